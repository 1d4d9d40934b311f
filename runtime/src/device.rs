//! Where tensors live and operations run.

use crate::{Error, Result, cuda::Gpu};
use std::{fmt, str::FromStr};

/// A place that holds tensors and runs operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The host's processor and memory.
    Cpu,
    /// The NVIDIA GPU with this ordinal.
    Cuda(usize),
}

impl Device {
    /// Waits until the device has done everything it was given.
    ///
    /// # Errors
    /// Something that it was given has failed.
    pub fn synchronize(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => Gpu::of(self)?.synchronize(),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

/// What a user asked for; [`DeviceRequest::resolve`] turns it into a [`Device`] that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRequest {
    /// The best device there is.
    Auto,
    /// Exactly this one.
    Exactly(Device),
}

impl FromStr for DeviceRequest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::Device {
            requested: text.to_string(),
            reason: "expected auto, cpu, cuda or cuda:N (N is the GPU's number, from 0)".into(),
        };
        Ok(match text {
            "auto" => DeviceRequest::Auto,
            "cpu" => DeviceRequest::Exactly(Device::Cpu),
            "cuda" => DeviceRequest::Exactly(Device::Cuda(0)),
            _ => {
                let ordinal = text.strip_prefix("cuda:").ok_or_else(bad)?;
                DeviceRequest::Exactly(Device::Cuda(ordinal.parse().map_err(|_| bad())?))
            }
        })
    }
}

impl fmt::Display for DeviceRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceRequest::Auto => f.write_str("auto"),
            DeviceRequest::Exactly(device) => device.fmt(f),
        }
    }
}

impl DeviceRequest {
    /// The device to use, and for [`DeviceRequest::Auto`] why it is not a GPU where it is not.
    ///
    /// # Errors
    /// A GPU was asked for by name and cannot be used: nothing falls back to the CPU in silence.
    pub fn resolve(self) -> Result<(Device, Option<String>)> {
        match self {
            DeviceRequest::Exactly(Device::Cpu) => Ok((Device::Cpu, None)),
            DeviceRequest::Exactly(device) => match Gpu::of(device) {
                Ok(gpu) => Ok((gpu.device(), None)),
                Err(Error::Device { requested, reason }) => {
                    Err(Error::Device { requested, reason: format!("{reason}; --device cpu does without a GPU") })
                }
                Err(error) => Err(error),
            },
            DeviceRequest::Auto => Ok(match Gpu::of(Device::Cuda(0)) {
                Ok(gpu) => (gpu.device(), None),
                Err(Error::Device { reason, .. }) => (Device::Cpu, Some(reason)),
                Err(error) => (Device::Cpu, Some(error.to_string())),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints_every_spelling() {
        for text in ["auto", "cpu", "cuda:3"] {
            assert_eq!(text.parse::<DeviceRequest>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceRequest>().unwrap(), DeviceRequest::Exactly(Device::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(text.parse::<DeviceRequest>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_gpu_asked_for_by_name_is_never_replaced_by_the_cpu() {
        let (auto, reason) = DeviceRequest::Auto.resolve().unwrap();
        assert_eq!(auto == Device::Cpu, reason.is_some());
        match DeviceRequest::Exactly(Device::Cuda(0)).resolve() {
            Ok((device, reason)) => assert_eq!((device, auto, reason), (Device::Cuda(0), Device::Cuda(0), None)),
            Err(error) => assert!(matches!(error, Error::Device { .. }), "{error}"),
        }
        assert!(DeviceRequest::Exactly(Device::Cuda(9999)).resolve().is_err());
    }
}
