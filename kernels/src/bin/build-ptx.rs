//! Builds every kernel to PTX with NVRTC, or checks that what is checked in is what the compiler writes.
//!
//! Run it by `scripts/build-ptx [--check]`, which brings the compiler.

use cudarc::nvrtc::sys;
use nibble_kernels::ptx::{COMPILER, FLAGS, Manifest, Record, architecture, digest, root, source_digest, sources};
use rayon::prelude::*;
use std::{
    ffi::{CString, c_char},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
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

/// The flags for a source; `includes` are the folders of the toolkit's headers.
fn flags(source: &Path, includes: &[String]) -> Result<Vec<CString>, String> {
    let name = source.file_stem().unwrap_or_default().to_string_lossy();
    let target = format!("--gpu-architecture=compute_{}", architecture(&name));
    let own = root().join("src").display().to_string();
    let includes = [own].into_iter().chain(includes.iter().cloned()).map(|folder| format!("-I{folder}"));
    let flags = [target].into_iter().chain(FLAGS.iter().map(|flag| flag.to_string())).chain(includes).map(CString::new);
    flags.collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// Compiles one source in a process of its own: what the compiler did before shows in the numbers of its registers.
fn compile_alone(source: &Path, includes: &[String]) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new(program).arg("--one").arg(source).args(includes).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| error.to_string())?;
    match output.status.success() {
        true => String::from_utf8(output.stdout).map_err(|error| error.to_string()),
        false => Err("does not compile".into()),
    }
}

/// How often a source is compiled before its PTX counts as changed.
const TRIES: usize = 16;

/// The PTX of a source: the checked-in one if the compiler writes it. For some sources the compiler's choice of registers
/// depends on where the system happens to load it, so a difference is believed only after some tries.
fn rebuild(source: &Path, checked_in: Option<&str>, includes: &[String]) -> Result<String, String> {
    let mut ptx = String::new();
    for _ in 0..if checked_in.is_some() { TRIES } else { 1 } {
        ptx = compile_alone(source, includes).map_err(|error| format!("{}: {error}", source.display()))?;
        if checked_in == Some(&ptx) {
            break;
        }
    }
    Ok(ptx)
}

fn run() -> Result<bool, String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [one, source, includes @ ..] = &arguments[..]
        && one == "--one"
    {
        print!("{}", compile(Path::new(source), &flags(Path::new(source), includes)?)?);
        return Ok(true);
    }
    let (check, includes) = match arguments.split_first() {
        Some((first, rest)) if first == "--check" => (true, rest),
        _ => (false, &arguments[..]),
    };
    let folder = root().join("ptx");
    let manifest_path = folder.join("manifest.json");
    let before: Option<Manifest> =
        std::fs::read(&manifest_path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let built = |(name, source): (&String, &PathBuf)| -> Result<(String, bool, Record), String> {
        let source_sha256 = source_digest(source).map_err(|error| error.to_string())?;
        let path = folder.join(name).with_extension("ptx");
        let old = std::fs::read_to_string(&path).ok();
        let recorded = before.as_ref().and_then(|manifest| manifest.modules.get(name));
        let unchanged = recorded.is_some_and(|record| record.source_sha256 == source_sha256);
        let ptx = rebuild(source, old.as_deref().filter(|_| unchanged || check), includes)?;
        let same = old.as_deref() == Some(&ptx);
        if !same {
            println!("{name}.ptx {}", if check { "is not what the compiler writes" } else { "written" });
            if !check {
                std::fs::write(&path, &ptx).map_err(|error| format!("{}: {error}", path.display()))?;
            }
        }
        let record = Record { source: source.clone(), source_sha256, ptx_sha256: digest(ptx.as_bytes()) };
        Ok((name.clone(), same, record))
    };
    let sources = sources().map_err(|error| error.to_string())?;
    let built: Vec<_> = sources.par_iter().map(built).collect::<Result<_, _>>()?;
    let same = built.iter().all(|(_, same, _)| *same);
    let modules = built.into_iter().map(|(name, _, record)| (name, record)).collect();
    let flags = FLAGS.iter().map(|flag| flag.to_string()).collect();
    let manifest = Manifest { compiler: COMPILER.into(), flags, modules };
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| error.to_string())? + "\n";
    let path = manifest_path;
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
