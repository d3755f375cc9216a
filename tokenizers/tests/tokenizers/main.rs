//! Tokenizers compared with the Python packages that people use, and with malformed files.

#[path = "../common/models.rs"]
mod models;

mod agreement;
mod chat;
mod folders;
mod gguf_metadata;
mod hostile;
mod learned;
mod sentence;
mod stream;
mod turns;
