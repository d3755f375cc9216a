//! `--profile` and `--trace` of the commands that compute.

use std::{
    io::{BufWriter, Write},
    path::PathBuf,
};

use clap::Args;
use x_transformers::{
    io::write_atomically,
    profile::{Profile, Report},
};

use crate::failure::Result;

#[derive(Args)]
pub struct ProfileArgs {
    /// Print the time, FLOP/s, bytes/s and number of calls of each op, forward and backward separately; waits for a GPU
    /// after each op
    #[arg(long)]
    profile: bool,

    /// Path of a Chrome trace of all op calls to write, for chrome://tracing or ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// Watches steps and adds them up.
pub struct Profiler<'a> {
    args: &'a ProfileArgs,
    total: Report,
}

impl<'a> Profiler<'a> {
    pub fn new(args: &'a ProfileArgs) -> Self {
        Self { args, total: Report::default() }
    }

    /// Returns `true` if a profile was asked for.
    pub fn is_on(&self) -> bool {
        self.args.profile || self.args.trace.is_some()
    }

    /// Calls `step`, with a profile if one was asked for.
    pub fn watch<R>(&mut self, step: impl FnOnce() -> R) -> Result<R> {
        let profile = match self.args {
            ProfileArgs { trace: Some(_), .. } => Profile::with_trace()?,
            ProfileArgs { profile: true, .. } => Profile::start()?,
            _ => return Ok(step()),
        };
        let result = step();
        self.total.add(profile.finish());
        Ok(result)
    }

    /// Writes the trace, and gives the totals if they are to be shown.
    ///
    /// Errors: the file cannot be written.
    pub fn finish(self) -> Result<Option<Report>> {
        if let Some(path) = &self.args.trace {
            write_atomically(path, |file| {
                let mut file = BufWriter::new(file);
                self.total.write_trace(&mut file)?;
                file.flush()
            })?;
        }
        Ok(self.args.profile.then_some(self.total))
    }
}
