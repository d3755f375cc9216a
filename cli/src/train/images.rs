//! `--task image`: a classifier of the images in folders.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use indicatif::HumanCount;
use rayon::prelude::*;
use x_transformers::{
    Device, Error, Result as LibraryResult,
    config::{AttentionLayersConfig, Config, LayersPlan, ModelPlan, ViTransformerWrapperConfig},
    train::{
        ImageBatch, ImageClassifier, ImageClassifierConfig, ImageTransform, LabelledImages, TrainModel, Trainer,
        accuracy, macro_f1,
    },
};

use super::{
    RATES, TrainArgs,
    data::{About, Data, DataArgs, Own},
    fit,
    options::ModelArgs,
    task::Task,
};
use crate::{
    failure::{Failure, Result},
    files,
    images::{self, Classes},
    metrics::Target,
};

#[derive(Args)]
pub struct ImageArgs {
    /// Folder of images: for --task image a folder of PNG and JPEG files for each class, for --task caption a metadata.jsonl or
    /// captions.jsonl beside them, with the fields `file_name` and `text`
    #[arg(long, value_name = "DIR", conflicts_with_all = ["text", "tokens", "jsonl", "parquet", "separator"])]
    pub images: Option<PathBuf>,

    /// Folder of images to validate on, with the same classes [default: every tenth image of --images, of each class]
    #[arg(long, value_name = "DIR", requires = "images")]
    pub validation_images: Option<PathBuf>,

    /// Side of the square that the model sees of an image, whose shorter side is resized to it [default: 32]
    #[arg(long, value_name = "N", requires = "images", conflicts_with_all = ["config", "preset", "resume"])]
    image_size: Option<usize>,

    /// Side of a patch, in pixels [default: an eighth of the image, or the next smaller size that divides it]
    #[arg(long, value_name = "N", requires = "images", conflicts_with_all = ["config", "preset", "resume"])]
    patch_size: Option<usize>,

    /// Mean of each channel, which is subtracted from values from 0 to 1 [default: 0.5]
    #[arg(long, value_name = "X", num_args = 1..=3, requires = "images", conflicts_with = "resume")]
    mean: Vec<f64>,

    /// Standard deviation of each channel, by which values are divided [default: 0.5]
    #[arg(long, value_name = "X", num_args = 1..=3, requires = "images", conflicts_with = "resume")]
    std: Vec<f64>,

    /// Mirror half of the images of training steps, drawn at random
    #[arg(long, requires = "images", conflicts_with = "resume")]
    pub flip: bool,
}

/// Side of an image by default.
const SIZE: usize = 32;
/// Bytes of cropped images that are kept in memory; with more of them, files are read again in each epoch.
const KEPT: usize = 1 << 30;
/// Classes that a line names.
const NAMED: usize = 10;

impl ImageArgs {
    /// Returns the config of a vision transformer of the sizes that were asked for.
    pub fn model(&self, model: &ModelArgs) -> ViTransformerWrapperConfig {
        let image_size = self.image_size.unwrap_or(SIZE);
        let plain = model.layers(false);
        let layers = AttentionLayersConfig::encoder(plain.dim, plain.depth);
        ViTransformerWrapperConfig {
            image_size,
            patch_size: self.patch_size.unwrap_or_else(|| patch(image_size)),
            attn_layers: AttentionLayersConfig { heads: plain.heads, attn: plain.attn, ..layers },
            ..Default::default()
        }
    }

    /// Adds the preparation of the images to that of a model.
    pub fn prepare(&self, transform: &mut ImageTransform) -> Result<()> {
        let channels = transform.channels();
        for (name, given, own) in [("mean", &self.mean, &mut transform.mean), ("std", &self.std, &mut transform.std)] {
            match &given[..] {
                [] => {}
                [one] => *own = vec![*one; channels],
                all if all.len() == channels => *own = all.to_vec(),
                all => {
                    let why =
                        format!("`--{name}`: expected 1 or {channels} numbers, one per channel, got {}", all.len());
                    return Err(Failure::new(why));
                }
            }
        }
        Ok(transform.check()?)
    }

    /// Returns the folder of the images.
    pub fn folder(&self) -> Result<&Path> {
        self.images.as_deref().ok_or_else(|| Failure::new("images come from `--images`, a folder of them"))
    }

    /// Refuses images for a task that does not take them.
    pub fn refuse(&self) -> Result<()> {
        match &self.images {
            Some(_) => Err(Failure::new("`--images` requires `--task image` or `--task caption`")),
            None => Ok(()),
        }
    }

