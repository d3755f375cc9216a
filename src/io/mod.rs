//! Files: named tensors in the formats of checkpoints, and atomic replacement of files.

mod bytes;
mod described;
mod file_set;
mod float8;
mod gather;
mod gguf;
mod gguf_write;
mod globals;
mod layout;
mod mistaken;
mod pickle;
mod pytorch;
mod safetensors;
mod small_file;
mod source;
mod split;
mod stored;
mod tensor_file;
mod zip;

pub use crate::atomic_file::{create_folders, retry as retry_interrupted, write_atomically};

pub use self::{
    gguf_write::{GgufTensor, write_gguf},
    safetensors::{read_safetensors, write_safetensors},
    small_file::{read_limited, read_text},
    stored::Stored,
    tensor_file::{Format, Metadata, RawTensor, TensorFile, TensorInfo},
};

pub(crate) use self::{
    file_set::{FileSet, Writer},
    layout::{Layout, Renamed},
    mistaken::mistaken,
    safetensors::{Places, pack, places, read_with_metadata},
    source::Source,
    tensor_file::holds_gguf,
};
