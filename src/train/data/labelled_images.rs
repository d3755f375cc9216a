//! Images with classes.

use std::{fmt, sync::Arc};

use super::{
    super::random::{Purpose, stream},
    Batch, BatchRequest, BatchSource, DataPrint, ImageTransform,
    shuffle::shuffled,
};
use crate::{
    DType, Device, Error, Philox, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::{fnv1a, fnv1a_from},
};

/// Images with classes as a batch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImageBatch {
    /// Images, `[b, channels, height, width]` F32.
    pub images: Tensor,
    /// Classes, `[b]` I64.
    pub labels: Tensor,
}

impl ImageBatch {
    /// Creates a batch.
    ///
    /// Errors: shapes or types other than those of the fields.
    pub fn new(images: Tensor, labels: Tensor) -> Result<Self> {
        let (of_images, of_labels) = (images.shape(), labels.shape());
        ensure!(
            images.rank() == 4
                && images.dtype() == DType::F32
                && of_labels[..] == of_images[..1]
                && labels.dtype() == DType::I64,
            Error::shape(
                "batch",
                format_args!(
                    "expected F32 images [b, channels, height, width] and I64 labels [b], got {of_images:?} {} and \
                     {of_labels:?} {}",
                    images.dtype(),
                    labels.dtype()
                )
            )
        );
        Ok(Self { images, labels })
    }
}

impl Batch for ImageBatch {
    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { images: self.images.to_device(device)?, labels: self.labels.to_device(device)? })
    }

    fn weight(&self) -> f64 {
        self.labels.numel() as f64
    }

    fn targets(&self) -> u64 {
        self.labels.numel() as u64
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        [&mut self.images, &mut self.labels].into_iter().for_each(f);
        true
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        let joined = |of: &dyn Fn(&Self) -> &Tensor| Tensor::cat(&parts.iter().map(of).collect_vec(), 0);
        Self::new(joined(&|part| &part.images)?, joined(&|part| &part.labels)?)
    }
}

/// Function that returns an image by its number, cropped: `[size, size, channels]`.
type Load = Arc<dyn Fn(usize) -> Result<Arc<[u8]>> + Send + Sync>;

/// Images by their numbers, loaded when a batch needs them, and how a batch is made of them.
#[derive(Clone)]
pub(super) struct Images {
    load: Load,
    transform: ImageTransform,
    pub(super) name: String,
    pub(super) flip: bool,
}

impl Images {
    pub(super) fn new(name: String, transform: ImageTransform, load: Load) -> Result<Self> {
        transform.check()?;
        Ok(Self { load, transform, name, flip: false })
    }

    /// Returns a batch of images, of which those of a training step may be mirrored.
    pub(super) fn batch(&self, numbers: &[usize], train: Option<&BatchRequest>) -> Result<Tensor> {
        let images = numbers.iter().map(|&number| (self.load)(number)).try_collect_vec()?;
        let drawn = train.filter(|_| self.flip);
        let drawn = drawn.map(|request| Philox::new(request.seed, stream(Purpose::Flip, request.step, request.micro)));
        let flipped = |row: u64| drawn.is_some_and(|random| random.word(row) & 1 == 1);
        let images = images.iter().zip(0..).map(|(image, row)| (&image[..], flipped(row))).collect_vec();
        self.transform.normalize(&images)
    }
}

/// Images with classes, each a row, in an order of its own in each epoch. Images are loaded when a batch needs them, by the thread
/// that prepares it.
///
/// ```
/// use x_transformers::train::{BatchSource, Image, ImageTransform, LabelledImages, TrainOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let transform = ImageTransform::new(8, 3);
/// let own = transform.clone();
/// // The first argument identifies the images for a resumed run. Image 0 is black and of class 0, image 1 white.
/// let source = LabelledImages::new("greys", vec![(0, 0), (1, 1)], vec![(1, 1)], 2, transform, move |number| {
///     own.crop(&Image::new(10, 9, 3, vec![255 * number as u8; 10 * 9 * 3])?)
/// })?;
/// let options = TrainOptions { batch_size: 2, ..Default::default() };
/// assert_eq!(source.batch(&options.request(0, 0, 0))?.images.shape(), [2, 3, 8, 8]);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "ImageFolder")]
pub struct LabelledImages {
    images: Images,
    /// Numbers and classes.
    parts: [Vec<(usize, usize)>; 2],
}

