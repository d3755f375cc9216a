//! Absolute positions of the wrappers.

use crate::{
    DType, Error, ParamStore, Result, Tensor,
    config::AbsolutePositions,
    error::{ErrorContext, ensure},
    nn::{AbsolutePositionalEmbedding, ForwardOptions, ScaledSinusoidalEmbedding},
};

/// Table of positions, or sinusoids.
#[derive(Clone, Debug)]
pub(super) enum Absolute {
    Table(AbsolutePositionalEmbedding),
    Sinusoids(ScaledSinusoidalEmbedding),
}

impl Absolute {
    /// Creates the planned positions at `pos_emb`, if there are any.
    pub fn new(plan: AbsolutePositions, dim: usize, max_seq_len: usize, store: &ParamStore) -> Result<Option<Self>> {
        let store = &store.at("pos_emb");
        let table = |scaled| AbsolutePositionalEmbedding::new(dim, max_seq_len, scaled, store);
        Ok(Some(match plan {
            AbsolutePositions::None => return Ok(None),
            AbsolutePositions::Table => Self::Table(table(false)?),
            AbsolutePositions::ScaledTable => Self::Table(table(true)?),
            AbsolutePositions::UnitTable => Self::Table(AbsolutePositionalEmbedding::normed(dim, max_seq_len, store)?),
            AbsolutePositions::Sinusoids => Self::Sinusoids(ScaledSinusoidalEmbedding::new(dim, store)?),
        }))
    }

    /// Returns the positions of the first `n` tokens, `[n, dim]`.
    pub fn first(&self, n: usize) -> Result<Tensor> {
        match self {
            Self::Table(table) => {
                check_length(n, table.len())?;
                table.forward(n)
            }
            Self::Sinusoids(sinusoids) => sinusoids.forward(0, n),
        }
    }

    /// Returns these positions: `[..] → [.., dim]`.
    pub fn at(&self, positions: &Tensor) -> Result<Tensor> {
        match self {
            Self::Table(table) => table.at(positions),
            Self::Sinusoids(sinusoids) => sinusoids.at(positions),
        }
    }

    /// Returns the positions of `n` tokens for these options.
    pub fn of_call(&self, n: usize, options: &ForwardOptions) -> Result<Tensor> {
        let positions = match (&options.pos, &options.seq_start_pos) {
            (None, None) => return self.first(n),
            (Some(pos), _) if pos.dtype().is_float() => return Ok(pos.clone()),
            (pos, None) => pos.clone(),
            (pos, Some(start)) => {
                let pos = pos.clone().map_or_else(|| Tensor::arange(n, start.device()), Ok)?;
                let from_start = pos.sub(&start.unsqueeze(-1)?)?;
                Some(from_start.relu()?)
            }
        };
        let positions = positions.ok_or_else(|| Error::argument("pos", "is missing"))?;
        ensure!(
            positions.dtype() == DType::I64 && positions.shape().last() == Some(&n),
            Error::shape(
                "pos",
                format_args!("expected i64 positions of {n} tokens, got {:?} {}", positions.shape(), positions.dtype())
            )
        );
        self.at(&positions)
    }

    /// Returns the number of positions of a table.
    pub fn limit(&self) -> usize {
        match self {
            Self::Table(table) => table.len(),
            Self::Sinusoids(_) => usize::MAX,
        }
    }
}

/// Adds the absolute positions of a call to embeddings `[b, n, dim]`; floats among the options take their place.
pub(super) fn add_positions(x: Tensor, positions: Option<&Absolute>, options: &ForwardOptions) -> Result<Tensor> {
    let floats = options.pos.as_ref().filter(|pos| pos.dtype().is_float());
    match (positions, floats) {
        (_, Some(given)) => x.add(given),
        (Some(positions), None) => x.add(&positions.of_call(x.dim(1)?, options)?),
        (None, None) => Ok(x),
    }
    .context("pos_emb")
}

/// Prepends embeddings `[b, p, dim]` to a sequence, and their mask to its mask.
pub(super) fn prepend(x: Tensor, mask: &mut Option<Tensor>, options: &ForwardOptions) -> Result<Tensor> {
    let Some(embeds) = &options.prepend_embeds else { return Ok(x) };
    let (b, n, dim) = (x.dim(0)?, x.dim(1)?, x.dim(2)?);
    ensure!(
        embeds.rank() == 3 && embeds.dim(0)? == b && embeds.dim(2)? == dim,
        Error::shape("prepend_embeds", format_args!("expected [{b}, p, {dim}], got {:?}", embeds.shape()))
    );
    if options.prepend_mask.is_some() || mask.is_some() {
        let kept = |n: usize| Tensor::ones([b, n], DType::Bool, x.device());
        let before = options.prepend_mask.clone().map_or_else(|| kept(embeds.dim(1)?), Ok)?;
        let after = mask.clone().map_or_else(|| kept(n), Ok)?;
        *mask = Some(Tensor::cat(&[&before, &after], 1)?);
    }
    Tensor::cat(&[embeds, &x], 1)
}

/// Prepends `count` real tokens to a padding mask, if there is one.
pub(super) fn with_real_tokens(mask: Option<&Tensor>, count: usize) -> Result<Option<Tensor>> {
    let Some(mask) = mask else { return Ok(None) };
    ensure!(
        mask.rank() == 2 && mask.dtype() == DType::Bool,
        Error::shape("mask", format_args!("expected bool [batch, n], got {:?} {}", mask.shape(), mask.dtype()))
    );
    if count == 0 {
        return Ok(Some(mask.clone()));
    }
    let kept = Tensor::ones([mask.dim(0)?, count], DType::Bool, mask.device())?;
    Tensor::cat(&[&kept, mask], 1).map(Some)
}

/// Rejects a sequence that is too long.
pub(super) fn check_length(n: usize, max_seq_len: usize) -> Result<()> {
    ensure!(
        n <= max_seq_len,
        Error::argument("sequence", format_args!("expected at most `max_seq_len` ({max_seq_len}) positions, got {n}"))
    );
    Ok(())
}
