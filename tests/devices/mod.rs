//! Tests that hold on every device.

/// Each check on the CPU, and on a GPU where there is one.
macro_rules! on_every_device {
    ($($check:ident),* $(,)?) => {
        mod cpu {
            $(#[test] fn $check() { super::$check(nibble_runtime::Device::Cpu); })*
        }
        mod gpu {
            $(#[test] fn $check() { nibble_runtime::cuda::device_for_tests().into_iter().for_each(super::$check); })*
        }
    };
}
