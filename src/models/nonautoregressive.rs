//! Masked token models that fill in all positions in a few steps.

use super::{TransformerWrapper, around::log_probabilities, sampling::best};
use crate::{
    DType, Device, Error, Init, Param, ParamStore, Philox, Result, Shape, Tensor,
    collect::CollectVec,
    config::{CriticPlan, MaskedCall, MaskedPlan, TransformerPlan},
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, Linear, log_sigmoid},
    sort::sort_by,
};

/// Model of masked tokens that generates all positions in a few steps: Mask-Predict (Ghazvininejad et al.,
/// <https://arxiv.org/abs/1904.09324>), MaskGIT (Chang et al., <https://arxiv.org/abs/2202.04200>) and masked diffusion
/// (Sahoo et al., <https://arxiv.org/abs/2406.07524>).
#[derive(Clone, Debug)]
#[doc(alias = "MaskGIT")]
#[doc(alias = "MDLM")]
pub struct NonAutoregressiveWrapper {
    /// The wrapped model.
    pub net: TransformerWrapper,
    plan: MaskedPlan,
    device: Device,
    /// Embedding before the first step, `[dim]`, and the layer from embeddings to what is added to those of tokens.
    self_cond: Option<(Param, Linear)>,
    critic: Option<Critic>,
}

/// Model that tells tokens of the data from those of the generator.
#[derive(Clone, Debug)]
enum Critic {
    /// A linear layer on the embeddings of the generator.
    Own(Linear),
    Other(Box<TransformerWrapper>),
}

/// First draws of a step of training.
pub(super) struct Draws {
    /// Time of each row, from 0, where all is masked, to 1.
    pub times: Vec<f64>,
    /// Rank of each position in its row: those below the number of masked tokens are masked.
    pub ranks: Vec<usize>,
    /// Temperature of the tokens that the critic judges.
    pub temperature: f64,
}

/// Streams of random numbers.
const TIMES: u64 = 0;
const RANKS: u64 = 1;
const KEPT: u64 = 2;
const REPLACED: u64 = 3;
const TOKENS: u64 = 4;
const COINS: u64 = 5;
const NOISE: u64 = 6;

impl NonAutoregressiveWrapper {
    /// Creates a model; its parameters' names begin with `net.` and `token_critic.`.
    ///
    /// Errors: a model without logits for each token, or those of the layers.
    pub fn new(net: TransformerPlan, plan: MaskedPlan, store: &ParamStore) -> Result<Self> {
        let dim = net.layers.dim;
        ensure!(
            net.max_seq_len > 0,
            Error::option("max_seq_len", "is the length of all sequences: expected at least 1")
        );
        ensure!(
            plan.self_cond.is_none() || net.emb_dim == dim,
            Error::option("self_cond", format_args!("needs `emb_dim` = `dim`; they are {} and {dim}", net.emb_dim))
        );
        let net = TransformerWrapper::from_plan(net, &store.at("net")).context("net")?;
        let place = store.at("token_critic");
        let critic = match &plan.critic {
            CriticPlan::None => None,
            CriticPlan::Own => {
                place.at("net").tie_all(&store.at("net"))?;
                Some(Critic::Own(Linear::new(&place.at("to_logits"), dim, 1)?))
            }
            CriticPlan::Other(plan) => {
                let critic = TransformerWrapper::from_plan(TransformerPlan::clone(plan), &place);
                Some(Critic::Other(Box::new(critic.context("token_critic")?)))
            }
        };
        let self_cond = || -> Result<(Param, Linear)> {
            let null = store.param("null_embed", [dim], Init::Normal(1.0))?;
            Ok((null, Linear::without_bias(&store.at("to_self_cond"), dim, dim)?))
        };
        let device = store.device().clone();
        Ok(Self { self_cond: plan.self_cond.map(|_| self_cond()).transpose()?, net, critic, plan, device })
    }

    /// Computes the loss of filling in tokens that are masked at random, and that of the critic if there is one: `[b,
    /// max_seq_len]` I64 to a scalar. Equal seeds mask equal tokens on every device.
    ///
    /// Errors: rows of another length, and those of [`TransformerWrapper::forward`].
    pub fn loss(&self, tokens: &Tensor, seed: u64, options: &ForwardOptions) -> Result<Tensor> {
        let draws = self.draws(tokens, seed, None)?;
        self.loss_for(tokens, draws, seed, options)
    }

