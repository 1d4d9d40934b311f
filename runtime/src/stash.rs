//! Tensors put aside in host memory between a forward pass and its backward pass: last in, first out.
//!
//! [`Stash::push`] copies tensors out, on a GPU by its copy engine and beside the compute stream. Their device memory is let
//! go of at the next push: the compute stream waits there for a copy that has had a layer's time. [`Stash::pop`] gives the
//! last ones back and begins to bring those below them, which then have a layer's time too. Both happen at fixed points of
//! the program, so that what a step takes does not depend on how fast the bus is. Host memory is kept from step to step.

use crate::{DType, Device, Error, Result, Tag, Tensor, cuda::PinnedArena};
use std::{
    fmt,
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Tensors start at multiples of this in host memory.
const ALIGN: usize = 512;

/// Tensors that were pushed together, to be popped in reverse order.
#[derive(Debug, PartialEq, Eq)]
pub struct Stashed(usize);

/// See the [module](self).
#[derive(Default)]
pub struct Stash(Mutex<State>);

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    /// Of the device that tensors came from last.
    arena: Option<Arena>,
}

struct Entry {
    /// Each tensor's type and shape.
    tensors: Vec<(DType, Vec<usize>)>,
    /// Where they are in the arena, one after another.
    place: Range<usize>,
    /// The tensors themselves: on their way out or in.
    on_device: Option<Vec<Tensor>>,
}

