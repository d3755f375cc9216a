//! `xt bench`: how fast a model is, on random data.

use std::{
    io::{self, BufRead},
    path::PathBuf,
    time::Instant,
};

use clap::{Args, ValueEnum, value_parser};
use serde_json::{Value, json};
use x_transformers::{
    Device, Error,
    config::{Config, ModelPlan},
    device::{Precision, describe, set_float32_matmul_precision},
    profile,
};

use crate::{
    compute::ComputeArgs,
    failure::{Failure, Result, print},
    files,
    keywords::KeywordArgs,
    profiler::{ProfileArgs, Profiler},
    progress::{Short, bytes, operations, resident_peak},
    workload::{Extent, Mode, Workload},
};

/// Repetitions after the first one that are not counted.
const WARM_UP: usize = 1;

#[derive(Args)]
pub struct BenchArgs {
    /// Path of the JSON config of a model
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    #[command(flatten)]
    keywords: KeywordArgs,

    /// Workload to time
    #[arg(long, value_enum)]
    mode: Mode,

    /// Batch size, in sequences or images
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
    batch: u32,

    /// Sequence length, in tokens; length of the prompt in mode generate [default: the model's max_seq_len, or 1024 if
    /// it has none]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    seq_len: Option<u32>,

    /// Number of tokens to generate in mode generate
    #[arg(long, value_name = "T", default_value_t = 64, value_parser = value_parser!(u32).range(1..))]
    new_tokens: u32,

    #[command(flatten)]
    compute: ComputeArgs,

    /// Precision of f32 matrix products, as in torch.set_float32_matmul_precision
    #[arg(long, value_enum, default_value_t = Exactness::Highest)]
    precision: Exactness,

    /// Number of CPU threads [default: RAYON_NUM_THREADS, or one per logical CPU]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,

    /// Number of timed repetitions, after the first one, which is reported separately, and a warm-up
    #[arg(long, value_name = "R", default_value_t = 10, value_parser = value_parser!(u32).range(1..))]
    repeat: u32,

    #[command(flatten)]
    profile: ProfileArgs,

    /// Print the results as one line of JSON
    #[arg(long)]
    json: bool,

    /// Interleave with other programs: run one repetition per line of standard input, print its seconds as a line of
    /// JSON, and report at the end of the input
    #[arg(long, conflicts_with_all = ["repeat", "profile", "trace"])]
    interleaved: bool,
}

/// [`Precision`] by the names of PyTorch.
#[derive(Clone, Copy, ValueEnum)]
enum Exactness {
    /// Operands and sums in f32
    Highest,
    /// Operands may be rounded, to TF32 or better
    High,
    /// Operands may be rounded to bf16
    Medium,
}

impl Exactness {
    fn precision(self) -> Precision {
        match self {
            Self::Highest => Precision::Highest,
            Self::High => Precision::High,
            Self::Medium => Precision::Medium,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Highest => "highest",
            Self::High => "high",
            Self::Medium => "medium",
        }
    }
}

pub fn run(args: BenchArgs) -> Result<()> {
    set_float32_matmul_precision(args.precision.precision());
    let device = args.compute.device()?;
    let text = files::config(&args.config)?;
    let broken = |error: Error| Failure::from(error).within(&args.config);
    let (config, call) = Config::with_call(&text).map_err(broken)?;
    let config = args.keywords.apply(config)?;
    let extent = Extent {
        batch: args.batch as usize,
        seq_len: args.seq_len.map(|length| length as usize),
        new_tokens: args.new_tokens as usize,
    };
    if let (ModelPlan::Vision(_), Some(_)) = (config.plan().map_err(broken)?, extent.seq_len) {
        let why = "the length of an image follows from its patches; omit --seq-len";
        return Err(Failure::new(why).within(&args.config));
    }
    let workload = Workload::new(&config, &call, args.mode, extent, args.compute.dtype, &device).map_err(broken)?;
    let Some(mut workload) = workload else {
        let why = match args.mode {
            Mode::Generate => "expected an AutoregressiveWrapper or XTransformer for `--mode generate`",
            Mode::Forward | Mode::Train => "is not the config of a model",
        };
        return Err(Failure::new(why).within(&args.config));
    };
    let mut time = || {
        let clock = Instant::now();
        workload.step().map(|()| clock.elapsed().as_secs_f64()).map_err(broken)
    };
    let mut profiler = Profiler::new(&args.profile);
    let mut seconds = if args.interleaved {
        interleaved(&mut time)?
    } else {
        let mut seconds = (0..=WARM_UP).map(|_| time()).collect::<Result<Vec<_>>>()?;
        for _ in 0..args.repeat {
            seconds.push(profiler.watch(&mut time)??);
        }
        seconds
    };
    let first = seconds.remove(0);
    // Of few steps in interleaved none may be left to warm up.
    seconds.drain(..WARM_UP.min(seconds.len() - 1));
    let profile = profiler.finish()?;
    let report = Report { args: &args, device: &device, workload: &workload, first, seconds, profile };
    if args.json { print(format_args!("{}\n", report.json())) } else { print(report.text()) }
}

