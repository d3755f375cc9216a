//! Sampling: from logits to the next token.

use crate::{
    Error, Result, Tensor,
    config::{FilterLogits, SamplingConfig},
    error::{ErrorContext, ensure},
    ops::{SampleFilter, SampleSpec},
    sort::order,
};

/// Rejects settings outside their domain.
pub(super) fn check(config: &SamplingConfig) -> Result<()> {
    let SamplingConfig { filter_thres, k, min_p_pow, min_p_ratio, temperature, .. } = *config;
    ensure!(
        temperature.is_finite() && temperature >= 0.0,
        Error::option("temperature", format_args!("expected a finite number of at least 0, got {temperature}"))
    );
    ensure!(
        (0.0..=1.0).contains(&filter_thres),
        Error::option("filter_thres", format_args!("expected 0 to 1, got {filter_thres}"))
    );
    ensure!(k != Some(0), Error::option("k", "expected at least 1, got 0"));
    ensure!(
        k.is_none() || config.filter_logits_fn == FilterLogits::TopK,
        Error::option("k", format_args!("requires `filter_logits_fn = top_k`, got {:?}", config.filter_logits_fn))
    );
    ensure!(
        (0.0..=1.0).contains(&min_p_ratio),
        Error::option("min_p_ratio", format_args!("expected 0 to 1, got {min_p_ratio}"))
    );
    ensure!(
        min_p_pow.is_finite() && min_p_pow >= 0.0,
        Error::option("min_p_pow", format_args!("expected a finite number of at least 0, got {min_p_pow}"))
    );
    Ok(())
}

/// Draws a token for each row of logits on their device: `[b, tokens] → [b]` I64. Row `i` uses draw `step` of stream
/// `i` of [`Philox`](crate::Philox) with this seed; `step` is one I64 on the logits' device.
///
/// The distribution is that of [`filter_probabilities`], except that probabilities below about 1e-11 of the largest
/// are lost; the tokens are the same on every device ([`Tensor::sample`]).
///
/// Errors: settings out of their domain, and those of [`Tensor::sample`].
pub fn sample_tokens(logits: &Tensor, config: &SamplingConfig, seed: u64, step: &Tensor) -> Result<Tensor> {
    check(config)?;
    let SamplingConfig { filter_thres, k, min_p_pow, min_p_ratio, temperature, .. } = *config;
    let filter = match config.filter_logits_fn {
        FilterLogits::None => SampleFilter::All,
        FilterLogits::Entmax => SampleFilter::Entmax,
        FilterLogits::TopK => {
            SampleFilter::Best(k.unwrap_or_else(|| kept_by_share(filter_thres, logits.shape().last())))
        }
        FilterLogits::TopShare => SampleFilter::Best(share(filter_thres, logits.shape().last())),
        FilterLogits::RowTopA => {
            return Err(Error::option("filter_logits_fn", "row_top_a is drawn row by row: use `generate`"));
        }
        FilterLogits::TopP => SampleFilter::MassUpTo(1.0 - filter_thres),
        FilterLogits::Nucleus => SampleFilter::MassBelow(filter_thres),
        FilterLogits::TopA => SampleFilter::TopA { power: min_p_pow, ratio: min_p_ratio },
        FilterLogits::MinP => SampleFilter::MinP(min_p_ratio),
    };
    logits.sample(&SampleSpec { filter, temperature, seed }, step).context("sampling")
}

/// Returns the number of tokens of a vocabulary that top-k keeps for a threshold.
fn kept_by_share(thres: f64, tokens: Option<&usize>) -> usize {
    share(1.0 - thres, tokens)
}

/// Returns a share of a vocabulary, at least one token.
fn share(share: f64, tokens: Option<&usize>) -> usize {
    ((share * tokens.copied().unwrap_or(0) as f64).ceil() as usize).max(1)
}

/// Returns the distribution of the next token for each row of logits, after filter and temperature.
///
/// The filter applies to raw logits and the temperature divides after it, except for entmax, where it divides before.
/// A temperature of 0 keeps only the most likely token.
///
/// Errors: settings out of their domain, rows without entries, or logits that are NaN or all −∞.
pub fn filter_probabilities(logits: &[Vec<f64>], config: &SamplingConfig) -> Result<Vec<Vec<f64>>> {
    check(config)?;
    for row in logits {
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        ensure!(
            best.is_finite() && !row.iter().any(|x| x.is_nan()),
            Error::argument(
                "sampling",
                "expected finite logits, got NaN or infinity: the weights are broken or overflow f16 (try bf16 or f32)"
            )
        );
    }
    // The largest probability of the batch, for `top_a`.
    let best = || logits.iter().flat_map(|row| softmax(row)).fold(0.0, f64::max);
    let limit = match config.filter_logits_fn {
        FilterLogits::TopA => best().powf(config.min_p_pow) * config.min_p_ratio,
        _ => 0.0,
    };
    Ok(logits.iter().map(|row| distribution(row, config, limit)).collect())
}

