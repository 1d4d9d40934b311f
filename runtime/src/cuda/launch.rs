//! Kernels: modules of PTX, compiled by the driver when first used, and their launch.

use super::{Gpu, Stream, driver::check, tensor_map::TensorMap};
use crate::{Error, Result, Tensor};
use cudarc::driver::sys::{self, CUfunction_attribute as Attribute, CUjit_option as Jit};
use std::{
    borrow::Cow,
    collections::HashMap,
    ffi::{CString, c_void},
    path::Path,
    sync::{Arc, LazyLock, PoisonError},
};

/// A file of kernels.
#[derive(Debug)]
pub struct Module {
    /// Name of the `.cu` file and of the `.ptx` file, without the ending.
    pub name: &'static str,
    /// The embedded PTX.
    pub ptx: &'static str,
    /// Every entry point.
    pub entries: &'static [Entry],
}

/// A kernel, or one for each float type.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Name, without the type's suffix where `floats`.
    pub name: &'static str,
    /// Whether there is one kernel for each of f32, f16 and bf16, named with a suffix `_f32`, `_f16` or `_bf16`.
    pub floats: bool,
    /// Bytes of each parameter.
    pub params: &'static [usize],
}

impl Entry {
    /// The names of its kernels.
    pub fn names(&self) -> Vec<String> {
        match self.floats {
            true => ["f32", "f16", "bf16"].iter().map(|dtype| format!("{}_{dtype}", self.name)).collect(),
            false => vec![self.name.to_string()],
        }
    }

    fn is(&self, name: &str) -> bool {
        match self.floats {
            true => name.strip_prefix(self.name).is_some_and(|rest| matches!(rest, "_f32" | "_f16" | "_bf16")),
            false => name == self.name,
        }
    }
}

/// An argument.
#[derive(Debug)]
enum Value {
    /// A number or address in the low bytes, and how many those are.
    Word(u64, usize),
    Map(Box<TensorMap>),
    /// A C structure.
    Structure(Vec<u64>),
}

impl Value {
    fn bytes(&self) -> usize {
        match self {
            Value::Word(_, bytes) => *bytes,
            Value::Map(_) => size_of::<TensorMap>(),
            Value::Structure(words) => size_of_val(&words[..]),
        }
    }

    /// Where it lies; little-endian, so a 32-bit value lies at the start of its word.
    fn pointer(&mut self) -> *mut c_void {
        match self {
            Value::Word(word, _) => std::ptr::from_mut(word).cast(),
            Value::Map(map) => std::ptr::from_mut(&mut **map).cast(),
            Value::Structure(words) => words.as_mut_ptr().cast(),
        }
    }
}

/// What a kernel has to do at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Floating-point operations of its products; 0 if its operation does not say.
    pub flops: f64,
    /// Bytes of the tensors that it reads and writes.
    pub bytes: f64,
}

/// The arguments of a launch.
#[derive(Debug, Default)]
pub struct Args {
    values: Vec<Value>,
    work: Work,
    /// `None`: the compute stream.
    stream: Option<Stream>,
    /// Whether the kernel waits itself for the one before it.
    early: bool,
    /// Blocks of a cluster, if not one.
    cluster: Option<u32>,
    /// What was wrong with an argument.
    error: Option<Error>,
}

impl Args {
    /// No arguments yet.
    pub fn new() -> Self {
        // More than most kernels take.
        Args { values: Vec::with_capacity(24), ..Self::default() }
    }

    fn push(mut self, value: u64, bytes: usize) -> Self {
        self.values.push(Value::Word(value, bytes));
        self
    }

    fn pointer(mut self, pointer: Result<u64>) -> Self {
        let value = pointer.unwrap_or_else(|error| {
            self.error.get_or_insert(error);
            0
        });
        self.push(value, 8)
    }

    fn touches(mut self, tensor: &Tensor) -> Self {
        self.work.bytes += tensor.size_bytes() as f64;
        self
    }

    /// The launch is given to this stream instead of the compute stream: whoever says so sees to the order.
    pub fn on(mut self, stream: Stream) -> Self {
        self.stream = Some(stream);
        self
    }

    /// The kernel may start while the one before it in the stream still runs, and waits itself until that one has written
    /// all it writes (programmatic dependent launch: Hopper's `griddepcontrol`).
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// So many blocks that follow one another are a cluster (Hopper): they run at once, and read each other's shared memory. At
    /// most 8, and the grid has a multiple of that.
    pub fn cluster(mut self, blocks: u32) -> Self {
        self.cluster = (blocks > 1).then_some(blocks);
        self
    }

    /// So many floating-point operations are done, for [`Gpu::record_launches`].
    pub fn flops(mut self, flops: f64) -> Self {
        self.work.flops = flops;
        self
    }

