//! A model and random data for it: what `xt bench` repeats.

use std::collections::BTreeMap;

use clap::ValueEnum;
use x_transformers::{
    DType, Device, ParamStore, Philox, Result, Tape, Tensor,
    config::{Call, Config, GenerateCall, LayersPlan, MaskedCall, ModelPlan, VisionHead},
    models::{Model, RunOptions},
    train::{AdamW, AdamWOptions, Optimizer},
};

use crate::cost::{Cost, Sizes};

/// A workload to repeat.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// Forward pass to logits or vectors, without gradients
    Forward,
    /// Training step: loss (the model's own, cross-entropy of its logits, or mean square of its vectors), backward
    /// pass, AdamW
    Train,
    /// Generation of new tokens after a prompt
    Generate,
}

impl Mode {
    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Train => "train",
            Self::Generate => "generate",
        }
    }
}

/// Size of the workload.
#[derive(Clone, Copy)]
pub struct Extent {
    /// Sequences, or images.
    pub batch: usize,
    /// Their length, of a prompt if there is one; the longest that the model takes if `None`.
    pub seq_len: Option<usize>,
    /// Tokens to generate.
    pub new_tokens: usize,
}

/// A model with inputs, and an optimizer if it is trained.
pub struct Workload {
    model: Model,
    call: Call,
    inputs: BTreeMap<String, Tensor>,
    loss: Loss,
    optimizer: Option<AdamW>,
    device: Device,
    /// The length of the sequences.
    pub seq_len: usize,
    /// Tokens, vectors or patches that one repetition reads or, generating, gives.
    pub tokens: usize,
    /// Floating-point operations of one repetition, if they can be told.
    pub operations: Option<f64>,
}

/// Loss that the gradients of a training step are taken of.
enum Loss {
    /// The output itself.
    Given,
    /// The cross-entropy of logits and these tokens or classes.
    Targets(Tensor),
    /// The mean of the squares.
    Squares,
}

/// Draws inputs.
struct Source<'a> {
    dtype: DType,
    device: &'a Device,
}

impl Source<'_> {
    fn tokens(&self, rows: usize, length: usize, limit: usize) -> Result<Tensor> {
        let random = Philox::new(1, 0);
        let token = |index: usize| random.below(index as u64, limit.max(1) as u64) as f64;
        Tensor::generate([rows, length], DType::I64, self.device, token)
    }

    fn floats(&self, shape: &[usize]) -> Result<Tensor> {
        let random = Philox::new(2, 0);
        Tensor::generate(shape, self.dtype, self.device, |index| random.normal(index as u64))
    }

    fn mask(&self, rows: usize, length: usize) -> Result<Tensor> {
        Tensor::ones([rows, length], DType::Bool, self.device)
    }

    /// The context that layers attend to, and a mask, all true, where padding is usual: in encoders.
    fn extras(&self, plan: &LayersPlan, rows: usize, length: usize) -> Result<Vec<(&'static str, Tensor)>> {
        let attentions = || plan.layers.iter().filter_map(|layer| layer.branch.attention());
        let mut extras = Vec::new();
        if attentions().any(|attention| !attention.causal) && !plan.cross_attend {
            extras.push(("mask", self.mask(rows, length)?));
        }
        if plan.cross_attend {
            extras.push(("context", self.floats(&[rows, length, plan.dim])?));
        }
        Ok(extras)
    }
}