/// Returns the distribution of [`filter_probabilities`] for one row; `limit` is the least probability of `top_a`.
fn distribution(row: &[f64], config: &SamplingConfig, limit: f64) -> Vec<f64> {
    let SamplingConfig { filter_thres: thres, temperature, .. } = *config;
    if temperature == 0.0 {
        return one_hot(row);
    }
    // The largest logit is subtracted first, or small temperatures would make the others overflow.
    let scaled = |row: &[f64]| {
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row.iter().map(|x| (x - best) / temperature).collect::<Vec<_>>()
    };
    let kept = match config.filter_logits_fn {
        FilterLogits::None => row.to_vec(),
        FilterLogits::Entmax => return entmax(&scaled(row), 1.3),
        FilterLogits::TopA => return uniform_above(&softmax(row), limit),
        FilterLogits::TopK => only_best(row, config.k.unwrap_or(kept_by_share(thres, Some(&row.len())))),
        FilterLogits::TopShare => only_best(row, share(thres, Some(&row.len()))),
        FilterLogits::TopP => only_mass(row, &|before| before > 1.0 - thres),
        FilterLogits::Nucleus => only_mass(row, &|before| before >= thres),
        FilterLogits::MinP | FilterLogits::RowTopA => {
            let power = if config.filter_logits_fn == FilterLogits::MinP { 1.0 } else { config.min_p_pow };
            let probabilities = softmax(row);
            let limit = probabilities.iter().copied().fold(0.0, f64::max).powf(power) * config.min_p_ratio;
            row.iter().zip(probabilities).map(|(&x, p)| if p < limit { f64::NEG_INFINITY } else { x }).collect()
        }
    };
    softmax(&scaled(&kept))
}

/// Draws one token per row in f64; [`sample_tokens`] is faster. `draws` are uniform in `[0, 1)`.
///
/// Errors: those of [`filter_probabilities`], or a number of draws other than the number of rows.
pub fn sample(logits: &[Vec<f64>], config: &SamplingConfig, draws: &[f64]) -> Result<Vec<i64>> {
    ensure!(
        logits.len() == draws.len(),
        Error::argument("sample", format_args!("expected one draw per row, got {} for {}", draws.len(), logits.len()))
    );
    let probabilities = filter_probabilities(logits, config)?;
    Ok(probabilities.iter().zip(draws).map(|(row, &draw)| pick(row, draw)).collect())
}

/// Returns the token in whose share of `0..1` the draw falls.
pub(super) fn pick(probabilities: &[f64], draw: f64) -> i64 {
    let target = draw * probabilities.iter().sum::<f64>();
    let mut sum = 0.0;
    let mut last = 0;
    for (token, &p) in probabilities.iter().enumerate() {
        if p > 0.0 {
            sum += p;
            last = token;
            if sum > target {
                break;
            }
        }
    }
    last as i64
}

fn one_hot(row: &[f64]) -> Vec<f64> {
    // The first of ties.
    let best = (0..row.len()).reduce(|best, token| if row[token] > row[best] { token } else { best });
    (0..row.len()).map(|token| if Some(token) == best { 1.0 } else { 0.0 }).collect()
}

/// Returns equal shares for all tokens with at least this probability; the most likely token if another row of the
/// batch has set the limit out of reach.
fn uniform_above(probabilities: &[f64], limit: f64) -> Vec<f64> {
    let kept = probabilities.iter().filter(|&&p| p >= limit).count();
    if kept == 0 {
        return one_hot(probabilities);
    }
    probabilities.iter().map(|&p| if p >= limit { 1.0 / kept as f64 } else { 0.0 }).collect()
}

/// Returns the logits of these tokens, −∞ for the others.
fn only(row: &[f64], tokens: impl Iterator<Item = usize>) -> Vec<f64> {
    let mut kept = vec![f64::NEG_INFINITY; row.len()];
    tokens.for_each(|token| kept[token] = row[token]);
    kept
}

/// Keeps exactly the `k` highest logits, at least one.
fn only_best(row: &[f64], k: usize) -> Vec<f64> {
    only(row, best(row, k.max(1)).into_iter())
}

/// Returns the `k` tokens with the highest logits, unordered; the earlier of ties.
pub(super) fn best(row: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    if k < order.len() {
        order.select_nth_unstable_by(k, |&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.truncate(k);
    }
    order
}

/// Keeps the highest logits until the mass before the next one is enough; at least one.
fn only_mass(row: &[f64], enough: &dyn Fn(f64) -> bool) -> Vec<f64> {
    let probabilities = softmax(row);
    let mut before = 0.0;
    // Ties in the order of tokens.
    let order = order(row.len(), |a, b| row[b].total_cmp(&row[a]));
    let kept = order.into_iter().enumerate().take_while(|&(rank, token)| {
        let stays = rank == 0 || !enough(before);
        before += probabilities[token];
        stays
    });
    only(row, kept.map(|(_, token)| token))
}

fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

/// Computes α-entmax by bisection in 50 steps, normalised at the end (Peters et al.,
/// <https://arxiv.org/abs/1905.05702>).
fn entmax(row: &[f64], alpha: f64) -> Vec<f64> {
    let row: Vec<f64> = row.iter().map(|x| x * (alpha - 1.0)).collect();
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = |threshold: f64| row.iter().map(move |x| (x - threshold).max(0.0).powf(1.0 / (alpha - 1.0)));
    let mut low = max - 1.0;
    let high = max - (1.0 / row.len() as f64).powf(alpha - 1.0);
    let excess_at_low = weights(low).sum::<f64>() - 1.0;
    let mut width = high - low;
    let mut middle = low;
    for _ in 0..50 {
        width /= 2.0;
        middle = low + width;
        if (weights(middle).sum::<f64>() - 1.0) * excess_at_low >= 0.0 {
            low = middle;
        }
    }
    let sum: f64 = weights(middle).sum();
    weights(middle).map(|weight| weight / sum).collect()
}
