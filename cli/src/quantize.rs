//! `xt quantize`: a GGUF file with fewer bits a weight.

use std::{fs, path::PathBuf};

use clap::{Args, ValueEnum};
use x_transformers::{
    Error, ErrorKind, QuantType, Tensor,
    config::Config,
    io::TensorFile,
    pretrained::{Pretrained, write_quantized},
    train::Checkpoint,
};

use crate::{
    describe,
    failure::{Failure, Result, print},
    files,
    tokenizer::{self, Tokenizer},
};

#[derive(Args)]
pub struct QuantizeArgs {
    /// Model that generates text: a GGUF file with weights of any type that is read, a folder of transformers, or a
    /// folder of `xt train` with Llama's options
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
    let (out, kind) = (&args.out, args.kind.quantized());
    if fs::symlink_metadata(out).is_ok() && !args.overwrite {
        return Err(Failure::new("already exists; replace it with `--overwrite`").within(out));
    }
    if Pretrained::is_one(&args.model) {
        let pretrained = Pretrained::open(&args.model)?;
        if !pretrained.family().is_causal() {
            let why = format!("belongs to the {} family, which does not generate text", pretrained.family());
            return Err(Failure::new(why).within(&args.model));
        }
        let metadata = Tokenizer::gguf_metadata(&pretrained, None)?;
        pretrained.write_quantized(out, kind, &metadata)?;
    } else {
        let folder = files::checkpoint(&args.model);
        let (config, values) = Checkpoint::load_averaged(&folder)?;
        let Config::AutoregressiveWrapper(config) = config else {
            let why = "expected an AutoregressiveWrapper of version 0.22, as `xt train` writes it";
            return Err(Failure::new(why).within(&folder));
        };
        let parameter = |name: &str| -> x_transformers::Result<Tensor> {
            let value = values.get(&format!("net.{name}")).cloned();
            value.ok_or_else(|| {
                Error::new(ErrorKind::File { path: folder.clone(), why: format!("has no `net.{name}`") })
            })
        };
        let num_tokens = config.net.num_tokens;
        let training = Checkpoint::load_training(&folder).ok();
        let name = training.as_ref().and_then(|training| training.tokenizer.as_ref());
        let metadata = match name {
            Some(name) => {
                let path = folder.join(name);
                let end = tokenizer::open(&path)?.end_token();
                Tokenizer::gguf_metadata_of_file(&path, num_tokens, end)?
            }
            // A folder with only a config and weights is a model of bytes.
            None if training.as_ref().is_none_or(|training| training.data.kind == "text") => {
                Tokenizer::gguf_metadata_of_bytes(num_tokens)
            }
            None => {
                let why = "is a model of tokens whose run had no tokenizer, without which llama.cpp cannot read texts";
                return Err(Failure::new(why).within(&folder));
            }
        };
        write_quantized(out, &config.net, kind, &metadata, parameter)?;
    }
    print(format_args!("{}\n", describe::types(&TensorFile::open(out)?)))
}
