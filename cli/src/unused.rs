//! Weights of a pretrained model that it has no use for.

use std::path::Path;

use clap::Args;
use x_transformers::pretrained::Pretrained;

use crate::failure::{Failure, Result, warn};

#[derive(Args, Clone, Copy)]
pub struct StrictArgs {
    /// Fail, instead of warning, if a pretrained model does not use all weights in its files
    #[arg(long)]
    strict: bool,
}

impl StrictArgs {
    /// Returns `true` if the option was given.
    pub fn is_given(self) -> bool {
        self.strict
    }

    /// Warns of weights that a model does not use, or refuses them.
    pub fn check(self, pretrained: &Pretrained, path: &Path) -> Result<()> {
        self.refuse(pretrained, path)?;
        let unused = pretrained.unused();
        if !unused.is_empty() {
            warn(format_args!("{}: {}", path.display(), told(&unused)));
        }
        Ok(())
    }

    /// Refuses weights that a model does not use, if that is asked for.
    pub fn refuse(self, pretrained: &Pretrained, path: &Path) -> Result<()> {
        let unused = if self.strict { pretrained.unused() } else { Vec::new() };
        if unused.is_empty() {
            return Ok(());
        }
        let why = format!("{}; omit `--strict` to load the model without them", told(&unused));
        Err(Failure::new(why).within(path))
    }
}

fn told(unused: &[String]) -> String {
    format!("{} unused weights: {}", unused.len(), listed(unused))
}

/// Names, the first of them where there are many.
pub fn listed(names: &[String]) -> String {
    /// An optimizer may have thousands.
    const LISTED: usize = 12;
    let shown = names.iter().take(LISTED).cloned().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(LISTED) {
        Some(more @ 1..) => format!("{shown} and {more} more"),
        _ => shown,
    }
}
