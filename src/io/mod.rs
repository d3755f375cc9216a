//! Files: tensors by name in the formats that checkpoints come in, and replacing a file in one step.

mod atomic;
mod bytes;
mod gather;
mod gguf;
mod names;
mod pickle;
mod pretrained;
mod pytorch;
mod safetensors;
mod small_file;
mod source;
mod stored;
mod tensor_file;
mod zip;

pub use self::{
    atomic::write_atomically,
    pretrained::{Family, Pretrained},
    safetensors::{read_safetensors, write_safetensors},
    small_file::{read_limited, read_text},
    stored::Stored,
    tensor_file::{Format, Metadata, TensorFile, TensorInfo},
};

pub(crate) use self::{atomic::sync_folder, safetensors::read_with_metadata};
