//! `xt kernels`: compiles the CUDA kernels ahead of their first use, for the card at hand or for others.

use std::path::PathBuf;

use clap::{Args, builder::TypedValueParser};
use x_transformers::device::{
    CudaDevice,
    cuda::{Architecture, cubin_in, folder},
    kernels::{KernelSource, SOURCES},
};

use crate::failure::{Failure, Result, print};

#[derive(Args)]
pub struct KernelsArgs {
    /// Sources to compile, by their names in `kernels/` [default: all]
    names: Vec<String>,

    /// Cards to compile for, as sm_80,sm_90; needs no GPU [default: the card at hand]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = architecture())]
    arch: Vec<Architecture>,

    /// Where the code is kept [default: XT_KERNEL_CACHE, else the user's cache folder]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

/// `sm_80` or `80`.
fn architecture() -> impl TypedValueParser<Value = Architecture> {
    clap::builder::StringValueParser::new().try_map(|text| match text.trim_start_matches("sm_").parse() {
        Ok(architecture @ 75..=999) => Ok(architecture),
        _ => Err(format!("expected a card like sm_80, at least sm_75, got `{text}`")),
    })
}

pub fn run(args: KernelsArgs) -> Result<()> {
    let Some(folder) = args.cache.or_else(folder) else {
        return Err(Failure::new("XT_KERNEL_CACHE=off: there is nowhere to keep the code; give --cache"));
    };
    if let Some(name) = args.names.iter().find(|name| KernelSource::named(name).is_none()) {
        let known: Vec<_> = SOURCES.iter().map(|source| source.name).collect();
        return Err(Failure::new(format_args!("there is no kernel source `{name}`; there are {}", known.join(", "))));
    }
    let wanted = |source: &&KernelSource| args.names.is_empty() || args.names.iter().any(|name| name == source.name);
    let architectures = match args.arch.as_slice() {
        [] => vec![CudaDevice::open(0)?.architecture()],
        given => given.to_vec(),
    };
    for architecture in architectures {
        let (mut compiled, mut present) = (0, 0);
        for source in SOURCES.iter().filter(wanted) {
            for options in source.options() {
                let cached = cubin_in(&folder, source, &options, architecture)?;
                cached.unwritten.map_or(Ok(()), Err)?;
                *(if cached.found { &mut present } else { &mut compiled }) += 1;
            }
        }
        let folder = folder.display();
        print(format_args!("sm_{architecture}: {compiled} compiled, {present} were there already, in {folder}\n"))?;
    }
    Ok(())
}