    /// Finds the images to train and to validate on, and the classes.
    fn classes(&self) -> Result<(Classes, Option<Classes>)> {
        let train = Classes::open(self.folder()?)?;
        let validation = self.validation_images.as_deref().map(|folder| {
            let found = Classes::open(folder)?;
            let other = train.names.iter().zip(&found.names).find(|(one, other)| one != other);
            if train.names.len() != found.names.len() || other.is_some() {
                let why = format!("has the classes {}, but --images has {}", named(&found.names), named(&train.names));
                return Err(Failure::new(why).within(folder));
            }
            Ok(found)
        });
        Ok((train, validation.transpose()?))
    }

    /// Opens the images of a run.
    fn open(
        &self,
        (train, validation): (Classes, Option<Classes>),
        config: &ImageClassifierConfig,
    ) -> Result<Data<ImageBatch>> {
        let names = &config.labels;
        if *names != train.names {
            let why = format!("has the classes {}, but the run has {}", named(&train.names), named(names));
            return Err(Failure::new(why).within(self.folder()?));
        }
        let mut files = train.files;
        let parts = match validation {
            Some(validation) => {
                let numbered = |from: usize, files: &[(PathBuf, usize)]| {
                    files.iter().enumerate().map(|(at, (_, class))| (from + at, *class)).collect()
                };
                let parts = [numbered(0, &files), numbered(files.len(), &validation.files)];
                files.extend(validation.files);
                parts
            }
            None => split(&files),
        };
        if parts[1].is_empty() {
            let why = "has one image for each class, expected more: some to train on, some to validate on";
            return Err(Failure::new(why).within(self.folder()?));
        }
        let [count, validated] = parts.each_ref().map(|part: &Vec<(usize, usize)>| HumanCount(part.len() as u64));
        let paths = files.into_iter().map(|(path, _)| path).collect();
        let Loaded { name, load } = load_all(paths, config.transform.clone())?;
        let [train, validation] = parts;
        let source = LabelledImages::new(name, train, validation, names.len(), config.transform.clone(), load)?;
        let line = format!("{count} images to train on, {validated} to validate, classes {}", named(names));
        let about = About { line, target: Target::Image, ..About::of_nothing() };
        Ok(Data { source: Box::new(source.with_flip(config.flip)), about })
    }
}

/// Returns the largest side of a patch, up to an eighth of the image, that divides the image.
fn patch(image_size: usize) -> usize {
    (1..=image_size / 8).rev().find(|side| image_size.is_multiple_of(*side)).unwrap_or(1)
}

/// Returns names in one line.
fn named(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    names[..names.len() - more].join(", ") + &rest
}

/// Returns numbers and classes of images to train and to validate on: every tenth of each class, or its last.
fn split(files: &[(PathBuf, usize)]) -> [Vec<(usize, usize)>; 2] {
    let mut parts = [Vec::new(), Vec::new()];
    for class in files.chunk_by(|one, other| one.1 == other.1) {
        for at in 0..class.len() {
            let chosen = at % 10 == 9 || (2..10).contains(&class.len()) && at + 1 == class.len();
            let number = parts[0].len() + parts[1].len();
            parts[usize::from(chosen)].push((number, class[at].1));
        }
    }
    parts
}

/// Function that returns an image by its number.
pub type Load = Box<dyn Fn(usize) -> LibraryResult<Arc<[u8]>> + Send + Sync>;

/// Images that were all read once.
pub struct Loaded {
    /// Hash of their files.
    pub name: String,
    pub load: Load,
}

/// Reads all images, so that a damaged one is found before the first step. If they need no more than 1 GiB they stay in memory.
pub fn load_all(paths: Vec<PathBuf>, transform: ImageTransform) -> Result<Loaded> {
    load(paths, transform, KEPT)
}

fn load(paths: Vec<PathBuf>, transform: ImageTransform, kept: usize) -> Result<Loaded> {
    let size = transform.size * transform.size * transform.channels();
    let keep = paths.len().saturating_mul(size) <= kept;
    let read = |path: &PathBuf| -> LibraryResult<(u64, Option<Arc<[u8]>>)> {
        let bytes = images::bytes(path)?;
        let pixels = transform.crop(&images::decode(path, &bytes)?)?;
        Ok((hash(HASH, &bytes), keep.then(|| pixels.into())))
    };
    let all: Vec<_> = paths.par_iter().map(read).collect();
    // The first one that is wrong, whichever thread found another.
    let all = all.into_iter().collect::<LibraryResult<Vec<_>>>()?;
    let name = all.iter().fold(HASH, |state, (own, _)| hash(state, &own.to_le_bytes()));
    let images: Vec<Arc<[u8]>> = all.into_iter().filter_map(|(_, image)| image).collect();
    let load = move |number: usize| match images.get(number) {
        Some(image) => Ok(image.clone()),
        None => Ok(transform.crop(&images::read(&paths[number])?)?.into()),
    };
    Ok(Loaded { name: format!("{name:016x}"), load: Box::new(load) })
}

/// FNV-1a.
const HASH: u64 = 0xcbf2_9ce4_8422_2325;

