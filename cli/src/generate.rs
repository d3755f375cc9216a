//! `xt generate`: text from a checkpoint, shown as it is produced.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use clap::{ArgGroup, Args, value_parser};
use x_transformers::{
    Device, Tensor,
    io::read_limited,
    models::{AutoregressiveWrapper, BeamOptions, ForwardOptions, GenerateOptions},
};

use crate::{
    compute::finite,
    failure::{Failure, Result, print},
    language::{Language, Turn},
    sample,
    sampling::SamplingArgs,
    source::{Source, WeightsArgs},
    text::decode,
    unused::StrictArgs,
};

mod encoded;

#[derive(Args)]
#[command(group = ArgGroup::new("filter").multiple(false))]
pub struct GenerateArgs {
    /// Path of the checkpoint: a folder written by `xt train`, or a pretrained Llama, Mistral or Qwen 2 (a GGUF file or
    /// a `transformers` folder)
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,

    /// Path of the tokenizer: its folder, or a .json, .model or .txt file in it [default: that of the checkpoint]
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// Path of a low-rank adapter in PEFT's layout, for a pretrained model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,

    /// Text to continue, or the source of a run of --task seq2seq; repeat it to continue several texts independently [default: a newline, or the start of a document
    /// if `xt train` taught the model documents]
    #[arg(long, value_name = "TEXT", value_parser = some_text)]
    prompt: Vec<String>,

    /// Images to write captions of, by a run of --task caption
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "prompt")]
    image: Vec<PathBuf>,

    /// Format the prompt as a user message with the chat template of the pretrained model
    #[arg(long)]
    chat: bool,

    /// System message for --chat [default: that of the chat template, if any]
    #[arg(long, value_name = "TEXT", requires = "chat", value_parser = some_text)]
    system: Option<String>,

    /// Maximum number of tokens to generate; models of `xt train` without a tokenizer have one token per byte
    #[arg(long, value_name = "N", default_value_t = 256)]
    length: usize,

    #[command(flatten)]
    sampling: SamplingArgs,

    /// ID of a token that ends the text, such as 10 (newline) for bytes; may be repeated [default: the end tokens of a
    /// pretrained model]
    #[arg(long, value_name = "N")]
    eos: Vec<u32>,

    /// Stop string, which ends the text and is not printed; may be repeated
    #[arg(long, value_name = "TEXT", value_parser = some_text)]
    stop: Vec<String>,

    /// Number of beams of a beam search, which replaces sampling and prints the most likely text found
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..), conflicts_with_all = ["filter", "draft"])]
    beams: Option<u32>,

    /// Length penalty of --beams: scores are log-probabilities divided by length^P, so that above 0 favours long texts
    #[arg(long, value_name = "P", default_value_t = 1.0, requires = "beams", value_parser = finite)]
    length_penalty: f64,

    /// Path of a smaller draft model with the same tokenizer, for speculative decoding
    #[arg(long, value_name = "PATH")]
    draft: Option<PathBuf>,

    /// Number of tokens that the model of --draft proposes at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = value_parser!(u32).range(1..=64), requires = "draft")]
    ahead: u32,

    #[command(flatten)]
    types: WeightsArgs,

    /// Number of prompt tokens to process at a time
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = value_parser!(u32).range(1..))]
    prefill: u32,

    /// Recompute the whole text for each token instead of using a KV cache
    #[arg(long)]
    no_cache: bool,

    /// Print tokens per second to standard error; always on if that is a terminal
    #[arg(long)]
    stats: bool,

    /// Path of a text to score instead of generating; prints its bits per byte under the model, for instance to compare
    /// --weights
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "beams", "draft"])]
    score: Option<PathBuf>,

    #[command(flatten)]
    strict: StrictArgs,

    /// Device: auto (a GPU if there is one), cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// Clap's own parser says of an empty value that there is none.
fn some_text(text: &str) -> std::result::Result<String, &'static str> {
    if text.is_empty() { Err("expected some text, got an empty string") } else { Ok(text.to_string()) }
}

/// A text to continue.
struct Prompt {
    /// Text printed before the continuation.
    shown: String,
    tokens: Vec<i64>,
}

