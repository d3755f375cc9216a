//! Speculative decoding (Leviathan et al., <https://arxiv.org/abs/2211.17192>; Chen et al.,
//! <https://arxiv.org/abs/2302.01318>).

use super::{
    AutoregressiveWrapper, GenerateOptions,
    ends::RowEnd,
    generate::gathered,
    rows::Rows,
    sampling::{filter_probabilities, pick},
};
use crate::{Error, Philox, Result, Tensor, collect::CollectVec, error::ensure};

/// Counts of proposed and accepted tokens in speculative decoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct SpeculativeStats {
    /// Number of tokens proposed by the draft model.
    pub proposed: usize,
    /// Number of proposed tokens accepted by the large model.
    pub accepted: usize,
    /// Number of forward passes of the large model.
    pub passes: usize,
}

/// Indices of a row's random streams, distinct from that of plain generation.
const PROPOSALS: u64 = 1 << 62;
const ACCEPTANCE: u64 = 2 << 62;
const CORRECTIONS: u64 = 3 << 62;

impl AutoregressiveWrapper {
    /// Like [`AutoregressiveWrapper::generate`], but with speculative decoding, which is faster if a smaller model
    /// often guesses right: `draft` proposes `ahead` tokens one by one, and this model verifies them in one pass.
    ///
    /// The tokens have the same distribution as without the draft, and are the same with temperature 0. Random draws
    /// differ from those of `generate`. `on_token` is called after each step with its new tokens, by row; rows may have
    /// different numbers of them.
    ///
    /// Errors: those of [`AutoregressiveWrapper::generate`], a draft with another vocabulary, `ahead` of 0, or a model
    /// that does not support a KV cache.
    #[doc(alias = "speculative")]
    pub fn generate_with_draft(
        &self,
        draft: &AutoregressiveWrapper,
        ahead: usize,
        start_tokens: &Tensor,
        seq_len: usize,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&[Vec<i64>]) -> bool,
    ) -> Result<(Tensor, SpeculativeStats)> {
        let (own, other) = (self.net.plan().num_tokens, draft.net.plan().num_tokens);
        ensure!(
            own == other,
            Error::option(
                "draft",
                format_args!("expected a vocabulary of {own} tokens, as the model has, got {other}")
            )
        );
        ensure!(ahead > 0, Error::option("ahead", "expected at least 1, got 0"));
        ensure!(
            options.forward.context.is_none() && options.forward.mems.is_none(),
            Error::option("draft", "cannot be used with a context or memories, which belong to one model")
        );
        let room = seq_len.saturating_add(ahead);
        let mut rows = Rows::new(self, start_tokens, room, options)?;
        if let Err(why) = self.net.supports_kv_cache(&options.forward) {
            return Err(Error::option("draft", format_args!("requires a model that can use a KV cache: {why}")));
        }
        let restricted = options.restrict_to_max_seq_len;
        ensure!(restricted, Error::option("draft", "requires `restrict_to_max_seq_len = true`"));
        ensure!(rows.is_cached(), Error::option("draft", "cannot be used with `recompute`"));
        let b = rows.tokens.len();
        options.check(b, own)?;
        let mut guesses = Rows::new(draft, start_tokens, room, options)?;
        let prompts: Vec<usize> = rows.tokens.iter().map(Vec::len).collect_vec();
        let ended = rows.tokens.iter().map(|row| options.ends(row)).collect_vec();
        let mut run = Run { options, ended, row_ends: options.row_ends.clone(), stats: SpeculativeStats::default() };
        loop {
            let open: Vec<usize> = (0..b)
                .map(|row| {
                    let tokens = &rows.tokens[row];
                    if run.ended[row] { 0 } else { seq_len - (tokens.len() - prompts[row]) }
                })
                .collect_vec();
            if open.iter().all(|&left| left == 0) {
                break;
            }
            let before: Vec<usize> = rows.tokens.iter().map(Vec::len).collect_vec();
            run.step(&mut rows, &mut guesses, &open, ahead)?;
            let new: Vec<Vec<i64>> = rows.tokens.iter().zip(&before).map(|(row, &at)| row[at..].to_vec()).collect_vec();
            if !on_token(&new) {
                break;
            }
        }
        let longest = rows.tokens.iter().zip(&prompts).map(|(row, &prompt)| row.len() - prompt).max().unwrap_or(0);
        let padded = rows.tokens.iter().zip(&prompts).map(|(row, &prompt)| {
            let mut new = row[prompt..].to_vec();
            new.resize(longest, self.pad_value());
            new
        });
        Ok((gathered(padded.collect_vec(), start_tokens)?, run.stats))
    }
}

