//! The cases: which precision, in which pages, under which policy and budget.

use nibble_optim::StateBits;
use nibble_runtime::pager::Policy;
use std::fmt;

/// The trainer's default.
pub const PAGE: usize = 3 << 20;
/// Sizes of pages to compare [`PAGE`] with.
const OTHER_PAGES: [usize; 3] = [1 << 20, 6 << 20, 16 << 20];

/// What pages are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Store {
    Pinned,
    Unified,
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Store::Pinned => "pinned",
            Store::Unified => "unified",
        })
    }
}

/// How the state is paged.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    pub store: Store,
    pub policy: Policy,
    /// Percent of the pages that may be in device memory.
    pub budget: usize,
    pub page_bytes: usize,
    /// Gradients are in the pages too.
    pub grads: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub bits: StateBits,
    /// Without, the state is a tensor or two for each parameter, as are gradients.
    pub paging: Option<Paging>,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Paging { store, policy, budget, page_bytes, grads }) = self.paging else {
            return write!(f, "unpaged/{}-bit", self.bits);
        };
        write!(f, "{store}/{policy}/{budget}%/{}-bit", self.bits)?;
        if page_bytes != PAGE {
            write!(f, "/{}MiB", page_bytes >> 20)?;
        }
        f.write_str(if grads { "/gradients" } else { "" })
    }
}

impl Case {
    /// Bytes an element of moments.
    fn moments(&self) -> f64 {
        match self.bits {
            StateBits::F32 => 8.0,
            // Codes, and a scale for every 256 of them.
            StateBits::Bits8 => 2.0 + 8.0 / 256.0,
        }
    }

    /// Bytes an element that an update reads of the pages, and that it writes there.
    pub fn page_traffic(&self) -> (f64, f64) {
        let grads = self.paging.is_some_and(|paging| paging.grads);
        (self.moments() + if grads { 4.0 } else { 0.0 }, self.moments())
    }

    /// Bytes an element that an update reads and writes in all, wherever they are: gradient, parameter, moments.
    pub fn traffic(&self) -> f64 {
        4.0 + 2.0 * (4.0 + self.moments())
    }
}

/// All cases, slow ones last.
pub fn all() -> Vec<Case> {
    let both = [StateBits::F32, StateBits::Bits8];
    let mut cases: Vec<Case> = both.map(|bits| Case { bits, paging: None }).into();
    let mut push = |bits, store, policy, budget, page_bytes, grads| {
        cases.push(Case { bits, paging: Some(Paging { store, policy, budget, page_bytes, grads }) });
    };
    for bits in both {
        for store in [Store::Pinned, Store::Unified] {
            for policy in [Policy::Stream, Policy::InPlace] {
                for budget in [100, 25, 0] {
                    push(bits, store, policy, budget, PAGE, false);
                }
            }
        }
        for page_bytes in OTHER_PAGES {
            push(bits, Store::Pinned, Policy::Stream, 25, page_bytes, false);
        }
        // In pinned memory alone: with 32-bit moments this would be more unified memory than is asked for here.
        push(bits, Store::Pinned, Policy::Stream, 25, PAGE, true);
    }
    for bits in both {
        // With no budget nothing can be brought: pages are used in place, as always by unified memory.
        for budget in [100, 25] {
            push(bits, Store::Pinned, Policy::Lru, budget, PAGE, false);
        }
    }
    cases
}
