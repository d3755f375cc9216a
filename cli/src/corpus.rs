//! The text that is learned from when no other is given.

/// This repository's sources and documents, joined by the build script.
pub static EMBEDDED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/corpus.txt"));
