//! Transformers with every option of lucidrains' [x-transformers] 0.22, on a tensor engine of their own: autograd,
//! fused CPU kernels, and CUDA kernels that are compiled at run time. No libtorch, no CUDA toolkit at build time.
//!
//! [x-transformers]: https://github.com/lucidrains/x-transformers
//!
//! ```
//! use x_transformers::prelude::*;
//!
//! fn main() -> x_transformers::Result<()> {
//!     let mut layers = AttentionLayersConfig::decoder(64, 2); // width, depth
//!     layers.rotary_pos_emb = true;
//!     let net = TransformerWrapperConfig::new(256, 128, layers); // vocabulary, longest sequence
//!     let config = AutoregressiveConfig { net, ..Default::default() };
//!     let store = ParamStore::new(42, DType::F32, &Device::best()); // seed, dtype, device
//!     let model = AutoregressiveWrapper::new(&config, &store)?;
//!
//!     let tokens = Tensor::from_slice(b"to be or not to be", [1, 18], store.device())?;
//!     let mut optimizer = AdamW::new(AdamWOptions::default())?;
//!     for step in 0..3 {
//!         let mut tape = Tape::train(step); // records while it lives; the seed is dropout's
//!         let loss = model.loss(&tokens, &ForwardOptions::default())?;
//!         let grads = tape.backward(&loss)?;
//!         optimizer.step(&store.params(), &grads, 1e-3, Some(1.0))?; // learning rate, clipping
//!     }
//!
//!     let prompt = Tensor::from_slice(b"to be", [5], store.device())?;
//!     let new = model.generate(&prompt, 8, &GenerateOptions::default(), &mut |_tokens| true)?;
//!     assert_eq!(new.shape()[..], [8]);
//!     Ok(())
//! }
//! ```
//!
//! The manual is the book in `docs/` of the repository. Programs that take a model from files, tokenizers included, start
//! from [`pretrained::Pretrained`] and the crate `x-transformers-tokenizers`.
//!
//! # Map
//!
//! | module | contents |
//! |---|---|
//! | [`prelude`] | the names that most programs use |
//! | [`Tensor`], [`Shape`], [`DType`], [`Device`] | values and their place; every op is a method of [`Tensor`] |
//! | [`Tape`], [`Gradients`], [`checkpoint()`], [`gradcheck()`], [`record()`] | gradients, recomputation, checks, ops of your own |
//! | [`ParamStore`], [`Param`], [`ParamMap`], [`Init`] | parameters by their names in a PyTorch state dict |
//! | [`config`] | x-transformers' options, and the plans that they resolve to |
//! | [`nn`] | linear layers, norms, attention, feedforward, the layer loop |
//! | [`models`] | wrappers, generation, sentence encoders |
//! | [`pretrained`] | BERT, ALBERT, Llama, Mistral and Qwen 2 from the files of `transformers` and llama.cpp |
//! | [`train`] | optimizers, schedule, data, trainer, checkpoints |
//! | [`io`] | safetensors, GGUF and PyTorch files |
//! | [`ops`] | ops with arguments of their own, such as [`ops::attention`] |
//! | [`device`] | processors and GPUs: memory, precision, kernels |
//! | [`profile`] | time, operations and bytes of each op |
//!
//! # From PyTorch
//!
//! | PyTorch | here |
//! |---|---|
//! | `torch.tensor([1., 2.])`, `t.tolist()`, `t.item()` | [`Tensor::from_slice`], [`Tensor::to_vec`], [`Tensor::item`] |
//! | `t.to("cuda:0")`, `t.to(torch.bfloat16)` | [`Tensor::to_device`], [`Tensor::to_dtype`] |
//! | `a @ b`, `F.linear`, `F.softmax`, `F.layer_norm` | [`Tensor::matmul`], [`Tensor::linear`], [`Tensor::softmax`], [`Tensor::layer_norm`] |
//! | `F.scaled_dot_product_attention` | [`ops::attention`] |
//! | `loss.backward()`, `p.grad` | [`Tape::backward`], [`Gradients::param`] |
//! | `model.train()`, `torch.no_grad()` | [`Tape::train`]; without a tape nothing is recorded |
//! | `nn.Linear`, `nn.Embedding`, `nn.LayerNorm` | [`nn::Linear`], [`nn::Embedding`], [`nn::Norm`] |
//! | `model.state_dict()`, `load_state_dict` | [`ParamMap::state_dict`], [`ParamMap::load`] |
//! | `torch.optim`, `clip_grad_norm_` | [`train::Optimizer`], the `clip` argument of its steps |
//! | `torch.load`, `safetensors.torch.load_file` | [`io::TensorFile`], [`io::read_safetensors`] |
//! | `AutoModel.from_pretrained` | [`pretrained::Pretrained::open`] |
//! | `x_transformers.TransformerWrapper(…)` | [`models::TransformerWrapper::new`] with [`config::TransformerWrapperConfig`] |
//!
//! # Features
//!
//! | feature | default | effect |
//! |---|---|---|
//! | `cuda` | yes | [`Device::cuda`]: the driver, NVRTC and cuBLAS are opened when a program asks for a GPU, and NCCL for several; a build needs none of them |
//! | `mpi` | no | [`distributed`] over MPI: a build needs the system's MPI library and libclang |
//!
//! # Errors and threads
//!
//! Everything that can fail returns [`Result`]; no input of a caller makes the library panic. Tensors, parameters and models
//! are `Send` and `Sync`; a [`Tape`] belongs to its thread. Results have the same bits for any number of threads.
#![warn(missing_docs, missing_debug_implementations)]
#![deny(unsafe_op_in_unsafe_fn)]

