//! Beam search.

use super::{AutoregressiveWrapper, GenerateOptions, rows::Rows, sampling::best};
use crate::{Error, Result, Tensor, collect::CollectVec, error::ensure, sort::sort_by};

/// Options of beam search.
#[derive(Clone, Copy, Debug)]
pub struct BeamOptions {
    /// Number of continuations that are kept at a time. Default 4.
    pub beams: usize,
    /// Exponent of the length normalization: a score is the log-probability over `tokens ^ length_penalty`. Numbers
    /// above 0 favour long continuations, 0 the most likely one (Wu et al., <https://arxiv.org/abs/1609.08144>).
    /// Default 1.
    pub length_penalty: f64,
}

impl Default for BeamOptions {
    fn default() -> Self {
        Self { beams: 4, length_penalty: 1.0 }
    }
}

/// Continuation found by a beam search.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct Hypothesis {
    /// New tokens, with the end token if it was reached.
    pub tokens: Vec<i64>,
    /// Log-probability of the tokens over their number to the power of `length_penalty`.
    pub score: f64,
}

/// Open continuation: its log-probability, and the beam that it extends.
#[derive(Clone, Copy)]
struct Candidate {
    log_probability: f64,
    beam: usize,
    token: i64,
}

impl AutoregressiveWrapper {
    /// Returns the best continuations of each row of a prompt, `[b, t]` or `[t]` I64, by up to `seq_len` tokens: at
    /// most `beams` per row, the best first.
    ///
    /// The options in effect are the end tokens and other ends, the prompt's lengths and masks, the context and
    /// `repetition_penalty`; nothing is sampled. A row that has ended in the prompt gets the empty continuation. A
    /// row's search ends when no open continuation can become better than the worst of its `beams` closed ones.
    ///
    /// Errors: those of [`AutoregressiveWrapper::generate`], `beams` of 0, or a penalty that is not finite.
    pub fn beam_search(
        &self,
        start_tokens: &Tensor,
        seq_len: usize,
        beam: &BeamOptions,
        options: &GenerateOptions,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        let &BeamOptions { beams, length_penalty } = beam;
        let most = self.net.plan().num_tokens;
        ensure!(
            (1..=most).contains(&beams),
            Error::option("beams", format_args!("expected 1 to {most} (the vocabulary size), got {beams}"))
        );
        ensure!(
            length_penalty.is_finite(),
            Error::option("length_penalty", format_args!("expected a finite number, got {length_penalty}"))
        );
        let mut rows = Rows::new(self, start_tokens, seq_len, options)?;
        let b = rows.tokens.len();
        options.check(b, most)?;
        let prompts: Vec<usize> = rows.tokens.iter().map(Vec::len).collect_vec();
        let score = |log_probability: f64, tokens: usize| log_probability / (tokens as f64).powf(length_penalty);
        let mut searches: Vec<Search> = rows
            .tokens
            .iter()
            .enumerate()
            .map(|(row, tokens)| {
                let ended = options.ends(tokens);
                let closed = if ended { vec![Hypothesis { tokens: vec![], score: 0.0 }] } else { vec![] };
                Search { open: if ended { vec![] } else { vec![(row, 0.0)] }, closed }
            })
            .collect_vec();
        // Stopping criteria, one for each of `rows`.
        let mut row_ends = options.row_ends.clone();
        for step in 0..seq_len {
            let mut wanted = vec![false; rows.tokens.len()];
            searches.iter().flat_map(|search| &search.open).for_each(|&(row, _)| wanted[row] = true);
            if !wanted.contains(&true) {
                break;
            }
            let logits = rows.next_logits(&wanted)?;
            let mut taken = Vec::new();
            let mut new = Vec::new();
            let mut ends_of_taken = Vec::new();
            for (search, &prompt) in searches.iter_mut().zip(&prompts) {
                let candidates = search.candidates(&logits, &rows, options, beams)?;
                let mut open = Vec::new();
                let mut ends = Vec::new();
                for candidate in candidates {
                    let row = search.open[candidate.beam].0;
                    let mut end = row_ends.get(row).cloned();
                    if options.ends_with(candidate.token, end.as_mut())? {
                        let mut tokens = rows.tokens[row][prompt..].to_vec();
                        tokens.push(candidate.token);
                        let score = score(candidate.log_probability, step + 1);
                        search.closed.push(Hypothesis { tokens, score });
                    } else if open.len() < beams {
                        open.push(candidate);
                        ends.extend(end);
                    }
                }
                sort_by(&mut search.closed, |a, b| b.score.total_cmp(&a.score));
                search.closed.truncate(beams);
                // Upper bound of an open one's score: its probability only falls.
                let best = open.first().map_or(f64::NEG_INFINITY, |best| {
                    let longest = if length_penalty > 0.0 { seq_len } else { step + 1 };
                    score(best.log_probability, longest)
                });
                if search.closed.len() == beams && search.closed[beams - 1].score >= best {
                    open.clear();
                    ends.clear();
                }
                ends_of_taken.extend(ends);
                let from = |candidate: &Candidate| search.open[candidate.beam].0;
                let rows_of_open: Vec<usize> = open.iter().map(from).collect_vec();
                let first = taken.len();
                taken.extend(rows_of_open);
                new.extend(open.iter().map(|candidate| candidate.token));
                let numbered = open.iter().enumerate();
                search.open = numbered.map(|(at, candidate)| (first + at, candidate.log_probability)).collect_vec();
            }
            if taken.is_empty() {
                break;
            }
            rows.select(&taken)?;
            row_ends = ends_of_taken;
            new.into_iter().enumerate().for_each(|(row, token)| rows.push(row, token));
        }
        let close = |(search, prompt): (Search, usize)| {
            let mut found = search.closed;
            found.extend(search.open.iter().map(|&(row, log_probability)| {
                let tokens = rows.tokens[row][prompt..].to_vec();
                Hypothesis { score: score(log_probability, tokens.len().max(1)), tokens }
            }));
            sort_by(&mut found, |a, b| b.score.total_cmp(&a.score));
            found.truncate(beams);
            found
        };
        Ok(searches.into_iter().zip(prompts).map(close).collect_vec())
    }
}

