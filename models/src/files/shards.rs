//! The tensors of a folder: one `model.safetensors`, or several files listed in `model.safetensors.index.json`.

use super::{
    atomic::read_json_object,
    safetensors::{SafetensorsFile, TensorView},
};
use crate::{Error, Result};
use nibble_runtime::{Tag, Tensor};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// All tensors of a folder, wherever they lie.
#[derive(Debug)]
pub struct Shards {
    folder: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Which file holds each tensor.
    places: BTreeMap<String, usize>,
}

impl Shards {
    /// Opens every file of a folder.
    ///
    /// # Errors
    /// [`Error::File`]: the folder has neither a single file nor an index; the index is malformed, names a file outside
    /// of the folder, or a tensor that its file lacks. [`Error::Io`]: a file is missing.
    pub fn open(folder: &Path) -> Result<Shards> {
        if folder.join(SINGLE).is_file() {
            let file = SafetensorsFile::open(&folder.join(SINGLE))?;
            let places = file.names().into_iter().map(|name| (name, 0)).collect();
            return Ok(Shards { folder: folder.to_path_buf(), files: vec![file], places });
        }
        let index = folder.join(INDEX);
        if !index.is_file() {
            let hint = match folder.join("pytorch_model.bin").exists()
                || folder.join("pytorch_model.bin.index.json").exists()
            {
                true => "; it has PyTorch pickles, which nibble does not read: save it with safe_serialization=True",
                false => "",
            };
            return Err(Error::file(folder, format!("the folder has neither {SINGLE} nor {INDEX}{hint}")));
        }
        Self::open_index(folder, &index)
    }

    fn open_index(folder: &Path, index: &Path) -> Result<Shards> {
        let json = read_json_object(index)?;
        let Some(Value::Object(weight_map)) = json.get("weight_map") else {
            return Err(Error::file(index, "\"weight_map\" is missing or not an object"));
        };
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut files = Vec::new();
        let mut places = BTreeMap::new();
        for (tensor, shard) in weight_map {
            let shard = shard.as_str().filter(|name| is_plain_name(name)).ok_or_else(|| {
                Error::file(index, format!("tensor \"{tensor}\" is said to lie in {shard}; expected a plain file name"))
            })?;
            let number = match numbers.get(shard) {
                Some(&number) => number,
                None => {
                    let path = folder.join(shard);
                    if !path.is_file() {
                        let what = format!("the file is missing, and {INDEX} lists it; download it");
                        return Err(Error::file(&path, what));
                    }
                    files.push(SafetensorsFile::open(&path)?);
                    numbers.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[number].has(tensor) {
                return Err(Error::file(
                    files[number].path(),
                    format!("{INDEX} says that \"{tensor}\" is here; it is not"),
                ));
            }
            places.insert(tensor.clone(), number);
        }
        Ok(Shards { folder: folder.to_path_buf(), files, places })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: none does.
    pub fn file_of(&self, name: &str) -> Result<&SafetensorsFile> {
        let missing = || Error::mismatch(&self.folder, format!("the checkpoint has no tensor \"{name}\""));
        self.places.get(name).and_then(|&place| self.files.get(place)).ok_or_else(missing)
    }

    /// A tensor, in place; see [`SafetensorsFile::view`].
    pub fn view(&self, name: &str) -> Result<TensorView<'_>> {
        self.file_of(name)?.view(name)
    }

    /// A copy of a tensor; see [`SafetensorsFile::tensor`].
    pub fn tensor(&self, name: &str, tag: Tag) -> Result<Tensor> {
        self.file_of(name)?.tensor(name, tag)
    }

    /// Gives all pages of all files back to the system.
    pub fn release(&self) {
        self.files.iter().for_each(SafetensorsFile::release);
    }
}

/// Whether a name stays in its folder: one component, not `..`.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part.to_str() == Some(name))
        && !name.contains('\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_inside_the_folder_are_plain() {
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
        for name in ["", ".", "..", "../x", "/x", "a/b", "a/", "./a", "a\\b"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
