//! What a user names as data: files, folders and data sets, with weights.

use super::error::{DataError, Result};
use super::records::Kind;
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// One or more places to take rows from: `a.jsonl`, or `a.jsonl:2,folder,c.csv:0.5`.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSpec(pub Vec<Place>);

/// A file or a folder.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub path: PathBuf,
    /// How many times an epoch has each of its rows; of a fraction, that share of the rows, chosen anew each epoch.
    pub weight: f64,
}

impl From<PathBuf> for DataSpec {
    fn from(path: PathBuf) -> Self {
        DataSpec(vec![Place { path, weight: 1.0 }])
    }
}

impl FromStr for DataSpec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        // What is there under just this name is meant, whatever signs the name holds.
        if Path::new(text).exists() {
            return Ok(PathBuf::from(text).into());
        }
        text.split(',').map(place).collect::<std::result::Result<_, _>>().map(DataSpec)
    }
}

fn place(text: &str) -> std::result::Result<Place, String> {
    let weighted = text.rsplit_once(':').and_then(|(path, weight)| Some((path, weight.parse::<f64>().ok()?)));
    let (path, weight) = weighted.filter(|_| !Path::new(text).exists()).unwrap_or((text, 1.0));
    if path.is_empty() {
        return Err("expected PATH, PATH:WEIGHT or several of them with commas between".to_owned());
    }
    // More repetitions than anyone trains for, which would only ask for memory.
    if !(weight > 0.0 && weight <= 1000.0) {
        return Err(format!("the weight of {path} is {weight}; expected above 0 and at most 1000"));
    }
    Ok(Place { path: path.into(), weight })
}

impl fmt::Display for DataSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Place { path, weight }) in self.0.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{}", path.display())?;
            if *weight != 1.0 {
                write!(f, ":{weight}")?;
            }
        }
        Ok(())
    }
}

impl Place {
    /// The files to read: the file itself, or all data files of the folder and of those in it, by name.
    ///
    /// # Errors
    /// The path cannot be read, or the folder holds no data file.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let metadata = std::fs::metadata(&self.path).map_err(DataError::io(&self.path))?;
        if !metadata.is_dir() {
            return Ok(vec![self.path.clone()]);
        }
        let mut files = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).map_err(DataError::io(&folder))? {
                let entry = entry.map_err(DataError::io(&folder))?;
                let path = entry.path();
                if entry.file_name().to_string_lossy().starts_with('.') {
                    continue;
                }
                // A link to a folder might lead back here.
                if entry.file_type().map_err(DataError::io(&path))?.is_dir() {
                    folders.push(path);
                } else if Kind::named(&path).is_some() && path.is_file() {
                    files.push(path);
                }
            }
        }
        if files.is_empty() {
            let what =
                "holds no data files; expected .jsonl, .json, .csv, .tsv, .txt (these also .gz or .zst) or .parquet";
            return Err(DataError::file(&self.path, what));
        }
        files.sort();
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_weights() {
        let spec: DataSpec = "a.jsonl:2,b/c,d.csv:0.5,C:\\e:x".parse().unwrap();
        let found: Vec<(&str, f64)> = spec.0.iter().map(|p| (p.path.to_str().unwrap(), p.weight)).collect();
        assert_eq!(found, [("a.jsonl", 2.0), ("b/c", 1.0), ("d.csv", 0.5), ("C:\\e:x", 1.0)]);
        assert_eq!(spec.to_string().parse::<DataSpec>().unwrap(), spec);
        for bad in ["", "a,", "a:0", "a:-1", "a:inf", "a:nan", "a:1001", ":2"] {
            assert!(bad.parse::<DataSpec>().is_err(), "{bad}");
        }
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a,b:2");
        std::fs::write(&odd, "").unwrap();
        let spec: DataSpec = odd.to_str().unwrap().parse().unwrap();
        assert_eq!(spec, odd.into());
    }

    #[test]
    fn folders_list_their_data_files() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place { path: dir.path().into(), weight: 1.0 };
        std::fs::create_dir(dir.path().join("inner")).unwrap();
        std::fs::write(dir.path().join("README.md"), "").unwrap();
        assert!(place.files().unwrap_err().to_string().contains("holds no data files"));
        for name in ["b.jsonl", "a.csv.gz", "inner/c.parquet", ".hidden.jsonl", "notes.pdf"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names: Vec<_> =
            place.files().unwrap().iter().map(|f| f.strip_prefix(dir.path()).unwrap().to_owned()).collect();
        assert_eq!(names, ["a.csv.gz", "b.jsonl", "inner/c.parquet"].map(PathBuf::from));
    }
}
