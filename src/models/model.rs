//! Models of any class, run on named tensors.

mod call;

use std::{collections::BTreeMap, sync::Arc};

use super::{
    AttentionPool, AutoregressiveWrapper, BeamOptions, BeliefStateWrapper, ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper, GenerateOptions, GptVae, NeoMlp, NonAutoregressiveWrapper, Output,
    TransformerWrapper, ViTransformerWrapper, XTransformer,
    around::{Dpo, Preference, XValAutoregressiveWrapper, XlAutoregressiveWrapper},
    autoregressive::z_loss,
    model_inputs::{Ends, Inputs},
    named::NamedModel,
    sampling::filter_probabilities,
};
use crate::{
    DType, Device, Error, Gradients, Param, ParamMap, ParamStore, Result, Tape, Tensor,
    collect::CollectVec,
    config::{AroundPlan, BeamCall, Call, Config, GenerateCall, MemoryPlan, ModelPlan, Recurrence, SamplingConfig},
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
    /// And the names of the masks of the source.
    EncoderDecoder(Box<XTransformer>, [&'static str; 2]),
    Autoregressive(AutoregressiveWrapper),
    ContinuousAutoregressive(ContinuousAutoregressiveWrapper),
    Layers(AttentionLayers),
    Pool(AttentionPool),
    Filter(SamplingConfig),
    /// And the names of its inputs.
    MultiInput(TransformerWrapper, Vec<String>),
    XValLoss(XValAutoregressiveWrapper),
    Xl(XlAutoregressiveWrapper),
    Dpo(Box<Dpo>),
    Masked(Box<NonAutoregressiveWrapper>),
    Named(Arc<dyn NamedModel>),
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

/// Result of a forward pass: outputs that have gradients, `loss` or `out` and others, and named extras.
struct Forward {
    outputs: Vec<(String, Tensor)>,
    extras: Vec<(String, Tensor)>,
}

impl Forward {
    fn new(name: &str, value: Tensor) -> Self {
        Self { outputs: vec![(name.to_string(), value)], extras: Vec::new() }
    }

    /// Names an output; attached memories have gradients.
    fn output(output: Output, attached: bool) -> Self {
        let name = |kind: &'static str| move |(index, tensor)| (format!("{kind}.{index}"), tensor);
        let mems = output.mems.into_iter().enumerate().map(name("mems"));
        let attn = output.attn.into_iter().enumerate().map(name("attn"));
        let (mut of_mems, mut extras) = (mems.collect_vec(), attn.collect_vec());
        let mut outputs: Vec<(String, Tensor)> = match output.others.is_empty() {
            true => vec![("out".to_string(), output.out)],
            false => std::iter::once(output.out).chain(output.others).enumerate().map(name("out")).collect_vec(),
        };
        outputs.extend(output.embeddings.map(|embeddings| ("embeddings".to_string(), embeddings)));
        if attached { &mut outputs } else { &mut extras }.append(&mut of_mems);
        Self { outputs, extras }
    }

    /// Returns the name of an output's cotangent: `out.0` has `cotangent.0`, `embeddings` has `cotangent.embeddings`.
    fn cotangent(name: &str) -> String {
        match name.strip_prefix("out") {
            Some(part) => format!("cotangent{part}"),
            None => format!("cotangent.{name}"),
        }
    }

    /// Returns the gradients of the loss, or of the sum of all outputs times their cotangents.
    fn backward(&self, tape: &mut Tape, cotangents: &BTreeMap<String, Tensor>) -> Result<Gradients> {
        if let [(name, loss)] = &self.outputs[..]
            && name == "loss"
        {
            return tape.backward(loss);
        }
        let cotangent = |name: &str, value: &Tensor| {
            let name = Self::cotangent(name);
            let shape = value.shape();
            let missing =
                || Error::argument("inputs", format_args!("gradients require a `{name}` input of shape {shape:?}"));
            cotangents.get(&name).ok_or_else(missing)
        };
        if let [(name, value)] = &self.outputs[..] {
            return tape.backward_with(value, cotangent(name, value)?).context("cotangent");
        }
        let mut sum: Option<Tensor> = None;
        for (name, value) in &self.outputs {
            let product = value.mul(cotangent(name, value)?).context("cotangent")?.sum(&[])?;
            sum = Some(match sum {
                Some(sum) => sum.add(&product)?,
                None => product,
            });
        }
        let sum = sum.ok_or_else(|| Error::argument("inputs", "there is no output to differentiate"))?;
        tape.backward(&sum)
    }
}

impl Model {
    /// Creates a model from its config; the store should be fresh.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &Config, store: &ParamStore) -> Result<Self> {
        Self::from_plan(config.plan()?, store)
    }

    /// Creates a model from its plan; the store should be fresh.
    ///
    /// Errors: those of its class.
    pub fn from_plan(plan: ModelPlan, store: &ParamStore) -> Result<Self> {
        let kind = match plan {
            ModelPlan::Transformer(plan) => Kind::Transformer(TransformerWrapper::from_plan(plan, store)?),
            ModelPlan::Continuous(plan) => Kind::Continuous(ContinuousTransformerWrapper::from_plan(plan, store)?),
            ModelPlan::Vision(plan) => Kind::Vision(ViTransformerWrapper::from_plan(plan, store)?),
            ModelPlan::EncoderDecoder(plan) => {
                let masks = plan.masks;
                Kind::EncoderDecoder(Box::new(XTransformer::from_plan(*plan, store)?), masks)
            }
            ModelPlan::Autoregressive(plan) => Kind::Autoregressive(AutoregressiveWrapper::from_plan(plan, store)?),
            ModelPlan::ContinuousAutoregressive(plan) => {
                Kind::ContinuousAutoregressive(ContinuousAutoregressiveWrapper::from_plan(plan, store)?)
            }
            ModelPlan::Layers(plan) => Kind::Layers(AttentionLayers::new(&plan, store)?),
            ModelPlan::Pool(plan) => Kind::Pool(AttentionPool::new(&plan, store)?),
            ModelPlan::Filter(config) => Kind::Filter(config),
            ModelPlan::NeoMlp(plan) => Kind::Named(Arc::new(NeoMlp::new(&plan, store)?)),
            ModelPlan::Around(plan) => match *plan {
                AroundPlan::MultiInput(plan, names) => {
                    Kind::MultiInput(TransformerWrapper::from_plan(plan, store)?, names)
                }
                AroundPlan::XVal(plan) => Kind::Transformer(TransformerWrapper::from_plan(plan, store)?),
                AroundPlan::XValLoss(plan, loss, numbers) => {
                    Kind::XValLoss(XValAutoregressiveWrapper::new(plan, loss, numbers, store)?)
                }
                AroundPlan::Xl(plan, loss, steps) => Kind::Xl(XlAutoregressiveWrapper::new(plan, loss, steps, store)?),
                AroundPlan::Masked(net, plan) => {
                    Kind::Masked(Box::new(NonAutoregressiveWrapper::new(net, *plan, store)?))
                }
                AroundPlan::Belief(plan) => Kind::Named(Arc::new(BeliefStateWrapper::new(*plan, store)?)),
                AroundPlan::Vae(plan) => Kind::Named(Arc::new(GptVae::new(*plan, store)?)),
                AroundPlan::Dpo(plan, beta, pad) => Kind::Dpo(Box::new(Dpo::new(plan, beta, pad, store)?)),
            },
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
    /// Outputs: `out` (or `loss`, `[1]`), `out.N` of several heads, `embeddings`, `attn_z_loss`, `scores`, `mems.N`,
    /// `attn.N`, `grad.<parameter>`, and `grad.input.<name>` for every float input except memories. With several
    /// outputs the gradient is that of the sum of all times their cotangents, `cotangent.N`. Gradients that are zero
    /// everywhere are omitted; memories have gradients if they are attached. A tied parameter has one entry, in an
    /// encoder-decoder under the encoder's name.
    ///
    /// Errors: inputs that are missing, not used by this call, or do not fit.
    pub fn run(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        call: &Call,
        options: &RunOptions,
    ) -> Result<BTreeMap<String, Tensor>> {
        self.check_call(call)?;
        let generates = call.generate.is_some() || call.beam_search.is_some();
        let gradients = options.gradients && !generates && !matches!(self.kind, Kind::Filter(_));
        let mut given = self.adopt(inputs)?;
        // Only a pass with gradients uses them, but they may always be among the inputs.
        let keys: Vec<String> = given.tensors.keys().filter(|key| key.starts_with("cotangent")).cloned().collect_vec();
        let cotangents =
            ordered(keys.into_iter().filter_map(|key| given.tensors.remove(&key).map(|value| (key, value))));
        let mut leaves = Vec::new();
        for (name, tensor) in &mut given.tensors {
            if gradients && tensor.dtype().is_float() && !name.starts_with("mems.") {
                *tensor = tensor.requires_grad()?;
                leaves.push((name.clone(), tensor.clone()));
            }
        }
        let mut tape = gradients.then(Tape::grad);
        self.check_recycled(call)?;
        let forward = match (&call.generate, &call.beam_search) {
            (Some(generate), _) => self.generate(&mut given, call, generate, options)?,
            (None, Some(beams)) => self.beam_search(&mut given, call, beams, options)?,
            (None, None) => self.pass(&mut given, call, options)?,
        };
        given.finish()?;
        let mut outputs = BTreeMap::new();
        if let Some(tape) = &mut tape {
            let grads = forward.backward(tape, &cotangents)?;
            let params = names(&self.params).map(|(name, param)| (format!("grad.{name}"), grads.param(param)));
            let inputs = leaves.iter().map(|(name, leaf)| (format!("grad.input.{name}"), grads.get(leaf)));
            for (name, grad) in params.chain(inputs) {
                if let Some(grad) = grad.filter(|grad| !is_zero(grad)) {
                    outputs.insert(name, grad.clone());
                }
            }
        }
        outputs.extend(forward.extras);
        for (name, value) in forward.outputs {
            let value = if name == "loss" { value.reshape([1])? } else { value };
            outputs.insert(name, value);
        }
        Ok(ordered(outputs.into_iter().map(|(name, tensor)| (name, tensor.detach()))))
    }

    /// Runs only the forward pass of [`Model::run`] and returns its `out`, or the loss, a scalar. The tape of this
    /// thread, if any, records it: [`Tape::backward`] returns the gradients of the parameters.
    ///
    /// Errors: inputs that are missing, not used by this call, or do not fit; a call that generates.
    pub fn forward(&self, inputs: &BTreeMap<String, Tensor>, call: &Call, options: &RunOptions) -> Result<Tensor> {
        ensure!(
            call.generate.is_none() && call.beam_search.is_none(),
            Error::option("method", "`forward` does not generate; use `run`").context("call")
        );
        self.check_call(call)?;
        let mut given = self.adopt(inputs)?;
        let forward = self.pass(&mut given, call, options)?;
        given.finish()?;
        let first = forward.outputs.into_iter().next();
        first.map(|(_, value)| value).ok_or_else(|| Error::argument("model", "has no output"))
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
        Ok(Inputs { tensors: try_ordered(adopted)?, device: self.device.clone() })
    }

    fn pass(&self, inputs: &mut Inputs, call: &Call, run: &RunOptions) -> Result<Forward> {
        let asks = [
            ("return_embeddings", call.return_embeddings),
            ("return_mems", call.return_mems),
            ("return_attn", call.return_attn),
            ("return_logits_and_embeddings", call.return_logits_and_embeddings),
            ("return_outputs", call.return_outputs),
            ("return_attn_z_loss", call.return_attn_z_loss),
        ];
        let taken: &[&str] = match &self.kind {
            Kind::MultiInput(..) => {
                &["return_embeddings", "return_logits_and_embeddings", "return_mems", "return_attn"]
            }
            Kind::Transformer(_) => &[
                "return_embeddings",
                "return_logits_and_embeddings",
                "return_mems",
                "return_attn",
                "return_attn_z_loss",
            ],
            Kind::Continuous(model) if model.plan().memories == MemoryPlan::None => {
                &["return_embeddings", "return_attn"]
            }
            Kind::Continuous(_) => &["return_embeddings", "return_mems", "return_attn"],
            Kind::Vision(_) => &["return_embeddings", "return_logits_and_embeddings"],
            Kind::Layers(_) => &["return_attn"],
            Kind::Autoregressive(_) => &["return_outputs"],
            Kind::EncoderDecoder(..)
            | Kind::ContinuousAutoregressive(_)
            | Kind::Pool(_)
            | Kind::XValLoss(_)
            | Kind::Xl(_)
            | Kind::Dpo(_)
            | Kind::Masked(_)
            | Kind::Named(_)
            | Kind::Filter(_) => &[],
        };
        if let Some((name, _)) = asks.into_iter().find(|(name, on)| *on && !taken.contains(name)) {
            return Err(Error::option(name, "not supported by this model").context("call"));
        }
        Ok(match &self.kind {
            Kind::Transformer(model) => {
                let x = inputs.need("x")?;
                let output = model.forward(&x, &inputs.forward_options(call, run)?)?;
                let z_loss = || z_loss(&output.scores, call.attn_z_loss_weight);
                let z_loss = call.return_attn_z_loss.then(z_loss).transpose()?;
                let mut forward = Forward::output(output, call.attached_mems);
                forward.outputs.extend(z_loss.map(|loss| ("attn_z_loss".to_string(), loss)));
                forward
            }
            Kind::Continuous(model) => {
                let x = inputs.need("x")?;
                Forward::output(model.forward(&x, &inputs.forward_options(call, run)?)?, call.attached_mems)
            }
            Kind::Layers(model) => {
                let x = inputs.need("x")?;
                let output = model.forward(&x, &inputs.forward_options(call, run)?)?;
                let (out, attn) = (output.out, output.attn);
                let (others, mems, scores) = (Vec::new(), Vec::new(), Vec::new());
                Forward::output(Output { out, others, embeddings: None, mems, attn, scores }, false)
            }
            Kind::Vision(model) => {
                let embeddings = model.embeddings(&inputs.need("img")?)?;
                if call.return_embeddings {
                    Forward::new("out", embeddings)
                } else {
                    let mut forward = Forward::new("out", model.head(&embeddings)?);
                    if call.return_logits_and_embeddings {
                        forward.outputs.push(("embeddings".to_string(), embeddings));
                    }
                    forward
                }
            }
            Kind::Autoregressive(model) => {
                let x = inputs.need("x")?;
                let options = inputs.forward_options(call, run)?;
                if call.return_outputs {
                    let (loss, logits) = model.loss_and_logits(&x, &options)?;
                    Forward { extras: vec![("logits".to_string(), logits)], ..Forward::new("loss", loss) }
                } else {
                    Forward::new("loss", model.loss(&x, &options)?)
                }
            }
            Kind::ContinuousAutoregressive(model) => {
                let x = inputs.need("x")?;
                Forward::new("loss", model.loss(&x, &inputs.forward_options(call, run)?)?)
            }
            Kind::EncoderDecoder(model, masks) => {
                let (src, tgt) = (inputs.need("src")?, inputs.need("tgt")?);
                Forward::new("loss", model.loss(&src, &tgt, &inputs.encoder_decoder_options(*masks, run))?)
            }
            Kind::Pool(model) => {
                let context = inputs.need("context")?;
                let (mask, queries) = (inputs.take("mask"), inputs.take("queries"));
                Forward::new("out", model.forward(&context, mask.as_ref(), queries.as_ref())?)
            }
            Kind::MultiInput(model, names) => {
                let mut tokens = inputs.object("x");
                let missing = || Error::argument("inputs", "`x.NAME` is missing");
                let first = names.first().and_then(|first| tokens.remove(first)).ok_or_else(missing)?;
                let options = ForwardOptions { embed_ids: tokens, ..inputs.forward_options(call, run)? };
                let mut forward = Forward::output(model.forward(&first, &options)?, call.attached_mems);
                for (index, name) in names.iter().enumerate() {
                    let numbered = if names.len() == 1 { "out".to_string() } else { format!("out.{index}") };
                    let named = forward.outputs.iter_mut().filter(|(output, _)| *output == numbered);
                    named.for_each(|(output, _)| *output = format!("out.{name}"));
                }
                forward
            }
            Kind::XValLoss(model) => {
                let (x, numbers) = (inputs.need("x")?, inputs.need("x_num")?);
                Forward::new("loss", model.loss(&x, &numbers, &inputs.forward_options(call, run)?)?)
            }
            Kind::Xl(model) => {
                let x = inputs.need("x")?;
                Forward::new("loss", model.loss(&x, &inputs.forward_options(call, run)?)?)
            }
            Kind::Dpo(model) => {
                let given = Preference {
                    sequences: [inputs.need("preferred_seq")?, inputs.need("unpreferred_seq")?],
                    prompt_mask: inputs.need("prompt_mask")?,
                    masks: [inputs.take("preferred_seq_mask"), inputs.take("unpreferred_seq_mask")],
                };
                Forward::new("loss", model.loss(&given)?)
            }
            Kind::Masked(model) => {
                let x = inputs.need("x")?;
                let mut draws = model.draws(&x, run.seed, call.generator_sample_temperature)?;
                if let Some(times) = inputs.take("times") {
                    draws.times = times.to_f64_vec()?;
                }
                if let Some(ranks) = inputs.take("order") {
                    let ranks = ranks.to_vec::<i64>()?;
                    draws.ranks = ranks.into_iter().map(|rank| usize::try_from(rank).unwrap_or(0)).collect_vec();
                }
                let fits = draws.times.len() == x.dim(0)? && draws.ranks.len() == x.numel();
                ensure!(fits, Error::shape("order", "expected `times` [batch] and `order` [batch, n]"));
                Forward::new("loss", model.loss_for(&x, draws, run.seed, &inputs.forward_options(call, run)?)?)
            }
            Kind::Named(model) => {
                let (name, value) = model.pass(inputs, call, run)?;
                Forward::new(name, value)
            }
            Kind::Filter(config) => Forward::new("out", filter(&inputs.need("logits")?, config)?),
        })
    }

    fn generate(&self, inputs: &mut Inputs, call: &Call, generate: &GenerateCall, run: &RunOptions) -> Result<Forward> {
        // Rows continue after their ends until every row has one: `Ends` decides where all stop.
        let mut options = GenerateOptions {
            sampling: generate.sampling.clone(),
            seed: run.seed,
            recompute: !generate.cache_kv,
            restrict_to_max_seq_len: generate.restrict_to_max_seq_len,
            ..GenerateOptions::default()
        };
        let ends = |start: &Tensor, decoder: &AutoregressiveWrapper| {
            Ends::new(generate, start, decoder.net.plan().num_tokens, decoder.pad_value())
        };
        if let Kind::Named(model) = &self.kind {
            return Ok(Forward::new("out", model.generate(inputs, call, generate, run)?));
        }
        if let Kind::Masked(model) = &self.kind {
            let forward = inputs.forward_options(call, run)?;
            let rows = generate.masked.batch_size;
            let new = model.generate(rows.unwrap_or(1), &generate.masked, run.seed, &forward)?;
            return Ok(Forward::new("out", if rows.is_none() { new.squeeze(0)? } else { new }));
        }
        ensure!(
            generate.restrict_to_max_seq_len || matches!(self.kind, Kind::Autoregressive(_) | Kind::EncoderDecoder(..)),
            Error::option("restrict_to_max_seq_len", "is for AutoregressiveWrapper and XTransformer").context("call")
        );
        let seq_len = generate.seq_len.ok_or_else(|| Error::missing_option("seq_len").context("call"))?;
        let tokens = match &self.kind {
            Kind::Autoregressive(model) => {
                let looped = matches!(model.net.plan().recurrence, Recurrence::Looped(_));
                ensure!(
                    !(looped && generate.cache_kv),
                    Error::option("cache_kv", "must be false for a `looped` model, which runs all passes here")
                        .context("call")
                );
                let (start, lengths) = inputs.prompts()?;
                options.prompt_lengths = lengths;
                options.forward = inputs.forward_options(call, run)?;
                let mut ends = ends(&start, model)?;
                let new = model.generate(&start, seq_len, &options, &mut |tokens| ends.push(tokens))?;
                ends.pad(new)?
            }
            Kind::EncoderDecoder(model, masks) => {
                let (source, start) = (inputs.need("seq_in")?, inputs.need("seq_out_start")?);
                let of_source = inputs.encoder_decoder_options(*masks, run);
                options.forward.mask = inputs.take("mask");
                let mut ends = ends(&start, &model.decoder)?;
                let on_token = &mut |tokens: &[i64]| ends.push(tokens);
                let new = model.generate(&source, &start, seq_len, &of_source, &options, on_token)?;
                ends.pad(new)?
            }
            Kind::ContinuousAutoregressive(model) => {
                let start = inputs.need("start_tokens")?;
                let forward = inputs.forward_options(call, run)?;
                model.generate(&start, seq_len, &forward)?
            }
            Kind::Xl(model) => {
                let start = inputs.prompt()?;
                let forward = inputs.forward_options(call, run)?;
                let plan = model.net.plan();
                // Rows are padded only once all have ended, unlike those of an AutoregressiveWrapper.
                let call = GenerateCall { pads_open_rows: false, ..generate.clone() };
                let mut ends = Ends::new(&call, &start, plan.num_tokens, model.pad_value())?;
                let on_tokens = &mut |tokens: &[i64]| ends.push(tokens);
                let new = model.generate(&start, seq_len, &generate.sampling, run.seed, &forward, on_tokens)?;
                ends.pad(new)?
            }
            Kind::XValLoss(model) => {
                let (start, numbers) = (inputs.prompt()?, inputs.need("start_numbers")?);
                let forward = inputs.forward_options(call, run)?;
                let [tokens, numbers] =
                    model.generate([&start, &numbers], seq_len, &generate.sampling, run.seed, &forward)?;
                let mut forward = Forward::new("out", tokens);
                forward.outputs.push(("numbers".to_string(), numbers));
                return Ok(forward);
            }
            _ => {
                let why = "\"generate\" requires an AutoregressiveWrapper or XTransformer";
                return Err(Error::option("method", why).context("call"));
            }
        };
        Ok(Forward::new("out", tokens))
    }

    fn beam_search(&self, inputs: &mut Inputs, call: &Call, beams: &BeamCall, run: &RunOptions) -> Result<Forward> {
        let Kind::Autoregressive(model) = &self.kind else {
            let why = "\"beam_search\" is for AutoregressiveWrapper";
            return Err(Error::option("method", why).context("call"));
        };
        let (prompt, prompt_lengths) = inputs.prompts()?;
        let forward = inputs.forward_options(call, run)?;
        let restrict_to_max_seq_len = beams.restrict_to_max_seq_len;
        let options =
            GenerateOptions { prompt_lengths, restrict_to_max_seq_len, forward, ..GenerateOptions::default() };
        let search = BeamOptions { beams: beams.beams, length_penalty: 0.0 };
        let found = model.beam_search(&prompt, beams.seq_len, &search, &options)?;
        let (rows, kept) = (found.len(), if beams.return_beams_and_scores { beams.beams } else { 1 });
        let of_all = || (0..kept).flat_map(|beam| found.iter().map(move |row| &row[beam]));
        let tokens: Vec<i64> = of_all().flat_map(|found| found.tokens.iter().copied()).collect_vec();
        let scores: Vec<f64> = of_all().map(|found| found.score).collect_vec();
        if !beams.return_beams_and_scores {
            return Ok(Forward::new("out", Tensor::from_vec(tokens, [rows, beams.seq_len], &self.device)?));
        }
        let tokens = Tensor::from_vec(tokens, [kept, rows, beams.seq_len], &self.device)?;
        let scores = Tensor::from_vec(scores, [kept, rows], &self.device)?.to_dtype(self.dtype)?;
        let mut forward = Forward::new("out", tokens);
        forward.outputs.push(("scores".to_string(), scores));
        Ok(forward)
    }
}

/// Returns each parameter once; a tied one by the name that PyTorch has first.
fn names(params: &ParamMap) -> impl Iterator<Item = (&str, &Param)> {
    params.iter().filter(move |(name, param)| {
        let tied = params.iter().filter(|(_, other)| other.leaf() == param.leaf()).map(|(other, _)| other);
        let order = ["encoder.", "forward_decoder.", "decoder."];
        let rank = |name: &str| order.iter().position(|first| name.starts_with(first)).unwrap_or(order.len());
        tied.min_by_key(|other| (rank(other), *other)) == Some(*name)
    })
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
