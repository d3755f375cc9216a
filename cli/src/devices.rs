//! `xt devices`: what there is to compute on, and what is missing and why.

use crate::failure::{Result, print};

pub fn run() -> Result<()> {
    x_transformers::device::describe().into_iter().try_for_each(|line| print(format_args!("{line}\n")))
}
