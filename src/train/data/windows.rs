//! Windows of a long list of tokens: at random offsets, in a random order, or evenly spaced for validation.

use std::ops::Range;

use super::{
    super::random::{Purpose, stream},
    BatchRequest, TokenBatch,
    shuffle::shuffled,
};
use crate::{DType, Device, Error, Philox, Result, Shape, Tensor, collect::CollectVec, error::ensure};

/// Number of windows of a validation.
const VALIDATION_WINDOWS: usize = 64;

/// List of tokens that are read by position.
pub(super) trait Tokens {
    /// Returns the number of tokens.
    fn len(&self) -> u64;

    /// Fills a row with the tokens from a position on; those of `num_tokens` and above are errors.
    fn read(&self, start: u64, row: &mut [i64], num_tokens: usize) -> Result<()>;

    /// Returns the token that begins each document.
    fn end_of_text(&self) -> Option<i64>;
}

/// Checks that windows fit into both parts; `what` and `unit` are those of the message.
pub(super) fn check(
    [train, validation]: [&dyn Tokens; 2],
    request: &BatchRequest,
    key: &str,
    unit: &str,
) -> Result<()> {
    let (train, validation) = (train.len(), validation.len());
    ensure!(
        (request.seq_len as u64) < train.min(validation),
        Error::option(
            key,
            format_args!(
                "{} {unit} are too few for windows of {} {unit}: {train} are for training and {validation} for validation; \
                 use more data or a smaller `seq_len`",
                train + validation,
                request.seq_len.saturating_add(1),
            )
        )
    );
    Ok(())
}

/// Returns the windows of a request.
pub(super) fn batch(tokens: &dyn Tokens, request: &BatchRequest) -> Result<TokenBatch> {
    let &BatchRequest { seed, step, micro, first, rows, seq_len, shuffle, .. } = request;
    if shuffle {
        let count = (tokens.len() - 1) / seq_len as u64;
        let start = |row: u64| shuffled(seed, row / count, row % count, count) * seq_len as u64;
        return windows(tokens, 0..rows, &|row| start(first.wrapping_add(row as u64)), request);
    }
    let starts = tokens.len() - seq_len as u64;
    let random = Philox::new(seed, stream(Purpose::Batch, step, micro));
    windows(tokens, 0..rows, &|row| random.below(row as u64, starts), request)
}

/// Returns 64 windows, the first at the start of the tokens and the last at their end.
pub(super) fn validation(tokens: &dyn Tokens, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
    let room = (tokens.len() - request.seq_len as u64 - 1) as u128;
    let start = |window: usize| (window as u128 * room / (VALIDATION_WINDOWS as u128 - 1)) as u64;
    let part = |first: usize| {
        windows(tokens, first..first.saturating_add(request.rows).min(VALIDATION_WINDOWS), &start, request)
    };
    (0..VALIDATION_WINDOWS).step_by(request.rows.max(1)).map(part).try_collect_vec()
}

fn windows(
    tokens: &dyn Tokens,
    rows: Range<usize>,
    start: &dyn Fn(usize) -> u64,
    request: &BatchRequest,
) -> Result<TokenBatch> {
    let width = request.seq_len + 1;
    let shape = Shape::new(&[rows.len(), width])?;
    let mut all = Tensor::uninit(shape, DType::I64, &Device::Cpu)?;
    for (row, index) in all.values_mut::<i64>()?.chunks_exact_mut(width).zip(rows) {
        tokens.read(start(index), row, request.num_tokens)?;
    }
    let documents = match tokens.end_of_text() {
        Some(end) if request.documents => {
            let mut documents = Tensor::uninit(shape, DType::I64, &Device::Cpu)?;
            let rows = documents.values_mut::<i64>()?.chunks_exact_mut(width);
            for (documents, tokens) in rows.zip(all.values::<i64>()?.chunks_exact(width)) {
                // The token between two documents belongs to the later one, which is predicted from it.
                let mut document = 0;
                for (number, &token) in documents.iter_mut().zip(tokens) {
                    document += i64::from(token == end);
                    *number = document;
                }
            }
            Some(documents)
        }
        _ => None,
    };
    let batch = TokenBatch::new(all)?;
    documents.map_or(Ok(batch.clone()), |documents| batch.with_documents(documents))
}