    /// Draws times and masks of rows; a temperature may be given.
    pub(super) fn draws(&self, tokens: &Tensor, seed: u64, temperature: Option<f64>) -> Result<Draws> {
        let n = self.net.plan().max_seq_len;
        ensure!(
            tokens.rank() == 2 && tokens.dim(0)? > 0 && tokens.dim(1)? == n && tokens.dtype() == DType::I64,
            Error::shape(
                "loss",
                format_args!("expected i64 [batch, {n}], got {:?} {}", tokens.shape(), tokens.dtype())
            )
        );
        let b = tokens.dim(0)?;
        let (times, order) = (Philox::new(seed, TIMES), Philox::new(seed, RANKS));
        let mut ranks = vec![0; b * n];
        for row in 0..b {
            let places = in_drawn_order((row * n..(row + 1) * n).collect_vec(), &order);
            places.into_iter().enumerate().for_each(|(rank, at)| ranks[at] = rank);
        }
        let temperature = temperature.unwrap_or_else(|| Philox::new(seed, COINS).uniform(3));
        Ok(Draws { times: (0..b).map(|row| times.uniform(row as u64)).collect_vec(), ranks, temperature })
    }

    /// Computes [`NonAutoregressiveWrapper::loss`] for these times and masks.
    pub(super) fn loss_for(
        &self,
        tokens: &Tensor,
        draws: Draws,
        seed: u64,
        options: &ForwardOptions,
    ) -> Result<Tensor> {
        options.check_output_only("loss")?;
        let (b, n) = (tokens.dim(0)?, tokens.dim(1)?);
        let coin = Philox::new(seed, COINS);
        let own = tokens.to_vec::<i64>()?;
        let shares: Vec<f64> = draws.times.iter().map(|&time| self.plan.masked_share(time)).collect_vec();
        let masked: Vec<bool> =
            (0..b * n).map(|at| (draws.ranks[at] as f64) < (shares[at / n] * n as f64).max(1.0)).collect_vec();
        let (mut read, mut replaced, mut left) = (own.clone(), masked.clone(), 1.0);
        if self.plan.no_replace > 0.0 && coin.uniform(0) < 0.5 {
            left -= self.plan.no_replace;
            let kept = part(&masked, n, self.plan.no_replace, &Philox::new(seed, KEPT));
            kept.into_iter().for_each(|at| replaced[at] = false);
        }
        if self.plan.random_token > 0.0 && coin.uniform(1) < 0.5 {
            let random = Philox::new(seed, TOKENS);
            for at in part(&replaced, n, self.plan.random_token * left, &Philox::new(seed, REPLACED)) {
                read[at] = random.below(at as u64, self.net.plan().num_tokens as u64) as i64;
                replaced[at] = false;
            }
        }
        (0..b * n).filter(|&at| replaced[at]).for_each(|at| read[at] = self.plan.mask_id);
        let read = Tensor::from_vec(read, [b, n], tokens.device())?;
        let mut options = options.clone();
        if let Some(share) = self.plan.self_cond {
            let embeds = match coin.uniform(2) < share {
                true => {
                    let options = ForwardOptions { return_embeddings: true, ..options.clone() };
                    Some(self.net.forward(&read, &options).context("net")?.out.detach())
                }
                false => None,
            };
            options.sum_embeds = self.condition(embeds.as_ref())?;
        }
        let logits = self.net.forward(&read, &options).context("net")?.out;
        let known = log_probabilities(&logits, tokens)?;
        let count = masked.iter().filter(|&&masked| masked).count() as f64;
        let weight = |row: usize| if self.plan.weighted { self.plan.loss_weight(draws.times[row]) } else { 1.0 };
        let weights = (0..b * n).map(|at| if masked[at] { -weight(at / n) / count } else { 0.0 }).collect_vec();
        let weights = Tensor::from_vec(weights, [b, n], tokens.device())?.to_dtype(known.dtype())?;
        let loss = known.mul(&weights)?.sum(&[])?;
        let Some(critic) = &self.critic else { return Ok(loss) };
        let noise = Philox::new(seed, NOISE);
        let vocabulary = logits.dim(-1)?;
        let sampled: Vec<i64> = logits
            .detach()
            .to_f64_vec()?
            .chunks(vocabulary.max(1))
            .enumerate()
            .map(|(at, row)| noisy_best(row, draws.temperature.max(1e-10), &noise, at * vocabulary))
            .collect_vec();
        let generated = (0..b * n).map(|at| if masked[at] { sampled[at] } else { own[at] }).collect_vec();
        let scores = self.judge(critic, &Tensor::from_vec(generated, [b, n], tokens.device())?)?;
        let signs = (0..b * n).map(|at| if sampled[at] == own[at] { -1.0 } else { 1.0 }).collect_vec();
        let signs = Tensor::from_vec(signs, [b, n], tokens.device())?.to_dtype(scores.dtype())?;
        let known = log_sigmoid(&scores.mul(&signs)?)?.mean(&[])?;
        loss.sub(&known.affine(self.plan.critic_loss_weight, 0.0)?.to_dtype(loss.dtype())?)
    }

