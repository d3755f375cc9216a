//! Models of any class, run on named tensors.

use std::collections::BTreeMap;

use super::{
    AutoregressiveWrapper, ContinuousTransformerWrapper, EncoderDecoderOptions, GenerateOptions, Output,
    TransformerWrapper, ViTransformerWrapper, XTransformer, sampling::filter_probabilities,
};
use crate::{
    DType, Device, Error, Param, ParamMap, ParamStore, Result, Tape, Tensor,
    collect::CollectVec,
    config::{Call, Config, GenerateCall, LayersPlan, SamplingConfig},
    error::{ErrorContext, ensure},
    nn::{AttentionLayers, ForwardOptions},
    ordered::{ordered, try_ordered},
};

/// Model of any class.
///
/// ```
/// use std::collections::BTreeMap;
/// use x_transformers::{DType, Device, ParamStore, Tensor, config::{Call, Config}, models::Model};
/// # fn main() -> x_transformers::Result<()> {
/// let config = Config::from_json(r#"{"model": "Encoder", "dim": 8, "depth": 1, "heads": 2, "attn_dim_head": 4}"#)?;
/// let model = Model::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// let x = Tensor::generate([1, 3, 8], DType::F32, &Device::Cpu, |i| (i % 5) as f64)?;
/// let inputs = BTreeMap::from([("x".to_string(), x.clone()), ("cotangent".to_string(), x)]);
/// let outputs = model.run(&inputs, &Call::default(), &RunOptions { gradients: true, ..Default::default() })?;
/// assert_eq!(outputs["out"].shape()[..], [1, 3, 8]);
/// assert_eq!(outputs["grad.layers.0.1.to_q.weight"].shape()[..], [8, 8]);
/// # Ok(())
/// # }
/// # use x_transformers::models::RunOptions;
/// ```
#[derive(Clone, Debug)]
pub struct Model {
    kind: Kind,
    params: ParamMap,
    dtype: DType,
    device: Device,
}

#[derive(Clone, Debug)]
enum Kind {
    Transformer(TransformerWrapper),
    Continuous(ContinuousTransformerWrapper),
    Vision(ViTransformerWrapper),
    EncoderDecoder(Box<XTransformer>),
    Autoregressive(AutoregressiveWrapper),
    Layers(AttentionLayers),
    Filter(SamplingConfig),
}

/// Options of [`Model::run`].
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// If `true`, returns gradients too.
    pub gradients: bool,
    /// Like [`ForwardOptions::explicit_attention`].
    pub explicit_attention: bool,
    /// Like [`ForwardOptions::checkpoint_layers`].
    pub checkpoint_layers: bool,
    /// Seed of generated tokens.
    pub seed: u64,
}

/// Result of a forward pass: `out` or `loss`, and named extras.
struct Forward {
    name: &'static str,
    value: Tensor,
    extras: Vec<(String, Tensor)>,
}

impl Forward {
    fn new(name: &'static str, value: Tensor) -> Self {
        Self { name, value, extras: Vec::new() }
    }

    fn output(output: Output) -> Self {
        let name = |kind: &'static str| move |(index, tensor)| (format!("{kind}.{index}"), tensor);
        let mems = output.mems.into_iter().enumerate().map(name("mems"));
        let attn = output.attn.into_iter().enumerate().map(name("attn"));
        Self { name: "out", value: output.out, extras: mems.chain(attn).collect_vec() }
    }
}

/// Inputs by name, each of which must be used.
struct Inputs(BTreeMap<String, Tensor>);

impl Inputs {
    fn take(&mut self, name: &str) -> Option<Tensor> {
        self.0.remove(name)
    }

    fn need(&mut self, name: &str) -> Result<Tensor> {
        self.take(name).ok_or_else(|| Error::argument("inputs", format_args!("missing `{name}`")))
    }

