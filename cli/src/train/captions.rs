//! `--task caption`: captions of the images in a folder, as Hugging Face's `imagefolder` has them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use indicatif::HumanCount;
use x_transformers::{
    Device, Result as LibraryResult,
    config::{
        AttentionLayersConfig, AutoregressiveConfig, Config, LayersPlan, TransformerWrapperConfig,
        ViTransformerWrapperConfig,
    },
    train::{CaptionBatch, CaptionedImages, Captioner, CaptionerConfig, TrainModel, Trainer},
};

use super::{
    RATES, TrainArgs,
    data::{About, Data, DataArgs, Own},
    fit,
    images::{ImageArgs, Loaded, load_all},
    seq2seq::{Exact, about, of_language, two_texts},
    task::Task,
};
use crate::{
    documents::lines,
    failure::{Failure, Result, warn},
    images,
};

/// Files of captions, beside the images that they name.
const CAPTIONS: [&str; 2] = ["metadata.jsonl", "captions.jsonl"];
/// Tokens of a caption by default.
const LENGTH: usize = 64;

/// A caption, and where it is.
struct Record {
    path: PathBuf,
    line: u64,
    image: PathBuf,
    text: String,
}

impl Record {
    fn failure(&self, why: impl std::fmt::Display) -> Failure {
        Failure::new(format_args!("line {}: {why}", self.line)).within(&self.path)
    }
}

/// Finds the captions in a folder and in the folders in it, at least this many.
fn read(folder: &Path, least: usize) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut find = |folder: &Path, entries: &[PathBuf]| -> Result<()> {
        for path in entries {
            let is_one = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| CAPTIONS.contains(&name));
            if !is_one {
                continue;
            }
            for found in lines(path, |line: &[u8]| two_texts(line, ["file_name", "text"])) {
                let (line, [name, text]) = found?;
                let record = Record { path: path.clone(), line, image: folder.join(&name), text };
                if !record.image.is_file() {
                    return Err(record.failure(format_args!("file `{name}` does not exist in this folder")));
                }
                records.push(record);
            }
        }
        Ok(())
    };
    images::walk(folder, 0, &mut find)?;
    if records.len() < least {
        let purpose = if least > 1 { ": one to train on, one to validate on" } else { "" };
        let (count, names) = (records.len(), CAPTIONS.join(" or "));
        let why = format!("has {count} captions in files named {names}, expected at least {least}{purpose}");
        return Err(Failure::new(why).within(folder));
    }
    Ok(records)
}

/// Captions of images, before the images are read.
struct Captions {
    paths: Vec<PathBuf>,
    parts: [Vec<(usize, Vec<i64>)>; 2],
    border: i64,
    about: About,
}

impl Captions {
    fn open(args: &ImageArgs, own: Option<Own>) -> Result<Self> {
        let folder = args.validation_images.as_deref();
        let train = read(args.folder()?, if folder.is_some() { 1 } else { 2 })?;
        let validation = folder.map(|folder| read(folder, 1)).transpose()?;
        let (tokens, border) = of_language(own.as_ref())?;
        let (mut paths, mut numbers) = (Vec::new(), BTreeMap::new());
        let mut caption = |record: &Record| {
            let caption = tokens(&record.text).map_err(|why| record.failure(why))?;
            if caption.is_empty() {
                return Err(record.failure("the text has no tokens"));
            }
            // An image may have several captions.
            let image = fs::canonicalize(&record.image).map_err(|why| record.failure(why))?;
            let number = *numbers.entry(image).or_insert_with(|| {
                paths.push(record.image.clone());
                paths.len() - 1
            });
            Ok((number, caption))
        };
        let mut train = train.iter().map(&mut caption).collect::<Result<Vec<_>>>()?;
        let validation = match validation {
            Some(records) => {
                let images = train.iter().map(|(number, _)| *number + 1).max().unwrap_or(0);
                let other =
                    |record| {
                        let (number, tokens) = caption(record)?;
                        match number < images {
                            true => Err(Failure::new("is in `--images` too; validation needs other images")
                                .within(&record.image)),
                            false => Ok((number, tokens)),
                        }
                    };
                records.iter().map(other).collect::<Result<Vec<_>>>()?
            }
            None => {
                // Every tenth image with all its captions, or the last image.
                let last = train.iter().map(|(number, _)| *number).max().unwrap_or(0);
                let chosen = |number: usize| if last < 10 { number == last } else { number % 10 == 9 };
                let (validation, rest) = train.into_iter().partition(|(number, _)| chosen(*number));
                train = rest;
                validation
            }
        };
        if train.is_empty() || validation.is_empty() {
            let why = "has captions of only one image, expected at least 2: one to train on, one to validate on";
            return Err(Failure::new(why).within(args.folder()?));
        }
        let [count, validated] = [&train, &validation].map(|part| HumanCount(part.len() as u64));
        let line =
            format!("{count} captions to train on, {validated} to validate, {} images", HumanCount(paths.len() as u64));
        drop(tokens);
        let about = about(own, line)?;
        Ok(Self { paths, parts: [train, validation], border, about })
    }

