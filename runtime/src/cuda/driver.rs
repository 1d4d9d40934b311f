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
    let found = (version / 1000, version % 1000 / 10);
    if found < DRIVER_NEEDED {
        let ((major, minor), (needed, point)) = (found, DRIVER_NEEDED);
        return Err(format!(
            "the NVIDIA driver supports CUDA {major}.{minor}; nibble needs {needed}.{point} (driver 550 or newer)"
        ));
    }
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