/// Bytes that a tensor takes.
fn room(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// Host memory of one device's tensors.
enum Arena {
    Cpu(Vec<u8>),
    Cuda(PinnedArena),
}

impl Arena {
    fn new(device: Device) -> Result<Self> {
        Ok(match device {
            Device::Cpu => Arena::Cpu(Vec::new()),
            Device::Cuda(_) => Arena::Cuda(PinnedArena::new(device)?),
        })
    }

    fn device(&self) -> Device {
        match self {
            Arena::Cpu(_) => Device::Cpu,
            Arena::Cuda(arena) => arena.device(),
        }
    }

    /// Copies tensors to where they belong from `at` on.
    fn store(&mut self, at: usize, tensors: &[Tensor]) -> Result<()> {
        match self {
            Arena::Cuda(arena) => arena.store(&placed(at, tensors)),
            Arena::Cpu(bytes) => placed(at, tensors).into_iter().try_for_each(|(at, tensor)| {
                let end = at + tensor.size_bytes();
                bytes.resize(end.max(bytes.len()), 0);
                bytes[at..end].copy_from_slice(tensor.bytes()?);
                Ok(())
            }),
        }
    }

    /// The reverse of [`Arena::store`].
    fn load(&mut self, at: usize, tensors: &mut [Tensor]) -> Result<()> {
        match self {
            Arena::Cuda(arena) => arena.load(&placed(at, tensors)),
            Arena::Cpu(bytes) => {
                let mut at = at;
                tensors.iter_mut().try_for_each(|tensor| {
                    let from = at..at + tensor.size_bytes();
                    at += room(from.len());
                    tensor.bytes_mut()?.copy_from_slice(&bytes[from]);
                    Ok(())
                })
            }
        }
    }
}

/// Each tensor with its place.
fn placed(at: usize, tensors: &[Tensor]) -> Vec<(usize, &Tensor)> {
    let place = |at: &mut usize, tensor| Some((std::mem::replace(at, *at + room(Tensor::size_bytes(tensor))), tensor));
    tensors.iter().scan(at, place).collect()
}

impl Stash {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all tensors, of a pass that was given up. Their host memory stays, to be used again.
    pub fn clear(&self) {
        self.state().entries.clear();
    }

    /// Puts tensors of one device aside. Nobody else may write them.
    ///
    /// # Errors
    /// There are none, they are on several devices, or the host is out of memory that can be pinned.
    pub fn push(&self, tensors: Vec<Tensor>) -> Result<Stashed> {
        let mut state = self.state();
        let state = &mut *state;
        let device = tensors.first().ok_or_else(|| Error::invalid("stash", "nothing to put aside"))?.device();
        if tensors.iter().any(|tensor| tensor.device() != device) {
            return Err(Error::invalid("stash", "tensors are on several devices"));
        }
        if state.arena.as_ref().is_none_or(|arena| arena.device() != device) {
            state.arena = Some(Arena::new(device)?);
        }
        let Some(arena) = &mut state.arena else { return Err(Error::invalid("stash", "no host memory")) };
        // Those before are on their way since a layer ago.
        let start = state.entries.last_mut().map_or(0, |entry| {
            entry.on_device = None;
            entry.place.end
        });
        arena.store(start, &tensors)?;
        let end = start + tensors.iter().map(|tensor| room(tensor.size_bytes())).sum::<usize>();
        let shapes = tensors.iter().map(|tensor| (tensor.dtype(), tensor.shape().to_vec())).collect();
        state.entries.push(Entry { tensors: shapes, place: start..end, on_device: Some(tensors) });
        Ok(Stashed(state.entries.len() - 1))
    }

    /// The tensors of the last push that has not been popped, counted as [`Tag::Activations`].
    ///
    /// # Errors
    /// They are not those of the last push, or the device is out of memory.
    pub fn pop(&self, stashed: Stashed) -> Result<Vec<Tensor>> {
        let mut state = self.state();
        let State { entries, arena } = &mut *state;
        let (Some(arena), true) = (arena, stashed.0 + 1 == entries.len()) else {
            let what = format!("pops number {} of {}; expected the last", stashed.0, entries.len());
            return Err(Error::invalid("stash", what));
        };
        // The one below is under way from now on, while its user works on this one.
        for entry in entries.iter_mut().rev().take(2).filter(|entry| entry.on_device.is_none()) {
            entry.on_device = Some(entry.bring(arena)?);
        }
        Ok(entries.pop().and_then(|entry| entry.on_device).unwrap_or_default())
    }
}

impl Entry {
    /// The tensors on their way back.
    fn bring(&self, arena: &mut Arena) -> Result<Vec<Tensor>> {
        let device = arena.device();
        let empty = |(dtype, shape): &(DType, Vec<usize>)| Tensor::empty(shape, *dtype, device, Tag::Activations);
        let mut tensors = self.tensors.iter().map(empty).collect::<Result<Vec<_>>>()?;
        arena.load(self.place.start, &mut tensors)?;
        Ok(tensors)
    }
}

impl fmt::Debug for Stash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stash({} put aside)", self.state().entries.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{device_for_tests, poison};
    use proptest::{collection::vec, prelude::*, test_runner::TestRunner};

    /// Tensors of these sizes in words, each filled with a number of its own.
    fn filled(sizes: &[usize], number: &mut u32, device: Device) -> Vec<Tensor> {
        let tensor = |&size: &usize| {
            *number += 1;
            let values: Vec<i32> = (0..size as i32).map(|i| i ^ (*number << 8) as i32).collect();
            Tensor::from_slice(&values, &[size], Tag::Activations)
                .unwrap()
                .into_device(device, Tag::Activations)
                .unwrap()
        };
        sizes.iter().map(tensor).collect()
    }

    fn contents(tensors: &[Tensor]) -> Vec<Vec<u8>> {
        let host = |tensor: &Tensor| tensor.to_device(Device::Cpu, Tag::Workspace).unwrap().bytes().unwrap().to_vec();
        tensors.iter().map(host).collect()
    }

    /// Steps of pushes and pops, as deep as `passes` says, over the same host memory.
    fn returns_what_was_put(device: Device, passes: &[Vec<Vec<usize>>]) {
        let (stash, mut number) = (Stash::default(), 0);
        for pass in passes {
            let mut expected = Vec::new();
            for sizes in pass {
                let tensors = filled(sizes, &mut number, device);
                expected.push((contents(&tensors), stash.push(tensors).unwrap()));
            }
            while let Some((contents_before, stashed)) = expected.pop() {
                // What freed memory is used for meanwhile.
                let other = filled(&[999; 3], &mut number, device);
                assert_eq!(contents(&stash.pop(stashed).unwrap()), contents_before);
                drop(other);
            }
        }
    }

    #[test]
    fn what_was_put_aside_comes_back() {
        let sizes = |most: usize| vec(vec(vec(0..most, 1..5), 0..6), 1..4);
        TestRunner::default()
            .run(&sizes(3000), |passes| {
                returns_what_was_put(Device::Cpu, &passes);
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn gpu_what_was_put_aside_comes_back() {
        let Some(device) = device_for_tests() else { return };
        poison(true);
        // Small, with many copies under way; and over the edges of slabs.
        for (most, cases) in [(3000usize, 64), (20 << 20, 4)] {
            let passes = vec(vec(vec(0..most, 1..4), 0..4), 1..3);
            TestRunner::new(ProptestConfig::with_cases(cases))
                .run(&passes, |passes| {
                    returns_what_was_put(device, &passes);
                    Ok(())
                })
                .unwrap();
        }
        poison(false);
    }

    #[test]
    fn order_is_kept_and_a_pass_can_be_given_up() {
        let (stash, mut number) = (Stash::default(), 0);
        let mut push = || stash.push(filled(&[5], &mut number, Device::Cpu)).unwrap();
        let (first, second) = (push(), push());
        assert!(stash.pop(first).is_err());
        stash.clear();
        assert!(stash.pop(second).is_err());
        let again = push();
        assert_eq!(again, Stashed(0));
        assert_eq!(stash.pop(again).unwrap().len(), 1);
        assert!(stash.push(Vec::new()).is_err());
    }
}
