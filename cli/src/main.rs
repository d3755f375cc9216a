//! `xt`: train, sample, inspect and check x-transformers from the command line.
//!
//! Exit codes: 0 done, 1 failed with one line on standard error, 2 wrong usage.

mod allocator;
mod bench;
mod chat;
mod classify;
mod columns;
mod compute;
mod convert;
mod corpus;
mod cost;
mod describe;
mod devices;
mod documents;
mod embed;
mod events;
mod export;
mod failure;
mod files;
mod generate;
mod images;
mod info;
mod interrupt;
#[cfg(feature = "cuda")]
mod kernels;
mod keywords;
mod language;
mod markov;
mod metrics;
mod plot;
mod profiler;
mod progress;
mod quantize;
mod ranks;
mod replacement;
mod run;
mod sample;
mod sampling;
mod scaling;
mod source;
mod stored;
mod tasks;
mod text;
mod tokenize;
mod tokenizer;
mod train;
mod typed;
mod unused;
mod verify;
mod workload;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};

use x_transformers::device::Level;

use failure::{Failure, Result};

#[global_allocator]
static ALLOCATOR: allocator::OrExit = allocator::OrExit;

/// Train, run, inspect and verify x-transformers models.
#[derive(Parser)]
#[command(name = "xt", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a language model on text, as bytes or tokens
    Train(Box<train::TrainArgs>),
    /// Learn a vocabulary, and turn texts into token files
    Tokenize(tokenize::TokenizeArgs),
    /// Generate text with a trained or pretrained model
    Generate(generate::GenerateArgs),
    /// Chat with a pretrained or tuned model
    Chat(chat::ChatArgs),
    /// Classify texts with a tuned encoder, or images
    Classify(classify::ClassifyArgs),
    /// Export a trained model to transformers, PEFT or PyTorch x-transformers
    Export(export::ExportArgs),
    /// Quantize the weights of a GGUF file
    Quantize(quantize::QuantizeArgs),
    /// Convert a config or run of x-transformers 0.22 to version 2
    Convert(convert::ConvertArgs),
    /// Compute sentence embeddings with a pretrained encoder
    Embed(embed::EmbedArgs),
    /// Show the parameters, layers and cost of a model
    Info(info::InfoArgs),
    /// Run the forward and backward pass of a model on tensors from files
    Run(run::RunArgs),
    /// Benchmark a model on random data
    Bench(bench::BenchArgs),
    /// Compare models with reference outputs
    Verify(verify::VerifyArgs),
    /// List the available devices and the state of the GPU libraries
    Devices,
    /// Compile the CUDA kernels ahead of time
    #[cfg(feature = "cuda")]
    Kernels(kernels::KernelsArgs),
}

impl Command {
    fn run(self) -> Result<()> {
        Level::wanted()?;
        match &self {
            Self::Devices => {}
            #[cfg(feature = "cuda")]
            Self::Kernels(_) => {}
            Self::Bench(args) => compute::start_threads(args.threads)?,
            _ => compute::start_threads(None)?,
        }
        match self {
            Self::Train(args) => train::run(*args),
            Self::Tokenize(args) => tokenize::run(args),
            Self::Generate(args) => generate::run(args),
            Self::Chat(args) => chat::run(args),
            Self::Classify(args) => classify::run(args),
            Self::Export(args) => export::run(args),
            Self::Quantize(args) => quantize::run(args),
            Self::Convert(args) => convert::run(args),
            Self::Embed(args) => embed::run(args),
            Self::Info(args) => info::run(args),
            Self::Run(args) => run::run(args),
            Self::Bench(args) => bench::run(args),
            Self::Verify(args) => verify::run(args),
            Self::Devices => devices::run(),
            #[cfg(feature = "cuda")]
            Self::Kernels(args) => kernels::run(args),
        }
    }
}

/// A negative number is a value of the option before it, which then says what it expects.
fn numbers(argument: Arg) -> Arg {
    if argument.get_action().takes_values() { argument.allow_negative_numbers(true) } else { argument }
}

fn main() -> ExitCode {
    let mut arguments = Cli::command().mut_subcommands(|command| command.mut_args(numbers)).get_matches();
    let command = Cli::from_arg_matches_mut(&mut arguments).unwrap_or_else(|error| error.exit()).command;
    match command.run() {
        Ok(()) | Err(Failure::ClosedPipe) => ExitCode::SUCCESS,
        Err(failure) => {
            // Where even standard error is closed, the exit code has to do.
            ranks::fail(&failure, |line| drop(writeln!(io::stderr(), "xt: {line}")));
            ExitCode::FAILURE
        }
    }
}