    fn load(self, config: &CaptionerConfig) -> Result<(CaptionedImages, About)> {
        let Self { paths, parts: [train, validation], border, about } = self;
        let transform = config.transform.clone();
        let Loaded { name, load } = load_all(paths, transform.clone())?;
        let source = CaptionedImages::new(name, train, validation, border, transform, load)?;
        Ok((source.with_flip(config.flip), about))
    }
}

/// Begins a run.
pub fn begin(args: &TrainArgs, device: &Device) -> Result<()> {
    args.refuse_beside("caption", &["from", "lora-rank", "config"])?;
    let images = &args.data.images;
    let own = args.data.tokenizer().map(Own::open).transpose()?;
    let captions = Captions::open(images, own)?;
    let vision = match args.preset {
        Some(preset) => preset.vision()?,
        None => images.model(&args.model),
    };
    let ViTransformerWrapperConfig { image_size, attn_layers: layers, .. } = &vision;
    let (image_size, max_seq_len) = (*image_size, args.options.seq_len.unwrap_or(LENGTH));
    let attn_layers = AttentionLayersConfig {
        heads: layers.heads,
        attn: layers.attn.clone(),
        cross_attend: true,
        ..AttentionLayersConfig::decoder(layers.dim, layers.depth)
    };
    let num_tokens = captions.about.num_tokens.unwrap_or_default();
    let net = TransformerWrapperConfig { num_tokens, max_seq_len, attn_layers, ..Default::default() };
    let decoder = args.keywords.apply(AutoregressiveConfig { net, ..Default::default() }.into())?;
    let encoder = Config::ViTransformerWrapper(vision);
    let mut config = CaptionerConfig::new(encoder.clone(), decoder.clone(), image_size)?;
    images.prepare(&mut config.transform)?;
    config.flip = images.flip;
    super::check_vocabulary(&captions.about, Captioner::num_tokens(&config))?;
    let options = args.train_options(super::length(Captioner::max_seq_len(&config)), RATES[0]);
    let build = |store: &_| Captioner::build(&config, store).map(drop);
    // The two models are about as large; what is counted is the larger share of either.
    for part in [&encoder, &decoder] {
        fit::check_as(args, part, &options, device, &build)?;
    }
    let (source, about) = captions.load(&config)?;
    let cut = source.cut(options.seq_len);
    if cut > 0 {
        warn(format_args!("{cut} captions are cut to {} tokens; `--seq-len` changes it", options.seq_len));
    }
    super::begin(args, args.build(|| Trainer::<Captioner>::start(config, options, source, device))?, about, device)
}

impl Task for Captioner {
    type Seen = Exact;

    fn data(args: &DataArgs, own: Option<Own>, checkpoint: &Path) -> Result<Data<CaptionBatch>> {
        let missing = || Failure::new("is not a run of `--task caption`").within(checkpoint);
        let config = CaptionerConfig::read(checkpoint)?.ok_or_else(missing)?;
        let (source, about) = Captions::open(&args.images, own)?.load(&config)?;
        Ok(Data { source: Box::new(source), about })
    }

    fn layers(&self) -> &LayersPlan {
        &self.decoder().net.plan().layers
    }

    fn hint(dir: &str, _: &About) -> Option<String> {
        Some(format!("generate --checkpoint {dir} --image FILE"))
    }

    fn see(&self, batch: &CaptionBatch, seen: &mut Exact) -> LibraryResult<()> {
        seen.see(&batch.captions, &mut |start, length, options| {
            self.generate(&batch.images, start, length, options, &mut |_| true)
        })
    }

    fn scores(&self, seen: Exact, loss: f64) -> Vec<(&'static str, f64)> {
        seen.scores(loss)
    }
}