/// The totals of a profile.
fn ops(report: &profile::Report) -> Vec<Value> {
    let op = |op: &profile::OpProfile| {
        json!({
            "op": op.name,
            "phase": op.phase.name(),
            "calls": op.calls,
            "seconds": op.seconds,
            "flop": op.operations,
            "bytes": op.bytes,
        })
    };
    report.ops().map(op).collect()
}

/// A step for each line of standard input.
fn interleaved(time: &mut impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    for line in io::stdin().lock().lines() {
        line.map_err(|error| Failure::new(format_args!("standard input: {error}")))?;
        seconds.push(time()?);
        print(format_args!("{}\n", json!({ "seconds": seconds.last() })))?;
    }
    if seconds.len() < 2 {
        return Err(Failure::new("--interleaved expects one line of standard input per step, and at least two lines"));
    }
    Ok(seconds)
}

/// Measurements of a run.
struct Report<'a> {
    args: &'a BenchArgs,
    device: &'a Device,
    workload: &'a Workload,
    /// Seconds of the first repetition.
    first: f64,
    /// Seconds of those that count.
    seconds: Vec<f64>,
    /// Where they went, if that was asked for.
    profile: Option<profile::Report>,
}

impl Report<'_> {
    /// Median, smallest and largest time.
    fn times(&self) -> [f64; 3] {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = ((sorted.len() - 1) / 2, sorted.len() / 2);
        [(sorted[low] + sorted[high]) / 2.0, sorted[0], sorted[sorted.len() - 1]]
    }

    fn text(&self) -> String {
        let Self { args, workload, first, .. } = self;
        let [median, least, most] = self.times();
        let what = match args.mode {
            Mode::Forward => "forward pass",
            Mode::Train => "loss, backward pass, AdamW",
            Mode::Generate => "generation",
        };
        let new = if args.mode == Mode::Generate { format!(" + {}", args.new_tokens) } else { String::new() };
        let rate = |count: f64| Short(count / median);
        let speed = workload
            .operations
            .map_or(String::new(), |count| format!(", {}/s of {}", operations(count / median), operations(count)));
        let tensors = bytes(self.device.memory().peak as u64);
        let profile = self.profile.as_ref().map_or(String::new(), |profile| format!("\n{profile}\n"));
        let resident = resident_peak().map_or(String::new(), |peak| format!("{} resident, ", bytes(peak)));
        format!(
            "{}: {} parameters, {}, precision {}, {}\n\
             {what} of {} x {}{new}\n\
             first       {first:.4} s\n\
             {:<11} median {median:.4} s, minimum {least:.4} s, maximum {most:.4} s\n\
             speed       {} tokens/s{speed}\n\
             peak memory {resident}{tensors} of tensors\n{profile}",
            args.config.display(),
            Short(workload.parameters() as f64),
            args.compute.dtype,
            args.precision.name(),
            self.machine(),
            args.batch,
            workload.seq_len,
            format!("{} more", self.seconds.len()),
            rate(workload.tokens as f64),
        )
    }

    fn json(&self) -> Value {
        let Self { args, workload, first, .. } = self;
        let [median, least, most] = self.times();
        json!({
            "config": args.config,
            "mode": args.mode.name(),
            "batch": args.batch,
            "seq_len": workload.seq_len,
            "new_tokens": (args.mode == Mode::Generate).then_some(args.new_tokens),
            "dtype": args.compute.dtype.name(),
            "precision": args.precision.name(),
            "device": self.device.to_string(),
            "machine": self.machine(),
            "threads": rayon::current_num_threads(),
            "parameters": workload.parameters(),
            "first_seconds": first,
            "median_seconds": median,
            "min_seconds": least,
            "max_seconds": most,
            "seconds": self.seconds,
            "tokens": workload.tokens,
            "tokens_per_second": workload.tokens as f64 / median,
            "flop": workload.operations,
            "flop_per_second": workload.operations.map(|count| count / median),
            "peak_resident_bytes": resident_peak(),
            "peak_tensor_bytes": self.device.memory().peak,
            "profile": self.profile.as_ref().map(ops),
        })
    }

    /// Returns a description of the processor or GPU.
    fn machine(&self) -> String {
        match self.device {
            // The first line is about the CPU.
            Device::Cpu => describe().into_iter().next().unwrap_or_default(),
            device => device.to_string(),
        }
    }
}
