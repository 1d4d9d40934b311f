//! Writing files so that a reader sees the old contents or the new, never a part.

use crate::{Error, Result};
use serde::Serialize;
use std::{
    fs::{self, File},
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
    builder.prefix(UNFINISHED[0]);
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
    // The rename itself is durable once the folder is synced.
    sync_folder(folder);
    Ok(())
}

/// How the names of folders that are being written, and of those that are being removed, begin.
const UNFINISHED: [&str; 2] = [".writing-", ".removed-"];

/// Makes the folder `path` through a temporary one beside it: `write` fills that with synced files, then it is renamed. What
/// was at `path` is removed; between the two there is nothing there. The folder above is made where it is missing. If anything
/// fails before that, `path` stays as it was and the temporary folder is removed.
///
/// # Errors
/// `write` failed, or [`Error::Io`] naming `path`.
pub fn atomic_folder<E: From<Error>>(
    path: &Path,
    write: impl FnOnce(&Path) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let io = |error| Error::io(path)(error);
    let above = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(above).map_err(io)?;
    let folder = |prefix| {
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o777));
        }
        builder.tempdir_in(above).map_err(io)
    };
    let temporary = folder(UNFINISHED[0])?;
    write(temporary.path())?;
    sync_folder(temporary.path());
    let old = match path.exists() {
        true => {
            let old = folder(UNFINISHED[1])?;
            fs::rename(path, old.path().join("old")).map_err(io)?;
            Some(old)
        }
        false => None,
    };
    fs::rename(temporary.path(), path).map_err(io)?;
    // It is not there any more under its temporary name.
    let _ = temporary.keep();
    sync_folder(above);
    drop(old);
    Ok(())
}

/// Removes what writers that were killed have left in `folder`. None may be at work there.
///
/// # Errors
/// [`Error::Io`]: it cannot be read or removed.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    let remove = |path: &Path| if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        if UNFINISHED.iter().any(|prefix| entry.file_name().to_string_lossy().starts_with(prefix)) {
            remove(&entry.path()).map_err(Error::io(&entry.path()))?;
        }
    }
    Ok(())
}

/// Makes what a folder lists durable. Not every system can; what it lists is whole either way.
fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
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

    #[test]
    fn a_folder_appears_whole_and_takes_the_place_of_another() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("new/folder");
        let write =
            |text: &'static str| move |folder: &Path| fs::write(folder.join(text), text).map_err(Error::io(folder));
        atomic_folder(&path, write("a")).unwrap();
        let fails = |folder: &Path| write("b")(folder).and(Err(Error::Invalid("half way".into())));
        assert!(atomic_folder(&path, fails).unwrap_err().to_string().contains("half way"));
        let names =
            |folder: &Path| -> Vec<_> { fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect() };
        assert_eq!((names(&path), names(path.parent().unwrap())), (vec!["a".into()], vec!["folder".into()]));
        atomic_folder(&path, write("b")).unwrap();
        fs::create_dir_all(above.path().join("new/.removed-x/y")).unwrap();
        fs::write(above.path().join("new/.writing-x"), "").unwrap();
        remove_unfinished(path.parent().unwrap()).unwrap();
        assert_eq!((names(&path), names(path.parent().unwrap())), (vec!["b".into()], vec!["folder".into()]));
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
