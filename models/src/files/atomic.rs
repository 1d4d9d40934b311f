//! Writing files so that a reader sees the old contents or the new, never a part.

use crate::{Error, Result};
use serde::Serialize;
use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

/// Writes `path` through a temporary file beside it: `write` fills it, then it is synced and renamed over `path`.
/// If anything fails, `path` stays as it was and the temporary file is removed.
///
/// # Errors
/// [`Error::Io`] naming `path`: its folder is missing or cannot be written, the disk is full, or `write` failed.
pub fn atomic_write(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    write_and_rename(path, write).map_err(Error::io(path))
}

fn write_and_rename(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-");
    #[cfg(unix)]
    {
        // The permissions of any new file, rather than the owner-only ones of a temporary.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let temporary = builder.tempfile_in(folder)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, temporary.as_file());
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|error| error.error)?;
    // The rename itself is durable once the folder is synced. Not every system can; the file is whole either way.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Writes `value` as JSON, indented by two, with a newline at the end, as [`atomic_write`] does.
///
/// # Errors
/// As [`atomic_write`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    atomic_write(path, |file| {
        serde_json::to_writer_pretty(&mut *file, value)?;
        file.write_all(b"\n")
    })
}

/// The text of a file of at most 64 MiB, enough for any settings or index.
///
/// # Errors
/// [`Error::Io`]: missing or unreadable. [`Error::File`]: larger, or not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    const LIMIT: u64 = 64 << 20;
    let size = std::fs::metadata(path).map_err(Error::io(path))?.len();
    if size > LIMIT {
        return Err(Error::file(path, format!("{size} bytes; a settings file has at most {LIMIT}")));
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|e| Error::file(path, format!("not UTF-8: {e}")))
}

/// A JSON object from a file.
///
/// # Errors
/// As [`read_text`]; [`Error::File`] also if it is not a JSON object.
pub fn read_json_object(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>> {
    serde_json::from_str(&read_text(path)?).map_err(|e| Error::file(path, format!("not a JSON object: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        atomic_write(&path, |file| file.write_all(b"old")).unwrap();
        let error = atomic_write(&path, |file| {
            file.write_all(b"half of the new")?;
            Err(io::Error::other("no space"))
        });
        assert!(error.unwrap_err().to_string().contains("no space"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        atomic_write(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert!(atomic_write(&folder.path().join("missing/file"), |_| Ok(())).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn permissions_are_those_of_a_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        std::fs::write(folder.path().join("plain"), "").unwrap();
        atomic_write(&folder.path().join("atomic"), |_| Ok(())).unwrap();
        assert_eq!(mode("atomic"), mode("plain"));
    }
}
