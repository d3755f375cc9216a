//! Texts that a decoder writes of what an encoder read: runs of `xt train --task seq2seq` and `--task caption`.

use std::path::Path;

use x_transformers::{
    DType, Device, ParamStore, Result as LibraryResult, Tensor,
    config::{Config, ModelPlan},
    models::{EncoderDecoderOptions, GenerateOptions, XTransformer},
    pretrained::Pretrained,
    train::{Captioner, CaptionerConfig, Checkpoint, TrainModel},
};

use super::GenerateArgs;
use crate::{
    failure::{Failure, Result, print},
    files, images,
    language::Language,
    source, tokenize,
};

/// Generates with a run whose model has an encoder; `false` if the checkpoint is that of another model.
pub fn run(args: &GenerateArgs, device: &Device) -> Result<bool> {
    let folder = files::checkpoint(&args.checkpoint);
    if Pretrained::is_one(&folder) || !Checkpoint::is_in(&folder) {
        return Ok(false);
    }
    if let Ok(Some(config)) = CaptionerConfig::read(&folder) {
        args.refuse_unused()?;
        captions(args, &folder, &config, device)?;
        return Ok(true);
    }
    // Other kinds of folders are handled by the caller.
    match Checkpoint::load_config(&folder).and_then(|config| config.plan()) {
        Ok(ModelPlan::EncoderDecoder(_)) => {
            args.refuse_unused()?;
            sources(args, &folder, device)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Callback that receives new tokens and returns `true` to continue.
type Show<'s> = &'s mut dyn FnMut(&[i64]) -> bool;

/// Function that continues a text by at most a number of tokens.
type Generate<'g> = &'g mut dyn FnMut(&Tensor, usize, &GenerateOptions, Show) -> LibraryResult<Tensor>;

impl GenerateArgs {
    /// Refuses options of models that continue a prompt.
    fn refuse_unused(&self) -> Result<()> {
        let wrong = [
            ("tokenizer", self.tokenizer.is_some()),
            ("adapter", self.adapter.is_some()),
            ("chat", self.chat),
            ("beams", self.beams.is_some()),
            ("draft", self.draft.is_some()),
            ("score", self.score.is_some()),
            ("weights", !self.types.are_stored()),
            ("stats", self.stats),
            ("strict", self.strict.is_given()),
        ];
        match wrong.into_iter().find(|(_, given)| *given) {
            Some((name, _)) => {
                let why = format!("has an encoder, with which `--{name}` cannot be used; omit it");
                Err(Failure::new(why).within(&self.checkpoint))
            }
            None => Ok(()),
        }
    }

    /// Writes a text that begins and ends with a token, of at most this many; `generate` continues what it is given.
    fn write(&self, language: &Language, longest: usize, device: &Device, generate: Generate) -> Result<()> {
        let border = match language.tokenizer() {
            Some(tokenizer) => tokenize::begin(tokenizer)?,
            None => 0,
        };
        let options = GenerateOptions {
            eos_tokens: [vec![border], self.eos.iter().map(|&eos| eos.into()).collect()].concat(),
            eos_in_prompt: false,
            prefill_chunk: self.prefill as usize,
            recompute: self.no_cache,
            row_ends: language.row_ends(&[&[border]], &self.stop)?,
            ..self.sampling.options(0.0)
        };
        let mut shown = language.shown(&[border], &options.eos_tokens, &self.stop)?;
        let mut printed = Ok(());
        let mut show = |new: &[i64]| {
            printed = new.iter().try_for_each(|&token| print(shown.push(token)?));
            printed.is_ok()
        };
        let start = Tensor::from_slice(&[border], [1, 1], device)?;
        let _ = generate(&start, self.length.min(longest), &options, &mut show)?;
        printed?;
        print(format_args!("{}\n", shown.finish()?))
    }
}

/// Prints the target of each source.
fn sources(args: &GenerateArgs, folder: &Path, device: &Device) -> Result<()> {
    if args.prompt.is_empty() {
        return Err(Failure::new("has an encoder of texts; give its input with `--prompt`").within(&args.checkpoint));
    }
    let (config, weights): (Config, _) = Checkpoint::load_averaged(folder)?;
    let language = source::language(folder, None, <XTransformer as TrainModel>::num_tokens(&config))?;
    let longest = <XTransformer as TrainModel>::max_seq_len(&config);
    let store = ParamStore::zeros(DType::F32, device);
    let model = <XTransformer as TrainModel>::build(&config, &store)?;
    store.params().load(&weights)?;
    drop(weights);
    for text in &args.prompt {
        let tokens = match language.tokenizer() {
            Some(tokenizer) => tokenizer.encode_plain(text)?,
            None => text.bytes().map(i64::from).collect(),
        };
        if tokens.is_empty() || tokens.len() > longest {
            let count = tokens.len();
            let why = format!("the prompt has {count} tokens, expected 1 to {longest}, which the encoder reads");
            return Err(Failure::new(why));
        }
        let source = Tensor::from_slice(&tokens, [1, tokens.len()], device)?;
        args.write(&language, longest, device, &mut |start, length, options, show| {
            model.generate(&source, start, length, &EncoderDecoderOptions::default(), options, show)
        })?;
    }
    Ok(())
}

/// Prints the caption of each image.
fn captions(args: &GenerateArgs, folder: &Path, config: &CaptionerConfig, device: &Device) -> Result<()> {
    if args.image.is_empty() {
        return Err(Failure::new("has an encoder of images; give its input with `--image`").within(&args.checkpoint));
    }
    let language = source::language(folder, None, Captioner::num_tokens(config))?;
    let model = Captioner::load(folder, DType::F32, device)?;
    let (transform, longest) = (&config.transform, Captioner::max_seq_len(config));
    for path in &args.image {
        let pixels = transform.crop(&images::read(path)?)?;
        let image = transform.normalize(&[(&pixels, false)])?.to_device(device)?;
        args.write(&language, longest, device, &mut |start, length, options, show| {
            model.generate(&image, start, length, options, show)
        })?;
    }
    Ok(())
}
