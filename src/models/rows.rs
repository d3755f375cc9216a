//! Rows of a batch that is being continued, and the logits of their next tokens.

use super::{AutoregressiveWrapper, DecodeCache, GenerateOptions, TransformerWrapper};
use crate::{
    DType, Device, Error, Result, Tensor,
    collect::CollectVec,
    error::{ErrorContext, ensure},
    nn::ForwardOptions,
    sort::sort,
};

/// Growing sequences, with their cache.
///
/// Each row has its own length. Rows within `max_seq_len` are in a cache, unless the model does not support one; the
/// window of a longer row is recomputed for each token, because every token in it gets a new position and a new past.
#[derive(Clone, Debug)]
pub(super) struct Rows<'m> {
    net: &'m TransformerWrapper,
    /// Tokens of each row, without padding.
    pub tokens: Vec<Vec<i64>>,
    /// Padding mask of the rows, if the prompt has one; `true` marks a real token.
    mask: Option<Vec<Vec<bool>>>,
    cache: Option<DecodeCache>,
    forward: ForwardOptions,
    prefill: usize,
    /// Length of the longest row that fits the context.
    window: usize,
    device: Device,
}

impl<'m> Rows<'m> {
    /// Checks prompts to which at most `more` tokens will be appended.
    pub fn new(
        model: &'m AutoregressiveWrapper,
        start_tokens: &Tensor,
        more: usize,
        options: &GenerateOptions,
    ) -> Result<Self> {
        let net = &model.net;
        let forward = &options.forward;
        forward.check_output_only("generate")?;
        ensure!(
            (1..=2).contains(&start_tokens.rank()) && start_tokens.dtype() == DType::I64,
            Error::shape(
                "start_tokens",
                format_args!("expected i64 [batch, n] or [n], got {:?} {}", start_tokens.shape(), start_tokens.dtype())
            )
        );
        let t = start_tokens.shape().last().copied().unwrap_or(0);
        ensure!(
            start_tokens.numel() > 0,
            Error::shape(
                "start_tokens",
                format_args!("expected at least one token, got shape {:?}", start_tokens.shape())
            )
        );
        let tokens: Vec<Vec<i64>> = start_tokens.to_vec::<i64>()?.chunks(t).map(<[i64]>::to_vec).collect_vec();
        let vocabulary = net.plan().num_tokens;
        if let Some(&index) = tokens.iter().flatten().find(|&&token| token < 0 || token as usize >= vocabulary) {
            return Err(Error::index("start_tokens", "token", index, vocabulary));
        }
        let tokens = unpadded(tokens, options)?;
        let b = tokens.len();
        let mask = prompt_mask(forward, b, t)?;
        ensure!(options.prefill_chunk > 0, Error::option("prefill_chunk", "expected at least 1, got 0"));
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0).saturating_add(more);
        // Without a limit rows may outgrow a cache.
        let restricted = options.restrict_to_max_seq_len;
        let cached = !options.recompute && restricted && net.supports_kv_cache(forward).is_ok();
        let cache = cached.then(|| net.cache(b, longest, forward).context("net")).transpose()?;
        let forward = ForwardOptions { mask: None, return_embeddings: true, ..forward.clone() };
        let device = start_tokens.device().clone();
        // A padded query attends to all keys equally, including later ones of the prompt.
        let prefill = if mask.is_some() { usize::MAX } else { options.prefill_chunk };
        let window = if restricted { net.plan().window() } else { usize::MAX };
        Ok(Self { net, tokens, mask, cache, forward, prefill, window, device })
    }

    /// Returns the length of the longest row that fits the context.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Returns `true` if rows are in a cache while they fit.
    pub fn is_cached(&self) -> bool {
        self.cache.is_some()
    }

    /// Appends a token to a row.
    pub fn push(&mut self, row: usize, token: i64) {
        self.tokens[row].push(token);
        if let Some(mask) = &mut self.mask {
            mask[row].push(true);
        }
    }

    /// Truncates a row.
    pub fn truncate(&mut self, row: usize, length: usize) -> Result<()> {
        self.tokens[row].truncate(length);
        if let Some(mask) = &mut self.mask {
            mask[row].truncate(length);
        }
        let Some(cache) = &mut self.cache else { return Ok(()) };
        let mut lengths = cache.lengths().to_vec();
        lengths[row] = lengths[row].min(length);
        cache.truncate(&lengths)
    }

    /// Selects these rows in this order; a row may be selected several times.
    pub fn select(&mut self, rows: &[usize]) -> Result<()> {
        self.tokens = rows.iter().map(|&row| self.tokens[row].clone()).collect_vec();
        self.mask = self.mask.as_ref().map(|mask| rows.iter().map(|&row| mask[row].clone()).collect_vec());
        self.forward = of_rows(&self.forward, rows)?;
        match &mut self.cache {
            Some(cache) => cache.select_rows(rows),
            None => Ok(()),
        }
    }

    /// Returns for each wanted row the logits after its last token, in f64; an empty row for the others.
    pub fn next_logits(&mut self, wanted: &[bool]) -> Result<Vec<Vec<f64>>> {
        let last: Vec<usize> = wanted.iter().map(|&wanted| usize::from(wanted)).collect_vec();
        Ok(self.last_logits(&last)?.into_iter().map(|mut rows| rows.pop().unwrap_or_default()).collect_vec())
    }

    /// Returns the logits after the last token of every row, `[b, num_tokens]`; those of unwanted rows are arbitrary.
    pub fn logits_of_all(&mut self, wanted: &[bool]) -> Result<Tensor> {
        let last: Vec<usize> = wanted.iter().map(|&wanted| usize::from(wanted)).collect_vec();
        let (order, mut hidden) = self.last_hidden(&last)?;
        if order.len() < last.len() || order.iter().enumerate().any(|(at, &row)| at != row) {
            let place = |row: usize| order.iter().position(|&other| other == row).unwrap_or(0) as i64;
            let index: Vec<i64> = (0..last.len()).map(place).collect_vec();
            hidden = hidden.embedding(&Tensor::from_vec(index, [last.len()], &self.device)?)?;
        }
        Ok(self.net.logits(&hidden).context("net")?.detach())
    }

    /// Returns for each row the logits after its last `last[row]` tokens, in f64. More than one requires a cached row
    /// with at least that many tokens not in the cache yet.
    pub fn last_logits(&mut self, last: &[usize]) -> Result<Vec<Vec<Vec<f64>>>> {
        let (order, hidden) = self.last_hidden(last)?;
        let logits = self.net.logits(&hidden).context("net")?.detach();
        // `logits_dim` may differ from the vocabulary.
        let (values, width) = (logits.to_f64_vec()?, logits.dim(-1)?.max(1));
        let mut logits = vec![Vec::new(); last.len()];
        for (row, values) in order.into_iter().zip(values.chunks(width)) {
            logits[row].push(values.to_vec());
        }
        Ok(logits)
    }

    /// Returns normed hidden states, `[.., dim]`, and the row that each belongs to.
    fn last_hidden(&mut self, last: &[usize]) -> Result<(Vec<usize>, Tensor)> {
        let window = self.window();
        let anew = |row: &usize| last[*row] > 0 && (self.cache.is_none() || self.tokens[*row].len() > window);
        let anew: Vec<usize> = (0..last.len()).filter(anew).collect_vec();
        let (mut order, mut parts) = self.extend(last)?;
        let mut lengths: Vec<usize> = anew.iter().map(|&row| self.tokens[row].len().min(window)).collect_vec();
        sort(&mut lengths);
        lengths.dedup();
        for seen in lengths {
            let rows: Vec<usize> =
                anew.iter().copied().filter(|&row| self.tokens[row].len().min(window) == seen).collect_vec();
            parts.push(self.recompute(&rows, seen)?);
            order.extend(rows);
        }
        let hidden = match &parts[..] {
            [only] => only.clone(),
            parts => Tensor::cat(&parts.iter().collect_vec(), 0)?,
        };
        Ok((order, hidden))
    }

    /// Appends missing tokens to the cache for rows that fit.
    fn extend(&mut self, last: &[usize]) -> Result<(Vec<usize>, Vec<Tensor>)> {
        let (b, window) = (last.len(), self.window());
        let (mut order, mut parts) = (Vec::new(), Vec::new());
        let Some(cache) = &mut self.cache else { return Ok((order, parts)) };
        loop {
            let pending = |row: usize| match self.tokens[row].len() {
                length if length <= window && last[row] > 0 => length - cache.lengths()[row],
                _ => 0,
            };
            let n = (0..b).map(pending).max().unwrap_or(0).min(self.prefill);
            if n == 0 {
                return Ok((order, parts));
            }
            let counts: Vec<usize> = (0..b).map(|row| pending(row).min(n)).collect_vec();
            let starts = cache.lengths().to_vec();
            let mut new = vec![0; b * n];
            let mut kept = vec![true; b * n];
            for (row, (&count, &start)) in counts.iter().zip(&starts).enumerate() {
                new[row * n..][..count].copy_from_slice(&self.tokens[row][start..start + count]);
                if let Some(mask) = &self.mask {
                    kept[row * n..][..count].copy_from_slice(&mask[row][start..start + count]);
                }
            }
            let mask = self.mask.as_ref().map(|_| Tensor::from_vec(kept, [b, n], &self.device)).transpose()?;
            let new = Tensor::from_vec(new, [b, n], &self.device)?;
            let hidden = self.net.extend(&new, &counts, mask.as_ref(), cache).context("net")?.detach();
            // Positions whose logits are wanted, by row.
            let mut wanted = Vec::new();
            for row in 0..b {
                let first = self.tokens[row].len() - last[row].min(self.tokens[row].len());
                let positions = starts[row]..starts[row] + counts[row];
                wanted.extend(positions.filter(|&at| at >= first).map(|at| (row, row * n + at - starts[row])));
            }
            if wanted.is_empty() {
                continue;
            }
            let dim = hidden.dim(2)?;
            let mut hidden = hidden.reshape([b * n, dim])?;
            if wanted.len() < b * n {
                let index: Vec<i64> = wanted.iter().map(|&(_, at)| at as i64).collect_vec();
                hidden = hidden.embedding(&Tensor::from_vec(index, [wanted.len()], &self.device)?)?;
            }
            order.extend(wanted.into_iter().map(|(row, _)| row));
            parts.push(hidden);
        }
    }

    /// Computes the hidden states of the last tokens of these rows from their last `seen` tokens, without a cache:
    /// `[rows, dim]`.
    fn recompute(&self, rows: &[usize], seen: usize) -> Result<Tensor> {
        let b = rows.len();
        let last = |row: &Vec<i64>| row[row.len() - seen..].to_vec();
        let window: Vec<i64> = rows.iter().flat_map(|&row| last(&self.tokens[row])).collect_vec();
        let window = Tensor::from_vec(window, [b, seen], &self.device)?;
        let mut options = if b == self.tokens.len() { self.forward.clone() } else { of_rows(&self.forward, rows)? };
        if let Some(mask) = &self.mask {
            let mask: Vec<bool> =
                rows.iter().flat_map(|&row| mask[row][mask[row].len() - seen..].to_vec()).collect_vec();
            options.mask = Some(Tensor::from_vec(mask, [b, seen], &self.device)?);
        }
        // Only the last position needs logits.
        let out = self.net.forward(&window, &options).context("net")?.out;
        Ok(out.select(1, out.dim(1)? - 1)?.detach())
    }
}