pub fn run(args: GenerateArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    if encoded::run(&args, &device)? {
        return Ok(());
    }
    if !args.image.is_empty() {
        return Err(Failure::new("is not a run of `xt train --task caption`").within(&args.checkpoint));
    }
    let tokenizer = args.tokenizer.as_deref();
    let mut source = Source::open(&args.checkpoint, tokenizer, args.strict, args.types)?;
    if let Some(adapter) = &args.adapter {
        source.add_adapter(adapter)?;
    }
    if let Some(path) = &args.score {
        return score(&source, args.types, path, &device);
    }
    let (prompts, length) = args.prompts(&source)?;
    if args.chat && source.language.assumes_chat_form() {
        let note = "xt: the model has no chat template; using ChatML, whose tokens it has";
        let _ = writeln!(io::stderr(), "{note}");
    }
    let draft = args
        .draft
        .as_ref()
        .map(|path| Source::open(path, tokenizer, args.strict, args.types).map(|draft| (draft, path)))
        .transpose()?;
    if let Some((draft, path)) = &draft {
        let same = |(own, other): (&Prompt, &Prompt)| own.tokens == other.tokens;
        if !prompts.iter().zip(&args.prompts(draft).map_err(|failure| failure.within(path))?.0).all(same) {
            let why = "has a different tokenizer from the model; a draft model needs the same one";
            return Err(Failure::new(why).within(path));
        }
    }
    let vocabulary = source.vocabulary();
    if let Some(eos) = args.eos.iter().find(|&&eos| eos as usize >= vocabulary) {
        let why = format!("`--eos`: expected a token id in 0..{vocabulary} (the vocabulary), got {eos}");
        return Err(Failure::new(why).within(&args.checkpoint));
    }
    let model = source.model(args.types, &device)?;
    let options = GenerateOptions {
        eos_tokens: args.ends(&source)?,
        eos_in_prompt: false,
        prefill_chunk: args.prefill as usize,
        recompute: args.no_cache,
        ..args.sampling.options(1.0)
    };
    let start = Instant::now();
    let (mut tokens, mut note) = (0, String::new());
    let (language, stops) = (&source.language, &args.stop[..]);
    if let Some(beams) = args.beams {
        let beam = BeamOptions { beams: beams as usize, length_penalty: args.length_penalty };
        for prompt in &prompts {
            let options = prompt.options(language, &options, stops)?;
            let found = model.beam_search(&row(prompt, &device)?, length, &beam, &options)?;
            let best = found.into_iter().flatten().next().map(|hypothesis| hypothesis.tokens).unwrap_or_default();
            tokens += show(language, prompt, &best, &options.eos_tokens, stops)?;
        }
    } else if let Some((draft, _)) = &draft {
        let draft = draft.model(args.types, &device)?;
        let (mut proposed, mut accepted) = (0, 0);
        for prompt in &prompts {
            print(&prompt.shown)?;
            let options = prompt.options(language, &options, stops)?;
            let mut text = language.shown(&prompt.tokens, &options.eos_tokens, stops)?;
            let mut shown = Ok(());
            let mut on_token = |new: &[Vec<i64>]| {
                shown = new.iter().flatten().try_for_each(|&token| print(text.push(token)?));
                shown.is_ok()
            };
            let ahead = args.ahead as usize;
            let (new, stats) =
                model.generate_with_draft(&draft, ahead, &row(prompt, &device)?, length, &options, &mut on_token)?;
            shown?;
            print(format_args!("{}\n", text.finish()?))?;
            tokens += new.numel();
            (proposed, accepted) = (proposed + stats.proposed, accepted + stats.accepted);
        }
        note = format!(", {accepted} of {proposed} draft tokens accepted");
    } else if let [prompt] = &prompts[..] {
        print(&prompt.shown)?;
        let options = prompt.options(language, &options, stops)?;
        let text = language.shown(&prompt.tokens, &options.eos_tokens, stops)?;
        tokens = sample::stream(&model, text, &prompt.tokens, length, &options, &device, |text| print(text))?;
        print("\n")?;
    } else {
        tokens = together(&model, language, &prompts, length, options, stops, &device)?;
    }
    if args.stats || io::stderr().is_terminal() {
        let seconds = start.elapsed().as_secs_f64();
        // The text has been printed: figures that nobody can read are not worth a failure.
        let _ =
            writeln!(io::stderr(), "{tokens} tokens in {seconds:.2} s, {:.0} tokens/s{note}", tokens as f64 / seconds);
    }
    Ok(())
}

impl GenerateArgs {
    /// The prompts as tokens of a model, and how many tokens may follow each.
    fn prompts(&self, source: &Source) -> Result<(Vec<Prompt>, usize)> {
        let mut length = self.length;
        let mut prompts = Vec::new();
        let nothing = ["\n".to_string()];
        if self.prompt.is_empty()
            && !self.chat
            && let Some(begin) = source.language.begin()
        {
            return Ok((vec![Prompt { shown: String::new(), tokens: vec![begin] }], length));
        }
        for text in if self.prompt.is_empty() { &nothing[..] } else { &self.prompt } {
            let (shown, tokens) = if self.chat {
                let system = self.system.as_deref().map(|system| Turn::new("system", system));
                let turns: Vec<Turn> = system.into_iter().chain([Turn::new("user", text)]).collect();
                (String::new(), source.language.chat(&turns, "omit `--chat`")?)
            } else {
                (decode(text.as_bytes()), source.language.encode(text)?)
            };
            if tokens.is_empty() {
                return Err(Failure::new("the prompt has no tokens; give some text"));
            }
            length = length.min(source.room(tokens.len())?);
            prompts.push(Prompt { shown, tokens });
        }
        Ok((prompts, length))
    }

