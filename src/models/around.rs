//! Models around a transformer with losses of their own: segments with memories, numbers, preferences.

use super::{TransformerWrapper, sampling::sample};
use crate::{
    DType, Error, ParamStore, Philox, Result, Tensor,
    collect::CollectVec,
    config::{LossPlan, SamplingConfig, TransformerPlan},
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, log_sigmoid},
};

/// Language model that reads long sequences in segments of `max_seq_len` tokens, each with the memories of those before
/// it (Dai et al., Transformer-XL, <https://arxiv.org/abs/1901.02860>).
#[derive(Clone, Debug)]
pub struct XlAutoregressiveWrapper {
    /// The wrapped model.
    pub net: TransformerWrapper,
    loss: LossPlan,
    /// Number of segments that gradients pass.
    steps: usize,
}

impl XlAutoregressiveWrapper {
    /// Creates a model; its parameters' names begin with `net.`.
    ///
    /// Errors: a model without a longest sequence, or those of the layers.
    pub fn new(plan: TransformerPlan, loss: LossPlan, steps: usize, store: &ParamStore) -> Result<Self> {
        ensure!(plan.max_seq_len > 0, Error::option("max_seq_len", "is the length of a segment: expected at least 1"));
        Ok(Self { net: TransformerWrapper::from_plan(plan, &store.at("net")).context("net")?, loss, steps })
    }

    /// Returns the token that fills a row after its end.
    pub(super) fn pad_value(&self) -> i64 {
        self.loss.pad_value
    }

    /// Computes the loss of predicting `tokens[:, 1:]` from `tokens[:, :-1]`, `[b, n + 1]` I64 to a scalar: the mean of
    /// rows, weighted by the length of the segments.
    ///
    /// Errors: fewer than two tokens, and those of [`TransformerWrapper::forward`].
    pub fn loss(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        ensure!(
            tokens.rank() == 2 && tokens.shape()[1] >= 2,
            Error::shape("loss", format_args!("expected [batch, n] with n of at least 2, got {:?}", tokens.shape()))
        );
        options.check_output_only("loss")?;
        let (n, segment) = (tokens.dim(1)? - 1, self.net.plan().max_seq_len);
        let mut options = ForwardOptions { return_mems: true, return_embeddings: true, ..options.clone() };
        let mut total: Option<Tensor> = None;
        for (index, first) in (0..n).step_by(segment).enumerate() {
            let length = segment.min(n - first);
            options.attached_mems = !(index + 1).is_multiple_of(self.steps);
            let output = self.net.forward(&tokens.narrow(1, first, length)?, &options).context("net")?;
            options.mems = Some(output.mems);
            let targets = tokens.narrow(1, first + 1, length)?;
            let loss = self.mean_of_rows(&output.out, &targets)?.affine(length as f64 / n as f64, 0.0)?;
            total = Some(match total {
                Some(total) => total.add(&loss)?,
                None => loss,
            });
        }
        total.ok_or_else(|| Error::argument("loss", "there is no segment"))
    }

    /// Returns the mean of the rows' mean cross-entropies; a row without targets counts 0.
    fn mean_of_rows(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let ignored = self.loss.ignore_index;
        let values = targets.to_vec::<i64>()?;
        if !values.contains(&ignored) {
            return self.net.cross_entropy(hidden, targets, ignored).context("net");
        }
        let (b, n) = (targets.dim(0)?, targets.dim(1)?);
        let mut sum = Tensor::zeros((), hidden.dtype().accumulator(), hidden.device())?;
        for (row, values) in values.chunks(n).enumerate() {
            if values.iter().all(|&target| target == ignored) {
                continue;
            }
            let (hidden, targets) = (hidden.narrow(0, row, 1)?, targets.narrow(0, row, 1)?);
            sum = sum.add(&self.net.cross_entropy(&hidden, &targets, ignored).context("net")?)?;
        }
        sum.affine(1.0 / b as f64, 0.0)
    }

