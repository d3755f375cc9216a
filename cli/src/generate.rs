//! `xt generate`: text from a checkpoint, shown as it is produced.

use std::path::PathBuf;

use clap::{Args, builder::NonEmptyStringValueParser, value_parser};
use x_transformers::{
    DType, Device, Error, Store,
    config::{Config, FilterLogits, SamplingConfig},
    io::Pretrained,
    models::{AutoregressiveWrapper, GenerateOptions},
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
pub struct GenerateArgs {
    /// Folder that `xt train` wrote; or a pretrained Llama: a GGUF file, or a folder of `transformers`
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,

    /// Text to continue
    #[arg(long, value_name = "TEXT", default_value = "\n", hide_default_value = true, value_parser = NonEmptyStringValueParser::new())]
    prompt: String,

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
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    top_k: Option<u32>,

    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

pub fn run(args: GenerateArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    if Pretrained::is_one(&args.checkpoint) {
        let (prompt, chat, length) = (args.prompt.as_str(), args.chat, args.length);
        let options = options(&args);
        return pretrained::generate(&args.checkpoint, Continue { prompt, chat, length, options }, &device);
    }
    if args.chat {
        return Err(Failure::new("`--chat` is for pretrained models; what `xt train` wrote continues bytes"));
    }
    let dir = files::checkpoint(&args.checkpoint);
    let (config, weights) = Checkpoint::load_model(&dir)?;
    let broken = |error: Error| Failure::from(error).within(&dir);
    let Config::AutoregressiveWrapper(config) = config else {
        let why = "expected an AutoregressiveWrapper; give the folder that `xt train` wrote";
        return Err(Failure::new(why).within(&dir));
    };
    let store = Store::zeros(DType::F32, &device);
    let model = AutoregressiveWrapper::new(&config, &store).map_err(broken)?;
    store.params().load(&weights).map_err(broken)?;

    let options = options(&args);
    print(decode(args.prompt.as_bytes()))?;
    sample::stream(&model, args.prompt.as_bytes(), args.length, &options, &device, |text| print(text))?;
    print("\n")
}

/// How tokens are drawn.
fn options(args: &GenerateArgs) -> GenerateOptions {
    let filter_logits_fn = FilterLogits::TopK;
    let k = args.top_k.map(|k| k as usize);
    let sampling = SamplingConfig { filter_logits_fn, k, temperature: args.temperature, ..Default::default() };
    GenerateOptions { sampling, seed: args.seed, ..Default::default() }
}