    /// So many bytes are read and written, where that is not all of the tensors given so far.
    pub fn moves(mut self, bytes: usize) -> Self {
        self.work.bytes = bytes as f64;
        self
    }

    /// A tensor to read.
    pub fn input(self, tensor: &Tensor) -> Self {
        self.touches(tensor).pointer(tensor.device_pointer())
    }

    /// A tensor to read, or a null pointer.
    pub fn input_opt(self, tensor: Option<&Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.input(tensor),
            None => self.pointer(Ok(0)),
        }
    }

    /// A tensor to write; nothing else may refer to its storage.
    pub fn output(self, tensor: &mut Tensor) -> Self {
        self.touches(tensor).pointer(tensor.device_pointer_mut())
    }

    /// A tensor to read and write; nothing else may refer to its storage.
    pub fn in_place(self, tensor: &mut Tensor) -> Self {
        self.touches(tensor).output(tensor)
    }

    /// A tensor to write, or a null pointer.
    pub fn output_opt(self, tensor: Option<&mut Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.output(tensor),
            None => self.pointer(Ok(0)),
        }
    }

    /// A matrix to read by the tensor memory accelerator (Hopper), in boxes of `rows` × `columns`: a parameter of 128 bytes,
    /// CUDA's `CUtensorMap`. Rows of a box are 128 bytes swizzled where its elements have 16 bits, and 32 bytes where it is
    /// one of bytes.
    ///
    /// The launch is refused unless `tensor` is such a matrix on a GPU, with rows of a multiple of 16 bytes from an address
    /// that is one too, and a box has 1 to 256 rows of 16 bytes or more, which a swizzled row holds.
    pub fn tensor_map(self, tensor: &Tensor, rows: u32, columns: u32) -> Self {
        self.touches(tensor).uncounted_map(tensor, rows, columns)
    }

    /// As [`Args::tensor_map`], where the bytes are counted with another argument.
    pub fn uncounted_map(mut self, tensor: &Tensor, rows: u32, columns: u32) -> Self {
        match TensorMap::new(tensor, rows, columns) {
            Ok(map) => self.values.push(Value::Map(Box::new(map))),
            Err(error) => {
                self.error.get_or_insert(error);
            }
        }
        self
    }

    /// As [`Args::tensor_map`], of a matrix to write; nothing else may refer to its storage.
    pub fn output_map(mut self, tensor: &mut Tensor, rows: u32, columns: u32) -> Self {
        if let Err(error) = tensor.device_pointer_mut() {
            self.error.get_or_insert(error);
        }
        self.tensor_map(tensor, rows, columns)
    }

    /// A structure of these fields, as C lays it out: each at a multiple of its size, the whole a multiple of 8 bytes. A field
    /// may be a structure.
    ///
    /// # Panics
    /// A field is a [`Args::tensor_map`].
    pub fn structure(mut self, fields: Args) -> Self {
        let mut bytes: Vec<u8> = Vec::new();
        for field in &fields.values {
            let (data, align): (Vec<u8>, usize) = match field {
                Value::Word(word, size) => (word.to_le_bytes()[..*size].to_vec(), *size),
                Value::Structure(words) => (words.iter().flat_map(|word| word.to_le_bytes()).collect(), 8),
                Value::Map(_) => panic!("a tensor map is a parameter of its own"),
            };
            bytes.resize(bytes.len().next_multiple_of(align), 0);
            bytes.extend(data);
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        self = self.words(&bytes, bytes.len() / 8);
        self.work.flops += fields.work.flops;
        self.work.bytes += fields.work.bytes;
        self.error = self.error.or(fields.error);
        self
    }

    /// A structure of `words` 64-bit words that begins with these bytes, whole words, and goes on with zeros.
    ///
    /// # Panics
    /// There are more bytes than that.
    pub fn words(mut self, bytes: &[u8], words: usize) -> Self {
        let word = |chunk: &[u8]| u64::from_le_bytes(std::array::from_fn(|i| chunk[i]));
        let mut value: Vec<u64> = bytes.chunks_exact(8).map(word).collect();
        assert!(value.len() <= words && bytes.len().is_multiple_of(8), "{} bytes in {words} words", bytes.len());
        value.resize(words, 0);
        self.values.push(Value::Structure(value));
        self
    }

    /// A 32-bit unsigned number.
    pub fn u32(self, value: u32) -> Self {
        self.push(value.into(), 4)
    }

    /// A 32-bit signed number.
    pub fn i32(self, value: i32) -> Self {
        self.push(u64::from(value as u32), 4)
    }

    /// A 64-bit unsigned number.
    pub fn u64(self, value: u64) -> Self {
        self.push(value, 8)
    }

    /// A 32-bit float.
    pub fn f32(self, value: f32) -> Self {
        self.push(value.to_bits().into(), 4)
    }
}

