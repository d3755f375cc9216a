//! `xt generate`: text from a checkpoint, shown as it is produced.

use std::{fs, io::IsTerminal, path::PathBuf, time::Instant};

use clap::{ArgGroup, Args, ValueEnum, builder::NonEmptyStringValueParser, value_parser};
use x_transformers::{
    DType, Device, Error, Store, Tensor,
    config::{Config, FilterLogits, SamplingConfig},
    io::Pretrained,
    models::{AutoregressiveWrapper, BeamOptions, ForwardOptions, GenerateOptions},
    train::Checkpoint,
};

use crate::{
    failure::{Failure, Result, print},
    files,
    pretrained::{self, Continue},
    sample,
    text::decode,
};

#[derive(Args)]
#[command(group = ArgGroup::new("filter").multiple(false))]
pub struct GenerateArgs {
    /// Folder that `xt train` wrote; or a pretrained Llama: a GGUF file, or a folder of `transformers`
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,

    /// Text to continue; several are continued together, each by itself
    #[arg(long, value_name = "TEXT", default_value = "\n", hide_default_value = true, value_parser = NonEmptyStringValueParser::new())]
    prompt: Vec<String>,

    /// The prompt is a question to a pretrained model that chats
    #[arg(long)]
    chat: bool,

    /// Bytes to add, of a pretrained model tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    length: usize,

    /// Divides the logits: below 1 safer, above 1 bolder, 0 takes the best byte
    #[arg(long, value_name = "T", default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,

    /// Choose among the N best bytes [default: a tenth of the vocabulary]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..), group = "filter")]
    top_k: Option<u32>,

    /// Choose among the best bytes that have this probability together
    #[arg(long, value_name = "P", group = "filter")]
    top_p: Option<f64>,

    /// Choose among bytes with at least this share of the best one's probability
    #[arg(long, value_name = "P", group = "filter")]
    min_p: Option<f64>,

    /// Choose alike among bytes with at least this share of the square of the best one's probability
    #[arg(long, value_name = "P", group = "filter")]
    top_a: Option<f64>,

    /// Choose by 1.3-entmax instead of softmax
    #[arg(long, group = "filter")]
    entmax: bool,

    /// Makes bytes that are there already less likely, above 1
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f64,

    /// Token that ends a text, for instance 10 for a line
    #[arg(long, value_name = "N")]
    eos: Option<u32>,

    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Follow the N most likely texts at once and show the best; nothing is drawn
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..), conflicts_with_all = ["filter", "draft"])]
    beams: Option<u32>,

    /// With --beams: above 0 favours long texts
    #[arg(long, value_name = "P", default_value_t = 1.0, requires = "beams", allow_negative_numbers = true)]
    length_penalty: f64,

    /// Folder of a smaller model that proposes bytes, which the model then judges several at a time
    #[arg(long, value_name = "DIR")]
    draft: Option<PathBuf>,

    /// With --draft: bytes that it proposes at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = value_parser!(u32).range(1..=64), requires = "draft")]
    ahead: u32,

    /// What the weights are kept as
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    weights: Weights,

    /// Bytes of a prompt that are computed at a time
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = value_parser!(u32).range(1..))]
    prefill: u32,

    /// Compute the whole text for each byte, without a cache of keys and values
    #[arg(long)]
    no_cache: bool,

    /// Print tokens per second on standard error, as on a terminal always
    #[arg(long)]
    stats: bool,

    /// Print the bits per byte that the model needs for a text instead: what --weights costs
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "beams", "draft"])]
    score: Option<PathBuf>,

    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// What weights are kept as.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Weights {
    F32,
    Bf16,
    F16,
    /// Eight bits, a scale per row, sums in f32
    Int8,
}

