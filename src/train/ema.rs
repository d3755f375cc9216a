//! Exponential moving average of weights.

use std::{collections::BTreeMap, fmt};

use crate::{
    Device, Error, ErrorKind, Param, ParamMap, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    ops::adamw::{average, own},
    ordered::{OrderedMap, ordered},
    profile::{self, Phase},
};

/// Exponential moving average of every parameter, often better in evaluation than the last weights (Polyak and
/// Juditsky, 1992).
///
/// `average ← average + (1 − decay) · (value − average)` after each step, from the initial weights on; f32, and f64
/// for f64 parameters.
///
/// ```
/// use x_transformers::{DType, Device, Init, ParamStore, Tensor, train::Ema};
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let weight = store.param("weight", [1], Init::Constant(0.0))?;
/// let mut ema = Ema::new(&store.params(), 0.5)?;
/// weight.set(Tensor::ones([1], DType::F32, &Device::Cpu)?)?;
/// ema.update(&store.params())?;
/// let averages = ema.swap_in(&store.params())?;
/// assert_eq!(weight.tensor().item()?, 0.5);
/// drop(averages);
/// assert_eq!(weight.tensor().item()?, 1.0);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone)]
#[doc(alias = "AveragedModel")]
pub struct Ema {
    decay: f64,
    averages: OrderedMap<String, Tensor>,
}

impl fmt::Debug for Ema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let averages = self.averages.len();
        f.debug_struct("Ema").field("decay", &self.decay).field("averages", &averages).finish()
    }
}

impl Ema {
    /// Creates an average that starts at the current values.
    ///
    /// Errors: a decay outside `[0, 1]`.
    pub fn new(params: &ParamMap, decay: f64) -> Result<Self> {
        ensure!((0.0..=1.0).contains(&decay), Error::option("ema_decay", format_args!("expected 0 to 1, got {decay}")));
        let averages = params.unique().map(|(name, param)| {
            let value = param.tensor().detach();
            let mut average = value.to_dtype(value.dtype().accumulator())?;
            own(&mut average)?;
            Ok((name.to_string(), average))
        });
        Ok(Self { decay, averages: averages.collect::<Result<_>>()? })
    }

    /// Creates an average of deferred parameters, without values or with those of [`Ema::load_state_dict`], on the CPU.
    pub(super) fn deferred(params: &ParamMap, decay: f64) -> Self {
        let averages = params.unique().map(|(name, param)| {
            let value = param.tensor();
            let average = Tensor::without_elements(*value.shape(), value.dtype().accumulator(), &Device::Cpu);
            (name.to_string(), average)
        });
        Self { decay, averages: averages.collect() }
    }

    /// Returns `true` for [`Ema::deferred`] without values.
    pub(super) fn is_deferred(&self) -> bool {
        self.averages.values().iter().any(Tensor::is_absent)
    }

    /// Returns the factor of the average in an update.
    pub(super) fn decay(&self) -> f64 {
        self.decay
    }

    /// Returns the averages of a part of the parameters, given by the names of [`Ema::state_dict`].
    pub(super) fn with_averages(&self, averages: BTreeMap<String, Tensor>) -> Result<Self> {
        let own = |(name, mut average): (String, Tensor)| own(&mut average).map(|()| (name, average));
        Ok(Self { decay: self.decay, averages: averages.into_iter().map(own).collect::<Result<_>>()? })
    }

    /// Updates the average with the current values.
    ///
    /// Errors: parameters other than those that it was created for.
    pub fn update(&mut self, params: &ParamMap) -> Result<()> {
        self.update_unless_nan(params, None)
    }

    /// Updates the average like [`Ema::update`], unless `grad_scale`, a scalar on the GPU, is NaN when the update runs.
    pub(super) fn update_unless_nan(&mut self, params: &ParamMap, grad_scale: Option<&Tensor>) -> Result<()> {
        let mut values = Vec::with_capacity(self.averages.len());
        for (name, param) in params.unique() {
            let value = param.tensor().detach().contiguous()?;
            self.check(name, &value)?;
            values.push(value);
        }
        ensure!(
            values.len() == self.averages.len(),
            Error::argument(
                "ema",
                format_args!("got {} parameters for {} averages", values.len(), self.averages.len())
            )
        );
        // Both iterate over the names in alphabetical order.
        let mut averages: Vec<&mut Tensor> = self.averages.values_mut().iter_mut().collect_vec();
        averages.iter_mut().try_for_each(|average| own(average))?;
        average(averages, &values, self.decay, grad_scale)?;
        let device = values.first().map_or(Device::Cpu, |value| value.device().clone());
        // The average is read and written.
        let bytes = |value: &Tensor| value.numel() * (value.dtype().size() + 2 * value.dtype().accumulator().size());
        profile::done("ema", Phase::Update, &device, || values.iter().map(bytes).sum())
    }

