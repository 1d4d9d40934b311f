//! The optimizer's pages of a run: whether there are any, what they are made of, and what happens when memory is short.

use crate::{report::bytes, settings::Settings};
use anyhow::{Context, Result};
use nibble_models::Llama;
use nibble_optim::PagedState;
use nibble_runtime::{
    Device, ParamId,
    allocator::Reclaim,
    cuda::{Gpu, PinnedPages, UnifiedPages},
    pager::{HostPages, PageStore, Pager, Policy},
};
use serde::Serialize;
use std::{fmt, str::FromStr, sync::Arc};

/// Smaller states are not worth a table of pages: all of them would not make room for anything.
const WORTH_PAGING: usize = 256 << 20;

/// A number of bytes as people write it: 512MiB, 1.5GiB, 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub usize);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let unit = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit);
        let wrong = || format!("expected a size such as 512MiB, not {text:?}");
        let number: f64 = number.trim().parse().map_err(|_| wrong())?;
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            _ => return Err(format!("unknown unit {unit:?} in {text:?}; expected KiB, MiB or GiB")),
        };
        let bytes = number * f64::from(1u32 << shift);
        // 2^53: the last whole number that a double is sure of.
        match (0.0..9e15).contains(&bytes) {
            true => Ok(Bytes(bytes as usize)),
            false => Err(wrong()),
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 > 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        self.0.fmt(f)
    }
}

/// How much of the optimizer's pages may be in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagedBudget {
    /// There are no pages: states and gradients are in device memory.
    Off,
    /// As much as others can spare.
    Auto,
    Bytes(Bytes),
}

impl PagedBudget {
    /// That of a run which trains `numel` numbers: as it was asked for, or the usual one.
    pub fn of(settings: &Settings, numel: usize, on_cpu: bool) -> Self {
        // Gradient and two moments in f32, whatever their bits: what is worth paging is that large.
        let usual = if on_cpu || 12 * numel < WORTH_PAGING { PagedBudget::Off } else { PagedBudget::Auto };
        settings.paged_budget.unwrap_or(usual)
    }
}

impl FromStr for PagedBudget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "off" => Ok(PagedBudget::Off),
            "auto" => Ok(PagedBudget::Auto),
            _ => text
                .parse()
                .map(PagedBudget::Bytes)
                .map_err(|error| format!("--paged-budget: {error}; or auto, or off")),
        }
    }
}

impl fmt::Display for PagedBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PagedBudget::Off => f.write_str("off"),
            PagedBudget::Auto => f.write_str("auto"),
            PagedBudget::Bytes(bytes) => bytes.fmt(f),
        }
    }
}

/// What pages are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageMemory {
    /// What was measured to be best where it can be had.
    Auto,
    Pinned,
    Unified,
}

impl FromStr for PageMemory {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(PageMemory::Auto),
            "pinned" => Ok(PageMemory::Pinned),
            "unified" => Ok(PageMemory::Unified),
            _ => Err(format!("--page-memory {text}: expected pinned, unified or auto")),
        }
    }
}

impl fmt::Display for PageMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PageMemory::Auto => "auto",
            PageMemory::Pinned => "pinned",
            PageMemory::Unified => "unified",
        })
    }
}

type Store = Box<dyn PageStore>;

/// Pages in the memory that was asked for. Where unified memory cannot be had they are in pinned memory, which every
/// system has, and the reason comes with them.
fn store_in(
    memory: PageMemory,
    unified: impl FnOnce() -> nibble_runtime::Result<Store>,
    pinned: impl FnOnce() -> nibble_runtime::Result<Store>,
) -> nibble_runtime::Result<(Store, Option<String>)> {
    match memory {
        PageMemory::Auto | PageMemory::Pinned => Ok((pinned()?, None)),
        PageMemory::Unified => match unified() {
            Ok(store) => Ok((store, None)),
            Err(reason) => Ok((pinned()?, Some(reason.to_string()))),
        },
    }
}

/// The pages of a run. As long as this lives, memory that is short elsewhere on the GPU is taken from them.
pub struct Paging {
    pub state: Arc<PagedState>,
    device: Device,
    /// Gives memory of the pages back to others, on a GPU.
    reclaim: Option<Reclaim>,
}

