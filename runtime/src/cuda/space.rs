//! The address range of a GPU's memory, by the driver's virtual memory management, and its marks in streams.

use super::{Event, Gpu, Stream, driver::check};
use crate::{
    Error, Result,
    allocator::{AddressSpace, Events, MapError, StreamId},
};
use cudarc::driver::sys::{self, CUresult};
use std::collections::BTreeMap;

/// Addresses are reserved for this many times the memory there is. They cost nothing, and the more there are the less
/// often blocks that stay leave no gap long enough for a large one.
const RESERVED: usize = 8;

/// Reserved addresses of one GPU and the physical memory behind them.
pub struct GpuSpace {
    gpu: &'static Gpu,
    device: sys::CUdevice,
    base: sys::CUdeviceptr,
    reserved: usize,
    granule: usize,
    /// Bytes and handle of each piece, by offset.
    pieces: BTreeMap<usize, (usize, sys::CUmemGenericAllocationHandle)>,
}

fn location(device: sys::CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

/// Plain memory of the device that no other process sees.
fn properties(device: sys::CUdevice) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// As [`check`], telling a full device from other failures.
fn check_memory(op: &'static str, status: CUresult) -> std::result::Result<(), MapError> {
    match status {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(MapError::OutOfMemory),
        status => Ok(check(op, status)?),
    }
}

impl GpuSpace {
    /// Reserves addresses on `gpu`.
    ///
    /// # Errors
    /// The GPU or its driver has no virtual memory management, or refuses so many addresses.
    pub(crate) fn new(gpu: &'static Gpu) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        gpu.bind()?;
        let (mut device, mut supported, mut granule) = (0, 0, 0);
        let attribute = Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
        // SAFETY: a context is current; each call writes the one number that it is given.
        unsafe {
            check("cuCtxGetDevice", sys::cuCtxGetDevice(&mut device))?;
            check("cuDeviceGetAttribute", sys::cuDeviceGetAttribute(&mut supported, attribute, device))?;
        }
        if supported == 0 {
            let reason = "its driver has no virtual memory management, from which nibble takes device memory; \
                          use --device cpu";
            return Err(Error::Device { requested: gpu.device().to_string(), reason: reason.into() });
        }
        let flags = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        let properties = properties(device);
        // SAFETY: as above; the properties outlive the call.
        let status = unsafe { sys::cuMemGetAllocationGranularity(&mut granule, &properties, flags) };
        check("cuMemGetAllocationGranularity", status)?;
        // A system that bounds address space may allow less than we would like.
        let (mut base, mut times) = (0, RESERVED);
        let reserved = loop {
            let bytes = (times * gpu.total_memory()).next_multiple_of(granule);
            // SAFETY: the context is current; the call writes one address.
            match check("cuMemAddressReserve", unsafe { sys::cuMemAddressReserve(&mut base, bytes, 0, 0, 0) }) {
                Ok(()) => break bytes,
                Err(error) if times == 1 => return Err(error),
                Err(_) => times /= 2,
            }
        };
        Ok(GpuSpace { gpu, device, base, reserved, granule, pieces: BTreeMap::new() })
    }

    fn address(&self, offset: usize) -> sys::CUdeviceptr {
        self.base + offset as u64
    }

    fn release(handle: sys::CUmemGenericAllocationHandle) -> Result<()> {
        // SAFETY: every handle is released once, by who takes it out of `pieces` or has not put it there.
        check("cuMemRelease", unsafe { sys::cuMemRelease(handle) })
    }

    /// Puts a handle's memory behind addresses. The handle is released on errors.
    fn attach(
        &mut self,
        offset: usize,
        bytes: usize,
        handle: sys::CUmemGenericAllocationHandle,
    ) -> std::result::Result<(), MapError> {
        let address = self.address(offset);
        let access = sys::CUmemAccessDesc {
            location: location(self.device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the addresses are reserved and not backed (the allocator's holes), and the handle has `bytes` bytes.
        let mapped = check_memory("cuMemMap", unsafe { sys::cuMemMap(address, bytes, 0, handle, 0) });
        let attached = mapped.and_then(|()| {
            // SAFETY: the range was mapped just now; one descriptor is passed.
            check_memory("cuMemSetAccess", unsafe { sys::cuMemSetAccess(address, bytes, &access, 1) }).inspect_err(
                |_| {
                    // SAFETY: nobody has been given these addresses.
                    self.gpu.record_error(check("cuMemUnmap", unsafe { sys::cuMemUnmap(address, bytes) }));
                },
            )
        });
        match attached {
            Ok(()) => {
                self.pieces.insert(offset, (bytes, handle));
                Ok(())
            }
            Err(error) => {
                self.gpu.record_error(Self::release(handle));
                Err(error)
            }
        }
    }

    /// Takes the memory from behind addresses.
    fn detach(&mut self, offset: usize, bytes: usize) -> Result<sys::CUmemGenericAllocationHandle> {
        let Some(&(held, handle)) = self.pieces.get(&offset).filter(|(held, _)| *held == bytes) else {
            return Err(Error::invalid("unmap", format!("no piece of {bytes} bytes at {offset}")));
        };
        // SAFETY: the range is one mapping, and the allocator has waited for the device to be done with it.
        check("cuMemUnmap", unsafe { sys::cuMemUnmap(self.address(offset), held) })?;
        self.pieces.remove(&offset);
        Ok(handle)
    }
}

impl AddressSpace for GpuSpace {
    fn granule(&self) -> usize {
        self.granule
    }

    fn reserved(&self) -> usize {
        self.reserved
    }

    fn base(&self) -> u64 {
        self.base
    }

    fn available(&self) -> usize {
        self.gpu.free_memory().unwrap_or(0)
    }

    fn map(&mut self, offset: usize, bytes: usize) -> std::result::Result<(), MapError> {
        self.gpu.bind()?;
        let (mut handle, properties) = (0, properties(self.device));
        // SAFETY: the context is current, the call writes one handle, and the properties outlive it.
        check_memory("cuMemCreate", unsafe { sys::cuMemCreate(&mut handle, bytes, &properties, 0) })?;
        self.attach(offset, bytes, handle)
    }

    fn unmap(&mut self, offset: usize, bytes: usize) -> Result<()> {
        self.gpu.bind()?;
        let handle = self.detach(offset, bytes)?;
        // The range is free of the memory whatever becomes of it.
        self.gpu.record_error(Self::release(handle));
        Ok(())
    }

    fn remap(&mut self, from: usize, to: usize, bytes: usize) -> std::result::Result<(), MapError> {
        self.gpu.bind()?;
        let handle = self.detach(from, bytes)?;
        self.attach(to, bytes, handle)
    }
}

impl Drop for GpuSpace {
    fn drop(&mut self) {
        let pieces: Vec<_> = self.pieces.iter().map(|(&offset, &(bytes, _))| (offset, bytes)).collect();
        let freed = self.gpu.bind().and_then(|()| {
            if !pieces.is_empty() {
                // SAFETY: the context is current.
                check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })?;
            }
            pieces.into_iter().try_for_each(|(offset, bytes)| self.unmap(offset, bytes))?;
            // SAFETY: the range was reserved with this length, and nothing is mapped in it any more.
            check("cuMemAddressFree", unsafe { sys::cuMemAddressFree(self.base, self.reserved) })
        });
        self.gpu.record_error(freed);
    }
}

/// Marks in the streams of one GPU.
pub struct GpuEvents(pub(crate) &'static Gpu);

/// The allocator's name of a stream.
pub(crate) fn stream_id(stream: Stream) -> StreamId {
    StreamId(stream.0 as usize)
}

fn stream(StreamId(id): StreamId) -> Stream {
    Stream(id as sys::CUstream)
}

impl Events for GpuEvents {
    type Mark = Event;

    fn mark(&mut self, id: StreamId) -> Result<Event> {
        let event = Event::new(self.0, false)?;
        event.record(stream(id))?;
        Ok(event)
    }

    fn done(&self, mark: &Event) -> Result<bool> {
        mark.is_reached()
    }

    fn wait(&mut self, id: StreamId, mark: &Event) -> Result<()> {
        mark.hold(stream(id))
    }

    fn synchronize(&mut self, mark: &Event) -> Result<()> {
        mark.wait()
    }
}
