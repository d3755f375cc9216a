//! Text from both sides.

use super::{
    RunOptions, TransformerWrapper,
    around::{log_probabilities, sampled},
    model_inputs::Inputs,
    named::NamedModel,
};
use crate::{
    DType, Error, Init, Param, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{BeliefPlan, Call, GenerateCall, SamplingConfig, TransformerPlan},
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, Linear},
};

/// Belief State Transformer: a decoder reads the text before, another one the text after in reverse, and a head
/// predicts the next token of the former and the one before the latter (Hu et al., <https://arxiv.org/abs/2410.23506>).
#[derive(Clone, Debug)]
pub struct BeliefStateWrapper {
    /// Decoder of the text before.
    pub forward_decoder: TransformerWrapper,
    /// Decoder of the text after; it shares its parameters with the other one by default.
    pub backward_decoder: TransformerWrapper,
    /// Embedding before the reversed text, `[dim]`.
    suffix_token: Param,
    text_head: Head,
    to_distance: Option<Head>,
    plan: BeliefPlan,
}

/// Linear layers with LeakyReLU between them.
#[derive(Clone, Debug)]
struct Head([Linear; 2]);

impl Head {
    fn new(store: &ParamStore, dim: usize, width: usize) -> Result<Self> {
        Ok(Self([Linear::new(&store.at(0), 2 * dim, dim)?, Linear::new(&store.at(2), dim, width)?]))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [inner, outer] = &self.0;
        let x = inner.forward(x)?;
        outer.forward(&x.relu()?.sub(&x.neg()?.relu()?.affine(0.01, 0.0)?)?)
    }
}

impl BeliefStateWrapper {
    /// Creates a model; its parameters' names begin with `forward_decoder.`, `backward_decoder.` and `text_head.`.
    ///
    /// Errors: those of the layers.
    pub fn new(plan: BeliefPlan, store: &ParamStore) -> Result<Self> {
        let (dim, tokens) = (plan.forward.layers.dim, plan.forward.num_tokens);
        let decoder = |plan: &TransformerPlan, name: &'static str| {
            TransformerWrapper::from_plan(plan.clone(), &store.at(name)).context(name)
        };
        let forward_decoder = decoder(&plan.forward, "forward_decoder")?;
        let backward_decoder = match &plan.backward {
            Some(plan) => decoder(plan, "backward_decoder")?,
            None => {
                store.at("backward_decoder").tie_all(&store.at("forward_decoder"))?;
                forward_decoder.clone()
            }
        };
        let weights = Tensor::from_vec(vec![1.0, plan.backward_weight], [2], store.device())?;
        store.buffer("loss_weights", weights.to_dtype(store.dtype())?)?;
        let distance = plan.distance.map(|(longest, _)| Head::new(&store.at("to_distance_logits"), dim, longest));
        Ok(Self {
            suffix_token: store.param("suffix_token", [dim], Init::Normal(0.02))?,
            text_head: Head::new(&store.at("text_head"), dim, 2 * tokens)?,
            to_distance: distance.transpose()?,
            forward_decoder,
            backward_decoder,
            plan,
        })
    }

    /// Computes the mean cross-entropy of the next tokens and of those before, over all pairs of a text before and one
    /// after with at least one token between them: `[b, n]` I64 to a scalar, in f32 for half precision.
    ///
    /// Memory grows with the square of the length.
    ///
    /// Errors: fewer than two tokens, and those of [`TransformerWrapper::forward`].
    pub fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        ensure!(
            tokens.rank() == 2 && tokens.shape()[1] >= 2 && tokens.dtype() == DType::I64,
            Error::shape("loss", format_args!("expected i64 [batch, n], n at least 2, got {:?}", tokens.shape()))
        );
        let (b, n, vocabulary) = (tokens.dim(0)?, tokens.dim(1)?, self.plan.forward.num_tokens);
        let before = self.hidden(&self.forward_decoder, tokens, false).context("forward_decoder")?;
        let reversed = rows_at(tokens, &(0..n).rev().collect_vec())?;
        let after = self.hidden(&self.backward_decoder, &reversed, true).context("backward_decoder")?;
        // The text after position k has the state of the n - k last tokens.
        let pairs: Vec<(usize, usize)> = (0..n).flat_map(|f| (f + 2..=n).map(move |b| (f, b))).collect_vec();
        let firsts = pairs.iter().map(|&(first, _)| first).collect_vec();
        let lasts = pairs.iter().map(|&(_, last)| n - last).collect_vec();
        let states = Tensor::cat(&[&rows_at(&before, &firsts)?, &rows_at(&after, &lasts)?], -1)?;
        let logits = self.text_head.forward(&states).context("text_head")?;
        let next = firsts.iter().map(|first| first + 1).collect_vec();
        let previous = pairs.iter().map(|&(_, last)| last - 1).collect_vec();
        let part = |at: usize, places: &[usize]| {
            let logits = logits.narrow(-1, at * vocabulary, vocabulary)?;
            log_probabilities(&logits, &rows_at(tokens, places)?)?.mean(&[1])?.mean(&[])?.neg()
        };
        let weight = self.plan.backward_weight;
        let mut loss = part(0, &next)?.add(&part(1, &previous)?.affine(weight, 0.0)?)?;
        if let (Some(head), Some((longest, factor))) = (&self.to_distance, self.plan.distance) {
            let labels = pairs.iter().map(|&(first, last)| (last - first).min(longest - 1) as i64).collect_vec();
            let labels = Tensor::from_vec(labels, [1, pairs.len()], tokens.device())?.expand([b, pairs.len()])?;
            let logits = head.forward(&states).context("to_distance_logits")?;
            let error = log_probabilities(&logits, &labels)?.mean(&[1])?.mean(&[])?.neg()?;
            loss = loss.add(&error.affine(factor * (1.0 + weight), 0.0)?)?;
        }
        loss.affine(0.5, 0.0)
    }

    /// Returns normed hidden states; those of reversed text begin with that of no token.
    fn hidden(&self, decoder: &TransformerWrapper, tokens: &Tensor, reversed: bool) -> Result<Tensor> {
        let suffix = || {
            let suffix = self.suffix_token.tensor();
            let dim = suffix.dim(0)?;
            suffix.reshape([1, 1, dim])?.expand([tokens.dim(0)?, 1, dim])
        };
        let prepend_embeds = reversed.then(suffix).transpose()?;
        let options = ForwardOptions { prepend_embeds, return_embeddings: true, ..ForwardOptions::default() };
        Ok(decoder.forward(tokens, &options)?.out)
    }

    /// Continues a prompt, `[b, t]` I64, by `seq_len` tokens, and returns only those. `suffix`, `[n]` or `[b, n]`, is
    /// the text after them.
    ///
    /// Errors: an empty prompt, and those of [`TransformerWrapper::forward`].
    pub fn generate(
        &self,
        prompt: &Tensor,
        suffix: Option<&Tensor>,
        seq_len: usize,
        sampling: &SamplingConfig,
        seed: u64,
    ) -> Result<Tensor> {
        ensure!(
            prompt.rank() == 2 && prompt.numel() > 0 && prompt.dtype() == DType::I64,
            Error::shape("prompts", format_args!("expected i64 [batch, n], got {:?}", prompt.shape()))
        );
        let (b, t) = (prompt.dim(0)?, prompt.dim(1)?);
        let after = match suffix {
            Some(suffix) => {
                let suffix =
                    if suffix.rank() == 1 { suffix.unsqueeze(0)?.expand([b, suffix.dim(0)?])? } else { suffix.clone() };
                ensure!(
                    suffix.rank() == 2 && suffix.dim(0)? == b,
                    Error::shape("suffix", format_args!("expected i64 [n] or [{b}, n], got {:?}", suffix.shape()))
                );
                rows_at(&suffix, &(0..suffix.dim(1)?).rev().collect_vec())?
            }
            None => Tensor::zeros([b, 0], DType::I64, prompt.device())?,
        };
        let after = self.hidden(&self.backward_decoder, &after, true).context("backward_decoder")?;
        let after = after.narrow(1, after.dim(1)? - 1, 1)?;
        let mut all = prompt.clone();
        for step in 0..seq_len {
            let before = self.hidden(&self.forward_decoder, &all, false).context("forward_decoder")?;
            let before = before.narrow(1, before.dim(1)? - 1, 1)?;
            let logits = self.text_head.forward(&Tensor::cat(&[&before, &after], -1)?).context("text_head")?;
            let logits = logits.narrow(-1, 0, self.plan.forward.num_tokens)?;
            all = Tensor::cat(&[&all, &sampled(&logits, sampling, seed, step)?], 1)?;
        }
        all.narrow(1, t, seq_len)
    }
}