/// A module that the driver has compiled.
pub(super) struct Loaded {
    functions: HashMap<String, Function>,
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    params: &'static [usize],
    /// Bytes of dynamic shared memory that a launch may ask for.
    shared: usize,
}

// SAFETY: function handles may be used from any thread whose current context is theirs; `Gpu::launch` binds it.
unsafe impl Send for Loaded {}
// SAFETY: as above; the table is not changed after it was made.
unsafe impl Sync for Loaded {}

/// Whether `NIBBLE_CUDA_SYNC` wants every launch to be waited for.
pub(super) fn waits() -> bool {
    static WAITS: LazyLock<bool> = LazyLock::new(|| std::env::var_os("NIBBLE_CUDA_SYNC").is_some());
    *WAITS
}

/// That so many blocks are a cluster.
fn clusters_of(blocks: u32) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 },
        },
    }
}

/// Shared memory that every kernel may use without asking.
const SHARED_BY_DEFAULT: usize = 48 << 10;

impl Gpu {
    /// Launches kernel `entry` of `module` on the compute stream, or that of [`Args::on`], and returns at once.
    ///
    /// `grid` and `block` are in blocks and threads; `shared` is dynamic shared memory in bytes. A grid with no blocks is
    /// not launched. With `NIBBLE_CUDA_SYNC=1` every launch is waited for, so that a failure names its kernel.
    ///
    /// # Errors
    /// The PTX does not load, there is no such entry, the arguments are not those it takes, or the driver refuses. A
    /// kernel that fails while it runs is reported by a later call.
    pub fn launch(
        &self,
        module: &'static Module,
        entry: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        mut args: Args,
    ) -> Result<()> {
        let invalid = |what: String| Error::invalid("launch", format!("{entry}: {what}"));
        if let Some(error) = args.error {
            return Err(error);
        }
        self.report()?;
        if grid.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        let loaded = self.module(module)?;
        let function = *loaded.functions.get(entry).ok_or_else(|| invalid(format!("not in module {}", module.name)))?;
        if !args.values.iter().map(Value::bytes).eq(function.params.iter().copied()) {
            let found: Vec<usize> = args.values.iter().map(Value::bytes).collect();
            return Err(invalid(format!("takes parameters of {:?} bytes, was given {found:?}", function.params)));
        }
        if shared > function.shared {
            let most = function.shared;
            return Err(invalid(format!("needs {shared} bytes of shared memory a block; this GPU has {most}")));
        }
        let stream = args.stream.unwrap_or(self.stream());
        let start = self.mark_if_recording(stream)?;
        let mut pointers: Vec<*mut c_void> = args.values.iter_mut().map(Value::pointer).collect();
        let early = args.early.then_some(sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        });
        let mut attributes: Vec<_> = early.into_iter().chain(args.cluster.map(clusters_of)).collect();
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: shared as u32,
            hStream: stream.0,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the handle belongs to the current context; there is a pointer for each parameter, to a value of at
        // least its size (checked above against the table that a test holds against the PTX). That the kernel stays
        // inside of its tensors, and waits where it starts early, is checked by the operation that launches it.
        let status =
            unsafe { sys::cuLaunchKernelEx(&config, function.handle, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        let failed = |error| Error::Cuda { op: "launch", what: format!("{entry} {grid:?} x {block:?}: {error}") };
        check("cuLaunchKernel", status).map_err(failed)?;
        if let Some(start) = start {
            self.record(start, stream, entry, args.work)?;
        }
        if waits() {
            self.synchronize_all().map_err(failed)?;
            self.report()?;
        }
        Ok(())
    }

    /// How many clusters of kernel `entry` run at once, of `cluster` blocks as the kernel has them; the others as for
    /// [`Gpu::launch`]. Blocks of a cluster are near one another, so that these may be fewer than multiprocessors have place for.
    ///
    /// # Errors
    /// The PTX does not load, there is no such entry, or the driver refuses.
    pub fn clusters_at_once(
        &self,
        module: &'static Module,
        entry: &str,
        cluster: u32,
        threads: u32,
        shared: usize,
    ) -> Result<u32> {
        self.bind()?;
        let loaded = self.module(module)?;
        let absent = || Error::invalid("clusters", format!("{entry}: not in module {}", module.name));
        let function = *loaded.functions.get(entry).ok_or_else(absent)?;
        let mut size = clusters_of(cluster);
        let config = sys::CUlaunchConfig {
            gridDimX: cluster,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream().0,
            attrs: &mut size,
            numAttrs: 1,
        };
        let mut clusters = 0;
        // SAFETY: the handle belongs to the current context, and the attribute outlives the call, which writes one int.
        let status = unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, function.handle, &config) };
        check("cuOccupancyMaxActiveClusters", status)?;
        Ok(clusters.unsigned_abs())
    }

    /// The compiled module, compiling it at its first use.
    fn module(&self, module: &'static Module) -> Result<Arc<Loaded>> {
        let find = |modules: &HashMap<_, _>| modules.get(module.name).map(Arc::clone);
        if let Some(loaded) = find(&self.modules.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(loaded);
        }
        let mut modules = self.modules.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = find(&modules) {
            return Ok(loaded);
        }
        let loaded = Arc::new(self.load(module)?);
        modules.insert(module.name, Arc::clone(&loaded));
        Ok(loaded)
    }

    fn load(&self, module: &'static Module) -> Result<Loaded> {
        let failed = |what: String| Error::Cuda { op: "load kernels", what: format!("{}.ptx: {what}", module.name) };
        let ptx = match std::env::var_os("NIBBLE_PTX_DIR") {
            None => Cow::Borrowed(module.ptx),
            Some(dir) => {
                let path = Path::new(&dir).join(module.name).with_extension("ptx");
                let read = std::fs::read_to_string(&path);
                Cow::Owned(read.map_err(|error| failed(format!("{} of NIBBLE_PTX_DIR: {error}", path.display())))?)
            }
        };
        let ptx = CString::new(ptx.as_bytes()).map_err(|_| failed("contains a zero byte".into()))?;
        let mut log = vec![0u8; 8 << 10];
        let mut options = [Jit::CU_JIT_ERROR_LOG_BUFFER, Jit::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len())];
        let mut handle = std::ptr::null_mut();
        // SAFETY: `ptx` is a C string; the two options are a buffer and its length passed as a pointer-sized number, as
        // the interface wants; the context is current (`launch`).
        let status = unsafe {
            sys::cuModuleLoadDataEx(&mut handle, ptx.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
        };
        check("cuModuleLoadDataEx", status).map_err(|error| {
            let log = String::from_utf8_lossy(&log);
            failed(format!("{error} {}", log.trim_end_matches('\0').trim()))
        })?;
        let mut functions = HashMap::new();
        for entry in module.entries {
            for name in entry.names() {
                let symbol = CString::new(name.as_str()).map_err(|_| failed(format!("entry {name:?}")))?;
                let mut function = std::ptr::null_mut();
                // SAFETY: the module was loaded above and stays for the life of the process.
                check("cuModuleGetFunction", unsafe {
                    sys::cuModuleGetFunction(&mut function, handle, symbol.as_ptr())
                })
                .map_err(|error| failed(format!("{name}: {error}")))?;
                let shared = allow_shared(function, self.shared_per_block())?;
                functions.insert(name, Function { handle: function, params: entry.params, shared });
            }
        }
        Ok(Loaded { functions })
    }
}