    /// Returns what self-conditioning adds to the embeddings of tokens, given those of the step before.
    fn condition(&self, embeds: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some((null, to_condition)) = &self.self_cond else { return Ok(None) };
        let embeds = embeds.cloned().unwrap_or_else(|| null.tensor());
        to_condition.forward(&embeds).context("to_self_cond").map(Some)
    }

    /// Returns the critic's scores, `[b, n]`: high for tokens of the generator.
    fn judge(&self, critic: &Critic, tokens: &Tensor) -> Result<Tensor> {
        let scores = match critic {
            Critic::Own(to_logits) => {
                let options = ForwardOptions { return_embeddings: true, ..ForwardOptions::default() };
                to_logits.forward(&self.net.forward(tokens, &options).context("net")?.out)
            }
            Critic::Other(model) => model.forward(tokens, &ForwardOptions::default()).map(|output| output.out),
        };
        let scores = scores.context("token_critic")?;
        if scores.rank() == 3 { scores.squeeze(-1) } else { Ok(scores) }
    }

    /// Generates rows of `max_seq_len` tokens, `[b, max_seq_len]`: each step fills in all masked tokens, and masks
    /// those again that are the least certain. Equal seeds draw equal noise on every device.
    ///
    /// Errors: those of [`TransformerWrapper::forward`].
    pub fn generate(&self, batch: usize, call: &MaskedCall, seed: u64, options: &ForwardOptions) -> Result<Tensor> {
        options.check_output_only("generate")?;
        let (n, steps, device) = (self.net.plan().max_seq_len, self.plan.steps, &self.device);
        let count = Shape::new(&[batch, n])?.numel();
        let mut tokens = vec![self.plan.mask_id; count];
        let mut masked = vec![true; count];
        let mut options = ForwardOptions { return_logits_and_embeddings: true, ..options.clone() };
        let mut last: Option<Tensor> = None;
        for step in 0..steps {
            options.sum_embeds = self.condition(last.as_ref())?;
            let read = Tensor::from_vec(tokens.clone(), [batch, n], device)?;
            let output = self.net.forward(&read, &options).context("net")?;
            last = output.embeddings;
            let vocabulary = output.out.dim(-1)?;
            let kept = (((1.0 - call.filter_thres) * vocabulary as f64).ceil() as usize).max(1);
            let annealing = (steps - 1 - step) as f64 / steps as f64;
            let temperature = (call.start_temperature * annealing).max(1e-3);
            let noise = Philox::new(seed, NOISE + 2 * step as u64);
            let mut scores = vec![f64::NEG_INFINITY; batch * n];
            for (at, row) in output.out.to_f64_vec()?.chunks(vocabulary.max(1)).enumerate() {
                let mut filtered = vec![f64::NEG_INFINITY; vocabulary];
                best(row, kept).into_iter().for_each(|token| filtered[token] = row[token]);
                let sampled = noisy_best(&filtered, temperature, &noise, at * vocabulary);
                if masked[at] {
                    tokens[at] = sampled;
                }
                if masked[at] || self.plan.can_mask_prev_unmasked {
                    let largest = filtered.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = filtered.iter().map(|x| (x - largest).exp()).sum();
                    scores[at] = 1.0 - (filtered[sampled as usize] - largest).exp() / sum;
                }
            }
            if let Some(critic) = &self.critic {
                let judged = self.judge(critic, &Tensor::from_vec(tokens.clone(), [batch, n], device)?)?;
                let noise = Philox::new(seed, NOISE + 2 * step as u64 + 1);
                for (at, score) in judged.to_f64_vec()?.into_iter().enumerate() {
                    if scores[at] > f64::NEG_INFINITY {
                        scores[at] = score + call.noise_level_scale * gumbel(&noise, at) * annealing;
                    }
                }
            }
            let again = self.plan.masked_after(step, n);
            for row in 0..batch {
                let places = best(&scores[row * n..(row + 1) * n], again);
                masked[row * n..(row + 1) * n].fill(false);
                places.into_iter().take(again).for_each(|at| masked[row * n + at] = true);
            }
            (0..batch * n).filter(|&at| masked[at]).for_each(|at| tokens[at] = self.plan.mask_id);
        }
        Tensor::from_vec(tokens, [batch, n], device)
    }
}