    /// Returns `true` if nothing else shares the averages, which a recorded step updates in place.
    #[cfg(feature = "cuda")]
    pub(super) fn is_unique(&mut self) -> bool {
        self.averages.values_mut().iter_mut().all(Tensor::is_unique)
    }

    /// Sets the parameters to their averages until the guard is dropped, which restores their values.
    ///
    /// Errors, with nothing changed: parameters other than those that it was created for.
    pub fn swap_in(&self, params: &ParamMap) -> Result<Swapped> {
        let mut swaps = Vec::with_capacity(self.averages.len());
        for (name, param) in params.unique() {
            let value = param.tensor().detach();
            let average = self.check(name, &value)?.to_dtype(value.dtype())?;
            swaps.push((param.clone(), value, average));
        }
        let mut swapped = Swapped::none();
        swaps.into_iter().try_for_each(|(param, value, average)| swapped.set(&param, value, average))?;
        Ok(swapped)
    }

    /// Returns the averages by the names of their parameters.
    pub fn state_dict(&self) -> BTreeMap<String, Tensor> {
        ordered(self.averages.clone())
    }

    /// Replaces the averages.
    ///
    /// Errors, with nothing changed: [`ErrorKind::Weights`] with every missing, unused and mismatched name; another
    /// dtype.
    pub fn load_state_dict(&mut self, dict: &BTreeMap<String, Tensor>) -> Result<()> {
        let missing: Vec<_> =
            self.averages.keys().iter().filter(|&name| !dict.contains_key(name)).cloned().collect_vec();
        let unused: Vec<_> = dict.keys().filter(|&name| !self.averages.contains_key(name)).cloned().collect_vec();
        let pairs = || self.averages.iter().filter_map(|(name, average)| Some((name, average, dict.get(name)?)));
        let mismatched: Vec<_> = pairs()
            .filter(|(_, average, given)| average.shape() != given.shape())
            .map(|(name, average, given)| (name.clone(), average.shape().to_vec(), given.shape().to_vec()))
            .collect_vec();
        ensure!(
            missing.is_empty() && unused.is_empty() && mismatched.is_empty(),
            Error::new(ErrorKind::Weights { missing, unused, mismatched })
        );
        for (name, average, given) in pairs() {
            ensure!(
                average.dtype() == given.dtype(),
                Error::dtype(
                    "load_state_dict",
                    format_args!("the average of {name} is {}, expected {}", given.dtype(), average.dtype())
                )
            );
        }
        let moved =
            pairs().map(|(name, average, given)| Ok((name.clone(), given.detach().to_device(average.device())?)));
        self.averages = moved.collect::<Result<_>>()?;
        Ok(())
    }

    /// Returns the average of a parameter, if its shape and dtype fit.
    fn check(&self, name: &str, value: &Tensor) -> Result<&Tensor> {
        match self.averages.get(name) {
            Some(average) if average.shape() == value.shape() && average.dtype() == value.dtype().accumulator() => {
                Ok(average)
            }
            Some(average) => Err(Error::shape(
                "ema",
                format_args!(
                    "the average of {name} is {:?} {}, but the parameter is {:?} {}",
                    average.shape(),
                    average.dtype(),
                    value.shape(),
                    value.dtype()
                ),
            )),
            None => Err(Error::argument("ema", format_args!("{name} has no average"))),
        }
    }
}

/// Guard of parameters with temporary values; dropping it restores their own.
#[derive(Debug)]
#[must_use = "dropping it ends the swap"]
pub struct Swapped {
    values: Vec<(Param, Tensor)>,
}

impl Swapped {
    pub(super) fn none() -> Self {
        Self { values: Vec::new() }
    }

    /// Sets a parameter to a temporary value; `value` is its own.
    pub(super) fn set(&mut self, param: &Param, value: Tensor, temporary: Tensor) -> Result<()> {
        param.replace(temporary)?;
        self.values.push((param.clone(), value));
        Ok(())
    }
}

impl Drop for Swapped {
    fn drop(&mut self) {
        for (param, value) in self.values.drain(..) {
            // The value came from this parameter: shape and dtype fit.
            let _ = param.replace(value);
        }
    }
}