    /// Continues a prompt, `[b, t]` I64, by `seq_len` tokens, and returns only those.
    ///
    /// Like x-transformers, which keeps of a token that it generates only the memory of its own step, and reads a
    /// finished segment again with the memories before its last token. `on_tokens` receives the new token of every row,
    /// and returns `false` to end generation.
    ///
    /// Errors: an empty prompt, and those of [`TransformerWrapper::forward`].
    pub fn generate(
        &self,
        prompt: &Tensor,
        seq_len: usize,
        sampling: &SamplingConfig,
        seed: u64,
        options: &ForwardOptions,
        on_tokens: &mut dyn FnMut(&[i64]) -> bool,
    ) -> Result<Tensor> {
        options.check_output_only("generate")?;
        ensure!(
            prompt.rank() == 2 && prompt.numel() > 0 && prompt.dtype() == DType::I64,
            Error::shape("start_tokens", format_args!("expected i64 [batch, n], got {:?}", prompt.shape()))
        );
        let (t, segment) = (prompt.dim(1)?, self.net.plan().max_seq_len);
        let mut options = ForwardOptions { return_mems: true, ..options.clone() };
        let mut first = (t - 1) / segment * segment;
        for leading in (0..first).step_by(segment) {
            let output = self.net.forward(&prompt.narrow(1, leading, segment)?, &options).context("net")?;
            options.mems = Some(output.mems);
        }
        let mut all = prompt.clone();
        // Memories after the last step; those of the options are before the segment.
        let mut newest = options.mems.clone();
        let mut read = 0;
        for step in 0..seq_len {
            let length = all.dim(1)?;
            let ends = length.is_multiple_of(segment);
            if ends {
                options.mems = newest.take();
                (first, read) = (length - segment, 0);
            }
            let seen = all.narrow(1, first, length - first)?;
            let output = self.net.forward(&seen, &options).context("net")?;
            // A step after the first of a segment adds the memory of one token.
            let added = if read == 0 { length - first } else { 1 };
            newest = Some(self.joined(&output.mems, options.mems.as_deref(), length - first, added)?);
            read = length - first;
            let tokens = sampled(&output.out, sampling, seed, step)?;
            let goes_on = on_tokens(&tokens.to_vec::<i64>()?);
            all = Tensor::cat(&[&all, &tokens], 1)?;
            if !goes_on {
                break;
            }
            if ends {
                options.mems = newest.clone();
                (first, read) = (length, 0);
            }
        }
        all.narrow(1, t, all.dim(1)? - t)
    }

    /// Returns the memories before a segment and those of its last `added` of `length` tokens, truncated.
    fn joined(&self, mems: &[Tensor], before: Option<&[Tensor]>, length: usize, added: usize) -> Result<Vec<Tensor>> {
        if added == length {
            return Ok(mems.to_vec());
        }
        let join = |(index, mem): (usize, &Tensor)| {
            let kept = mem.dim(1)?;
            let new = mem.narrow(1, kept - added.min(kept), added.min(kept))?;
            // The layers read memories of those above them, like `forward`.
            let read = (index + self.net.plan().shift_mem_down) % mems.len();
            let joined = match before.and_then(|before| before.get(read)) {
                Some(before) => Tensor::cat(&[before, &new], 1)?,
                None => new,
            };
            super::transformer::last_memories(&joined, self.net.plan().memories)
        };
        mems.iter().enumerate().map(join).try_collect_vec()
    }
}

/// Language model of text with numbers: a token stands for all numbers, whose values scale its embedding and are
/// predicted by a head of their own (Golkar et al., xVal, <https://arxiv.org/abs/2310.02989>).
#[derive(Clone, Debug)]
pub struct XValAutoregressiveWrapper {
    /// The wrapped model.
    pub net: TransformerWrapper,
    loss: LossPlan,
    numbers: f64,
}

impl XValAutoregressiveWrapper {
    /// Creates a model; its parameters' names begin with `net.`. `numbers` is the weight of the numbers' loss.
    ///
    /// Errors: those of the layers.
    pub fn new(plan: TransformerPlan, loss: LossPlan, numbers: f64, store: &ParamStore) -> Result<Self> {
        Ok(Self { net: TransformerWrapper::from_plan(plan, &store.at("net")).context("net")?, loss, numbers })
    }

