//! `xt kernels`: compiles the CUDA kernels ahead of their first use, for the card at hand or for others.

use std::path::PathBuf;

use clap::{Args, builder::TypedValueParser};
use rayon::prelude::*;
use x_transformers::device::{
    CudaDevice,
    cuda::{Target, cubin_in, folder},
    kernels::{KernelSource, LAB_SOURCES, SOURCES},
};

use crate::failure::{Failure, Result, print};

#[derive(Args)]
pub struct KernelsArgs {
    /// Names of the kernel sources to compile, such as copy for kernels/copy.cu [default: all]
    names: Vec<String>,

    /// Architectures to compile for, comma-separated, such as sm_80,sm_90a (H100 and H200: sm_90a); needs no GPU
    /// [default: that of the first GPU]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = target())]
    arch: Vec<Target>,

    /// Also compile the kernels that only benchmarks launch (kernels/lab)
    #[arg(long)]
    lab: bool,

    /// Folder for the compiled kernels [default: XT_KERNEL_CACHE, or the user's cache folder]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

/// `sm_80`, `80`, `sm_90a` or, for the driver to compile, `compute_90`.
fn target() -> impl TypedValueParser<Value = Target> {
    clap::builder::StringValueParser::new().try_map(|text| text.parse::<Target>())
}

pub fn run(args: KernelsArgs) -> Result<()> {
    let Some(folder) = args.cache.or_else(folder) else {
        return Err(Failure::new("XT_KERNEL_CACHE=off leaves nowhere to store the kernels; set --cache"));
    };
    let sources: Vec<_> = SOURCES.iter().chain(args.lab.then_some(LAB_SOURCES).into_iter().flatten()).collect();
    if let Some(name) = args.names.iter().find(|name| !sources.iter().any(|source| source.name == name.as_str())) {
        let known: Vec<_> = sources.iter().map(|source| source.name).collect();
        return Err(Failure::new(format_args!("unknown kernel source `{name}`, expected one of {}", known.join(", "))));
    }
    let wanted = |source: &&&KernelSource| args.names.is_empty() || args.names.iter().any(|name| name == source.name);
    let targets = match args.arch.as_slice() {
        [] => vec![CudaDevice::open(0)?.target()],
        given => given.to_vec(),
    };
    for target in targets {
        let variants = sources.iter().filter(wanted).flat_map(|source| {
            let options = source.options().into_iter();
            options.map(move |options| (*source, options))
        });
        let variants: Vec<_> = variants.collect();
        let found = variants.par_iter().map(|(source, options)| -> Result<bool> {
            let cached = cubin_in(&folder, source, options, target)?;
            cached.unwritten.map_or(Ok(cached.found), |why| Err(why.into()))
        });
        let found = found.collect::<Result<Vec<_>>>()?;
        let present = found.iter().filter(|found| **found).count();
        let (compiled, folder) = (found.len() - present, folder.display());
        print(format_args!("{target}: {compiled} compiled, {present} already cached, in {folder}\n"))?;
    }
    Ok(())
}