struct Run<'a> {
    options: &'a GenerateOptions,
    ended: Vec<bool>,
    row_ends: Vec<Box<dyn RowEnd>>,
    stats: SpeculativeStats,
}

impl Run<'_> {
    /// Runs one pass of the large model: at least one token for each row that has some left.
    fn step(&mut self, rows: &mut Rows, guesses: &mut Rows, left: &[usize], ahead: usize) -> Result<()> {
        let b = left.len();
        let before: Vec<usize> = rows.tokens.iter().map(Vec::len).collect_vec();
        // A row that outgrows the window of the large model continues without proposals.
        let window = rows.window();
        let proposals = |row: usize| ahead.min(left[row].saturating_sub(1)).min(window.saturating_sub(before[row]));
        let wanted: Vec<usize> = (0..b).map(proposals).collect_vec();
        let mut guessed: Vec<Vec<Vec<f64>>> = vec![Vec::new(); b];
        for at in 0..wanted.iter().copied().max().unwrap_or(0) {
            let open: Vec<bool> = wanted.iter().map(|&wanted| at < wanted).collect_vec();
            let logits = guesses.next_logits(&open)?;
            for (row, logits) in logits.into_iter().enumerate().filter(|&(row, _)| open[row]) {
                let probabilities = self.probabilities(logits, &guesses.tokens[row])?;
                let draw = self.stream(row, PROPOSALS).uniform(guesses.tokens[row].len() as u64);
                guesses.push(row, pick(&probabilities, draw));
                guessed[row].push(probabilities);
            }
        }
        for row in 0..b {
            for at in before[row]..before[row] + wanted[row] {
                rows.push(row, guesses.tokens[row][at]);
            }
        }
        let last: Vec<usize> = (0..b).map(|row| if left[row] > 0 { wanted[row] + 1 } else { 0 }).collect_vec();
        let logits = rows.last_logits(&last)?;
        self.stats.passes += 1;
        for (row, logits) in logits.into_iter().enumerate().filter(|&(row, _)| left[row] > 0) {
            let proposed = rows.tokens[row][before[row]..].to_vec();
            rows.truncate(row, before[row])?;
            self.stats.proposed += proposed.len();
            self.judge(rows, row, logits, &proposed, &guessed[row])?;
            // The common prefix stays in the cache of the draft.
            let kept = guesses.tokens[row].iter().zip(&rows.tokens[row]).take_while(|(a, b)| a == b).count();
            guesses.truncate(row, kept)?;
            for at in kept..rows.tokens[row].len() {
                guesses.push(row, rows.tokens[row][at]);
            }
        }
        Ok(())
    }

    /// Accepts proposals as long as the large model agrees, then draws one of its own tokens.
    fn judge(
        &mut self,
        rows: &mut Rows,
        row: usize,
        logits: Vec<Vec<f64>>,
        proposed: &[i64],
        guessed: &[Vec<f64>],
    ) -> Result<()> {
        for (at, logits) in logits.into_iter().enumerate() {
            let position = rows.tokens[row].len() as u64;
            let mut wanted = self.probabilities(logits, &rows.tokens[row])?;
            if let (Some(&token), Some(guessed)) = (proposed.get(at), guessed.get(at)) {
                let (p, q) = (wanted[token as usize], guessed[token as usize]);
                if self.stream(row, ACCEPTANCE).uniform(position) * q < p {
                    rows.push(row, token);
                    self.stats.accepted += 1;
                    self.ended[row] = self.options.ends_with(token, self.row_ends.get_mut(row))?;
                    if self.ended[row] {
                        return Ok(());
                    }
                    continue;
                }
                // Excess of the large model's probabilities over the draft's.
                wanted.iter_mut().zip(guessed).for_each(|(p, q)| *p = (*p - q).max(0.0));
            }
            let token = pick(&wanted, self.stream(row, CORRECTIONS).uniform(position));
            rows.push(row, token);
            self.ended[row] = self.options.ends_with(token, self.row_ends.get_mut(row))?;
            return Ok(());
        }
        Ok(())
    }

    fn probabilities(&self, mut logits: Vec<f64>, tokens: &[i64]) -> Result<Vec<f64>> {
        self.options.penalize(&mut logits, tokens);
        Ok(filter_probabilities(&[logits], &self.options.sampling)?.remove(0))
    }

    /// Returns a random stream of a row, by the position of the token.
    fn stream(&self, row: usize, kind: u64) -> Philox {
        let draws = self.options.draws(row);
        Philox::new(draws.seed(), draws.stream() ^ kind)
    }
}
