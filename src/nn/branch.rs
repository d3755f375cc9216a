//! Custom sublayers: a [`Branch`] takes the place of an attention or a feedforward.

use std::fmt;

use super::{cache::Decode, step::DecodeStep};
use crate::{Error, Result, Tensor, error::ensure};

/// Function that takes the place of an attention or a feedforward in a stack of layers, between the layer's norm and
/// its residual: see [`AttentionLayers::with_branches`](super::AttentionLayers::with_branches).
///
/// Each position may depend on itself and on earlier positions. A branch gets the latter from [`Past`], which handles
/// both whole sequences and those that continue in a cache: with a single `forward`, generation gives the numbers of
/// the uncached call. `forward` is called again in the backward pass where layers are recomputed
/// ([`ForwardOptions::checkpoint_layers`](super::ForwardOptions::checkpoint_layers)), so it must be a function of its
/// input and its parameters.
///
/// ```
/// use std::sync::Arc;
/// use x_transformers::{
///     DType, Device, Init, Param, ParamStore, Result, Tensor,
///     config::{AttentionLayersConfig, LayersPlan},
///     nn::{AttentionLayers, Branch, ForwardOptions, Past},
/// };
///
/// /// Multiplies each feature by a learned number.
/// #[derive(Debug)]
/// struct Scale(Param);
///
/// impl Branch for Scale {
///     fn forward(&self, x: &Tensor, _: &mut Past<'_>) -> Result<Tensor> {
///         x.mul(&self.0.tensor())
///     }
/// }
///
/// # fn main() -> Result<()> {
/// let plan = LayersPlan::new(&AttentionLayersConfig::decoder(8, 1))?;
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let layers = AttentionLayers::with_branches(&plan, &store, |index, _, store| match index {
///     1 => Ok(Some(Arc::new(Scale(store.param("scale", [8], Init::Constant(1.0))?)))),
///     _ => Ok(None),
/// })?;
/// assert!(store.params().get("layers.1.1.scale").is_some());
/// let x = Tensor::zeros([1, 3, 8], DType::F32, &Device::Cpu)?;
/// assert_eq!(layers.forward(&x, &ForwardOptions::default())?.out.shape()[..], [1, 3, 8]);
/// # Ok(())
/// # }
/// ```
pub trait Branch: fmt::Debug + Send + Sync {
    /// Computes the branch: `[b, n, dim] → [b, n, dim]`.
    fn forward(&self, x: &Tensor, past: &mut Past<'_>) -> Result<Tensor>;

    /// Returns `Ok` if no output depends on later positions, so that sequences can continue in a cache. The default is
    /// `Ok`.
    ///
    /// Errors: the reason why growing sequences must be recomputed in each step.
    fn supports_kv_cache(&self) -> std::result::Result<(), &'static str> {
        Ok(())
    }
}

/// Positions before those of a call of [`Branch::forward`]: none for whole sequences; the rows kept by earlier calls
/// for sequences that continue.
///
/// Rows are kept in slots, numbered from 0, each with its own width. A slot grows and is truncated with its sequence,
/// so it holds one row per position: for a recurrent branch the state after each position.
#[derive(Debug)]
pub struct Past<'c> {
    mask: Option<&'c Tensor>,
    /// Slots, and the step of a call that continues sequences.
    slots: Option<(&'c mut Vec<Option<Tensor>>, &'c DecodeStep)>,
}

impl<'c> Past<'c> {
    /// Creates the past of a call with this padding mask.
    pub(super) fn new(mask: Option<&'c Tensor>, decode: Option<Decode<'c>>) -> Self {
        Self { mask, slots: decode.map(|decode| (&mut decode.cache.slots, decode.step)) }
    }

    /// Returns the padding mask of the call's positions, `[b, n]` Bool; `true` marks a real token. `None` if all are
    /// real.
    pub fn mask(&self) -> Option<&Tensor> {
        self.mask
    }

    /// Returns the `count` rows of a slot before the call's positions, `[b, count, width]`, with the dtype and device
    /// of `x`, the branch's input `[b, n, dim]`. Rows before the first position of a sequence, and rows that were not
    /// kept, are zero.
    ///
    /// Errors: no rows or features, more than 64 slots, or a width that differs from the slot's.
    pub fn before(&mut self, slot: usize, count: usize, width: usize, x: &Tensor) -> Result<Tensor> {
        ensure!(
            count > 0 && width > 0,
            Error::argument("past", format_args!("expected at least one row and feature, got {count} rows of {width}"))
        );
        let Some((slots, step)) = &mut self.slots else {
            return Tensor::zeros([x.dim(0)?, count, width], x.dtype(), x.device());
        };
        let buffer = buffer(slots, slot, step.capacity + count, width, x)?;
        ensure!(
            buffer.dim(3)? == width,
            Error::shape("past", format_args!("slot {slot} has rows of {}, expected {width}", buffer.dim(3)?))
        );
        buffer.shift_rows(&step.device_lengths, count, &[count as isize], None)
    }

    /// Keeps a row for each of the call's positions, `[b, n, width]`, for later calls; does nothing for whole
    /// sequences.
    ///
    /// Errors: more than 64 slots, or rows whose shape or dtype differs from the slot's.
    pub fn keep(&mut self, slot: usize, rows: &Tensor) -> Result<()> {
        let Some((slots, step)) = &mut self.slots else { return Ok(()) };
        let rows = rows.unsqueeze(1)?;
        let buffer = buffer(slots, slot, step.capacity, rows.dim(-1)?, &rows)?;
        buffer.write_rows(&rows, &step.device_lengths, 0)
    }

    /// Keeps the rows `[b, n, width]` and returns them with the `count` rows before them, `[b, count + n, width]`: the
    /// input of a causal convolution or of local attention.
    ///
    /// Errors: those of [`Past::before`] and [`Past::keep`].
    pub fn window(&mut self, slot: usize, rows: &Tensor, count: usize) -> Result<Tensor> {
        let before = self.before(slot, count, rows.dim(-1)?, rows)?;
        self.keep(slot, rows)?;
        Tensor::cat(&[&before, rows], 1)
    }
}

/// Returns the buffer of a slot, `[b, 1, positions or more, width]`, and creates it with zeros if it does not exist.
fn buffer<'s>(
    slots: &'s mut Vec<Option<Tensor>>,
    slot: usize,
    positions: usize,
    width: usize,
    like: &Tensor,
) -> Result<&'s mut Tensor> {
    const MOST: usize = 64;
    ensure!(slot < MOST, Error::argument("past", format_args!("expected a slot below {MOST}, got {slot}")));
    if slots.len() <= slot {
        slots.resize(slot + 1, None);
    }
    let zeros = |rows: usize, width: usize| Tensor::zeros([like.dim(0)?, 1, rows, width], like.dtype(), like.device());
    let buffer = match slots[slot].take() {
        None => zeros(positions, width)?,
        Some(buffer) => match positions.saturating_sub(buffer.dim(2)?) {
            0 => buffer,
            more => Tensor::cat(&[&buffer, &zeros(more, buffer.dim(3)?)?], 2)?,
        },
    };
    Ok(slots[slot].insert(buffer))
}
