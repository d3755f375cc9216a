//! `xt chat`: a conversation with a model.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    path::PathBuf,
    time::Instant,
};

use clap::{ArgGroup, Args};
use x_transformers::{
    Device, Tensor,
    models::{AutoregressiveWrapper, GenerateOptions},
};

use crate::{
    failure::{Failure, Result, print},
    interrupt,
    language::Turn,
    sampling::SamplingArgs,
    source::{Source, WeightsArgs},
    unused::StrictArgs,
};

/// Temperature unless another one is given.
const TEMPERATURE: f64 = 0.7;

#[derive(Args)]
#[command(group = ArgGroup::new("filter").multiple(false))]
pub struct ChatArgs {
    /// Path of the model: a pretrained Llama, Mistral or Qwen 2 (a GGUF file or a `transformers` folder), or a run of `xt
    /// train` that tuned one
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,

    /// Path of the tokenizer: its folder, or a .json, .model or .txt file in it [default: that of the checkpoint]
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// Path of a low-rank adapter in PEFT's layout, for a pretrained model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,

    /// System message [default: that of the chat template, if any]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Maximum number of tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    length: usize,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    types: WeightsArgs,

    /// Print tokens per second after each answer to standard error
    #[arg(long)]
    stats: bool,

    #[command(flatten)]
    strict: StrictArgs,

    /// Device: auto (a GPU if there is one), cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// A line of input.
enum Line {
    Message(String),
    Reset,
    Exit,
    Help,
    Unknown(String),
    Empty,
}

impl Line {
    fn of(text: &str) -> Self {
        match text.trim() {
            "" => Self::Empty,
            "/reset" => Self::Reset,
            "/exit" | "/quit" => Self::Exit,
            "/help" => Self::Help,
            command if command.starts_with('/') => Self::Unknown(command.to_string()),
            message => Self::Message(message.to_string()),
        }
    }
}

const HELP: &str = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer";

/// A conversation so far.
struct Chat<'a> {
    args: &'a ChatArgs,
    source: &'a Source,
    model: AutoregressiveWrapper,
    device: Device,
    turns: Vec<Turn>,
    /// Number of answers, which draw other random numbers each.
    answers: u64,
}

pub fn run(args: ChatArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    let mut source = Source::open(&args.checkpoint, args.tokenizer.as_deref(), args.strict, args.types)?;
    if let Some(adapter) = &args.adapter {
        source.add_adapter(adapter)?;
    }
    // Whatever the model cannot do is said before its weights are read.
    source.language.chat(&[Turn::new("user", "x")], "use `xt generate`")?;
    if source.language.assumes_chat_form() {
        note("the model has no chat template; using ChatML, whose tokens it has");
    }
    let model = source.model(args.types, &device)?;
    let mut chat = Chat { args: &args, source: &source, model, device, turns: Vec::new(), answers: 0 };
    chat.reset();
    interrupt::listen_between_answers();
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    if terminal {
        note(HELP);
    }
    let mut lines = io::stdin().lock();
    loop {
        if terminal {
            print("> ")?;
        }
        let mut line = Vec::new();
        let read = lines.read_until(b'\n', &mut line);
        if read.map_err(|error| Failure::new(format_args!("standard input: {error}")))? == 0 {
            return if terminal { print("\n") } else { Ok(()) };
        }
        let text = String::from_utf8(line).map_err(|_| Failure::new("standard input: a message is not UTF-8"))?;
        match Line::of(&text) {
            Line::Empty => {}
            Line::Exit => return Ok(()),
            Line::Reset => chat.reset(),
            Line::Help => note(HELP),
            Line::Unknown(command) => note(format_args!("unknown command {command}; {HELP}")),
            Line::Message(message) => chat.answer(message)?,
        }
    }
}

/// Says something beside the conversation.
fn note(text: impl std::fmt::Display) {
    // A terminal that is gone is noticed when the answer is printed.
    let _ = writeln!(io::stderr(), "xt: {text}");
}

impl Chat<'_> {
    fn reset(&mut self) {
        let system = self.args.system.as_deref().map(|system| Turn::new("system", system));
        self.turns = system.into_iter().collect();
    }

    /// Prints the answer to a message.
    fn answer(&mut self, message: String) -> Result<()> {
        self.turns.push(Turn::new("user", message));
        let prompt = match self.prompt() {
            Ok(prompt) => prompt,
            Err(failure @ Failure::ClosedPipe) => return Err(failure),
            // A message that does not fit, or that a template refuses, is not the end of the conversation.
            Err(failure) => {
                self.turns.pop();
                note(failure);
                return Ok(());
            }
        };
        let Self { args, source, model, device, .. } = self;
        let length = args.length.min(source.room(prompt.len())?);
        let ends = source.ends(true);
        let options = GenerateOptions {
            eos_in_prompt: false,
            seed: args.sampling.seed().wrapping_add(self.answers),
            eos_tokens: ends.clone(),
            ..args.sampling.options(TEMPERATURE)
        };
        let mut shown = source.language.shown(&prompt, &ends, &[])?;
        let (mut answer, mut count, start) = (String::new(), 0, Instant::now());
        let mut show = |piece: &str| {
            answer.push_str(piece);
            if piece.is_empty() { Ok(()) } else { print(piece) }
        };
        let tokens = Tensor::from_slice(&prompt, [prompt.len()], device)?;
        let cancelled = interrupt::while_answering(|cancelled| {
            for tokens in model.stream(&tokens, length, &options)? {
                for token in tokens? {
                    count += 1;
                    show(&shown.push(token)?)?;
                }
                if cancelled() {
                    return Ok::<_, Failure>(true);
                }
            }
            Ok(false)
        })?;
        show(&shown.finish()?)?;
        print("\n")?;
        if cancelled {
            note("stopped");
        }
        if args.stats {
            let seconds = start.elapsed().as_secs_f64();
            note(format_args!("{count} tokens in {seconds:.2} s, {:.0} tokens/s", count as f64 / seconds));
        }
        self.turns.push(Turn::new("assistant", answer.trim()));
        self.answers += 1;
        Ok(())
    }

    /// The conversation as tokens. The oldest question and its answer are forgotten until the rest, and an answer of at
    /// least a quarter of the context, fit into the context.
    fn prompt(&mut self) -> Result<Vec<i64>> {
        loop {
            let tokens = self.source.language.chat(&self.turns, "use `xt generate`")?;
            let window = self.source.window();
            let wanted = self.args.length.min(window / 4);
            let first = usize::from(self.args.system.is_some());
            // The last message stays.
            if window == 0 || tokens.len() + wanted <= window || self.turns.len() <= first + 1 {
                self.source.room(tokens.len())?;
                if window > 0 && tokens.len() >= window {
                    let count = tokens.len();
                    let why =
                        format!("the message has {count} tokens with its system message, but the context is {window}");
                    return Err(Failure::new(why));
                }
                return Ok(tokens);
            }
            self.turns.drain(first..first + 2);
            note("the oldest question and its answer no longer fit into the context, and are forgotten");
        }
    }
}
