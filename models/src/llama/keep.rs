//! What layers keep between forward and backward, and where.

use nibble_runtime::{Result, Stash, Stashed, Tensor};
use std::{fmt, str::FromStr};

/// How much of its forward pass a layer keeps; the backward pass runs the rest again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// Its input, and the adapters' `x·Aᵀ`, which are narrow.
    Inputs,
    /// Also all that attention and the products around it made: the feed-forward block runs again, down to its last product.
    Attention,
    /// Also `gate` and `up`: norms and SwiGLU alone are made again.
    #[default]
    All,
}

/// What a layer keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keeping {
    /// How much.
    pub extent: Extent,
    /// Whether in host memory, from which it comes back before the backward pass reaches the layer.
    pub on_host: bool,
}

/// What each layer keeps: runs of layers from the first on, then everything on the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activations(Vec<(Keeping, usize)>);

impl Activations {
    /// The first `layers` layers keep `first`, all others `rest`.
    pub fn new(first: Keeping, layers: usize, rest: Keeping) -> Self {
        let mut runs = vec![(first, layers), (rest, usize::MAX)];
        runs.retain(|&(_, layers)| layers > 0);
        if first == rest || layers == usize::MAX {
            runs = vec![(runs[0].0, usize::MAX)];
        }
        if runs.last() == Some(&(Keeping::default(), usize::MAX)) {
            runs.pop();
        }
        Activations(runs)
    }

    /// What a layer keeps.
    pub fn of(&self, layer: usize) -> Keeping {
        let mut left = layer;
        for &(keeping, layers) in &self.0 {
            match left.checked_sub(layers) {
                None => return keeping,
                Some(rest) => left = rest,
            }
        }
        Keeping::default()
    }
}

impl FromStr for Keeping {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (extent, place) = text.split_once('@').unwrap_or((text, "device"));
        let extent = match extent {
            "inputs" => Extent::Inputs,
            "attention" => Extent::Attention,
            "all" => Extent::All,
            _ => return Err(format!("expected inputs, attention or all, not {extent}")),
        };
        match place {
            "device" => Ok(Keeping { extent, on_host: false }),
            "host" => Ok(Keeping { extent, on_host: true }),
            _ => Err(format!("expected @device or @host, not @{place}")),
        }
    }
}

impl fmt::Display for Keeping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.extent {
            Extent::Inputs => "inputs",
            Extent::Attention => "attention",
            Extent::All => "all",
        })?;
        f.write_str(if self.on_host { "@host" } else { "" })
    }
}

impl FromStr for Activations {
    type Err = String;

    /// `WHAT[@host][:LAYERS],…`; that without a number takes all layers that are left.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut runs = Vec::new();
        for part in text.split(',') {
            if runs.last().is_some_and(|&(_, layers)| layers == usize::MAX) {
                return Err(format!(
                    "no layers are left for {part}: give those before it a number, as in inputs:8,{part}"
                ));
            }
            let (keeping, layers) = match part.split_once(':') {
                None => (part, usize::MAX),
                Some((keeping, layers)) => {
                    (keeping, layers.parse().map_err(|_| format!("expected a number of layers, not {layers}"))?)
                }
            };
            runs.push((keeping.parse()?, layers));
        }
        runs.retain(|&(_, layers)| layers > 0);
        if runs.last() == Some(&(Keeping::default(), usize::MAX)) {
            runs.pop();
        }
        Ok(Activations(runs))
    }
}

impl fmt::Display for Activations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = true;
        for &(keeping, layers) in &self.0 {
            left = layers < usize::MAX;
            if left { write!(f, "{keeping}:{layers},")? } else { keeping.fmt(f)? }
        }
        f.write_str(if left { "all" } else { "" })
    }
}

/// What a layer has kept. `T` tokens, `H` and `G` heads for queries and for keys, `d` elements a head.
pub(crate) struct Kept<T = Tensor> {
    /// The layer's input, `[T, D]`.
    pub x: T,
    /// `t` `[T, r]` of q, k, v, o, gate, up, down.
    pub t: [Option<T>; 7],
    pub attended: Option<Attended<T>>,
    pub gated: Option<Gated<T>>,
}

