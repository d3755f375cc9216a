//! Images with captions.

use std::{fmt, sync::Arc};

use super::{
    Batch, BatchRequest, BatchSource, DataPrint, ImageTransform, TokenBatch,
    labelled_images::{Images, places},
    text_pairs::{check_tokens, targets},
};
use crate::{
    Device, Error, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::{fnv1a, fnv1a_from},
};

/// Images with captions as a batch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CaptionBatch {
    /// Images, `[b, channels, height, width]` F32.
    pub images: Tensor,
    /// The captions, which begin and end with the border, and the mask of tokens that count.
    pub captions: TokenBatch,
}

impl Batch for CaptionBatch {
    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { images: self.images.to_device(device)?, captions: self.captions.to_device(device)? })
    }

    fn weight(&self) -> f64 {
        self.captions.weight()
    }

    fn targets(&self) -> u64 {
        self.captions.targets()
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        f(&mut self.images);
        self.captions.visit_tensors(f)
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        let captions = parts.iter().map(|part| part.captions.clone()).collect_vec();
        let images = Tensor::cat(&parts.iter().map(|part| &part.images).collect_vec(), 0)?;
        Ok(Self { images, captions: TokenBatch::concat(&captions)? })
    }
}

/// Number of an image, and the tokens of its caption.
pub type Caption = (usize, Vec<i64>);

/// Images with captions, each a row, in an order of its own in each epoch; captions are cut to `seq_len` tokens. Images are loaded
/// when a batch needs them, by the thread that prepares it.
///
/// ```
/// use x_transformers::train::{BatchSource, CaptionedImages, Image, ImageTransform, TrainOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let transform = ImageTransform::new(8, 3);
/// let own = transform.clone();
/// let load = move |number| own.crop(&Image::new(10, 9, 3, vec![255 * number as u8; 10 * 9 * 3])?);
/// let captions = vec![(0, vec![5, 6]), (1, vec![7])]; // images by their numbers, tokens of captions
/// // A name that identifies the images, captions to train and to validate on, the token before and after a caption.
/// let source = CaptionedImages::new("greys", captions.clone(), captions, 0, transform, load)?;
/// let options = TrainOptions { batch_size: 2, seq_len: 8, ..Default::default() };
/// let batch = source.batch(&options.request(0, 0, 16))?;
/// assert_eq!((batch.images.shape()[0], batch.captions.tokens.shape()[1]), (2, 4));
/// # Ok(())
/// # }
/// ```
pub struct CaptionedImages {
    images: Images,
    parts: [Vec<Caption>; 2],
    border: i64,
}

impl fmt::Debug for CaptionedImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, validation] = self.parts.each_ref().map(Vec::len);
        f.debug_struct("CaptionedImages").field("train", &train).field("validation", &validation).finish()
    }
}

impl CaptionedImages {
    /// Creates a source of images, by their numbers, and captions to train and to validate on. `name` identifies the images;
    /// `load` returns the image of a number as [`ImageTransform::crop`] does. The token `border` is put before each caption,
    /// where the decoder begins, and after it, where it ends.
    ///
    /// Errors: no captions, an empty one, an illegal transform.
    pub fn new<P: Into<Arc<[u8]>>>(
        name: impl Into<String>,
        train: Vec<Caption>,
        validation: Vec<Caption>,
        border: i64,
        transform: ImageTransform,
        load: impl Fn(usize) -> Result<P> + Send + Sync + 'static,
    ) -> Result<Self> {
        let parts = [train, validation];
        for (part, name) in parts.iter().zip(["caption", "validation caption"]) {
            ensure!(
                !part.is_empty(),
                Error::option("captions", format_args!("expected at least one {name}, got none"))
            );
            if let Some((number, _)) = part.iter().find(|(_, caption)| caption.is_empty()) {
                return Err(Error::option("captions", format_args!("the {name} of image {number} is empty")));
            }
        }
        let load = Arc::new(move |number| Ok(load(number)?.into()));
        Ok(Self { images: Images::new(name.into(), transform, load)?, parts, border })
    }

    /// Mirrors half of the images of training steps, drawn at random. Captions that say left or right are wrong then.
    pub fn with_flip(mut self, flip: bool) -> Self {
        self.images.flip = flip;
        self
    }

    /// Returns the captions to train on, and those to validate on.
    pub fn parts(&self) -> [&[Caption]; 2] {
        self.parts.each_ref().map(Vec::as_slice)
    }

    /// Returns the number of captions of which rows of `seq_len` tokens cut something.
    pub fn cut(&self, seq_len: usize) -> usize {
        self.parts.iter().flatten().filter(|(_, caption)| caption.len() >= seq_len).count()
    }

    fn validation(&self, request: &BatchRequest) -> impl Iterator<Item = Result<CaptionBatch>> {
        let part = |chosen: &[Caption]| self.of(&chosen.iter().collect_vec(), request, false);
        self.parts[1].chunks(request.rows.max(1)).map(part)
    }

    fn of(&self, chosen: &[&Caption], request: &BatchRequest, train: bool) -> Result<CaptionBatch> {
        let numbers = chosen.iter().map(|(number, _)| *number).collect_vec();
        let rows = chosen.iter().map(|(_, caption)| &caption[..]).collect_vec();
        let captions = targets(&rows, self.border, request.seq_len)?;
        Ok(CaptionBatch { images: self.images.batch(&numbers, train.then_some(request))?, captions })
    }
}

impl BatchSource for CaptionedImages {
    type Batch = CaptionBatch;

    fn batch(&self, request: &BatchRequest) -> Result<CaptionBatch> {
        let train = &self.parts[0];
        let chosen = places(request, train.len()).into_iter().map(|place| &train[place]).collect_vec();
        self.of(&chosen, request, true)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<CaptionBatch>> {
        self.validation(request).try_collect_vec()
    }

    fn each_validation_batch(
        &self,
        request: &BatchRequest,
        each: &mut dyn FnMut(CaptionBatch) -> Result<()>,
    ) -> Result<()> {
        self.validation(request).try_for_each(|batch| each(batch?))
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        check_tokens([&[self.border][..]].into_iter(), request, "border")?;
        for (part, name) in self.parts.iter().zip(["caption", "validation caption"]) {
            check_tokens(part.iter().map(|(_, caption)| &caption[..]), request, name)?;
        }
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        let mut hash = fnv1a_from(fnv1a(self.images.name.as_bytes()), &self.border.to_le_bytes());
        for (part, captions) in self.parts.iter().enumerate() {
            for (number, caption) in captions {
                for word in [part, *number, caption.len()] {
                    hash = fnv1a_from(hash, &(word as u64).to_le_bytes());
                }
                for token in caption {
                    hash = fnv1a_from(hash, &token.to_le_bytes());
                }
            }
        }
        Ok(DataPrint::new("captions", self.parts.iter().map(Vec::len).sum::<usize>() as u64, hash))
    }
}