/// Returns the vectors or tokens at these positions of each row: `[b, n, ..] → [b, places, ..]`.
fn rows_at(x: &Tensor, places: &[usize]) -> Result<Tensor> {
    let (b, n) = (x.dim(0)?, x.dim(1)?);
    if x.dtype() == DType::I64 {
        let values = x.to_vec::<i64>()?;
        let picked =
            (0..b).flat_map(|row| places.iter().map(move |at| row * n + at)).map(|at| values[at]).collect_vec();
        return Tensor::from_vec(picked, [b, places.len()], x.device());
    }
    let index = (0..b).flat_map(|row| places.iter().map(move |at| (row * n + at) as i64)).collect_vec();
    let index = Tensor::from_vec(index, [b, places.len()], x.device())?;
    x.reshape([b * n, x.dim(2)?])?.embedding(&index)
}

impl NamedModel for BeliefStateWrapper {
    fn pass(&self, inputs: &mut Inputs, _: &Call, _: &RunOptions) -> Result<(&'static str, Tensor)> {
        Ok(("loss", self.loss(&inputs.need("seq")?)?))
    }

    fn generates_to_suffix(&self) -> bool {
        true
    }

    fn generate(&self, inputs: &mut Inputs, _: &Call, generate: &GenerateCall, run: &RunOptions) -> Result<Tensor> {
        for (name, given) in [
            ("eos_token", generate.eos_token.is_some()),
            ("restrict_to_max_seq_len", !generate.restrict_to_max_seq_len),
        ] {
            ensure!(!given, Error::option(name, "is not supported by BeliefStateWrapper").context("call"));
        }
        let seq_len = generate.seq_len.ok_or_else(|| Error::missing_option("seq_len").context("call"))?;
        let (prompt, suffix) = (inputs.prompt()?, inputs.take("suffix"));
        self.generate(&prompt, suffix.as_ref(), seq_len, &generate.sampling, run.seed)
    }
}
