//! Reads the files of reference results for tests.

use nibble_runtime::{DType, Tag, Tensor};
use safetensors::{Dtype, SafeTensors};

/// A safetensors file under `tests/golden`.
pub(crate) struct Golden(Vec<u8>);

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let path = format!("../tests/golden/{name}");
        Golden(std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}")))
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.file().names().into_iter().map(String::from).collect()
    }

    pub(crate) fn tensor(&self, name: &str) -> Tensor {
        let file = self.file();
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::U8 => DType::U8,
            other => panic!("{name}: {other:?}"),
        };
        Tensor::from_bytes(view.data(), dtype, view.shape(), Tag::Workspace).unwrap()
    }

    pub(crate) fn u8(&self, name: &str) -> Vec<u8> {
        self.tensor(name).as_slice().unwrap().to_vec()
    }

    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        self.tensor(name).to_f32().unwrap().into_owned()
    }
}

/// Floats by their bits, so that a comparison tells zeros and NaNs apart.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