impl Workload {
    /// A model with random weights, and random data.
    ///
    /// `call` may say how tokens are drawn. Errors: the config is illegal; `None` for a class that does not do this.
    pub fn new(
        config: &Config,
        call: &Call,
        mode: Mode,
        extent: Extent,
        dtype: DType,
        device: &Device,
    ) -> Result<Option<Self>> {
        // The forward pass of a wrapper with a loss is that of what it wraps.
        let plan = match (config.plan()?, mode) {
            (ModelPlan::Autoregressive(plan), Mode::Forward) => ModelPlan::Transformer(plan.net),
            (ModelPlan::ContinuousAutoregressive(plan), Mode::Forward) => ModelPlan::Continuous(plan.net),
            (plan, _) => plan,
        };
        let Extent { batch, new_tokens, .. } = extent;
        let sizes = Sizes { rows: batch, tokens: extent.seq_len };
        let Some((sizes, cost)) = Cost::of_plan(plan.clone(), sizes)? else {
            return Ok(None);
        };
        let length = sizes.tokens;
        let source = Source { dtype, device };
        let generates = mode == Mode::Generate;
        let mut loss = Loss::Squares;
        let mut inputs: Vec<(&str, Tensor)> = match &plan {
            ModelPlan::Autoregressive(plan) => {
                loss = Loss::Given;
                // The last token is predicted only, unless the model reads it too.
                let read = if plan.loss.reads_all { length } else { length + 1 };
                let (name, read) = if generates { ("start_tokens", length) } else { ("x", read) };
                let mut inputs = source.extras(&plan.net.layers, batch, length)?;
                inputs.push((name, source.tokens(batch, read, plan.net.num_tokens)?));
                inputs
            }
            ModelPlan::EncoderDecoder(plan) => {
                loss = Loss::Given;
                let src = source.tokens(batch, length, plan.enc.num_tokens)?;
                let mask = source.mask(batch, length)?;
                if generates {
                    let start = source.tokens(batch, 1, plan.dec.num_tokens)?;
                    vec![("seq_in", src), ("seq_out_start", start), (plan.masks[0], mask)]
                } else {
                    let read = if plan.loss.reads_all { length } else { length + 1 };
                    let tgt = source.tokens(batch, read, plan.dec.num_tokens)?;
                    vec![("src", src), ("tgt", tgt), (plan.masks[0], mask)]
                }
            }
            _ if generates => return Ok(None),
            ModelPlan::Transformer(plan) => {
                loss = Loss::Targets(source.tokens(batch, length, plan.num_tokens)?);
                let mut inputs = source.extras(&plan.layers, batch, length)?;
                inputs.push(("x", source.tokens(batch, length, plan.num_tokens)?));
                inputs
            }
            ModelPlan::Continuous(plan) => {
                let mut inputs = source.extras(&plan.layers, batch, length)?;
                let features = plan.dim_in.unwrap_or(plan.layers.dim);
                inputs.push(("x", source.floats(&[batch, length, features])?));
                inputs
            }
            ModelPlan::Vision(plan) => {
                let classes = match &plan.head {
                    VisionHead::FeedForward(head) => Some(head.dim_out),
                    VisionHead::Mean(classes) => *classes,
                    _ => None,
                };
                if let Some(classes) = classes {
                    loss = Loss::Targets(source.tokens(batch, 1, classes)?.reshape([batch])?);
                }
                let side = plan.patch_size * plan.patches.isqrt();
                vec![("img", source.floats(&[batch, plan.channels, side, side])?)]
            }
            ModelPlan::Layers(plan) => {
                let mut inputs = source.extras(plan, batch, length)?;
                inputs.push(("x", source.floats(&[batch, length, plan.dim])?));
                inputs
            }
            _ => return Ok(None),
        };
        let sampling = call.generate.as_ref().map(|generate| generate.sampling.clone()).unwrap_or_default();
        let generate = GenerateCall {
            restrict_to_max_seq_len: true,
            seq_len: Some(new_tokens),
            eos_token: None,
            sampling,
            pads_open_rows: false,
            cache_kv: true,
            masked: MaskedCall::default(),
        };
        let (tokens, operations) = match mode {
            Mode::Forward => (batch * length, Some(cost.forward)),
            Mode::Train => (batch * length, Some(cost.training())),
            Mode::Generate => (batch * new_tokens, Cost::of_generation(plan.clone(), batch, length, new_tokens)?),
        };
        Ok(Some(Self {
            model: Model::from_plan(plan, &ParamStore::new(0, dtype, device))?,
            call: Call { generate: generates.then_some(generate), ..Call::default() },
            inputs: inputs.drain(..).map(|(name, tensor)| (name.to_string(), tensor)).collect(),
            loss,
            optimizer: (mode == Mode::Train).then(|| AdamW::new(AdamWOptions::default())).transpose()?,
            device: device.clone(),
            seq_len: length,
            tokens,
            operations,
        }))
    }

    /// The number of weights.
    pub fn parameters(&self) -> usize {
        self.model.params().numel()
    }

    /// One repetition, and all that the device has to do for it.
    ///
    /// Errors: sizes that the model does not take; memory runs out.
    pub fn step(&mut self) -> Result<()> {
        let Self { model, call, inputs, loss, optimizer, device, .. } = self;
        let options = RunOptions::default();
        match optimizer {
            Some(optimizer) => {
                let mut tape = Tape::train(optimizer.steps());
                let loss = match loss {
                    Loss::Given => model.forward(inputs, call, &options)?,
                    Loss::Targets(targets) => model.cross_entropy(inputs, targets, -100, &options)?,
                    Loss::Squares => model.forward(inputs, call, &options)?.square()?.mean(&[])?,
                };
                let gradients = tape.backward(&loss)?;
                optimizer.step(model.params(), &gradients, 1e-4, None)?;
            }
            None if call.generate.is_some() => drop(model.run(inputs, call, &options)?),
            None => drop(model.forward(inputs, call, &options)?),
        }
        device.synchronize()
    }
}
