//! Generation of tokens after a prompt: one by one, or all at once.

use super::{
    AutoregressiveWrapper,
    ends::RowEnd,
    rows::Rows,
    sampling::{check as check_sampling, sample, sample_tokens},
};
use crate::{
    DType, Error, Philox, Result, Tensor,
    collect::CollectVec,
    config::{FilterLogits, SamplingConfig},
    error::ensure,
    nn::ForwardOptions,
    sort::sort,
};

/// Options of generation.
///
/// ```
/// use x_transformers::prelude::*;
/// let options = GenerateOptions {
///     sampling: SamplingConfig { filter_logits_fn: FilterLogits::Nucleus, temperature: 0.8, ..Default::default() },
///     eos_tokens: vec![2],
///     seed: 1,
///     ..Default::default()
/// };
/// assert_eq!(options.prefill_chunk, 512);
/// ```
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Filter and temperature. Here `top_a` looks at each row by itself.
    pub sampling: SamplingConfig,
    /// Tokens that end a row, `eos_token` in x-transformers; `pad_value` fills the row after the first one. Generation
    /// stops once every row has ended. Default none.
    pub eos_tokens: Vec<i64>,
    /// If `true`, a row whose prompt has one of `eos_tokens` has already ended, as in x-transformers. Use `false` for
    /// chats, where each turn ends with one. Default `true`.
    pub eos_in_prompt: bool,
    /// Other stopping criteria, one per row, each of which sees the new tokens of its row. Default none.
    pub row_ends: Vec<Box<dyn RowEnd>>,
    /// Seed of sampling: the same seed gives the same tokens.
    pub seed: u64,
    /// Seed for each row, in place of `seed` and the row's index: a row then gets the same tokens in any batch.
    pub row_seeds: Option<Vec<u64>>,
    /// Number of real tokens in each row of the prompt; the rest is padding. Every row continues as if it were the only
    /// one.
    pub prompt_lengths: Option<Vec<usize>>,
    /// If `true`, the padding precedes the tokens instead of following them.
    pub left_padded: bool,
    /// Divides the positive logits of tokens that the row already has, and multiplies the negative ones (Keskar et al.,
    /// <https://arxiv.org/abs/1909.05858>). Default 1.
    pub repetition_penalty: f64,
    /// Number of prompt tokens that are computed at a time; a prompt with a mask is computed at once. Default 512.
    pub prefill_chunk: usize,
    /// If `true`, computes the whole sequence for each token, without a cache. For comparisons.
    pub recompute: bool,
    /// If `true`, the context is the last `max_seq_len` tokens, otherwise all, which a table of positions limits and no
    /// cache holds. Default `true`.
    pub restrict_to_max_seq_len: bool,
    /// Mask of the prompt, context and its mask, and memories, for every step. The mask does not change positions; for
    /// prompts of different lengths see `prompt_lengths`.
    pub forward: ForwardOptions,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            sampling: SamplingConfig::default(),
            eos_tokens: Vec::new(),
            eos_in_prompt: true,
            row_ends: Vec::new(),
            seed: 0,
            row_seeds: None,
            prompt_lengths: None,
            left_padded: false,
            repetition_penalty: 1.0,
            prefill_chunk: 512,
            recompute: false,
            restrict_to_max_seq_len: true,
            forward: ForwardOptions::default(),
        }
    }
}

impl GenerateOptions {
    /// Checks the options for a number of rows and a vocabulary size.
    pub(super) fn check(&self, rows: usize, vocabulary: usize) -> Result<()> {
        check_sampling(&self.sampling)?;
        for &eos in &self.eos_tokens {
            ensure!(
                usize::try_from(eos).is_ok_and(|eos| eos < vocabulary),
                Error::option(
                    "eos_tokens",
                    format_args!("expected token ids in 0..{vocabulary} (the vocabulary), got {eos}")
                )
            );
        }
        ensure!(
            self.row_ends.is_empty() || self.row_ends.len() == rows,
            Error::option(
                "row_ends",
                format_args!("expected none or {rows}, one per row, got {}", self.row_ends.len())
            )
        );
        ensure!(
            self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
            Error::option(
                "repetition_penalty",
                format_args!("expected a finite number above 0, got {}", self.repetition_penalty)
            )
        );
        if let Some(seeds) = &self.row_seeds {
            ensure!(
                seeds.len() == rows,
                Error::option("row_seeds", format_args!("expected {rows}, one per row, got {}", seeds.len()))
            );
        }
        Ok(())
    }

