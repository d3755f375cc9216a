//! `xt classify`: classes of texts or images, or the numbers of a regression, by a run of `xt train`.

use std::path::{Path, PathBuf};

use clap::Args;
use x_transformers::{
    DType, Device, Tensor,
    pretrained::Pretrained,
    train::{
        Checkpoint, Classifier, ClassifierConfig, ImageClassifier, ImageClassifierConfig, Label, LabelledBatch,
        LabelledText, TrainModel,
    },
};

use crate::{
    failure::{Failure, Result, print},
    files, images,
    language::Language,
};

#[derive(Args)]
pub struct ClassifyArgs {
    /// Folder of a run of `xt train --task classify`, `--task regress` or `--task image`
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// Text to classify; may be repeated
    #[arg(long, value_name = "TEXT", required_unless_present = "image")]
    text: Vec<String>,

    /// Images to classify, PNG or JPEG files
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "text")]
    image: Vec<PathBuf>,

    /// Print the probability of every class
    #[arg(long)]
    all: bool,

    /// Device: auto (a GPU if there is one), cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

pub fn run(args: ClassifyArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    let folder = files::checkpoint(&args.checkpoint);
    if !args.image.is_empty() {
        return of_images(&args, &folder, &device);
    }
    let config = if Pretrained::is_one(&folder) { None } else { ClassifierConfig::read(&folder)? };
    let Some(config) = config else {
        return Err(Failure::new("is not a run of `xt train --task classify`").within(&args.checkpoint));
    };
    let missing = || Failure::new("names no tokenizer").within(&folder);
    let name = Checkpoint::load_training(&folder)?.tokenizer.ok_or_else(missing)?;
    let language = Language::open(&folder.join(name))?;
    let model = Classifier::load(&folder, DType::F32, &device)?;
    let longest = <Classifier as TrainModel>::max_seq_len(&config);
    // As the run read its texts, with what the tokenizer puts around them.
    let tokenizer = language.tokenizer().ok_or_else(missing)?;
    for text in &args.text {
        let text_ = LabelledText { tokens: tokenizer.encode(text)?, label: Label::Class(0) };
        let LabelledBatch { tokens, mask, .. } = LabelledBatch::of_texts(&[&text_], longest)?;
        let logits = model.logits(&tokens.to_device(&device)?, &mask.to_device(&device)?)?;
        if config.labels.is_empty() {
            print(format_args!("{:.4}  {text}\n", logits.to_f64_vec()?[0]))?;
            continue;
        }
        show(&logits, &config.labels, args.all, text)?;
    }
    Ok(())
}

/// Prints the most likely class, or all of them, before what has it.
fn show(logits: &Tensor, labels: &[String], all: bool, what: impl std::fmt::Display) -> Result<()> {
    let probabilities = logits.softmax()?.to_f64_vec()?;
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|&one, &other| probabilities[other].total_cmp(&probabilities[one]));
    let shown = if all { order.len() } else { 1 };
    for &class in &order[..shown] {
        print(format_args!("{}  {:.4}  {what}\n", labels[class], probabilities[class]))?;
    }
    Ok(())
}

/// Classifies image files.
fn of_images(args: &ClassifyArgs, folder: &Path, device: &Device) -> Result<()> {
    let own = !Pretrained::is_one(folder) && ImageClassifierConfig::read(folder)?.is_some();
    if !own {
        return Err(Failure::new("is not a run of `xt train --task image`").within(&args.checkpoint));
    }
    let model = ImageClassifier::load(folder, DType::F32, device)?;
    let transform = &model.config().transform;
    for path in &args.image {
        let pixels = transform.crop(&images::read(path)?)?;
        let logits = model.logits(&transform.normalize(&[(&pixels, false)])?.to_device(device)?)?;
        show(&logits, &model.config().labels, args.all, path.display())?;
    }
    Ok(())
}