/// Returns the options of these rows.
fn of_rows(options: &ForwardOptions, rows: &[usize]) -> Result<ForwardOptions> {
    let pick = |x: &Tensor| -> Result<Tensor> {
        let parts = rows.iter().map(|&row| x.narrow(0, row, 1)).try_collect_vec()?;
        Tensor::cat(&parts.iter().collect_vec(), 0)
    };
    // An attention mask has rows only if it has four dimensions.
    let pairs = |mask: &Tensor| if mask.rank() == 4 && mask.shape()[0] > 1 { pick(mask) } else { Ok(mask.clone()) };
    Ok(ForwardOptions {
        context: options.context.as_ref().map(pick).transpose()?,
        context_mask: options.context_mask.as_ref().map(pick).transpose()?,
        attn_mask: options.attn_mask.as_ref().map(pairs).transpose()?,
        mems: options.mems.as_ref().map(|mems| mems.iter().map(pick).try_collect_vec()).transpose()?,
        prepend_embeds: options.prepend_embeds.as_ref().map(pick).transpose()?,
        prepend_mask: options.prepend_mask.as_ref().map(pick).transpose()?,
        condition: options.condition.as_ref().map(pick).transpose()?,
        seq_start_pos: options.seq_start_pos.as_ref().map(pick).transpose()?,
        ..options.clone()
    })
}