/// Shuffles places.
fn in_drawn_order(mut places: Vec<usize>, draws: &Philox) -> Vec<usize> {
    sort_by(&mut places, |&a, &b| draws.uniform(a as u64).total_cmp(&draws.uniform(b as u64)));
    places
}

/// Draws a share of the marked places of each row of `n`.
fn part(marked: &[bool], n: usize, share: f64, draws: &Philox) -> Vec<usize> {
    let row = |row: usize| {
        let places = in_drawn_order((row * n..(row + 1) * n).filter(|&at| marked[at]).collect_vec(), draws);
        let count = (places.len() as f64 * share).ceil() as usize;
        places.into_iter().take(count)
    };
    (0..marked.len() / n).flat_map(row).collect_vec()
}

/// Returns the token with the largest sum of its logit over the temperature and Gumbel noise: a draw of the softmax.
fn noisy_best(row: &[f64], temperature: f64, noise: &Philox, first: usize) -> i64 {
    let value = |token: usize| row[token] / temperature + gumbel(noise, first + token);
    let open = (0..row.len()).filter(|&token| row[token] > f64::NEG_INFINITY);
    let best = open.map(|token| (token, value(token))).reduce(|a, b| if b.1 > a.1 { b } else { a });
    best.map_or(0, |(token, _)| token as i64)
}

fn gumbel(noise: &Philox, at: usize) -> f64 {
    let log = |x: f64| libm::log(x + 1e-10);
    -log(-log(noise.uniform(at as u64)))
}

#[cfg(test)]
mod tests {
    use super::{noisy_best, part};
    use crate::Philox;

    /// A part has the right size, only marked places, and each as often as any other.
    #[test]
    fn parts_of_marked_places_are_drawn_evenly() {
        let marked: Vec<bool> = (0..20).map(|at| at % 10 < 6).collect();
        let mut counts = [0; 20];
        for seed in 0..200 {
            let places = part(&marked, 10, 0.3, &Philox::new(seed, 1));
            assert_eq!(places.iter().filter(|&&at| at < 10).count(), 2);
            assert_eq!(places.len(), 4);
            places.into_iter().for_each(|at| counts[at] += 1);
        }
        for (at, count) in counts.into_iter().enumerate() {
            // A third of 200, and five standard deviations.
            assert!(if marked[at] { (33..=100).contains(&count) } else { count == 0 }, "{at}: {count}");
        }
    }

    /// Gumbel noise draws tokens with the probabilities of the softmax.
    #[test]
    fn noise_draws_the_softmax() {
        let row = [0.0, 1.0, f64::NEG_INFINITY, 2.0];
        let mut counts = [0.0; 4];
        for seed in 0..4000 {
            counts[noisy_best(&row, 2.0, &Philox::new(seed, 6), 0) as usize] += 1.0 / 4000.0;
        }
        let powers = row.map(|x| (x / 2.0).exp());
        let sum: f64 = powers.iter().sum();
        for (count, power) in counts.into_iter().zip(powers) {
            assert!((count - power / sum).abs() < 0.04, "{count}, not {}", power / sum);
        }
    }
}