    /// Takes `mems.0`, `mems.1`, … up to the first that is missing.
    fn mems(&mut self) -> Option<Vec<Tensor>> {
        let mems: Vec<Tensor> = (0..).map_while(|index| self.take(&format!("mems.{index}"))).collect_vec();
        (!mems.is_empty()).then_some(mems)
    }

    fn forward_options(&mut self, call: &Call, run: &RunOptions) -> ForwardOptions {
        ForwardOptions {
            mask: self.take("mask"),
            context: self.take("context"),
            context_mask: self.take("context_mask"),
            attn_mask: self.take("attn_mask"),
            mems: self.mems(),
            token_types: self.take("token_types"),
            return_embeddings: call.return_embeddings,
            return_mems: call.return_mems,
            return_attn: call.return_attn,
            checkpoint_layers: run.checkpoint_layers,
            explicit_attention: run.explicit_attention,
        }
    }

    fn encoder_decoder_options(&mut self, run: &RunOptions) -> EncoderDecoderOptions {
        EncoderDecoderOptions {
            src_mask: self.take("src_mask"),
            tgt_mask: self.take("tgt_mask"),
            src_attn_mask: self.take("src_attn_mask"),
            checkpoint_layers: run.checkpoint_layers,
            explicit_attention: run.explicit_attention,
        }
    }

    fn finish(self) -> Result<()> {
        match self.0.into_keys().next() {
            Some(name) => Err(Error::argument("inputs", format_args!("`{name}` is not used by this call"))),
            None => Ok(()),
        }
    }
}

