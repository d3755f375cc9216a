//! `xt quantize`: a GGUF file with fewer bits a weight.

use std::{fs, path::PathBuf};

use clap::{Args, ValueEnum};
use x_transformers::{QuantType, io::TensorFile, pretrained::Pretrained};

use crate::{
    describe,
    failure::{Failure, Result, print},
};

#[derive(Args)]
pub struct QuantizeArgs {
    /// GGUF file of a model that generates text, with weights of any type that is read
    #[arg(value_name = "PATH")]
    model: PathBuf,

    /// GGUF file to write, which llama.cpp reads too
    #[arg(value_name = "OUT.gguf")]
    out: PathBuf,

    /// Type of the weights
    #[arg(long = "type", value_enum, value_name = "TYPE", default_value_t = Kind::Q4K)]
    kind: Kind,

    /// Replace OUT.gguf if it exists
    #[arg(long)]
    overwrite: bool,
}

/// Types that files are written in.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// 8.5 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
    /// 6.6 bits
    #[value(name = "q6_k")]
    Q6K,
    /// 5.5 bits
    #[value(name = "q5_k")]
    Q5K,
    /// 4.5 bits, scales and minima of 6 bits
    #[value(name = "q4_k")]
    Q4K,
    /// 4.5 bits, one scale for 32 weights
    #[value(name = "q4_0")]
    Q4_0,
}

impl Kind {
    fn quantized(self) -> QuantType {
        match self {
            Self::Q8_0 => QuantType::Q8_0,
            Self::Q6K => QuantType::Q6K,
            Self::Q5K => QuantType::Q5K,
            Self::Q4K => QuantType::Q4K,
            Self::Q4_0 => QuantType::Q4_0,
        }
    }
}

pub fn run(args: QuantizeArgs) -> Result<()> {
    let pretrained = Pretrained::open(&args.model)?;
    if !pretrained.family().is_causal() {
        let why = format!("belongs to the {} family, which does not generate text", pretrained.family());
        return Err(Failure::new(why).within(&args.model));
    }
    if fs::symlink_metadata(&args.out).is_ok() && !args.overwrite {
        return Err(Failure::new("already exists; replace it with `--overwrite`").within(&args.out));
    }
    pretrained.write_quantized(&args.out, args.kind.quantized())?;
    print(format_args!("{}\n", describe::types(&TensorFile::open(&args.out)?)))
}
