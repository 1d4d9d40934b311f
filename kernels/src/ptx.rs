//! The checked-in PTX and the record of what it was built from.
//!
//! `kernels/ptx/manifest.json` names for every module the digests of its source (with everything it includes) and of
//! its PTX, and the compiler and flags. A test holds it against the tree, so that a change of a kernel without a rebuild
//! is seen without a compiler; `scripts/build-ptx --check` compiles again and compares byte for byte.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

/// The compiler's version as its output names it. It writes PTX ISA 8.4, which drivers from 550 on load.
pub const COMPILER: &str = "V12.4.127";

/// Flags of every compilation, but for the architecture and the include paths.
pub const FLAGS: &[&str] = &["--std=c++17", "-default-device", "--extra-device-vectorization"];

/// The architecture that a module is compiled for: of Ampere, `80`, which all later GPUs run too, or for names that end
/// in `_sm90a` of Hopper alone. NVRTC knows it as `compute_80`, PTX as `.target sm_80`.
pub fn architecture(name: &str) -> &'static str {
    if name.ends_with("_sm90a") { "90a" } else { "80" }
}

/// What one PTX file was built from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The `.cu` file, from the crate's `src`.
    pub source: PathBuf,
    /// SHA-256 of the source and of all that it includes.
    pub source_sha256: String,
    /// SHA-256 of the PTX.
    pub ptx_sha256: String,
}

/// `manifest.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`COMPILER`].
    pub compiler: String,
    /// [`FLAGS`].
    pub flags: Vec<String>,
    /// By module name.
    pub modules: BTreeMap<String, Record>,
}

/// The folder of this crate.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// SHA-256 in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every `.cu` file under `src`, by the name of its module.
///
/// # Errors
/// A folder cannot be read, or two files have one name.
pub fn sources() -> io::Result<BTreeMap<String, PathBuf>> {
    let src = root().join("src");
    let (mut found, mut folders) = (BTreeMap::new(), vec![src.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "cu") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let inside = path.strip_prefix(&src).map_err(io::Error::other)?.to_path_buf();
                if let Some(other) = found.insert(name.clone(), inside) {
                    return Err(io::Error::other(format!("two files are named {name}.cu: {}", other.display())));
                }
            }
        }
    }
    Ok(found)
}

/// Digest of a source under `src` and of everything that it includes in quotes, whatever the line endings.
///
/// # Errors
/// A file cannot be read.
pub fn source_digest(source: &Path) -> io::Result<String> {
    let src = root().join("src");
    let (mut hash, mut seen, mut open) = (Sha256::new(), BTreeSet::new(), vec![source.to_path_buf()]);
    while let Some(path) = open.pop() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let text = std::fs::read_to_string(src.join(&path))?.replace("\r\n", "\n");
        hash.update(format!("{}\n{}\n", path.display(), text.len()));
        hash.update(&text);
        let included = text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
        open.extend(included.map(PathBuf::from));
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A kernel as PTX declares it.
#[derive(Debug, PartialEq, Eq)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// Bytes of each parameter.
    pub params: Vec<usize>,
}

/// The kernels that a PTX text declares.
pub fn declared(ptx: &str) -> Vec<Declared> {
    // `u64 name`, or `align 64 .b8 name[128]` of a structure.
    let size = |param: &str| match param.trim_end_matches(',').strip_suffix(']').and_then(|text| text.rsplit_once('['))
    {
        Some((_, bytes)) => bytes.parse::<usize>(),
        None => {
            let kind = param.split_whitespace().next().unwrap_or_default();
            kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().map(|bits| bits / 8)
        }
    };
    let entry = |text: &str| {
        let (name, rest) = text.split_once('(')?;
        let params = rest.split_once(')')?.0;
        let params = params.lines().filter_map(|line| line.trim().strip_prefix(".param ."));
        Some(Declared { name: name.trim().to_string(), params: params.map(size).collect::<Result<_, _>>().ok()? })
    };
    ptx.split(".visible .entry").skip(1).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::MODULES;

    fn manifest() -> Manifest {
        serde_json::from_slice(&std::fs::read(root().join("ptx/manifest.json")).unwrap()).unwrap()
    }

    #[test]
    fn the_ptx_was_built_from_these_sources() {
        let manifest = manifest();
        assert_eq!(
            (manifest.compiler.as_str(), manifest.flags.as_slice()),
            (COMPILER, &FLAGS.iter().map(|flag| flag.to_string()).collect::<Vec<_>>()[..])
        );
        let sources = sources().unwrap();
        assert!(manifest.modules.keys().eq(sources.keys()), "run scripts/build-ptx");
        for (name, record) in &manifest.modules {
            assert_eq!(record.source, sources[name]);
            let rebuild = format!("{name}.cu changed: run scripts/build-ptx");
            assert_eq!(record.source_sha256, source_digest(&record.source).unwrap(), "{rebuild}");
            let ptx = std::fs::read(root().join("ptx").join(name).with_extension("ptx")).unwrap();
            assert_eq!(record.ptx_sha256, digest(&ptx), "{name}.ptx is not what scripts/build-ptx wrote");
        }
    }

    #[test]
    fn the_launch_table_is_that_of_the_ptx() {
        let names: Vec<&str> = MODULES.iter().map(|module| module.name).collect();
        assert!(names.iter().copied().eq(manifest().modules.keys()), "cuda::MODULES: {names:?}");
        for module in MODULES {
            let target = module.ptx.lines().find_map(|line| line.strip_prefix(".target "));
            let expected = format!("sm_{}", architecture(module.name));
            assert_eq!(target.map(str::trim), Some(expected.as_str()), "{}", module.name);
            assert!(module.ptx.contains(COMPILER) && module.ptx.contains(".version 8.4"), "{}", module.name);
            let declared = declared(module.ptx);
            for Declared { name, params } in &declared {
                assert_eq!(module.params(name), Some(&params[..]), "{name} of {}", module.name);
            }
            let listed: usize = module.entries.iter().map(|entry| entry.names().len()).sum();
            assert_eq!(listed, declared.len(), "{} lists kernels that its PTX lacks", module.name);
        }
    }

    #[test]
    fn declarations_are_read() {
        let ptx = ".version 8.4\n.target sm_80\n.visible .entry f_bf16(\n\t.param .u64 f_0,\n\t.param .f32 f_1\n)\n\
                   .maxntid 256, 1, 1\n{ }\n.visible .entry g(\n\n)\n{ }\n\
                   .visible .entry h(\n\t.param .align 64 .b8 h_0[128],\n\t.param .align 8 .b8 h_1[16]\n)\n{ }";
        let expected = [("f_bf16", vec![8, 4]), ("g", vec![]), ("h", vec![128, 16])];
        let expected = expected.map(|(name, params)| Declared { name: name.into(), params });
        assert_eq!(declared(ptx), expected);
    }
}