pub fn run(args: GenerateArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    if Pretrained::is_one(&args.checkpoint) {
        return continue_pretrained(&args, &device);
    }
    if args.chat {
        return Err(Failure::new("`--chat` is for pretrained models; what `xt train` wrote continues bytes"));
    }
    let model = load(&args.checkpoint, args.weights, &device)?;
    if let Some(path) = &args.score {
        return score(&model, path, &device);
    }
    let options = GenerateOptions {
        sampling: args.sampling(),
        eos_token: args.eos.map(i64::from),
        seed: args.seed,
        repetition_penalty: args.repetition_penalty,
        prefill_chunk: args.prefill as usize,
        recompute: args.no_cache,
        ..Default::default()
    };
    let start = Instant::now();
    let (mut tokens, mut note) = (0, String::new());
    let stop = args.eos.map(i64::from);
    if let Some(beams) = args.beams {
        let beam = BeamOptions { beams: beams as usize, length_penalty: args.length_penalty };
        for prompt in &args.prompt {
            let found = model.beam_search(&bytes(prompt, &device)?, args.length, &beam, &options)?;
            let best = found.into_iter().flatten().next().map(|hypothesis| hypothesis.tokens).unwrap_or_default();
            tokens += best.len();
            show(prompt, &best, stop)?;
        }
    } else if let Some(draft) = &args.draft {
        let draft = load(draft, args.weights, &device)?;
        let (mut proposed, mut accepted) = (0, 0);
        for prompt in &args.prompt {
            print(decode(prompt.as_bytes()))?;
            let mut text = sample::Shown::new(stop);
            let mut shown = Ok(());
            let mut on_token = |new: &[Vec<i64>]| {
                shown = new.iter().flatten().try_for_each(|&token| print(text.push(token)));
                shown.is_ok()
            };
            let (ahead, prompt) = (args.ahead as usize, bytes(prompt, &device)?);
            let (new, stats) =
                model.generate_with_draft(&draft, ahead, &prompt, args.length, &options, &mut on_token)?;
            shown?;
            print(format_args!("{}\n", text.finish()))?;
            tokens += new.elements();
            (proposed, accepted) = (proposed + stats.proposed, accepted + stats.accepted);
        }
        note = format!(", {accepted} of {proposed} proposals of the draft taken");
    } else if let [prompt] = &args.prompt[..] {
        print(decode(prompt.as_bytes()))?;
        tokens = sample::stream(&model, prompt.as_bytes(), args.length, &options, &device, |text| print(text))?;
        print("\n")?;
    } else {
        tokens = together(&model, &args, options, &device)?;
    }
    if args.stats || std::io::stderr().is_terminal() {
        let seconds = start.elapsed().as_secs_f64();
        eprintln!("{tokens} tokens in {seconds:.2} s, {:.0} tokens/s{note}", tokens as f64 / seconds);
    }
    Ok(())
}

impl GenerateArgs {
    fn sampling(&self) -> SamplingConfig {
        let config = SamplingConfig { temperature: self.temperature, ..Default::default() };
        match (self.top_p, self.min_p, self.top_a, self.entmax) {
            (Some(mass), ..) => {
                SamplingConfig { filter_logits_fn: FilterLogits::Nucleus, filter_thres: mass, ..config }
            }
            (_, Some(share), ..) => {
                SamplingConfig { filter_logits_fn: FilterLogits::MinP, min_p_ratio: share, ..config }
            }
            (_, _, Some(share), _) => {
                SamplingConfig { filter_logits_fn: FilterLogits::TopA, min_p_ratio: share, ..config }
            }
            (.., true) => SamplingConfig { filter_logits_fn: FilterLogits::Entmax, ..config },
            _ => SamplingConfig { k: self.top_k.map(|k| k as usize), ..config },
        }
    }
}

/// The model of a checkpoint.
fn load(folder: &std::path::Path, weights: Weights, device: &Device) -> Result<AutoregressiveWrapper> {
    let dir = files::checkpoint(folder);
    let (config, values) = Checkpoint::load_model(&dir)?;
    let broken = |error: Error| Failure::from(error).within(&dir);
    let Config::AutoregressiveWrapper(config) = config else {
        let why = "expected an AutoregressiveWrapper; give the folder that `xt train` wrote";
        return Err(Failure::new(why).within(&dir));
    };
    let dtype = match weights {
        Weights::F32 | Weights::Int8 => DType::F32,
        Weights::Bf16 => DType::BF16,
        Weights::F16 => DType::F16,
    };
    let store = Store::zeros(dtype, device);
    let mut model = AutoregressiveWrapper::new(&config, &store).map_err(broken)?;
    store.params().load(&values).map_err(broken)?;
    if weights == Weights::Int8 {
        model.quantize_int8().map_err(broken)?;
    }
    Ok(model)
}

