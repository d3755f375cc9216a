//! `xt classify`: classes of texts, or the numbers of a regression, by a run of `xt train --task classify`.

use std::path::PathBuf;

use clap::Args;
use x_transformers::{
    DType, Device,
    pretrained::Pretrained,
    train::{Checkpoint, Classifier, ClassifierConfig, Label, LabelledBatch, LabelledText, TrainModel},
};

use crate::{
    failure::{Failure, Result, print},
    files,
    language::Language,
};

#[derive(Args)]
pub struct ClassifyArgs {
    /// Folder of a run of `xt train --task classify` or `--task regress`
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// Text to classify; may be repeated
    #[arg(long, value_name = "TEXT", required = true)]
    text: Vec<String>,

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
    let config = if Pretrained::is_one(&folder) { None } else { ClassifierConfig::read(&folder)? };
    let Some(config) = config else {
        return Err(Failure::new("is not a run of `xt train --task classify`").within(&args.checkpoint));
    };
    let missing = || Failure::new("names no tokenizer").within(&folder);
    let tokenizer = Checkpoint::load_training(&folder)?.tokenizer.ok_or_else(missing)?;
    let language = Language::open(&folder.join(tokenizer))?;
    let model = Classifier::load(&folder, DType::F32, &device)?;
    let longest = <Classifier as TrainModel>::max_seq_len(&config);
    for text in &args.text {
        let text_ = LabelledText { tokens: language.encode(text)?, label: Label::Class(0) };
        let LabelledBatch { tokens, mask, .. } = LabelledBatch::of_texts(&[&text_], longest)?;
        let logits = model.logits(&tokens.to_device(&device)?, &mask.to_device(&device)?)?;
        if config.labels.is_empty() {
            print(format_args!("{:.4}  {text}\n", logits.to_f64_vec()?[0]))?;
            continue;
        }
        let probabilities = logits.softmax()?.to_f64_vec()?;
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&one, &other| probabilities[other].total_cmp(&probabilities[one]));
        let shown = if args.all { order.len() } else { 1 };
        for &class in &order[..shown] {
            print(format_args!("{}  {:.4}  {text}\n", config.labels[class], probabilities[class]))?;
        }
    }
    Ok(())
}