/// Returns the tokens without padding.
fn unpadded(mut tokens: Vec<Vec<i64>>, options: &GenerateOptions) -> Result<Vec<Vec<i64>>> {
    let Some(lengths) = &options.prompt_lengths else {
        ensure!(!options.left_padded, Error::option("left_padded", "requires `prompt_lengths`"));
        return Ok(tokens);
    };
    ensure!(
        options.forward.mask.is_none(),
        Error::option("prompt_lengths", "cannot be used with `mask`: both mark padding")
    );
    let t = tokens[0].len();
    ensure!(
        lengths.len() == tokens.len() && lengths.iter().all(|length| (1..=t).contains(length)),
        Error::option(
            "prompt_lengths",
            format_args!("expected {} lengths from 1 to {t}, one per row, got {lengths:?}", tokens.len())
        )
    );
    for (row, &length) in tokens.iter_mut().zip(lengths) {
        if options.left_padded {
            row.drain(..t - length);
        } else {
            row.truncate(length);
        }
    }
    Ok(tokens)
}

/// Checks the mask of the prompt and returns it by row.
fn prompt_mask(forward: &ForwardOptions, b: usize, t: usize) -> Result<Option<Vec<Vec<bool>>>> {
    let Some(mask) = &forward.mask else { return Ok(None) };
    let fits = mask.numel() == b * t && mask.shape().last() == Some(&t) && mask.dtype() == DType::Bool;
    ensure!(
        fits,
        Error::shape("mask", format_args!("expected bool [{b}, {t}], got {:?} {}", mask.shape(), mask.dtype()))
    );
    Ok(Some(mask.to_vec::<bool>()?.chunks(t).map(<[bool]>::to_vec).collect_vec()))
}
