//! One GPU: context, streams, properties, loaded modules.

use super::{
    copy::Staging,
    driver::{check, devices, gpu_suffices},
    launch::Loaded,
    memory::DeviceMemory,
    profile::Recording,
};
use crate::{Device, Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use std::{
    cell::Cell,
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
};

/// A queue of work on a GPU, which runs in order. It lives as long as the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub(super) sys::CUstream);

/// A GPU that is ready to run. There is one for each device, and it lives as long as the process.
pub struct Gpu {
    ordinal: usize,
    context: sys::CUcontext,
    stream: Stream,
    name: String,
    capability: (u32, u32),
    sm_count: u32,
    shared_per_block: usize,
    total_memory: usize,
    /// Modules by name, compiled by the driver when first used.
    pub(super) modules: RwLock<HashMap<&'static str, Arc<Loaded>>>,
    pub(super) staging: Mutex<Staging>,
    /// Made when first asked for.
    pub(super) memory: OnceLock<DeviceMemory>,
    /// The first error of a call that had nobody to report to.
    unreported: Mutex<Option<Error>>,
    /// Streams beside the compute stream that nobody uses now.
    retired: Mutex<Vec<Stream>>,
    pub(super) recording: Recording,
}

// SAFETY: context and stream handles may be used from any thread; every call binds the context to its thread first.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Sync for Gpu {}

impl Stream {
    /// A stream beside the compute stream: one that was retired, or a new one. Of two kernels that are ready, its own goes
    /// first: it is short and a copy waits for it, while one of the compute stream would hold up the bus.
    pub(super) fn beside(gpu: &'static Gpu) -> Result<Self> {
        if let Some(stream) = lock(&gpu.retired).pop() {
            return Ok(stream);
        }
        gpu.bind()?;
        let (mut stream, mut least, mut greatest) = (std::ptr::null_mut(), 0, 0);
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the first call writes two numbers, the second one handle.
        unsafe {
            check("cuCtxGetStreamPriorityRange", sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
            check("cuStreamCreate", sys::cuStreamCreateWithPriority(&mut stream, flags, greatest))?;
        }
        Ok(Stream(stream))
    }

    /// Keeps the stream for the next who needs one: streams are never destroyed, since the allocator knows blocks by them.
    pub(super) fn retire(self, gpu: &'static Gpu) {
        lock(&gpu.retired).push(self);
    }
}

// SAFETY: stream handles may be used from any thread; every call binds the context first.
unsafe impl Send for Stream {}

/// What decides on a GPU which kernels run, and what workspace they take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chip {
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sms: u32,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({})", self.ordinal, self.name)
    }
}

