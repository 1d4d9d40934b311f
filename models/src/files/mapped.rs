//! Read-only memory-mapped files.

use crate::{Error, Result};
use memmap2::{Mmap, UncheckedAdvice};
use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

/// A file's bytes, mapped into memory and read from disk as they are touched.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    path: PathBuf,
}

impl MappedFile {
    /// Maps the whole of `path`.
    ///
    /// # Errors
    /// The path is missing, cannot be read, or is not a regular file with something in it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if !metadata.is_file() {
            return Err(Error::file(path, "not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(Error::file(path, "the file is empty; download or write it again"));
        }
        // SAFETY: the mapping is private and read-only, and its bytes are only ever read as `&[u8]`, of which every
        // pattern is valid. Another process that shortens the file while it is open would end this one with SIGBUS;
        // files that nibble writes are replaced by renaming, which leaves existing mappings alone.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(MappedFile { map, path: path.to_path_buf() })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's contents.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Gives the pages of `range` back to the system; they are read from the file again if they are touched again.
    /// Out-of-range parts are ignored, and so is a refusal: this only lowers resident memory.
    pub fn release(&self, range: Range<usize>) {
        let (start, end) = (range.start.min(self.map.len()), range.end.min(self.map.len()));
        if start < end {
            // SAFETY: MADV_DONTNEED on a private read-only file mapping only drops pages; the same bytes come back from
            // the file, so what a `&[u8]` sees does not change.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}