/// Search of one row of the prompt.
struct Search {
    /// Open continuations: indices of their tokens, and their log-probabilities, the best first.
    open: Vec<(usize, f64)>,
    closed: Vec<Hypothesis>,
}

impl Search {
    /// Returns the best next steps, twice as many as beams, which leaves enough of them open.
    fn candidates(
        &self,
        logits: &[Vec<f64>],
        rows: &Rows,
        options: &GenerateOptions,
        beams: usize,
    ) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for (beam, &(row, so_far)) in self.open.iter().enumerate() {
            let mut logits = logits[row].clone();
            options.penalize(&mut logits, &rows.tokens[row]);
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            ensure!(
                max.is_finite() && !logits.iter().any(|x| x.is_nan()),
                Error::argument(
                    "beam_search",
                    "expected finite logits, got NaN or infinity: the weights are broken or overflow f16 (try bf16 or \
                     f32)"
                )
            );
            let log_sum = max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            candidates.extend(best(&logits, 2 * beams).into_iter().map(|token| Candidate {
                log_probability: so_far + logits[token] - log_sum,
                beam,
                token: token as i64,
            }));
        }
        // Ties in the order of beams and tokens, which makes the search deterministic.
        sort_by(&mut candidates, |a, b| {
            let by_probability = b.log_probability.total_cmp(&a.log_probability);
            by_probability.then(a.beam.cmp(&b.beam)).then(a.token.cmp(&b.token))
        });
        candidates.truncate(2 * beams);
        Ok(candidates)
    }
}
