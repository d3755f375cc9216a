//! Where and how precisely to compute.

use std::{
    hint::black_box,
    io::{self, ErrorKind},
    sync::mpsc,
    thread::{self, available_parallelism},
};

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use x_transformers::{DType, Device, train::OptimizerKind};

use crate::failure::{self, Failure};

/// For commands that compare with other implementations: the CPU unless another device is asked for.
#[derive(Args)]
pub struct ComputeArgs {
    /// Device: auto (a GPU if there is one), cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,

    /// Data type of the weights and activations
    #[arg(long, default_value = "f32", value_parser = dtypes([DType::F32, DType::F64, DType::BF16, DType::F16]))]
    pub dtype: DType,
}

impl ComputeArgs {
    pub fn device(&self) -> failure::Result<Device> {
        Ok(Device::parse(&self.device)?)
    }
}

/// Starts the compute threads: `wanted` of them, else `RAYON_NUM_THREADS`, else one for each processor.
///
/// Errors: the system refuses them. One thread is always there: it is the one that calls.
pub fn start_threads(wanted: Option<u32>) -> failure::Result<()> {
    let variable = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&n| n > 0);
    let wanted = wanted.map(|threads| threads as usize).or(variable);
    let threads = wanted.unwrap_or_else(|| available_parallelism().map_or(1, |threads| threads.get()));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    let pool = if threads == 1 { pool.use_current_thread() } else { pool };
    pool.spawn_handler(start_thread).build_global().map_err(|error| {
        Failure::new(format_args!(
            "cannot start {threads} threads: {error}; allow the process more threads and memory, or set \
             RAYON_NUM_THREADS=1"
        ))
    })
}

/// Starts one thread, and returns when it runs. The standard library aborts the process if a thread that exists finds
/// no memory for its signal stack, so that is looked for first, and no other thread is made meanwhile.
fn start_thread(worker: rayon::ThreadBuilder) -> io::Result<()> {
    const ROOM: usize = 4 << 20;
    let mut room = Vec::<u8>::new();
    room.try_reserve_exact(ROOM).map_err(|_| ErrorKind::OutOfMemory)?;
    drop(black_box(room));
    let (begun, begins) = mpsc::channel();
    thread::Builder::new().spawn(move || {
        drop(begun);
        worker.run()
    })?;
    // An error, since nothing is ever sent.
    let _: Result<(), _> = begins.recv();
    Ok(())
}

/// Takes the names of these dtypes.
pub fn dtypes<const N: usize>(allowed: [DType; N]) -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(allowed.map(DType::name)).try_map(move |name| {
        let named = |dtype: &DType| dtype.name() == name;
        allowed.into_iter().find(named).ok_or_else(|| format!("unknown dtype {name}"))
    })
}

/// Takes the names of optimizers.
pub fn optimizers() -> impl TypedValueParser<Value = OptimizerKind> {
    PossibleValuesParser::new(OptimizerKind::ALL.map(OptimizerKind::name)).try_map(|name| name.parse::<OptimizerKind>())
}

/// A number that is neither infinite nor NaN.
pub fn finite(text: &str) -> Result<f64, String> {
    number(text, "a finite number", f64::is_finite)
}

/// A finite number above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    number(text, "a finite number above 0", |x| x.is_finite() && x > 0.0)
}

/// A finite number from 0 on.
pub fn positive_or_zero(text: &str) -> Result<f64, String> {
    number(text, "a finite number of at least 0", |x| x.is_finite() && x >= 0.0)
}

/// A number from 0 to 1.
pub fn fraction(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|&x| fits(x)).ok_or_else(|| format!("expected {expected}"))
}