impl fmt::Debug for LabelledImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, validation] = self.parts.each_ref().map(Vec::len);
        let transform = &self.images.transform;
        f.debug_struct("LabelledImages")
            .field("train", &train)
            .field("validation", &validation)
            .field("transform", transform)
            .finish()
    }
}

impl LabelledImages {
    /// Creates a source of images to train and to validate on, by their numbers and classes. `name` identifies the images;
    /// `load` returns the image of a number as [`ImageTransform::crop`] does.
    ///
    /// Errors: no images; a class that is not below `classes`; an illegal transform.
    pub fn new<P: Into<Arc<[u8]>>>(
        name: impl Into<String>,
        train: Vec<(usize, usize)>,
        validation: Vec<(usize, usize)>,
        classes: usize,
        transform: ImageTransform,
        load: impl Fn(usize) -> Result<P> + Send + Sync + 'static,
    ) -> Result<Self> {
        let parts = [train, validation];
        for (part, name) in parts.iter().zip(["image", "validation image"]) {
            ensure!(!part.is_empty(), Error::option("images", format_args!("expected at least one {name}, got none")));
            if let Some((number, class)) = part.iter().find(|(_, class)| *class >= classes) {
                let why = format_args!("{name} {number} has the class {class}, expected less than {classes}");
                return Err(Error::option("images", why));
            }
        }
        let load = Arc::new(move |number| Ok(load(number)?.into()));
        Ok(Self { images: Images::new(name.into(), transform, load)?, parts })
    }

    /// Mirrors half of the images of training steps, drawn at random.
    #[doc(alias = "RandomHorizontalFlip")]
    pub fn with_flip(mut self, flip: bool) -> Self {
        self.images.flip = flip;
        self
    }

    /// Returns the numbers and classes of the images to train on, and of those to validate on.
    pub fn parts(&self) -> [&[(usize, usize)]; 2] {
        self.parts.each_ref().map(Vec::as_slice)
    }

    fn validation(&self, request: &BatchRequest) -> impl Iterator<Item = Result<ImageBatch>> {
        self.parts[1].chunks(request.rows.max(1)).map(|chosen| self.of(chosen, None))
    }

    fn of(&self, chosen: &[(usize, usize)], train: Option<&BatchRequest>) -> Result<ImageBatch> {
        let (numbers, classes): (Vec<usize>, Vec<i64>) = chosen.iter().map(|&(at, class)| (at, class as i64)).unzip();
        let count = [classes.len()];
        ImageBatch::new(self.images.batch(&numbers, train)?, Tensor::from_vec(classes, count, &Device::Cpu)?)
    }
}

/// Places of the rows of a batch in a list of this length: each epoch has an order of its own.
pub(super) fn places(request: &BatchRequest, count: usize) -> Vec<usize> {
    let count = count as u64;
    let place = |row: u64| shuffled(request.seed, row / count, row % count, count) as usize;
    (0..request.rows as u64).map(|row| place(request.first.wrapping_add(row))).collect_vec()
}

impl BatchSource for LabelledImages {
    type Batch = ImageBatch;

    fn batch(&self, request: &BatchRequest) -> Result<ImageBatch> {
        let train = &self.parts[0];
        let chosen = places(request, train.len()).into_iter().map(|place| train[place]).collect_vec();
        self.of(&chosen, Some(request))
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<ImageBatch>> {
        self.validation(request).try_collect_vec()
    }

    fn each_validation_batch(
        &self,
        request: &BatchRequest,
        each: &mut dyn FnMut(ImageBatch) -> Result<()>,
    ) -> Result<()> {
        self.validation(request).try_for_each(|batch| each(batch?))
    }

    fn check(&self, _request: &BatchRequest) -> Result<()> {
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        let mut hash = fnv1a(self.images.name.as_bytes());
        for part in &self.parts {
            hash = fnv1a_from(hash, &(part.len() as u64).to_le_bytes());
            for (number, class) in part {
                hash = fnv1a_from(hash, &[*number as u64, *class as u64].map(u64::to_le_bytes).concat());
            }
        }
        let size = self.parts.iter().map(Vec::len).sum::<usize>() as u64;
        Ok(DataPrint::new("labelled images", size, hash))
    }
}
