//! Any bytes that look like GGUF give tensors or a typed error. Begin from the files in tests/files.

#![no_main]

use libfuzzer_sys::fuzz_target;
use x_transformers::io::{Format, TensorFile};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = TensorFile::from_bytes(bytes) else { return };
    // Other formats have targets of their own.
    if file.format() == Format::Gguf {
        file.names().for_each(|name| drop(file.tensor(name)));
    }
});