impl Paging {
    /// The pages for the trainable parameters of `llama`, said on standard error; `None` where there are to be none.
    ///
    /// # Errors
    /// Pages were asked for and cannot be had.
    pub fn new(llama: &Llama, settings: &Settings) -> Result<Option<Self>> {
        let device = llama.device();
        let parameters = llama.parameters();
        let numel: usize = parameters.iter().map(|(_, _, value)| value.numel()).sum();
        let budget = match PagedBudget::of(settings, numel, device == Device::Cpu) {
            PagedBudget::Off => return Ok(None),
            PagedBudget::Auto => usize::MAX,
            PagedBudget::Bytes(Bytes(bytes)) => bytes,
        };
        let page_bytes = settings.page_size.0;
        let shapes: Vec<(ParamId, Vec<usize>)> =
            parameters.iter().map(|(id, _, value)| (*id, value.shape().to_vec())).collect();
        let params = shapes.iter().map(|(id, shape)| (*id, &shape[..]));
        let mut fallen_back = None;
        let state = PagedState::new(params, settings.optimizer_bits, true, page_bytes, |pages| {
            let store = match device {
                Device::Cpu => Box::new(HostPages::new(pages, page_bytes)?),
                Device::Cuda(_) => {
                    let gpu = Gpu::of(device)?;
                    let (store, reason) = store_in(
                        settings.page_memory,
                        || Ok(Box::new(UnifiedPages::new(gpu, pages, page_bytes)?)),
                        || Ok(Box::new(PinnedPages::new(gpu, pages, page_bytes)?)),
                    )?;
                    fallen_back = reason;
                    store
                }
            };
            let usual = if store.lanes() == 0 { Policy::InPlace } else { Policy::Stream };
            Pager::new(store, budget.min(pages * page_bytes), settings.page_policy.unwrap_or(usual))
        });
        let state = state.context("making the optimizer's pages (--paged-budget off does without)")?;
        let pager = state.pager();
        if let Some(reason) = fallen_back {
            crate::note!("pages    not in unified memory but in pinned: {reason}");
        }
        crate::note!(
            "pages    {} of {} in {}, {} on the device at most; the others: {}",
            pager.pages(),
            bytes(page_bytes),
            pager.store_name(),
            if budget == usize::MAX { "as many as others can spare".into() } else { bytes(budget) },
            pager.policy()
        );
        if let Some(asked) = settings.page_policy.filter(|&asked| asked != pager.policy()) {
            let why = "the device memory of pages that have left is not free at once there";
            crate::note!("pages    {} instead of {asked}: {why}; --page-memory pinned has it", pager.policy());
        }
        let mut reclaim = None;
        if let Device::Cuda(_) = device {
            let shared = pager.clone();
            let hook: Reclaim = Arc::new(move |bytes| shared.give_back(bytes));
            Gpu::of(device)?.memory()?.set_reclaim(Arc::clone(&hook));
            reclaim = Some(hook);
        }
        // In place before the first backward pass stores into them.
        pager.settle()?;
        Ok(Some(Paging { state: Arc::new(state), device, reclaim }))
    }

    /// What happened to the pages so far.
    pub fn figures(&self) -> PageFigures {
        let (pager, counters) = (self.state.pager(), self.state.pager().counters());
        PageFigures {
            bytes: pager.pages() * pager.page_bytes(),
            resident: pager.resident_bytes(),
            resident_peak: counters.resident_peak as usize * pager.page_bytes(),
            on_device: counters.hits,
            in_place: counters.in_place,
            streamed: counters.streamed,
            brought: counters.brought,
            evicted: counters.evicted,
            given_back: counters.given_back,
        }
    }
}

/// What happened to the pages of a run; as text, one line.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PageFigures {
    /// Bytes of all pages.
    pub bytes: usize,
    /// Of those on the device now,
    pub resident: usize,
    /// and of the most at once.
    pub resident_peak: usize,
    /// Uses of pages on the device,
    pub on_device: u64,
    /// across the bus,
    pub in_place: u64,
    /// and through a lane.
    pub streamed: u64,
    /// Pages brought to the device.
    pub brought: u64,
    /// Pages evicted,
    pub evicted: u64,
    /// and those of them that were because memory was short.
    pub given_back: u64,
}

impl fmt::Display for PageFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "pages    {} resident ({} at most) of {}; used {} times on the device, {} in place, {} streamed; {} brought, {} \
             evicted ({} because memory was short)",
            bytes(self.resident),
            bytes(self.resident_peak),
            bytes(self.bytes),
            self.on_device,
            self.in_place,
            self.streamed,
            self.brought,
            self.evicted,
            self.given_back
        )
    }
}

impl Drop for Paging {
    fn drop(&mut self) {
        if let (Some(hook), Ok(memory)) = (&self.reclaim, Gpu::of(self.device).and_then(Gpu::memory)) {
            memory.unset_reclaim(hook);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_unified_memory_pages_are_pinned_and_the_reason_is_kept() {
        let made = |pages| Ok(Box::new(HostPages::new(pages, 64)?) as Store);
        let refused = || Err(nibble_runtime::Error::Cuda { op: "test", what: "refused".into() });
        for (memory, pages) in [(PageMemory::Auto, 1), (PageMemory::Pinned, 1), (PageMemory::Unified, 2)] {
            let (store, reason) = store_in(memory, || made(2), || made(1)).unwrap();
            assert_eq!((store.pages(), reason), (pages, None), "{memory}");
        }
        let (store, reason) = store_in(PageMemory::Unified, refused, || made(1)).unwrap();
        assert!(store.pages() == 1 && reason.unwrap().contains("refused"));
        // Nothing is left to fall back to.
        assert!(store_in(PageMemory::Pinned, || made(2), refused).is_err());
        assert!(store_in(PageMemory::Unified, refused, refused).is_err());
    }

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("6MiB", 6 << 20), ("1.5GiB", 3 << 29), ("512m", 512 << 20)] {
            let size: Bytes = text.parse().unwrap();
            assert_eq!(size, Bytes(bytes));
            assert_eq!(size.to_string().parse::<Bytes>().unwrap(), size);
        }
        for text in ["", "MiB", "-1", "1TiB", "1e30", "x"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        for text in ["off", "auto", "1GiB", "0"] {
            assert_eq!(text.parse::<PagedBudget>().unwrap().to_string(), text);
        }
    }
}