    /// Computes the mean over targets of the cross-entropy, and for numbers of the squared error too: `tokens [b, n]`
    /// I64, `numbers [b, n]`. A mask as long as the tokens loses a column, and masks targets.
    ///
    /// Errors: tensors that do not match.
    pub fn loss(&self, tokens: &Tensor, numbers: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        ensure!(
            tokens.rank() == 2 && tokens.shape()[1] >= 2 && tokens.shape() == numbers.shape(),
            Error::shape("loss", format_args!("expected tokens and numbers [batch, n], got {:?}", tokens.shape()))
        );
        let n = tokens.dim(1)? - 1;
        let constant = |value: i64| Tensor::full((), value as f64, DType::I64, tokens.device());
        let (read, targets) = (tokens.narrow(1, 0, n)?, tokens.narrow(1, 1, n)?);
        let mut kept = targets.eq(&constant(self.loss.ignore_index)?)?.logical_not()?;
        let mut options = options.clone();
        if let Some(mask) = options.mask.take() {
            let full = mask.dim(1)? == n + 1;
            kept = kept.logical_and(&if full { mask.narrow(1, 1, n)? } else { mask.clone() })?;
            options.mask = Some(if full { mask.narrow(1, 0, n)? } else { mask });
        }
        options.numbers = Some(numbers.narrow(1, 0, n)?);
        let output = self.net.forward(&read, &options).context("net")?;
        let predicted =
            output.others.first().ok_or_else(|| Error::argument("xval", "the model predicts no numbers"))?;
        let wanted = kept.where_cond(&targets, &constant(self.loss.ignore_index)?)?;
        let words = output.out.cross_entropy(&wanted, self.loss.ignore_index)?;
        let token = self.net.plan().numerical_token.unwrap_or(-1);
        let numerical = targets.eq(&constant(token)?)?.logical_and(&kept)?;
        let numbers = numbers.narrow(1, 1, n)?.masked_fill(&numerical.logical_not()?, 0.0)?;
        let error = predicted.sub(&numbers)?.square()?.masked_fill(&numerical.logical_not()?, 0.0)?;
        let count = kept.to_vec::<bool>()?.into_iter().filter(|&kept| kept).count().max(1);
        words.add(&error.sum(&[])?.affine(self.numbers / count as f64, 0.0)?.to_dtype(words.dtype())?)
    }
}

impl XValAutoregressiveWrapper {
    /// Continues tokens and numbers, `[b, t]` each, by `seq_len`: returns the new tokens, and the numbers of those that
    /// stand for one, 0 for others. Each step reads the last `max_seq_len` of them.
    ///
    /// Errors: an empty prompt, tensors that do not match, and those of [`TransformerWrapper::forward`].
    pub fn generate(
        &self,
        [tokens, numbers]: [&Tensor; 2],
        seq_len: usize,
        sampling: &SamplingConfig,
        seed: u64,
        options: &ForwardOptions,
    ) -> Result<[Tensor; 2]> {
        options.check_output_only("generate")?;
        ensure!(
            tokens.rank() == 2 && tokens.numel() > 0 && tokens.shape() == numbers.shape(),
            Error::shape(
                "start_tokens",
                format_args!("expected tokens and numbers [batch, n], got {:?}", tokens.shape())
            )
        );
        let (t, longest) = (tokens.dim(1)?, self.net.plan().max_seq_len);
        let (mut all, mut numbers) = (tokens.clone(), numbers.detach());
        for step in 0..seq_len {
            let length = all.dim(1)?;
            let seen = if longest == 0 { length } else { length.min(longest) };
            let last = |x: &Tensor| x.narrow(1, length - seen, seen);
            let options = ForwardOptions { numbers: Some(last(&numbers)?), ..options.clone() };
            let output = self.net.forward(&last(&all)?, &options).context("net")?;
            let predicted =
                output.others.first().ok_or_else(|| Error::argument("xval", "the model predicts no numbers"))?;
            all = Tensor::cat(&[&all, &sampled(&output.out, sampling, seed, step)?], 1)?;
            numbers = Tensor::cat(&[&numbers, &predicted.narrow(1, seen - 1, 1)?.detach()], 1)?;
        }
        let (new, numbers) = (all.narrow(1, t, seq_len)?, numbers.narrow(1, t, seq_len)?);
        let token = self.net.plan().numerical_token.unwrap_or(-1);
        let other = new.eq(&Tensor::full((), token as f64, DType::I64, new.device())?)?.logical_not()?;
        Ok([new, numbers.masked_fill(&other, 0.0)?])
    }
}

/// Draws the tokens after logits `[b, n, num_tokens]`, `[b, 1]`.
pub(super) fn sampled(logits: &Tensor, sampling: &SamplingConfig, seed: u64, step: usize) -> Result<Tensor> {
    let (b, n) = (logits.dim(0)?, logits.dim(1)?);
    let last = logits.select(1, n - 1)?.to_f64_vec()?;
    let rows: Vec<Vec<f64>> = last.chunks((last.len() / b).max(1)).map(<[f64]>::to_vec).collect_vec();
    let draws: Vec<f64> = (0..b).map(|row| Philox::new(seed, row as u64).uniform(step as u64)).collect_vec();
    Tensor::from_vec(sample(&rows, sampling, &draws)?, [b, 1], logits.device())
}

