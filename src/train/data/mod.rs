//! Data: where the batches of a run come from.

mod ahead;
mod batch;
mod bytes;
mod examples;
mod groups;
mod labelled;
mod masked;
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
    groups::{Group, GroupBatch, Groups},
    labelled::{Label, LabelledBatch, LabelledText, LabelledTexts},
    masked::{Masked, MaskedBatch},
    mixture::Mixture,
    sequences::{Sequence, Sequences},
    token_data::TokenData,
    token_file::{TokenFile, TokenFormat},
    token_writer::TokenWriter,
};