/// All prompts in one batch; each text is shown when all are done.
fn together(
    model: &AutoregressiveWrapper,
    args: &GenerateArgs,
    mut options: GenerateOptions,
    device: &Device,
) -> Result<usize> {
    let lengths: Vec<usize> = args.prompt.iter().map(String::len).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let padded: Vec<u8> = args
        .prompt
        .iter()
        .flat_map(|prompt| {
            let padding = std::iter::repeat_n(0, longest - prompt.len());
            prompt.bytes().chain(padding)
        })
        .collect();
    // A text is the same whatever the others are.
    options.row_seeds = Some(vec![args.seed; lengths.len()]);
    options.prompt_lengths = Some(lengths);
    let prompt = Tensor::from_vec(padded, [args.prompt.len(), longest], device)?;
    let new = model.generate(&prompt, args.length, &options, &mut |_| true)?;
    let width = new.shape()[1];
    let new = new.to_vec::<i64>()?;
    let rows: Vec<&[i64]> = (0..args.prompt.len()).map(|row| &new[row * width..][..width]).collect();
    let mut tokens = 0;
    for (prompt, row) in args.prompt.iter().zip(rows) {
        let end = options.eos_token.and_then(|eos| row.iter().position(|&token| token == eos));
        tokens += end.map_or(width, |end| end + 1);
        show(prompt, row, options.eos_token)?;
    }
    Ok(tokens)
}

/// A prompt and what follows it, up to its end.
fn show(prompt: &str, tokens: &[i64], stop: Option<i64>) -> Result<()> {
    let mut text = sample::Shown::new(stop);
    let shown: String = tokens.iter().map(|&token| text.push(token)).collect();
    print(format_args!("{}{shown}{}\n", decode(prompt.as_bytes()), text.finish()))
}

fn bytes(prompt: &str, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_slice(prompt.as_bytes(), [prompt.len()], device)?)
}

/// Bits per byte of a text in windows that follow each other.
fn score(model: &AutoregressiveWrapper, path: &std::path::Path, device: &Device) -> Result<()> {
    /// Windows at a time.
    const BATCH: usize = 4;
    let text = fs::read(path).map_err(|error| Failure::io(path, &error))?;
    let window = model.net.plan().max_seq_len + 1;
    if text.len() < window {
        let why = format!("has {} bytes; a window of this model takes {window}", text.len());
        return Err(Failure::new(why).within(path));
    }
    let windows: Vec<&[u8]> = text.chunks_exact(window).collect();
    let mut nats = 0.0;
    for part in windows.chunks(BATCH) {
        let tokens = Tensor::from_vec(part.concat(), [part.len(), window], device)?;
        nats += part.len() as f64 * model.loss(&tokens, &ForwardOptions::default())?.item()?;
    }
    let bits = nats / windows.len() as f64 / std::f64::consts::LN_2;
    print(format_args!("{bits:.4} bits per byte of {} bytes\n", windows.len() * (window - 1)))
}

/// Text by a pretrained model, one prompt at a time and with its own end.
fn continue_pretrained(args: &GenerateArgs, device: &Device) -> Result<()> {
    let refused = [
        ("--beams", args.beams.is_some()),
        ("--draft", args.draft.is_some()),
        ("--eos", args.eos.is_some()),
        ("--score", args.score.is_some()),
        ("--weights", args.weights != Weights::F32),
        ("several prompts", args.prompt.len() > 1),
    ];
    if let Some((name, _)) = refused.iter().find(|(_, given)| *given) {
        return Err(Failure::new(format_args!("{name}: not for pretrained models; leave it out")));
    }
    let options = GenerateOptions {
        sampling: args.sampling(),
        seed: args.seed,
        repetition_penalty: args.repetition_penalty,
        prefill_chunk: args.prefill as usize,
        recompute: args.no_cache,
        ..Default::default()
    };
    let prompt = args.prompt.first().map_or("", String::as_str);
    let asked = Continue { prompt, chat: args.chat, length: args.length, options };
    pretrained::generate(&args.checkpoint, asked, device)
}
