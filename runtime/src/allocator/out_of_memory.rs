//! The answer to a request that cannot be met: who holds what, and what to change.

use crate::{
    Device, Tag,
    memory::{Usage, readable},
};
use std::fmt;

/// A device has no memory for a request, and the state in which it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Whose memory.
    pub device: Device,
    /// Bytes asked for.
    pub requested: usize,
    /// What for.
    pub tag: Tag,
    /// What was held.
    pub usage: Usage,
    /// Bytes of the largest block that was kept free.
    pub largest_free: usize,
    /// Bytes of the device that nobody used, in this program or others.
    pub available: usize,
    /// The most that this program may use, where that is bounded.
    pub limit: Option<usize>,
    /// Whether the failure was asked for, by [`fail_at`](super::Allocator::fail_at).
    pub injected: bool,
}

impl std::error::Error for OutOfMemory {}

impl OutOfMemory {
    /// What the user can do, what helps most first.
    pub fn advice(&self) -> Vec<String> {
        let held = |tag: Tag| self.usage.current[tag as usize] + if tag == self.tag { self.requested } else { 0 };
        let mut causes: Vec<(usize, &[&str])> = vec![
            (
                held(Tag::Activations) + held(Tag::Workspace),
                &[
                    "a smaller --batch-size with a larger --grad-accum (the same step), or a smaller --seq-len",
                    "--recompute, which keeps one activation a layer, or --activations inputs@host, which keeps none on the GPU",
                ],
            ),
            (
                held(Tag::Weights),
                &["--quant nf4 where the base is not quantized, or a smaller model", "--embedding-bits 8"],
            ),
            (
                held(Tag::Optimizer) + held(Tag::Adapters) + held(Tag::Gradients),
                &["--optimizer-bits 8", "a smaller --rank or fewer --targets"],
            ),
        ];
        causes.sort_by_key(|&(bytes, _)| std::cmp::Reverse(bytes));
        let causes = causes.into_iter().filter(|&(bytes, _)| bytes > 0);
        let mut advice: Vec<String> = causes.flat_map(|(_, lines)| lines).map(|line| line.to_string()).collect();
        match self.limit {
            Some(limit) if self.available >= self.requested => {
                advice.insert(0, format!("a memory limit above the present {}", readable(limit)));
            }
            _ => advice.push("close other programs that use the GPU, if there are any".into()),
        }
        advice
    }
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (usage, requested) = (&self.usage, readable(self.requested));
        writeln!(f, "{} is out of memory: {requested} for {} cannot be had", self.device, self.tag)?;
        if self.injected {
            writeln!(f, "  (this failure was asked for, to test what follows)")?;
        }
        let mut row = |what: &str, now: &str, peak: &str| {
            writeln!(f, "  {}", format!("{what:<12} {now:>11} {peak:>11}").trim_end())
        };
        row("", "now", "peak")?;
        for (tag, (&now, &peak)) in Tag::ALL.iter().zip(usage.current.iter().zip(&usage.peak)) {
            if peak > 0 {
                row(&tag.to_string(), &readable(now), &readable(peak))?;
            }
        }
        row("in use", &readable(usage.total), &readable(usage.total_peak))?;
        row("kept free", &readable(usage.cached), "")?;
        row("in one block", &readable(self.largest_free), "")?;
        row("nobody's", &readable(self.available), "")?;
        if let Some(limit) = self.limit {
            row("limit", &readable(limit), "")?;
        }
        write!(f, "What helps:")?;
        for line in self.advice() {
            write!(f, "\n  - {line}")?;
        }
        Ok(())
    }
}
