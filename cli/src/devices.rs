//! `xt devices`: what there is to compute on, and what is missing and why.

use crate::{
    failure::{Result, print},
    ranks,
};

pub fn run() -> Result<()> {
    let lines = x_transformers::device::describe().into_iter().chain(ranks::describe());
    lines.into_iter().try_for_each(|line| print(format_args!("{line}\n")))
}