fn hash(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Begins a run.
pub fn begin(args: &TrainArgs, device: &Device) -> Result<()> {
    let images = &args.data.images;
    args.refuse_beside("image", &["from", "lora-rank", "tokenizer", "seq-len"])?;
    let found = images.classes()?;
    let net = match (args.preset, &args.config) {
        (Some(preset), _) => Config::ViTransformerWrapper(preset.vision()?),
        (None, Some(path)) => {
            let broken = |error: Error| Failure::from(error).within(path);
            let config = Config::from_json(&files::config(path)?).map_err(broken)?;
            if !matches!(config.plan().map_err(broken)?, ModelPlan::Vision(_)) {
                return Err(Failure::new("expected a ViTransformerWrapper").within(path));
            }
            config
        }
        (None, None) => Config::ViTransformerWrapper(images.model(&args.model)),
    };
    let mut config = ImageClassifierConfig::new(args.keywords.apply(net)?, found.0.names.clone())?;
    images.prepare(&mut config.transform)?;
    config.flip = images.flip;
    let options = args.train_options(1, RATES[0]);
    fit::check_as(args, &Config::from_value(config.net.clone())?, &options, device, &|store| {
        ImageClassifier::build(&config, store).map(drop)
    })?;
    let Data { source, about } = images.open(found, &config)?;
    super::begin(
        args,
        args.build(|| Trainer::<ImageClassifier>::start(config, options, source, device))?,
        about,
        device,
    )
}

impl Task for ImageClassifier {
    /// Classes that the model predicts, and those of the images.
    type Seen = [Vec<usize>; 2];

    fn data(args: &DataArgs, _: Option<Own>, checkpoint: &Path) -> Result<Data<ImageBatch>> {
        let missing = || Failure::new("is not a run of `--task image`").within(checkpoint);
        let config = ImageClassifierConfig::read(checkpoint)?.ok_or_else(missing)?;
        args.images.open(args.images.classes()?, &config)
    }

    fn layers(&self) -> &LayersPlan {
        &self.net().plan().layers
    }

    fn hint(dir: &str, _: &About) -> Option<String> {
        Some(format!("classify --checkpoint {dir} --image FILE"))
    }

    fn see(&self, batch: &ImageBatch, [predicted, labels]: &mut Self::Seen) -> LibraryResult<()> {
        let best = self.logits(&batch.images)?.argmax(1)?.to_vec::<i64>()?;
        predicted.extend(best.into_iter().map(|class| class as usize));
        labels.extend(batch.labels.to_vec::<i64>()?.into_iter().map(|class| class as usize));
        Ok(())
    }

    fn scores(&self, [predicted, labels]: Self::Seen, _: f64) -> Vec<(&'static str, f64)> {
        vec![("accuracy", accuracy(&predicted, &labels)), ("f1", macro_f1(&predicted, &labels))]
    }
}

#[cfg(all(test, feature = "images"))]
mod tests {
    use super::*;

    /// Images that do not fit into memory are those that do.
    #[test]
    fn images_are_kept_or_read_again() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/files/images");
        let paths = || ["rgb.png", "grey.jpg", "tall.png"].map(|name| folder.join(name)).to_vec();
        let transform = ImageTransform::new(8, 3);
        let size = 3 * 8 * 8 * 3;
        let [kept, read] = [size, size - 1].map(|kept| load(paths(), transform.clone(), kept).expect("images"));
        assert_eq!(kept.name, read.name);
        for number in 0..3 {
            let [one, other] = [&kept, &read].map(|loaded| (loaded.load)(number).expect("an image"));
            assert!(one == other && one.len() == 192);
        }
        let [one, other] = [0, 0].map(|number| (kept.load)(number).expect("an image"));
        assert!(Arc::ptr_eq(&one, &other));
        let other = load(vec![folder.join("rgb.png")], transform.clone(), size).expect("an image");
        assert_ne!(kept.name, other.name);
        assert!(
            load(vec![folder.join("cmyk.jpg")], transform, size).is_err_and(|why| why.to_string().contains("cmyk"))
        );
    }

    #[test]
    fn patches_divide_images() {
        assert_eq!([7, 32, 36, 100, 224].map(patch), [1, 4, 4, 10, 28]);
    }

    #[test]
    fn every_class_is_validated() {
        let files = |counts: &[usize]| -> Vec<(PathBuf, usize)> {
            let class = |(class, count): (usize, &usize)| vec![(PathBuf::new(), class); *count];
            counts.iter().enumerate().flat_map(class).collect()
        };
        let [train, validation] = split(&files(&[1, 2, 25]));
        assert_eq!(validation, [(2, 1), (12, 2), (22, 2)]);
        assert_eq!(train.len() + validation.len(), 28);
        assert!(train.iter().all(|one| !validation.contains(one)));
        assert!(split(&files(&[1, 1]))[1].is_empty());
    }
}