impl Model {
    /// Creates a model from its config; the store should be fresh.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &Config, store: &ParamStore) -> Result<Self> {
        let kind = match config {
            Config::TransformerWrapper(config) => Kind::Transformer(TransformerWrapper::new(config, store)?),
            Config::ContinuousTransformerWrapper(config) => {
                Kind::Continuous(ContinuousTransformerWrapper::new(config, store)?)
            }
            Config::ViTransformerWrapper(config) => Kind::Vision(ViTransformerWrapper::new(config, store)?),
            Config::XTransformer(config) => Kind::EncoderDecoder(Box::new(XTransformer::new(config, store)?)),
            Config::AutoregressiveWrapper(config) => Kind::Autoregressive(AutoregressiveWrapper::new(config, store)?),
            Config::AttentionLayers(config) => Kind::Layers(AttentionLayers::new(&LayersPlan::new(config)?, store)?),
            Config::SamplingFilter(config) => Kind::Filter(config.clone()),
        };
        Ok(Self { kind, params: store.params(), dtype: store.dtype(), device: store.device().clone() })
    }

    /// Returns the parameters and buffers, by PyTorch's names.
    pub fn params(&self) -> &ParamMap {
        &self.params
    }

    /// Runs a forward pass, and a backward pass if requested.
    ///
    /// Inputs have the names of PyTorch's arguments: `x`, `mask`, `context`, `mems.0`, `src`, `img`, …; they are
    /// moved to the model's device, and floats are converted to its dtype. With gradients, an output that is not a loss
    /// requires a `cotangent` of its shape.
    ///
    /// Outputs: `out` (or `loss`, `[1]`), `mems.N`, `attn.N`, `grad.<parameter>`, and `grad.input.<name>` for the float
    /// inputs `x`, `context` and `img`. Gradients that are zero everywhere are omitted. A tied parameter has one entry,
    /// in an encoder-decoder under the encoder's name.
    ///
    /// Errors: inputs that are missing, not used by this call, or do not fit.
    pub fn run(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        call: &Call,
        options: &RunOptions,
    ) -> Result<BTreeMap<String, Tensor>> {
        let discrete = call.generate.is_some() || matches!(self.kind, Kind::Filter(_));
        let gradients = options.gradients && !discrete;
        let mut given = self.adopt(inputs)?;
        let mut leaves = Vec::new();
        for name in ["x", "context", "img"] {
            if let Some(tensor) = given.0.get_mut(name).filter(|tensor| gradients && tensor.dtype().is_float()) {
                *tensor = tensor.requires_grad()?;
                leaves.push((name, tensor.clone()));
            }
        }
        // Only a pass with gradients uses it, but it may always be among the inputs.
        let cotangent = given.take("cotangent");
        let mut tape = gradients.then(Tape::grad);
        let forward = match &call.generate {
            Some(generate) => self.generate(&mut given, call, generate, options)?,
            None => self.pass(&mut given, call, options)?,
        };
        given.finish()?;
        let mut outputs = ordered(forward.extras);
        if let Some(tape) = &mut tape {
            let grads = match (forward.name, &cotangent) {
                ("loss", _) => tape.backward(&forward.value)?,
                (_, Some(cotangent)) => tape.backward_with(&forward.value, cotangent).context("cotangent")?,
                (_, None) => {
                    let shape = forward.value.shape();
                    return Err(Error::argument(
                        "inputs",
                        format_args!("gradients require a `cotangent` input of shape {shape:?}"),
                    ));
                }
            };
            let params = names(&self.params).map(|(name, param)| (format!("grad.{name}"), grads.param(param)));
            let inputs = leaves.iter().map(|(name, leaf)| (format!("grad.input.{name}"), grads.get(leaf)));
            for (name, grad) in params.chain(inputs) {
                if let Some(grad) = grad.filter(|grad| !is_zero(grad)) {
                    outputs.insert(name, grad.clone());
                }
            }
        }
        let value = if forward.name == "loss" { forward.value.reshape([1])? } else { forward.value };
        outputs.insert(forward.name.to_string(), value);
        Ok(ordered(outputs.into_iter().map(|(name, tensor)| (name, tensor.detach()))))
    }

    /// Runs only the forward pass of [`Model::run`] and returns its `out`, or the loss, a scalar. The tape of this
    /// thread, if any, records it: [`Tape::backward`] returns the gradients of the parameters.
    ///
    /// Errors: inputs that are missing, not used by this call, or do not fit; a call that generates.
    pub fn forward(&self, inputs: &BTreeMap<String, Tensor>, call: &Call, options: &RunOptions) -> Result<Tensor> {
        ensure!(
            call.generate.is_none(),
            Error::option("method", "`forward` does not generate; use `run`").context("call")
        );
        let mut given = self.adopt(inputs)?;
        let forward = self.pass(&mut given, call, options)?;
        given.finish()?;
        Ok(forward.value)
    }

    /// Computes the mean cross-entropy of the logits of a forward pass and target tokens or classes, the loss of masked
    /// language models and of classifiers. The logits `[.., num_tokens]`, whose targets are `[..]`, are computed in
    /// blocks of rows and not kept; see [`TransformerWrapper::cross_entropy`].
    ///
    /// Errors: those of [`Model::forward`] and [`Tensor::cross_entropy`]; a model whose output is a loss or not logits.
    pub fn cross_entropy(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        targets: &Tensor,
        ignore_index: i64,
        options: &RunOptions,
    ) -> Result<Tensor> {
        let targets = targets.to_device(&self.device)?;
        match &self.kind {
            Kind::Transformer(model) => {
                let call = Call { return_embeddings: true, ..Call::default() };
                model.cross_entropy(&self.forward(inputs, &call, options)?, &targets, ignore_index)
            }
            Kind::Vision(_) => self.forward(inputs, &Call::default(), options)?.cross_entropy(&targets, ignore_index),
            _ => Err(Error::argument("cross_entropy", "expected a TransformerWrapper or ViTransformerWrapper")),
        }
    }

    /// Moves the inputs to the model's device, and converts floats to its dtype.
    fn adopt(&self, inputs: &BTreeMap<String, Tensor>) -> Result<Inputs> {
        let adopt = |tensor: &Tensor| {
            let tensor = tensor.to_device(&self.device)?;
            if tensor.dtype().is_float() { tensor.to_dtype(self.dtype) } else { Ok(tensor) }
        };
        let adopted = inputs.iter().map(|(name, tensor)| Ok((name.clone(), adopt(tensor)?)));
        try_ordered(adopted).map(Inputs)
    }

    fn pass(&self, inputs: &mut Inputs, call: &Call, run: &RunOptions) -> Result<Forward> {
        let asks = [
            ("return_embeddings", call.return_embeddings),
            ("return_mems", call.return_mems),
            ("return_attn", call.return_attn),
        ];
        let taken: &[&str] = match &self.kind {
            Kind::Transformer(_) => &["return_embeddings", "return_mems", "return_attn"],
            Kind::Continuous(_) => &["return_embeddings", "return_attn"],
            Kind::Vision(_) => &["return_embeddings"],
            Kind::Layers(_) => &["return_attn"],
            Kind::EncoderDecoder(_) | Kind::Autoregressive(_) | Kind::Filter(_) => &[],
        };
        if let Some((name, _)) = asks.into_iter().find(|(name, on)| *on && !taken.contains(name)) {
            return Err(Error::option(name, "not supported by this model").context("call"));
        }
        Ok(match &self.kind {
            Kind::Transformer(model) => {
                let x = inputs.need("x")?;
                Forward::output(model.forward(&x, &inputs.forward_options(call, run))?)
            }
            Kind::Continuous(model) => {
                let x = inputs.need("x")?;
                Forward::output(model.forward(&x, &inputs.forward_options(call, run))?)
            }
            Kind::Layers(model) => {
                let x = inputs.need("x")?;
                let output = model.forward(&x, &inputs.forward_options(call, run))?;
                Forward::output(Output { out: output.out, mems: Vec::new(), attn: output.attn })
            }
            Kind::Vision(model) => Forward::new("out", model.forward(&inputs.need("img")?, call.return_embeddings)?),
            Kind::Autoregressive(model) => {
                let x = inputs.need("x")?;
                Forward::new("loss", model.loss(&x, &inputs.forward_options(call, run))?)
            }
            Kind::EncoderDecoder(model) => {
                let (src, tgt) = (inputs.need("src")?, inputs.need("tgt")?);
                Forward::new("loss", model.loss(&src, &tgt, &inputs.encoder_decoder_options(run))?)
            }
            Kind::Filter(config) => Forward::new("out", filter(&inputs.need("logits")?, config)?),
        })
    }

    fn generate(&self, inputs: &mut Inputs, call: &Call, generate: &GenerateCall, run: &RunOptions) -> Result<Forward> {
        // Rows continue after their ends until every row has one: `Ends` decides where all stop.
        let mut options =
            GenerateOptions { sampling: generate.sampling.clone(), seed: run.seed, ..GenerateOptions::default() };
        let tokens = match &self.kind {
            Kind::Autoregressive(model) => {
                let start = inputs.need("start_tokens")?;
                options.forward = inputs.forward_options(call, run);
                let mut ends = Ends::new(generate.eos_token, &start, model.net.plan().num_tokens, model.pad_value())?;
                let new = model.generate(&start, generate.seq_len, &options, &mut |tokens| ends.push(tokens))?;
                ends.pad(new)?
            }
            Kind::EncoderDecoder(model) => {
                let (source, start) = (inputs.need("seq_in")?, inputs.need("seq_out_start")?);
                let masks = inputs.encoder_decoder_options(run);
                options.forward.mask = inputs.take("mask");
                let decoder = &model.decoder;
                let mut ends =
                    Ends::new(generate.eos_token, &start, decoder.net.plan().num_tokens, decoder.pad_value())?;
                let on_token = &mut |tokens: &[i64]| ends.push(tokens);
                let new = model.generate(&source, &start, generate.seq_len, &masks, &options, on_token)?;
                ends.pad(new)?
            }
            _ => {
                let why = "\"generate\" requires an AutoregressiveWrapper or XTransformer";
                return Err(Error::option("method", why).context("call"));
            }
        };
        Ok(Forward::new("out", tokens))
    }
}

