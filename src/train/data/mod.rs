//! Data: where the batches of a run come from.

mod ahead;
mod batch;
mod bytes;
mod captions;
mod examples;
mod groups;
mod image;
mod labelled;
mod labelled_images;
mod masked;
mod mixture;
mod sequences;
mod shuffle;
mod text_pairs;
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
    groups::{Group, GroupBatch, Groups},
    image::{Image, ImageTransform},
    labelled::{Label, LabelledBatch, LabelledText, LabelledTexts},
    labelled_images::{ImageBatch, LabelledImages},
    masked::{Masked, MaskedBatch},
    mixture::Mixture,
    sequences::{Sequence, Sequences},
    text_pairs::{Pair, PairBatch, Pairs},
    token_data::TokenData,
    token_file::{TokenFile, TokenFormat},
    token_writer::TokenWriter,
};