/// Direct preference optimization of a language model (Rafailov et al., <https://arxiv.org/abs/2305.18290>).
#[derive(Clone, Debug)]
pub struct Dpo {
    /// The model that learns.
    pub policy: TransformerWrapper,
    /// The model that it started as, which does not learn.
    pub reference: TransformerWrapper,
    beta: f64,
    pad: Option<i64>,
}

/// Inputs of [`Dpo::loss`].
#[derive(Clone, Debug)]
pub struct Preference {
    /// Preferred and other sequences, `[b, n]` I64 each, with the same prompts.
    pub sequences: [Tensor; 2],
    /// Mask of the prompts, `[b, n]` Bool; `true` marks a token of the prompt.
    pub prompt_mask: Tensor,
    /// Masks of the sequences, `[b, n]` Bool; `true` marks a real token. Default: all but padding.
    pub masks: [Option<Tensor>; 2],
}

impl Dpo {
    /// Creates both models: their parameters' names begin with `policy_model.` and `ref_model.`.
    ///
    /// Errors: those of the layers.
    pub fn new(plan: TransformerPlan, beta: f64, pad: Option<i64>, store: &ParamStore) -> Result<Self> {
        let reference = TransformerWrapper::from_plan(plan.clone(), &store.at("ref_model")).context("ref_model")?;
        let policy = TransformerWrapper::from_plan(plan, &store.at("policy_model")).context("policy_model")?;
        Ok(Self { policy, reference, beta, pad })
    }

    /// Computes the loss, a scalar. Masks lose their last column, like in x-transformers.
    ///
    /// Errors: tensors that do not match.
    pub fn loss(&self, given: &Preference) -> Result<Tensor> {
        let answer = given.prompt_mask.logical_not()?;
        let mut ratios = Vec::with_capacity(2);
        for (sequence, mask) in given.sequences.iter().zip(&given.masks) {
            let real = match (mask, self.pad) {
                (Some(mask), _) => Some(mask.clone()),
                (None, Some(pad)) => {
                    let pad = Tensor::full((), pad as f64, DType::I64, sequence.device())?;
                    Some(sequence.eq(&pad)?.logical_not()?)
                }
                (None, None) => None,
            };
            let kept = real.map_or_else(|| Ok(answer.clone()), |real| answer.logical_and(&real))?;
            let policy = mean_log_probability(&self.policy, sequence, &kept).context("policy_model")?;
            let reference = mean_log_probability(&self.reference, sequence, &kept).context("ref_model")?.detach();
            ratios.push([policy, reference]);
        }
        let [preferred, other] = [&ratios[0], &ratios[1]];
        let [policy, reference] = [0, 1].map(|model| preferred[model].sub(&other[model]));
        let margin = policy?.sub(&reference?)?.affine(self.beta, 0.0)?;
        log_sigmoid(&margin)?.neg()?.mean(&[])
    }
}

/// Returns the log-probabilities of tokens `[b, n]` given logits `[b, n, num_tokens]`.
pub(super) fn log_probabilities(logits: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    let logits = logits.to_dtype(logits.dtype().accumulator())?;
    let largest = logits.detach().max(-1)?.unsqueeze(-1)?;
    let shifted = logits.sub(&largest)?;
    let log_sum = shifted.exp()?.sum(&[-1])?.ln()?;
    let chosen = Tensor::arange(logits.dim(-1)?, logits.device())?.eq(&tokens.unsqueeze(-1)?)?;
    shifted.masked_fill(&chosen.logical_not()?, 0.0)?.sum(&[-1])?.sub(&log_sum)
}

/// Returns the mean log-probability of the tokens after the first that the mask keeps, `[b]`.
fn mean_log_probability(model: &TransformerWrapper, tokens: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let n = tokens.dim(1)?.saturating_sub(1);
    let logits = model.forward(&tokens.narrow(1, 0, n)?, &ForwardOptions::default())?.out;
    let known = log_probabilities(&logits, &tokens.narrow(1, 1, n)?)?;
    let mask = if mask.dim(1)? == n + 1 { mask.narrow(1, 0, n)? } else { mask.clone() };
    let sums = known.masked_fill(&mask.logical_not()?, 0.0)?.sum(&[1])?;
    let counts: Vec<f64> = mask
        .to_vec::<bool>()?
        .chunks(n.max(1))
        .map(|row| (row.iter().filter(|&&kept| kept).count() as f64).max(1e-5))
        .collect_vec();
    let counts = Tensor::from_vec(counts, [mask.dim(0)?], &crate::Device::Cpu)?.to_dtype(sums.dtype())?;
    sums.div(&counts.to_device(sums.device())?)
}