/// Ends of rows as in `generate` of x-transformers 0.22: once every row has the end token, possibly in its prompt, it
/// stops after the token that it has just drawn, and only then overwrites the tokens after the first end of each row.
struct Ends {
    eos: Option<i64>,
    pad_value: i64,
    /// First end of each row, counted from the end of its prompt; 0 for one in the prompt.
    ends: Vec<Option<usize>>,
    length: usize,
}

impl Ends {
    fn new(eos: Option<i64>, start: &Tensor, vocabulary: usize, pad_value: i64) -> Result<Self> {
        if let Some(eos) = eos {
            GenerateOptions { eos_tokens: vec![eos], ..GenerateOptions::default() }.check(1, vocabulary)?;
        }
        let width = start.shape().last().copied().unwrap_or(0).max(1);
        let rows = if start.dtype() == DType::I64 { start.to_vec::<i64>()? } else { Vec::new() };
        let end = |row: &[i64]| eos.is_some_and(|eos| row.contains(&eos)).then_some(0);
        Ok(Self { eos, pad_value, ends: rows.chunks(width).map(end).collect_vec(), length: 0 })
    }

    /// Counts the new token of every row; returns `false` once all have ended.
    fn push(&mut self, tokens: &[i64]) -> bool {
        self.length += 1;
        for (end, &token) in self.ends.iter_mut().zip(tokens) {
            if end.is_none() && self.eos == Some(token) {
                *end = Some(self.length);
            }
        }
        !self.all()
    }