    /// Returns `true` if a prompt has already ended its row.
    pub(super) fn ends(&self, prompt: &[i64]) -> bool {
        self.eos_in_prompt && prompt.iter().any(|token| self.eos_tokens.contains(token))
    }

    /// Returns `true` if a new token ends its row, after passing it to the row's other criterion.
    pub(super) fn ends_with(&self, token: i64, row_end: Option<&mut Box<dyn RowEnd>>) -> Result<bool> {
        if self.eos_tokens.contains(&token) {
            return Ok(true);
        }
        row_end.map_or(Ok(false), |end| end.push(token))
    }

    /// Returns a row's random numbers.
    pub(super) fn draws(&self, row: usize) -> Philox {
        match &self.row_seeds {
            Some(seeds) => Philox::new(seeds[row], 0),
            None => Philox::new(self.seed, row as u64),
        }
    }

    /// Makes the tokens that a row already has less likely.
    pub(super) fn penalize(&self, logits: &mut [f64], tokens: &[i64]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen = tokens.to_vec();
        sort(&mut seen);
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            }
        }
    }
}

/// Iterator over new tokens: each item has the new token of every row, `pad_value` for rows that have ended.
///
/// Created by [`AutoregressiveWrapper::stream`].
#[derive(Debug)]
pub struct TokenStream<'m> {
    rows: Rows<'m>,
    options: GenerateOptions,
    row_ends: Vec<Box<dyn RowEnd>>,
    pad_value: i64,
    ended: Vec<bool>,
    step: usize,
    left: usize,
}

impl TokenStream<'_> {
    fn advance(&mut self) -> Result<Vec<i64>> {
        let open: Vec<bool> = self.ended.iter().map(|ended| !ended).collect_vec();
        let drawn = self.draw(&open)?;
        let mut tokens = vec![self.pad_value; open.len()];
        for (row, &token) in drawn.iter().enumerate().filter(|&(row, _)| open[row]) {
            tokens[row] = token;
            self.rows.push(row, token);
            self.ended[row] = self.options.ends_with(token, self.row_ends.get_mut(row))?;
        }
        self.step += 1;
        Ok(tokens)
    }

    /// Draws a token for every row; those of rows that are not open are arbitrary.
    fn draw(&mut self, open: &[bool]) -> Result<Vec<i64>> {
        let GenerateOptions { sampling, seed, row_seeds, .. } = &self.options;
        // Penalties differ by row, and top-a would look at the whole batch.
        let top_a = matches!(sampling.filter_logits_fn, FilterLogits::TopA | FilterLogits::RowTopA);
        let by_rows = self.options.repetition_penalty != 1.0 || top_a;
        if !by_rows {
            let logits = self.rows.logits_of_all(open)?;
            let step = Tensor::full([1], self.step as f64, DType::I64, logits.device())?;
            let Some(seeds) = row_seeds else { return sample_tokens(&logits, sampling, *seed, &step)?.to_vec() };
            let of_row = |(row, &seed): (usize, &u64)| {
                let token = sample_tokens(&logits.narrow(0, row, 1)?, sampling, seed, &step)?;
                Ok(token.to_vec::<i64>()?[0])
            };
            return seeds.iter().enumerate().map(of_row).try_collect_vec();
        }
        let mut tokens = vec![0; open.len()];
        let logits = self.rows.next_logits(open)?;
        for (row, mut logits) in logits.into_iter().enumerate().filter(|&(row, _)| open[row]) {
            self.options.penalize(&mut logits, &self.rows.tokens[row]);
            let draw = self.options.draws(row).uniform(self.step as u64);
            tokens[row] = sample(&[logits], &self.options.sampling, &[draw])?[0];
        }
        Ok(tokens)
    }
}

