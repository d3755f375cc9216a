//! Files: tensors by name in the safetensors format, and replacing a file in one step.

mod atomic;
mod safetensors;

pub use self::{
    atomic::write_atomically,
    safetensors::{read_safetensors, write_safetensors},
};

pub(crate) use self::{atomic::sync_folder, safetensors::read_with_metadata};