/// Lets `function` use as much dynamic shared memory as its static one leaves of `most`; returns how much that is.
fn allow_shared(function: sys::CUfunction, most: usize) -> Result<usize> {
    let mut used = 0;
    // SAFETY: the function is live; the call writes one int.
    let status =
        unsafe { sys::cuFuncGetAttribute(&mut used, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function) };
    check("cuFuncGetAttribute", status)?;
    let left = most.saturating_sub(used.unsigned_abs() as usize);
    if left > SHARED_BY_DEFAULT {
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is live, and the value is within what the device reports.
        check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(function, attribute, left as i32) })?;
    }
    Ok(left)
}

impl Module {
    /// The parameters of kernel `name` by the table.
    pub fn params(&self, name: &str) -> Option<&'static [usize]> {
        self.entries.iter().find(|entry| entry.is(name)).map(|entry| entry.params)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_laid_out_as_in_c() {
        // struct { u32 a; struct { u64 b; float c; } d; u32 e; }
        let inner = Args::new().u64(0x1122_3344_5566_7788).f32(1.0);
        let args = Args::new().structure(Args::new().u32(7).structure(inner).u32(9));
        let Value::Structure(words) = &args.values[0] else { panic!("{args:?}") };
        assert_eq!(words, &[7, 0x1122_3344_5566_7788, u64::from(1f32.to_bits()), 9]);
        assert_eq!(args.values[0].bytes(), 32);
        let args = Args::new().structure(Args::new().u32(1).u32(2).u64(3));
        let Value::Structure(words) = &args.values[0] else { panic!("{args:?}") };
        assert_eq!(words, &[1 | 2 << 32, 3]);
    }
}
