//! The text to learn from: files of the user, or this repository's own sources.

use std::path::PathBuf;

/// This repository's sources and documents, joined by the build script.
pub static EMBEDDED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/corpus.txt"));
