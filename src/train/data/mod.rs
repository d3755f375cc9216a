//! Data: where the batches of a run come from.

mod ahead;
mod batch;
mod bytes;
mod examples;
mod labelled;
mod mixture;
mod sequences;
mod shuffle;
mod token_data;
mod token_file;
mod token_writer;
mod windows;

pub(super) use self::ahead::Ahead;
pub use self::{
    batch::{Batch, BatchRequest, BatchSource, DataPrint, TokenBatch},
    bytes::ByteText,
    examples::Examples,
    labelled::{Label, LabelledBatch, LabelledText, LabelledTexts},
    mixture::Mixture,
    sequences::{Sequence, Sequences},
    token_data::TokenData,
    token_file::{TokenFile, TokenFormat},
    token_writer::TokenWriter,
};
