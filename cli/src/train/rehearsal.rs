//! `--dry-run`: parameters, memory and time of a run, from a few steps that are thrown away.

use std::time::{Duration, Instant};

use indicatif::HumanCount;
use x_transformers::{Device, train::Trainer};

use super::{data::About, task::Task};
use crate::{
    failure::{Result, print},
    progress::{bytes, duration, peak_memory},
};

/// Steps: the first takes longer, the others are timed.
const STEPS: u32 = 4;

/// Runs a few steps and a validation, and prints what the whole run would take.
pub fn run<T: Task>(mut trainer: Trainer<T>, device: &Device, about: &About) -> Result<()> {
    let options = trainer.options().clone();
    print(format_args!("parameters  {}\n", HumanCount(trainer.params().numel() as u64)))?;
    print(format_args!("data        {}\n", about.line))?;
    let (mut times, mut tokens) = (Vec::new(), 0);
    for _ in 0..STEPS {
        let clock = Instant::now();
        tokens = trainer.step()?.tokens;
        times.push(clock.elapsed());
    }
    let step = times[1..].iter().sum::<Duration>() / (STEPS - 1);
    let clock = Instant::now();
    trainer.validate()?;
    let validation = clock.elapsed();
    trainer.end_ranks()?;
    let count = options.steps / options.every + 2;
    let whole = step.mul_f64(options.steps as f64) + validation.mul_f64(count as f64);
    let speed = tokens as f64 / step.as_secs_f64().max(1e-9);
    print(format_args!("memory      {} at most, on {device}\n", bytes(peak_memory(device))))?;
    print(format_args!("step        {:.3} s, {speed:.0} {}\n", step.as_secs_f64(), about.unit().speed()))?;
    print(format_args!("validation  {:.3} s, {count} times\n", validation.as_secs_f64()))?;
    print(format_args!("run         {} for {} steps\n", duration(whole), options.steps))?;
    print("nothing was written\n")
}