    /// The tokens that end a text: those asked for, or those that the model's files name, and special ones among the
    /// stop strings.
    fn ends(&self, source: &Source) -> Result<Vec<i64>> {
        let mut ends: Vec<i64> = self.eos.iter().map(|&eos| eos.into()).collect();
        if ends.is_empty() {
            ends = source.ends(self.chat);
        }
        for stop in &self.stop {
            let token = source.language.hidden_token(stop)?;
            ends.extend(token.filter(|&token| (token as usize) < source.vocabulary()));
        }
        Ok(ends)
    }
}

impl Prompt {
    /// Options with the end of this prompt's row at stop strings.
    fn options(&self, language: &Language, options: &GenerateOptions, stops: &[String]) -> Result<GenerateOptions> {
        Ok(GenerateOptions { row_ends: language.row_ends(&[&self.tokens], stops)?, ..options.clone() })
    }
}

fn row(prompt: &Prompt, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_slice(&prompt.tokens, [prompt.tokens.len()], device)?)
}

/// All prompts in one batch; each text is shown when all are done.
fn together(
    model: &AutoregressiveWrapper,
    language: &Language,
    prompts: &[Prompt],
    length: usize,
    mut options: GenerateOptions,
    stops: &[String],
    device: &Device,
) -> Result<usize> {
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.tokens.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let padded: Vec<i64> = prompts
        .iter()
        .flat_map(|prompt| {
            let padding = std::iter::repeat_n(0, longest - prompt.tokens.len());
            prompt.tokens.iter().copied().chain(padding)
        })
        .collect();
    // A text is the same whatever the others are.
    options.row_seeds = Some(vec![options.seed; lengths.len()]);
    options.prompt_lengths = Some(lengths);
    let all: Vec<&[i64]> = prompts.iter().map(|prompt| &prompt.tokens[..]).collect();
    options.row_ends = language.row_ends(&all, stops)?;
    let new =
        model
            .generate(&Tensor::from_vec(padded, [prompts.len(), longest], device)?, length, &options, &mut |_| true)?;
    let width = new.shape()[1];
    let new = new.to_vec::<i64>()?;
    let mut tokens = 0;
    for (number, prompt) in prompts.iter().enumerate() {
        let row = &new[number * width..][..width];
        tokens += show(language, prompt, row, &options.eos_tokens, stops)?;
    }
    Ok(tokens)
}

/// Prints a prompt and what follows it, up to its end; gives the number of tokens.
fn show(language: &Language, prompt: &Prompt, tokens: &[i64], ends: &[i64], stops: &[String]) -> Result<usize> {
    let mut text = language.shown(&prompt.tokens, ends, stops)?;
    let shown = tokens.iter().map(|&token| text.push(token)).collect::<Result<String>>()?;
    let count = text.tokens;
    print(format_args!("{}{shown}{}\n", prompt.shown, text.finish()?))?;
    Ok(count)
}

/// Bits per byte of a text, in windows that follow each other: what each token is predicted from begins anew with each.
fn score(source: &Source, types: WeightsArgs, path: &Path, device: &Device) -> Result<()> {
    /// Tokens at a time, which bounds the memory of their logits.
    const TOKENS: usize = 1024;
    let text = read_limited(path, u64::MAX)?;
    let tokens: Vec<i64> = match &source.language {
        // Bytes need not be text.
        Language::Bytes => text.iter().copied().map(i64::from).collect(),
        language => language.encode(str::from_utf8(&text).map_err(|why| Failure::new(why).within(path))?)?,
    };
    if tokens.len() < 2 {
        let why = format!("has {} tokens, expected at least 2 to score", tokens.len());
        return Err(Failure::new(why).within(path));
    }
    let model = source.model(types, device)?;
    let (width, predicted) = (source.predicted().min(TOKENS), tokens.len() - 1);
    let whole = predicted / width;
    // A window ends with the token that the next one begins with.
    let window = |number: usize| &tokens[number * width..][..width + 1];
    let mut nats = 0.0;
    let mut add = |rows: &[&[i64]]| -> Result<()> {
        let shape = [rows.len(), rows[0].len()];
        let loss = model.loss(&Tensor::from_vec(rows.concat(), shape, device)?, &ForwardOptions::default())?.item()?;
        nats += loss * (shape[0] * (shape[1] - 1)) as f64;
        Ok(())
    };
    let windows: Vec<&[i64]> = (0..whole).map(window).collect();
    windows.chunks((TOKENS / width).max(1)).try_for_each(&mut add)?;
    if predicted > whole * width {
        add(&[&tokens[whole * width..]])?;
    }
    // The first token is given.
    let bytes = text.len() - source.language.length(tokens[0])?.min(text.len() - 1);
    let bits = nats / bytes as f64 / std::f64::consts::LN_2;
    if !bits.is_finite() {
        let overflow = if types.are_f16() { " or overflow f16; try `--weights bf16`" } else { "" };
        return Err(Failure::new(format_args!("the loss is not finite: the weights are broken{overflow}")));
    }
    print(format_args!("{bits:.4} bits per byte of {bytes} bytes\n"))
}
