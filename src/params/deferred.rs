//! Parameters whose values come after the model has been built.

use std::cell::Cell;

use super::{Init, Param, ParamMap};
use crate::{DType, Device, Result, Tensor, philox::Philox, shape::Shape};

thread_local! {
    /// If `true`, this thread creates deferred parameters.
    static DEFERS: Cell<bool> = const { Cell::new(false) };
}

/// Source of a deferred parameter's value.
pub(super) enum Pending {
    Draw(Init, Philox),
    /// A value on any device and of any float dtype.
    Given(Tensor),
}

impl Pending {
    fn value(&self, shape: Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        match self {
            Self::Draw(init, random) => init.tensor(shape, dtype, device, *random),
            Self::Given(value) => value.packed()?.on(device)?.converted(dtype),
        }
    }
}

/// Calls `build` with deferred parameters: those that it creates on this thread have names, shapes and dtypes, but no
/// elements until [`ParamMap::materialize`], [`Trainer::with_ranks`] or the first step of a trainer. In [stage 3 of ZeRO]
/// `with_ranks` makes them one after another and keeps this rank's part of each, so that no rank ever holds the whole
/// model. The values are those of a model that was built without, bit by bit.
///
/// [`ParamMap::load`] then keeps the tensors that it is given until the parameters need them: on the CPU, as files are
/// read. PyTorch's counterparts are the device `meta` and `deepspeed.zero.Init`.
///
/// ```
/// use std::sync::Arc;
/// use x_transformers::{deferred_init, distributed::Alone, prelude::*, train::RankOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let net = TransformerWrapperConfig::new(256, 16, AttentionLayersConfig::decoder(16, 1));
/// let config = AutoregressiveConfig { net, ..Default::default() };
/// let options = TrainOptions { seq_len: 16, batch_size: 2, recompute: true, ..Default::default() };
/// let text = ByteText::from_bytes("It was the best of times. ".repeat(20))?;
/// let trainer = deferred_init(|| Trainer::new(config, options, text, &Device::Cpu))?; // or Trainer::resume
/// let mut trainer = trainer.with_ranks(Arc::new(Alone), RankOptions { zero: 3, ..Default::default() })?;
/// trainer.step()?;
/// # Ok(())
/// # }
/// ```
///
/// [`Trainer::with_ranks`]: crate::train::Trainer::with_ranks
/// [stage 3 of ZeRO]: crate::train::RankOptions::zero
#[doc(alias = "meta")]
#[doc(alias = "zero.Init")]
#[doc(alias = "init_empty_weights")]
pub fn deferred_init<T>(build: impl FnOnce() -> T) -> T {
    /// Restores the state before, also after a panic.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            DEFERS.set(self.0);
        }
    }
    let _before = Before(DEFERS.replace(true));
    build()
}

/// Returns `true` within [`deferred_init`].
pub(crate) fn defers() -> bool {
    DEFERS.get()
}

impl Param {
    /// Creates a parameter without elements.
    pub(super) fn pending(shape: Shape, dtype: DType, device: &Device, pending: Pending) -> Result<Self> {
        let param = Self::new(Tensor::without_elements(shape, dtype, device))?;
        *param.slot() = Some(pending);
        Ok(param)
    }

    /// Returns `true` for a parameter whose value is still to come.
    pub(crate) fn is_deferred(&self) -> bool {
        self.slot().is_some()
    }

    /// Frees the value and takes this one, of the same shape, when the parameter is materialised.
    pub(crate) fn defer(&self, value: Tensor) {
        let mut old = self.lock();
        *old = old.absent();
        *self.slot() = Some(Pending::Given(value));
    }

    /// Returns the current value, or that which a deferred parameter will have.
    pub(crate) fn value(&self) -> Result<Tensor> {
        let like = self.read().clone();
        match &*self.slot() {
            Some(pending) => pending.value(*like.shape(), like.dtype(), like.device()),
            None => Ok(like),
        }
    }

    /// Gives a deferred parameter its value.
    pub(crate) fn materialize(&self) -> Result<()> {
        if self.is_deferred() { self.replace(self.value()?) } else { Ok(()) }
    }
}

impl ParamMap {
    /// Gives parameters from [`deferred_init`] their values; others keep theirs.
    ///
    /// ```
    /// use x_transformers::{DType, Device, ParamStore, deferred_init, nn::Linear};
    /// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
    /// let linear = deferred_init(|| Linear::new(&store, 4, 2))?; // `[2, 4]` and `[2]`, without elements
    /// store.params().materialize()?;
    /// # let _ = linear;
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    ///
    /// Errors: out of memory, or a value that cannot be converted; the parameters before it have theirs then.
    pub fn materialize(&self) -> Result<()> {
        self.unique().try_for_each(|(_, param)| param.materialize())
    }

    /// Returns `true` if the value of any parameter is still to come.
    pub(crate) fn is_deferred(&self) -> bool {
        self.params.values().iter().any(Param::is_deferred)
    }
}