thread_local! {
    /// The GPU whose context is current on this thread.
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A lock whose data are consistent between statements, so that a panic elsewhere leaves nothing half-changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// The GPU behind a device, opened at the first call.
    ///
    /// # Errors
    /// The device is the CPU, the driver is missing or too old, there is no such GPU, or it is older than Ampere.
    pub fn of(device: Device) -> Result<&'static Gpu> {
        static OPEN: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());
        static FIRST: OnceLock<&'static Gpu> = OnceLock::new();
        let refuse = |reason: String| Error::Device { requested: device.to_string(), reason };
        let Device::Cuda(ordinal) = device else { return Err(refuse("not a GPU".into())) };
        // Nearly every call is for the one GPU there is.
        if let Some(gpu) = FIRST.get().filter(|gpu| gpu.ordinal == ordinal) {
            return Ok(gpu);
        }
        let mut open = lock(&OPEN);
        if let Some(gpu) = open.iter().find(|gpu| gpu.ordinal == ordinal) {
            return Ok(gpu);
        }
        let count = devices().map_err(refuse)?;
        if ordinal >= count {
            return Err(refuse(format!("there are {count} GPUs, numbered from 0")));
        }
        let gpu: &'static Gpu = Box::leak(Box::new(Gpu::open(ordinal)?));
        open.push(gpu);
        FIRST.get_or_init(|| gpu);
        Ok(gpu)
    }

    fn open(ordinal: usize) -> Result<Gpu> {
        let refuse = |reason: String| Error::Device { requested: Device::Cuda(ordinal).to_string(), reason };
        let number = i32::try_from(ordinal).map_err(|_| refuse("no such GPU".into()))?;
        let (mut device, mut context, mut stream) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        let (mut name, mut total_memory) = ([0u8; 256], 0);
        let attribute = |attribute: Attribute, device| -> Result<u32> {
            let mut value = 0;
            // SAFETY: the driver is initialized and writes one int.
            check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
            Ok(value.unsigned_abs())
        };
        // SAFETY: the driver is initialized (`devices`); each call writes the one variable that it is given, and the
        // name's length goes with its buffer.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, number))?;
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device))?;
            check("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&mut total_memory, device))?;
        }
        let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_string();
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)?,
        );
        gpu_suffices(&name, capability).map_err(refuse)?;
        // SAFETY: `device` is valid; each call writes the one handle that it is given, and the new context is current
        // before a stream is made in it.
        unsafe {
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("cuStreamCreate", sys::cuStreamCreate(&mut stream, flags))?;
        }
        CURRENT.set(Some(ordinal));
        Ok(Gpu {
            ordinal,
            context,
            stream: Stream(stream),
            name,
            capability,
            sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)?,
            shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device)?
                as usize,
            total_memory,
            modules: RwLock::default(),
            staging: Mutex::default(),
            memory: OnceLock::new(),
            unreported: Mutex::default(),
            retired: Mutex::default(),
            recording: Recording::default(),
        })
    }

    /// Makes this GPU's context current on the calling thread.
    pub(crate) fn bind(&self) -> Result<()> {
        if CURRENT.get() == Some(self.ordinal) {
            return Ok(());
        }
        // SAFETY: the context is retained for the life of the process.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })?;
        CURRENT.set(Some(self.ordinal));
        Ok(())
    }

    /// Its place among devices.
    pub fn device(&self) -> Device {
        Device::Cuda(self.ordinal)
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What kind of GPU it is.
    pub fn chip(&self) -> Chip {
        Chip { capability: self.capability, sms: self.sm_count }
    }

    /// Compute capability, major and minor.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Number of streaming multiprocessors.
    pub fn sm_count(&self) -> u32 {
        self.sm_count
    }

    /// Most bytes of shared memory that a block can have.
    pub fn shared_per_block(&self) -> usize {
        self.shared_per_block
    }

    /// Bytes of device memory in all.
    pub fn total_memory(&self) -> usize {
        self.total_memory
    }

    /// Bytes of device memory that nobody uses, as the driver sees it, of all processes.
    pub fn free_memory(&self) -> Result<usize> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; the call writes two numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free)
    }

    /// The stream on which operations run.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Blocks until the compute stream has done everything it was given.
    ///
    /// # Errors
    /// A kernel failed, or a call failed earlier that could not report.
    pub fn synchronize(&self) -> Result<()> {
        self.synchronize_stream(self.stream)?;
        self.report()
    }

    /// Blocks until `stream` has done everything it was given.
    pub(super) fn synchronize_stream(&self, stream: Stream) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is live.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.0) })
    }

    /// Blocks until all streams have done everything they were given.
    pub(crate) fn synchronize_all(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the context is current.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Keeps an error that nobody can be told now, for [`Gpu::report`].
    pub(crate) fn record_error(&self, result: Result<()>) {
        if let Err(error) = result {
            lock(&self.unreported).get_or_insert(error);
        }
    }

    /// The first error that could not be reported where it happened, once.
    pub(crate) fn report(&self) -> Result<()> {
        lock(&self.unreported).take().map_or(Ok(()), Err)
    }
}