    fn all(&self) -> bool {
        self.ends.iter().all(Option::is_some)
    }

    /// Returns the new tokens, `[b, n]` or `[n]`, with those after the ends overwritten.
    fn pad(&self, new: Tensor) -> Result<Tensor> {
        if self.eos.is_none() || !self.all() || self.length == 0 {
            return Ok(new);
        }
        let mut tokens = new.to_vec::<i64>()?;
        for (row, end) in tokens.chunks_mut(self.length).zip(&self.ends) {
            row[end.unwrap_or(self.length)..].fill(self.pad_value);
        }
        Tensor::from_vec(tokens, *new.shape(), new.device())
    }
}

/// Returns each parameter once; a tied one by the encoder's name, which PyTorch has first.
fn names(params: &ParamMap) -> impl Iterator<Item = (&str, &Param)> {
    let tied_to_encoder = |name: &str, leaf| {
        !name.starts_with("encoder.")
            && params.iter().any(|(other, param)| other.starts_with("encoder.") && param.leaf() == leaf)
    };
    params.iter().filter(move |(name, param)| !tied_to_encoder(name, param.leaf()))
}

fn is_zero(tensor: &Tensor) -> bool {
    tensor.to_f64_vec().is_ok_and(|values| values.iter().all(|&value| value == 0.0))
}

/// Returns the probabilities of logits `[b, num_tokens]` after the sampling filter.
fn filter(logits: &Tensor, config: &SamplingConfig) -> Result<Tensor> {
    ensure!(
        logits.rank() == 2 && logits.dtype().is_float(),
        Error::shape(
            "logits",
            format_args!("expected floats [batch, num_tokens], got {:?} {}", logits.shape(), logits.dtype())
        )
    );
    let width = logits.shape()[1].max(1);
    let rows: Vec<Vec<f64>> = logits.to_f64_vec()?.chunks(width).map(<[f64]>::to_vec).collect_vec();
    let probabilities: Vec<f64> = filter_probabilities(&rows, config)?.concat();
    Tensor::from_vec(probabilities, *logits.shape(), logits.device())?.to_dtype(logits.dtype())
}