impl Iterator for TokenStream<'_> {
    type Item = Result<Vec<i64>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 || self.ended.iter().all(|&ended| ended) {
            return None;
        }
        self.left -= 1;
        let tokens = self.advance();
        if tokens.is_err() {
            self.left = 0;
        }
        Some(tokens)
    }
}

impl AutoregressiveWrapper {
    /// Streams the tokens after a prompt, `[b, t]` or `[t]` I64: up to `seq_len` per row.
    ///
    /// ```
    /// # use x_transformers::{
    /// #     DType, Device, ParamStore, Tensor,
    /// #     config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    /// #     models::{AutoregressiveWrapper, GenerateOptions},
    /// # };
    /// # fn main() -> x_transformers::Result<()> {
    /// # let net = TransformerWrapperConfig::new(256, 16, AttentionLayersConfig::decoder(16, 1));
    /// # let config = AutoregressiveConfig { net, ..Default::default() };
    /// # let model = AutoregressiveWrapper::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
    /// let prompt = Tensor::from_slice(b"to be", [5], &Device::Cpu)?;
    /// for token in model.stream(&prompt, 8, &GenerateOptions::default())? {
    ///     let token = token?[0];
    ///     print!("{token} ");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: an empty prompt, options that do not fit, and those of [`TransformerWrapper::forward`] in the items.
    ///
    /// [`TransformerWrapper::forward`]: super::TransformerWrapper::forward
    pub fn stream(&self, start_tokens: &Tensor, seq_len: usize, options: &GenerateOptions) -> Result<TokenStream<'_>> {
        let rows = Rows::new(self, start_tokens, seq_len, options)?;
        options.check(rows.tokens.len(), self.net.plan().num_tokens)?;
        Ok(TokenStream {
            ended: rows.tokens.iter().map(|row| options.ends(row)).collect_vec(),
            rows,
            row_ends: options.row_ends.clone(),
            options: options.clone(),
            pad_value: self.pad_value(),
            step: 0,
            left: seq_len,
        })
    }

    /// Continues a prompt, `[b, t]` or `[t]` I64, by up to `seq_len` tokens, and returns only those: `[b, ..]` or
    /// `[..]`.
    ///
    /// The context is the last `max_seq_len` tokens. `on_token` gets the new token of each row after every step;
    /// generation stops when it returns `false`, or when all rows have ended.
    ///
    /// Errors: an empty prompt, options that do not fit, and those of [`TransformerWrapper::forward`].
    ///
    /// [`TransformerWrapper::forward`]: super::TransformerWrapper::forward
    pub fn generate(
        &self,
        start_tokens: &Tensor,
        seq_len: usize,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&[i64]) -> bool,
    ) -> Result<Tensor> {
        let stream = self.stream(start_tokens, seq_len, options)?;
        let mut rows: Vec<Vec<i64>> = vec![Vec::new(); stream.ended.len()];
        for tokens in stream {
            let tokens = tokens?;
            rows.iter_mut().zip(&tokens).for_each(|(row, &token)| row.push(token));
            if !on_token(&tokens) {
                break;
            }
        }
        gathered(rows, start_tokens)
    }
}

/// Converts rows of one length to a tensor with the prompt's rank.
pub(super) fn gathered(rows: Vec<Vec<i64>>, start_tokens: &Tensor) -> Result<Tensor> {
    let (b, len) = (rows.len(), rows.first().map_or(0, Vec::len));
    let shape = if start_tokens.rank() == 1 { vec![len] } else { vec![b, len] };
    Tensor::from_vec(rows.concat(), shape, start_tokens.device())
}