/// Of the first half of a layer.
pub(crate) struct Attended<T = Tensor> {
    pub rstd: T, // [T] f32
    pub q: T,    // [T, H·d], after rotary
    pub k: T,    // [T, G·d], after rotary
    pub v: T,    // [T, G·d]
    pub o: T,    // [T, H·d]
    pub lse: T,  // [H, T] f32
    pub h: T,    // [T, D]
}

/// Of the second half.
pub(crate) struct Gated<T = Tensor> {
    pub rstd: T, // [T] f32
    pub gate: T, // [T, F]
    pub up: T,   // [T, F]
}

impl<T> Kept<T> {
    /// The same of other things, each made in its turn.
    fn map<U>(self, mut f: impl FnMut(T) -> U) -> Kept<U> {
        Kept {
            x: f(self.x),
            t: self.t.map(|t| t.map(&mut f)),
            attended: self.attended.map(|Attended { rstd, q, k, v, o, lse, h }| Attended {
                rstd: f(rstd),
                q: f(q),
                k: f(k),
                v: f(v),
                o: f(o),
                lse: f(lse),
                h: f(h),
            }),
            gated: self.gated.map(|Gated { rstd, gate, up }| Gated { rstd: f(rstd), gate: f(gate), up: f(up) }),
        }
    }
}

/// What a layer's node saves.
#[expect(clippy::large_enum_variant, reason = "there is one a layer")]
pub(crate) enum Saved {
    Here(Kept),
    /// In host memory: which tensors, by their place among them.
    Away(Kept<usize>, Stashed),
}

impl Keeping {
    /// Keeps this much of what a layer made, in host memory through `stash`.
    pub(crate) fn keep(self, mut made: Kept, stash: &Stash) -> Result<Saved> {
        if self.extent < Extent::All {
            made.gated = None;
        }
        if self.extent < Extent::Attention {
            made.attended = None;
        }
        if !self.on_host {
            return Ok(Saved::Here(made));
        }
        let mut tensors = Vec::new();
        let places = made.map(|tensor| {
            tensors.push(tensor);
            tensors.len() - 1
        });
        Ok(Saved::Away(places, stash.push(tensors)?))
    }
}

impl Saved {
    /// What was kept, on the device again.
    pub(crate) fn back(self, stash: &Stash) -> Result<Kept> {
        match self {
            Saved::Here(kept) => Ok(kept),
            Saved::Away(places, stashed) => {
                let tensors = stash.pop(stashed)?;
                Ok(places.map(|place| tensors[place].clone()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_as_text() {
        for (text, same, of) in [
            ("all", "all", ["all", "all", "all"]),
            ("inputs", "inputs", ["inputs", "inputs", "inputs"]),
            ("inputs:2", "inputs:2,all", ["inputs", "inputs", "all"]),
            (
                "attention@host:1,inputs@device:1,all",
                "attention@host:1,inputs:1,all",
                ["attention@host", "inputs", "all"],
            ),
            ("inputs:0,all@host", "all@host", ["all@host", "all@host", "all@host"]),
        ] {
            let parsed: Activations = text.parse().unwrap();
            assert_eq!(parsed.to_string(), same);
            assert_eq!(same.parse::<Activations>().unwrap(), parsed);
            assert_eq!([0, 1, 2].map(|layer| parsed.of(layer).to_string()), of);
        }
        for (text, word) in
            [("some", "expected inputs"), ("all@disk", "@disk"), ("all,inputs", "left"), ("all:x", "number")]
        {
            assert!(text.parse::<Activations>().unwrap_err().contains(word), "{text}");
        }
        let inputs = Keeping { extent: Extent::Inputs, on_host: false };
        for (layers, text) in [(0, "all"), (3, "inputs:3,all"), (usize::MAX, "inputs")] {
            let made = Activations::new(inputs, layers, Keeping::default());
            assert_eq!((made.to_string(), text.parse()), (text.into(), Ok(made)));
        }
    }
}
