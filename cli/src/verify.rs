//! `xt verify`: cases with known results, compared one by one.

use std::path::{Path, PathBuf};

use clap::Args;
use x_transformers::models::RunOptions;
use x_transformers_parity::{Bounds, Case, Comparison};

use crate::{
    compute::ComputeArgs,
    failure::{Failure, Result, print},
};

#[derive(Args)]
pub struct VerifyArgs {
    /// Paths of folders to search for cases, each a config.json with weights, inputs and expected tensors beside it
    #[arg(value_name = "DIR", required = true)]
    dirs: Vec<PathBuf>,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Maximum number of mismatched tensors that are printed per case.
const TOLD: usize = 3;

pub fn run(args: VerifyArgs) -> Result<()> {
    let device = args.compute.device()?;
    let bounds = Bounds::of(args.compute.dtype);
    let mut cases = Vec::new();
    for dir in &args.dirs {
        cases.extend(Case::folders(dir)?.into_iter().map(|folder| (name(&folder, dir), folder)));
    }
    let width = cases.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut failed = 0;
    for (name, folder) in &cases {
        let compare = || {
            let case = Case::read(folder)?;
            case.compare(&case.run(args.compute.dtype, &device, &RunOptions::default())?, &bounds)
        };
        let (passed, line) = match compare() {
            Ok(comparison) => (comparison.passed(), describe(&comparison)),
            Err(error) => (false, Failure::from(error).to_string()),
        };
        failed += usize::from(!passed);
        print(format_args!("{:6}  {name:width$}  {line}\n", if passed { "ok" } else { "FAILED" }))?;
    }
    print(format_args!("{} passed, {failed} failed\n", cases.len() - failed))?;
    match failed {
        0 => Ok(()),
        _ => Err(Failure::new(format_args!("{failed} of {} cases failed", cases.len()))),
    }
}

/// A case by its path below the folder that was searched.
fn name(folder: &Path, dir: &Path) -> String {
    let below = folder.strip_prefix(dir).ok().filter(|below| !below.as_os_str().is_empty());
    below.unwrap_or(folder).display().to_string()
}

fn describe(comparison: &Comparison) -> String {
    let Comparison { error, tensor, wrong, .. } = comparison;
    let mut line = if tensor.is_empty() { String::new() } else { format!("{error:.1e}  {tensor}") };
    if !wrong.is_empty() {
        let told = wrong.iter().take(TOLD).map(String::as_str).collect::<Vec<_>>().join(", ");
        let separator = if line.is_empty() { "" } else { "; " };
        line += &format!("{separator}{told}");
        if wrong.len() > TOLD {
            line += &format!(", and {} more", wrong.len() - TOLD);
        }
    }
    line
}
