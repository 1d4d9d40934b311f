//! Builds every kernel to PTX with NVRTC, or checks that what is checked in is what the compiler writes.
//!
//! Run it by `scripts/build-ptx [--check]`, which brings the compiler.

use cudarc::nvrtc::sys;
use nibble_kernels::ptx::{COMPILER, FLAGS, Manifest, Record, digest, root, source_digest, sources};
use std::{
    collections::BTreeMap,
    ffi::{CString, c_char},
    path::Path,
    process::ExitCode,
};

/// Compiles one source under `src`.
fn compile(source: &Path, flags: &[CString]) -> Result<String, String> {
    let text = std::fs::read(root().join("src").join(source)).map_err(|error| error.to_string())?;
    let text = CString::new(text).map_err(|error| error.to_string())?;
    let name = CString::new(source.to_string_lossy().as_bytes()).map_err(|error| error.to_string())?;
    let flags: Vec<*const c_char> = flags.iter().map(|flag| flag.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: all pointers are to C strings that outlive the program, the counts are theirs, buffers have the sizes that
    // NVRTC says they need, and the program is destroyed once.
    unsafe {
        let check = |what: &str, code: sys::nvrtcResult| match code {
            sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
            code => Err(format!("{what}: {code:?}")),
        };
        let none = std::ptr::null();
        check("create", sys::nvrtcCreateProgram(&mut program, text.as_ptr(), name.as_ptr(), 0, none, none))?;
        let compiled = check("compile", sys::nvrtcCompileProgram(program, flags.len() as i32, flags.as_ptr()));
        let mut size = 0;
        check("log size", sys::nvrtcGetProgramLogSize(program, &mut size))?;
        let mut log = vec![0u8; size];
        check("log", sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast()))?;
        let log = String::from_utf8_lossy(&log);
        let log = log.trim_end_matches('\0').trim();
        if !log.is_empty() {
            eprintln!("{log}");
        }
        compiled?;
        check("PTX size", sys::nvrtcGetPTXSize(program, &mut size))?;
        let mut ptx = vec![0u8; size];
        check("PTX", sys::nvrtcGetPTX(program, ptx.as_mut_ptr().cast()))?;
        check("destroy", sys::nvrtcDestroyProgram(&mut program))?;
        ptx.retain(|&byte| byte != 0);
        let ptx = String::from_utf8(ptx).map_err(|error| error.to_string())?;
        match ptx.contains(COMPILER) {
            true => Ok(ptx),
            false => Err(format!("this NVRTC is not {COMPILER}; use scripts/build-ptx")),
        }
    }
}

fn run() -> Result<bool, String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (check, includes) = match arguments.split_first() {
        Some((first, rest)) if first == "--check" => (true, rest),
        _ => (false, &arguments[..]),
    };
    let own = format!("-I{}", root().join("src").display());
    let includes = includes.iter().map(|folder| format!("-I{folder}"));
    let flags = FLAGS.iter().map(|flag| flag.to_string()).chain([own]).chain(includes);
    let flags: Vec<CString> = flags.map(CString::new).collect::<Result<_, _>>().map_err(|error| error.to_string())?;

    let folder = root().join("ptx");
    let mut modules = BTreeMap::new();
    let mut same = true;
    for (name, source) in sources().map_err(|error| error.to_string())? {
        let ptx = compile(&source, &flags).map_err(|error| format!("{}: {error}", source.display()))?;
        let path = folder.join(&name).with_extension("ptx");
        let before = std::fs::read_to_string(&path).ok();
        if before.as_deref() != Some(&ptx) {
            same = false;
            println!("{name}.ptx {}", if check { "is not what the compiler writes" } else { "written" });
            if !check {
                std::fs::write(&path, &ptx).map_err(|error| format!("{}: {error}", path.display()))?;
            }
        }
        let source_sha256 = source_digest(&source).map_err(|error| error.to_string())?;
        modules.insert(name, Record { source, source_sha256, ptx_sha256: digest(ptx.as_bytes()) });
    }
    let flags = FLAGS.iter().map(|flag| flag.to_string()).collect();
    let manifest = Manifest { compiler: COMPILER.into(), flags, modules };
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| error.to_string())? + "\n";
    let path = folder.join("manifest.json");
    if check {
        let found = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        return Ok(same && found == text);
    }
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(true)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("the checked-in PTX is not built from these sources: run scripts/build-ptx");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
