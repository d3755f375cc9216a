//! The commands of `xt`, one by one.

#[path = "../command/mod.rs"]
mod command;

mod bench;
mod captions;
mod classify;
mod convert;
mod curves;
mod embed;
mod embedding;
mod generate;
mod images;
mod info;
mod masked;
mod parquet;
mod preferences;
mod pretrained;
mod quantize;
mod refusals;
mod run;
mod seq2seq;
mod texts;
mod tokens;
mod train;
mod tune;
mod two;
mod usage;
mod verify;
