//! The driver library: whether it is there and new enough, and its error codes.

use crate::{Error, Result};
use cudarc::driver::{result::DriverError, sys};
use std::sync::OnceLock;

/// The oldest driver interface that loads our PTX (ISA 8.4): CUDA 12.4, which drivers from 550 on have.
pub const DRIVER_NEEDED: (i32, i32) = (12, 4);

/// The oldest compute capability that our PTX runs on: Ampere.
pub const MIN_CAPABILITY: (u32, u32) = (8, 0);

/// An error of driver call `op`.
fn error(op: &'static str, error: DriverError) -> Error {
    let text = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    Error::Cuda { op, what: format!("{} ({})", text(error.error_string()), text(error.error_name())) }
}

/// Turns a status code of driver call `op` into a result.
pub(super) fn check(op: &'static str, status: sys::CUresult) -> Result<()> {
    status.result().map_err(|code| error(op, code))
}

/// Checks the version that `cuDriverGetVersion` gave: 1000 · major + 10 · minor of the newest CUDA that it supports.
fn driver_suffices(version: i32) -> std::result::Result<(), String> {
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if (major, minor) >= DRIVER_NEEDED {
        return Ok(());
    }
    let (needed, point) = DRIVER_NEEDED;
    Err(format!("the NVIDIA driver supports CUDA {major}.{minor}; nibble needs {needed}.{point} (driver 550 or newer)"))
}

/// Checks the compute capability of the GPU of this name.
pub(super) fn gpu_suffices(name: &str, (major, minor): (u32, u32)) -> std::result::Result<(), String> {
    if (major, minor) >= MIN_CAPABILITY {
        return Ok(());
    }
    let (needed, point) = MIN_CAPABILITY;
    Err(format!("the {name} has compute capability {major}.{minor}; nibble needs {needed}.{point} (Ampere) or newer"))
}

/// Number of GPUs; or why there is no usable driver. Looked up once.
pub(super) fn devices() -> std::result::Result<usize, String> {
    static DEVICES: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    DEVICES.get_or_init(look_up).clone()
}

fn look_up() -> std::result::Result<usize, String> {
    // SAFETY: loading the driver library runs its initializers, which NVIDIA's library allows in any process.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver was found (the library libcuda.so.1 or nvcuda.dll)".into());
    }
    let mut version = 0;
    // SAFETY: the library is there; both functions exist in every version of it and take what is passed here.
    let (init, asked) = unsafe { (sys::cuInit(0), sys::cuDriverGetVersion(&mut version)) };
    check("cuInit", init).map_err(|error| format!("the NVIDIA driver does not start: {error}"))?;
    check("cuDriverGetVersion", asked).map_err(|error| error.to_string())?;
    driver_suffices(version)?;
    let mut count = 0;
    // SAFETY: the driver is initialized and writes one int.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) }).map_err(|error| error.to_string())?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("the NVIDIA driver finds no GPU".into()),
    }
}

/// Number of GPUs that the driver shows.
///
/// # Errors
/// [`Error::Device`] with the reason: no driver, one that is too old or does not start, no GPU.
pub fn available() -> Result<usize> {
    devices().map_err(|reason| Error::Device { requested: "cuda".into(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_from_cuda_12_4_on_suffice() {
        for version in [12_040, 12_080, 13_000] {
            assert_eq!(driver_suffices(version), Ok(()), "{version}");
        }
        for (version, found) in [(12_030, "12.3"), (12_020, "12.2"), (11_080, "11.8"), (0, "0.0")] {
            let why = format!("the NVIDIA driver supports CUDA {found}; nibble needs 12.4 (driver 550 or newer)");
            assert_eq!(driver_suffices(version), Err(why));
        }
    }

    #[test]
    fn gpus_from_ampere_on_suffice() {
        for capability in [(8, 0), (8, 9), (9, 0), (12, 0)] {
            assert_eq!(gpu_suffices("GPU", capability), Ok(()), "{capability:?}");
        }
        let why = "the Tesla T4 has compute capability 7.5; nibble needs 8.0 (Ampere) or newer";
        assert_eq!(gpu_suffices("Tesla T4", (7, 5)), Err(why.to_string()));
    }
}
