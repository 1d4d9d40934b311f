//! How fast the bus is: what benchmarks compare with.

use super::{DeviceBuffer, Event, Gpu, Stream, transfer::Transfers};
use crate::{Result, Tag};

/// Measurements, of which the median counts; one before them warms up.
const RUNS: usize = 7;

/// Bytes a second of copies between pinned host memory and the device.
#[derive(Clone, Copy, Debug)]
pub struct BusRates {
    /// Host to device, nothing else under way.
    pub inward: f64,
    /// Device to host, nothing else under way.
    pub outward: f64,
    /// Host to device while as much goes the other way on another stream.
    pub inward_of_both: f64,
    /// Device to host while as much goes the other way.
    pub outward_of_both: f64,
}

/// One direction: what is copied, and on which stream.
struct Way {
    stream: Stream,
    to: DeviceBuffer,
    from: DeviceBuffer,
}

impl Way {
    /// Queues a copy; the marks before and behind it.
    fn start(&self, transfers: &Transfers, bytes: usize) -> Result<[Event; 2]> {
        let [begun, done] = [Event::new(transfers.gpu, true)?, Event::new(transfers.gpu, true)?];
        transfers.behind_compute(self.stream)?;
        begun.record(self.stream)?;
        // SAFETY: both buffers have the bytes and live until everything has been waited for (`BusRates::measure`).
        unsafe { transfers.copy(self.stream, self.to.pointer(), self.from.pointer(), bytes)? };
        done.record(self.stream)?;
        Ok([begun, done])
    }
}

impl BusRates {
    /// Measures with copies of `bytes`, which should take some milliseconds. Each rate is that of its own copy, begin to
    /// end: where both directions are busy and one is done first, the rest of the other copy goes a little faster, so
    /// that the slower rate comes out at most too high.
    ///
    /// # Errors
    /// There is not enough memory on either side, or the driver refuses.
    pub fn measure(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        let transfers = Transfers::new(gpu);
        let on_host = || DeviceBuffer::in_host_memory(gpu, bytes);
        let on_device = || DeviceBuffer::new(gpu, bytes, Tag::Workspace);
        let inward = Way { stream: Stream::beside(gpu)?, to: on_device()?, from: on_host()? };
        let outward = Way { stream: Stream::beside(gpu)?, to: on_host()?, from: on_device()? };
        let measure = || {
            let rate = |ways: &[&Way]| rates(&transfers, ways, bytes);
            let both = rate(&[&inward, &outward])?;
            Ok(BusRates {
                inward: rate(&[&inward])?[0],
                outward: rate(&[&outward])?[0],
                inward_of_both: both[0],
                outward_of_both: both[1],
            })
        };
        let measured = measure();
        // Whatever has failed: the buffers must not go while a copy is under way.
        gpu.synchronize_all()?;
        [inward.stream, outward.stream].into_iter().for_each(|stream| stream.retire(gpu));
        measured
    }
}

/// The median rate of each of `ways`, all copying at once.
fn rates(transfers: &Transfers, ways: &[&Way], bytes: usize) -> Result<Vec<f64>> {
    let mut times = vec![Vec::new(); ways.len()];
    for run in 0..=RUNS {
        let marks = ways.iter().map(|way| way.start(transfers, bytes)).collect::<Result<Vec<_>>>()?;
        for (times, [begun, done]) in times.iter_mut().zip(marks) {
            done.wait()?;
            if run > 0 {
                times.push(done.milliseconds_since(&begun)?);
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[RUNS / 2]
    };
    Ok(times.into_iter().map(|times| bytes as f64 / (median(times) / 1e3)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::device_for_tests;

    #[test]
    fn gpu_bus_has_rates_in_both_directions() {
        let Some(device) = device_for_tests() else { return };
        let rates = BusRates::measure(Gpu::of(device).unwrap(), 16 << 20).unwrap();
        for rate in [rates.inward, rates.outward, rates.inward_of_both, rates.outward_of_both] {
            assert!((1e8..1e12).contains(&rate), "{rates:?}");
        }
    }
}
