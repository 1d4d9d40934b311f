//! Which tokens of a packed batch attend to which, and the same as work for a GPU.

use super::cuda::Tables;
use nibble_runtime::{Device, Error, Result};

/// One sequence of a packed batch. Its last query attends to all of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First query row.
    pub query: usize,
    /// Number of queries.
    pub queries: usize,
    /// First key (and value) row.
    pub key: usize,
    /// Number of keys, at least as many as queries.
    pub keys: usize,
}

impl Segment {
    /// Segments of whole sequences of these lengths, packed one after another.
    pub fn packed(lengths: &[usize]) -> Vec<Segment> {
        let mut start = 0;
        let segment = |&length: &usize| {
            let segment = Segment { query: start, queries: length, key: start, keys: length };
            start += length;
            segment
        };
        lengths.iter().map(segment).collect()
    }
}

/// The segments of a batch, made ready for a device: once for a pass, as every layer needs the same.
#[derive(Clone, Debug)]
pub struct Layout {
    segments: Vec<Segment>,
    device: Device,
    /// Query rows.
    queries: usize,
    /// Key rows that are reached.
    keys: usize,
    /// On a GPU, what its kernels read.
    tables: Option<Tables>,
}

impl Layout {
    /// Lays out segments for `device`.
    ///
    /// # Errors
    /// The segments do not follow one another in the queries, or one has fewer keys than queries.
    pub fn new(segments: Vec<Segment>, device: Device) -> Result<Self> {
        let (mut queries, mut keys) = (0, 0);
        for segment in &segments {
            let end = segment.key.checked_add(segment.keys).filter(|&end| i32::try_from(end).is_ok());
            let Some(end) = end.filter(|_| segment.query == queries && segment.keys >= segment.queries) else {
                let what = format!("{segment:?} does not continue at query {queries}, or has too few or many keys");
                return Err(Error::shape("attention layout", what));
            };
            queries += segment.queries;
            keys = keys.max(end);
        }
        if i32::try_from(queries).is_err() {
            return Err(Error::shape("attention layout", format!("{queries} queries are more than i32 counts")));
        }
        let tables = match device {
            Device::Cpu => None,
            Device::Cuda(_) => Some(Tables::new(&segments, device)?),
        };
        Ok(Layout { segments, device, queries, keys, tables })
    }

    /// Whole sequences of these lengths, packed one after another.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn packed(lengths: &[usize], device: Device) -> Result<Self> {
        Self::new(Segment::packed(lengths), device)
    }

    /// The same for `device`.
    ///
    /// # Errors
    /// The device cannot be used or is out of memory.
    pub fn into_device(self, device: Device) -> Result<Self> {
        if self.device == device { Ok(self) } else { Self::new(self.segments, device) }
    }

    /// The segments, in the order of their queries.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Query rows.
    pub(super) fn queries(&self) -> usize {
        self.queries
    }

    /// Key rows that are reached.
    pub(super) fn keys(&self) -> usize {
        self.keys
    }

    /// Whether every sequence attends to its own tokens alone, as in training.
    pub(super) fn is_whole(&self) -> bool {
        self.segments.iter().all(|s| s.keys == s.queries && s.key == s.query)
    }

    /// The device that this was made for.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// What the kernels of a GPU read.
    pub(super) fn tables(&self) -> Result<&Tables> {
        self.tables.as_ref().ok_or_else(|| Error::invalid("attention", "the layout was made for the CPU"))
    }
}
