//! Data: where the batches of a run come from.

mod ahead;
mod batch;
mod bytes;
mod captions;
mod examples;
mod image;
mod labelled;
mod labelled_images;
mod mixture;
mod pairs;
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
    captions::{Caption, CaptionBatch, CaptionedImages},
    examples::Examples,
    image::{Image, ImageTransform},
    labelled::{Label, LabelledBatch, LabelledText, LabelledTexts},
    labelled_images::{ImageBatch, LabelledImages},
    mixture::Mixture,
    pairs::{Pair, PairBatch, Pairs},
    sequences::{Sequence, Sequences},
    token_data::TokenData,
    token_file::{TokenFile, TokenFormat},
    token_writer::TokenWriter,
};