mod atomic_file;
mod autograd;
mod collect;
pub mod config;
pub mod device;
pub mod distributed;
mod dtype;
mod error;
mod gemm;
#[cfg(feature = "cuda")]
mod graph;
mod hash;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
mod ordered;
mod params;
mod philox;
pub mod pretrained;
pub mod profile;
mod quantised;
mod shape;
mod sort;
mod tensor;
pub mod train;

#[cfg(feature = "cuda")]
pub use crate::graph::Graph;
pub use crate::{
    autograd::{
        Backward, Gradcheck, GradcheckReport, Gradients, InputGrad, InputGrads, InputReport, Mode, Tape, checkpoint,
        discrete, gradcheck, record,
    },
    device::Device,
    dtype::{DType, Element, FloatElement, Readable},
    error::{Error, ErrorKind, Result},
    params::{Buffer, Init, Param, ParamMap, ParamStore, deferred_init},
    philox::{Philox, philox4x32},
    quantised::QuantType,
    shape::{IntoShape, MAX_RANK, Shape},
    tensor::{GradSlice, KernelArg, LeafId, RawKernel, Tensor},
};

/// The half types of tensors, from the crate `half`.
pub use half::{bf16, f16};

/// The names that most programs use, for `use x_transformers::prelude::*`.
///
/// [`Result`] and [`Error`] are not among them, so that those of your program keep their names.
pub mod prelude {
    pub use crate::{
        DType, Device, Gradients, Init, Param, ParamMap, ParamStore, Tape, Tensor,
        config::{
            AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, ContinuousTransformerWrapperConfig,
            FeedForwardConfig, FilterLogits, LayerType, SamplingConfig, ShiftTokens, TransformerWrapperConfig,
            ViTransformerWrapperConfig, XTransformerConfig,
        },
        models::{
            AutoregressiveWrapper, BeamOptions, ContinuousAutoregressiveWrapper, ContinuousTransformerWrapper,
            EncoderDecoderOptions, ForwardOptions, GenerateOptions, Model, TransformerWrapper, ViTransformerWrapper,
            XTransformer,
        },
        ops::Activation,
        pretrained::Pretrained,
        train::{AdamW, AdamWOptions, ByteText, Optimizer, TrainOptions, Trainer},
    };
}

/// The programs of README.md and of the book, compiled and run with the other examples of the documentation.
#[cfg(doctest)]
mod book {
    macro_rules! pages {
        ($($name:ident: $file:literal,)*) => { $(#[doc = include_str!($file)] mod $name {})* };
    }
    pages! {
        readme: "../README.md",
        getting_started: "../docs/src/getting-started.md",
        command_line: "../docs/src/command-line.md",
        options: "../docs/src/options/index.md",
        models: "../docs/src/options/models.md",
        norms: "../docs/src/options/norms.md",
        feedforward: "../docs/src/options/feedforward.md",
        attention: "../docs/src/options/attention.md",
        order: "../docs/src/options/order.md",
        positions: "../docs/src/options/positions.md",
        memory: "../docs/src/options/memory.md",
        embeddings: "../docs/src/options/embeddings.md",
        two: "../docs/src/options/two.md",
        pretrained: "../docs/src/pretrained.md",
        quantised: "../docs/src/quantised.md",
        pytorch: "../docs/src/pytorch.md",
        training: "../docs/src/training.md",
        distributed: "../docs/src/distributed.md",
        tokens: "../docs/src/tokens.md",
        tuning: "../docs/src/tuning.md",
        adapters: "../docs/src/adapters.md",
        generation: "../docs/src/generation.md",
        gpu: "../docs/src/gpu.md",
        embedding: "../docs/src/embedding.md",
        numbers: "../docs/src/numbers.md",
        extending: "../docs/src/extending.md",
        messages: "../docs/src/messages.md",
        testing: "../docs/src/testing.md",
    }
}
