//! Tokenizers beside the packages of Python that people use, and with files that lie.

#[path = "../common/models.rs"]
mod models;

mod agreement;
mod chat;
mod folders;
mod hostile;
mod sentence;
mod stream;
