//! Sublayers of one's own: a [`Branch`] stands where an attention or a feedforward stands.

use std::fmt;

use super::{cache::Decode, step::DecodeStep};
use crate::{Error, Result, Tensor, error::ensure};

/// A function that stands in a stack of layers in place of an attention or a feedforward, between the layer's norm and
/// its residual: see [`AttentionLayers::with_branches`](super::AttentionLayers::with_branches).
///
/// Each position may depend on itself and on the positions before it. A branch that needs the latter asks [`Past`] for
/// them, which knows whole sequences and those that continue in a cache alike: with the one `forward`, generation has
/// the numbers of the uncached call. `forward` is called again for the backward pass where layers are recomputed
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

    /// Returns `Ok` if the outputs of the first positions do not depend on later ones, so that sequences can continue
    /// in a cache. The default is `Ok`.
    ///
    /// Errors: the reason why growing sequences must be computed anew in each step.
    fn supports_kv_cache(&self) -> std::result::Result<(), &'static str> {
        Ok(())
    }
}

/// The positions before those of a call of [`Branch::forward`]: none for whole sequences, and for sequences that
/// continue what earlier calls have kept.
///
/// Rows are kept in slots, numbered from 0, each of its own width. A slot grows and is cut with its sequence, so it
/// holds a row per position: for a recurrent branch the state after each position.
#[derive(Debug)]
pub struct Past<'c> {
    mask: Option<&'c Tensor>,
    /// The slots, and the step of a call that continues sequences.
    slots: Option<(&'c mut Vec<Option<Tensor>>, &'c DecodeStep)>,
}

impl<'c> Past<'c> {
    /// The past of a call with this padding mask.
    pub(super) fn new(mask: Option<&'c Tensor>, decode: Option<Decode<'c>>) -> Self {
        Self { mask, slots: decode.map(|decode| (&mut decode.cache.slots, decode.step)) }
    }

    /// Padding mask of the call's positions, `[b, n]` Bool; `true` marks a real token. `None` if all are real.
    pub fn mask(&self) -> Option<&Tensor> {
        self.mask
    }

    /// The `count` rows of a slot before the call's positions, `[b, count, width]`, of the dtype and device of `x`, the
    /// branch's input `[b, n, dim]`. Rows before the first position of a sequence, and those that were not kept, are
    /// zero.
    ///
    /// Errors: no rows or features, more than 64 slots, or another width than the slot has.
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

    /// Keeps a row for each of the call's positions, `[b, n, width]`, for later calls; of whole sequences nothing is
    /// kept.
    ///
    /// Errors: more than 64 slots, or rows of another shape or dtype than the slot has.
    pub fn keep(&mut self, slot: usize, rows: &Tensor) -> Result<()> {
        let Some((slots, step)) = &mut self.slots else { return Ok(()) };
        let rows = rows.unsqueeze(1)?;
        let buffer = buffer(slots, slot, step.capacity, rows.dim(-1)?, &rows)?;
        buffer.write_rows(&rows, &step.device_lengths, 0)
    }

    /// The rows `[b, n, width]` with the `count` rows before them, `[b, count + n, width]`, and keeps them: the input
    /// of a causal convolution or of local attention.
    ///
    /// Errors: as [`Past::before`] and [`Past::keep`].
    pub fn window(&mut self, slot: usize, rows: &Tensor, count: usize) -> Result<Tensor> {
        let before = self.before(slot, count, rows.dim(-1)?, rows)?;
        self.keep(slot, rows)?;
        Tensor::cat(&[&before, rows], 1)
    }
}

/// The buffer of a slot, `[b, 1, positions or more, width]`, made of zeros if it is not there.
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
