//! AdamW, with the state of each parameter under the parameter's name.

use std::{collections::BTreeMap, fmt};

#[cfg(feature = "cuda")]
use crate::ops::adamw::{adamw_recorded, clip_on_device};
use crate::{
    DType, Device, Error, ErrorKind, Gradients, ParamMap, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    ops::adamw::{Settings, Update, adamw, compile, own, square_norms},
    ordered::OrderedMap,
    params::Param,
    profile::{self, Phase},
    sort::{order, sort_by},
};

/// Hyperparameters of [`AdamW`]; the learning rate is an argument of each step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamWOptions {
    /// Decay of the running mean of gradients, β₁. Default 0.9.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients, β₂. Default 0.999.
    pub beta2: f64,
    /// Added to the denominator. Default 1e-8.
    pub eps: f64,
    /// Decoupled weight decay: each step shrinks every weight by the fraction `lr · weight_decay`. Default 0.01.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    /// PyTorch's values.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// AdamW (Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>) as in PyTorch, with gradients clipped by their
/// global norm in the same pass over the parameters.
///
/// `p ← p · (1 − lr · weight_decay)`, `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)`, where `t` counts the updates of this parameter.
///
/// `m` and `v` are f32 (f64 for f64 parameters). For a bf16 or f16 parameter the state also holds an f32 master
/// weight, and the parameter is that weight rounded: updates smaller than half a unit of the half type are not lost.
/// Setting such a parameter to another value makes training continue from that value. Results have the same bits for
/// any number of threads.
///
/// Other threads may use the model during a step: a reader of a parameter waits until all of them are updated, which
/// takes only the time of the arithmetic.
///
/// ```
/// use x_transformers::{DType, Device, Init, ParamStore, Tape, train::{AdamW, AdamWOptions}};
/// # fn main() -> x_transformers::Result<()> {
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let weight = store.param("weight", [3], Init::Constant(1.0))?;
/// let mut optimizer = AdamW::new(AdamWOptions::default())?;
/// let mut tape = Tape::train(0);
/// let loss = weight.tensor().square()?.sum(&[])?;
/// let grads = tape.backward(&loss)?;
/// let info = optimizer.step(&store.params(), &grads, 0.1, Some(1.0))?;
/// assert_eq!((info.updated, info.grad_norm), (1, 12f64.sqrt()));
/// assert!((weight.tensor().to_vec::<f32>()?[0] - 0.899).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[doc(alias = "Adam")]
#[doc(alias = "Optimizer")]
pub struct AdamW {
    options: AdamWOptions,
    state: OrderedMap<String, State>,
    steps: u64,
    /// If `true`, an update is in progress or has panicked.
    updating: bool,
}

impl fmt::Debug for AdamW {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options, state, steps, .. } = self;
        f.debug_struct("AdamW")
            .field("options", options)
            .field("parameters", &state.len())
            .field("steps", steps)
            .finish()
    }
}

#[derive(Clone)]
struct State {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Option<Tensor>,
    step: u64,
}

/// Result of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct StepInfo {
    /// Global norm of all gradients, before clipping.
    pub grad_norm: f64,
    /// Number of parameters that had a gradient and were updated.
    pub updated: usize,
}

impl State {
    fn new(value: &Tensor) -> Result<Self> {
        let dtype = value.dtype().accumulator();
        let zeros = || Tensor::zeros(*value.shape(), dtype, value.device());
        let master = if value.dtype() == dtype { None } else { Some(value.to_dtype(dtype)?) };
        Ok(Self { exp_avg: zeros()?, exp_avg_sq: zeros()?, master, step: 0 })
    }
}

impl AdamW {
    /// Creates an optimizer without state.
    ///
    /// Errors: a beta outside `[0, 1)`, or `eps` or `weight_decay` negative or not finite.
    pub fn new(options: AdamWOptions) -> Result<Self> {
        let AdamWOptions { beta1, beta2, eps, weight_decay } = options;
        for (key, beta) in [("beta1", beta1), ("beta2", beta2)] {
            ensure!(
                (0.0..1.0).contains(&beta),
                Error::option(key, format_args!("expected at least 0 and below 1, got {beta}"))
            );
        }
        for (key, value) in [("eps", eps), ("weight_decay", weight_decay)] {
            ensure!(
                value >= 0.0 && value.is_finite(),
                Error::option(key, format_args!("expected a finite number of at least 0, got {value}"))
            );
        }
        Ok(Self { options, state: OrderedMap::default(), steps: 0, updating: false })
    }

    /// Returns the hyperparameters.
    pub fn options(&self) -> AdamWOptions {
        self.options
    }

    /// Returns the number of steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates every parameter that has a gradient; the others do not change, not even by weight decay.
    ///
    /// With `clip`, gradients are multiplied by `clip / (norm + 1e-6)` if that is below 1, like PyTorch's
    /// `clip_grad_norm_`. A gradient has its parameter's dtype, or f32 if that is a half type.
    ///
    /// Errors, with nothing changed: [`ErrorKind::NonFinite`] for a gradient with NaN or infinity, naming its
    /// parameter; a rate that is negative or not finite; a clip that is not positive; a gradient of another shape or
    /// dtype.
    #[doc(alias = "clip_grad_norm_")]
    pub fn step(&mut self, params: &ParamMap, grads: &Gradients, lr: f64, clip: Option<f64>) -> Result<StepInfo> {
        self.step_scaled(params, grads, 1.0, lr, clip)
    }

    /// Like [`AdamW::step`], but multiplies all gradients by `scale` before taking their norm.
    pub(crate) fn step_scaled(
        &mut self,
        params: &ParamMap,
        grads: &Gradients,
        scale: f64,
        lr: f64,
        clip: Option<f64>,
    ) -> Result<StepInfo> {
        check(lr, clip)?;
        let (named, packed) = with_gradients(params, grads)?;
        let grad_norm = scale * self.norm(&named, &packed)?;
        let device = packed.first().map_or(Device::Cpu, |grad| grad.device().clone());
        profile::done("gradient_norm", Phase::Update, &device, || packed.iter().map(bytes).sum())?;
        let grad_scale = scale * clip.map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
        let settings = self.settings(lr, grad_scale);
        compile("adamw_step", kinds(&named, &packed))?;
        self.update(&named, &packed, |updates| {
            // Everything except the gradient is read and written.
            let moved = |update: &Update| {
                let state = [&*update.exp_avg, &*update.exp_avg_sq].into_iter().chain(update.master.as_deref());
                bytes(update.grad) + 2 * (bytes(update.value) + state.map(bytes).sum::<usize>())
            };
            let moved: usize = if profile::active() { updates.iter().map(moved).sum() } else { 0 };
            adamw(updates, settings)?;
            profile::done("adamw", Phase::Update, &device, || moved)
        })?;
        self.advance(named.iter().map(|(name, _)| *name));
        Ok(StepInfo { grad_norm, updated: named.len() })
    }

    fn settings(&self, lr: f64, grad_scale: f64) -> Settings {
        let AdamWOptions { beta1, beta2, eps, weight_decay } = self.options;
        Settings { lr, beta1, beta2, eps, weight_decay, grad_scale }
    }

    /// Calls `f` with the updates of these parameters. The caller has compiled what `f` launches.
    ///
    /// Parameters are locked all together, so that other threads see the weights of one step, and in the order of their
    /// identity, so that two optimizers of the same parameters do not wait for each other. Below the locks there is
    /// arithmetic alone: `f` must not wait for anything that may need a parameter.
    fn update(
        &mut self,
        named: &[Named],
        grads: &[Tensor],
        f: impl FnOnce(Vec<Update<'_>>) -> Result<()>,
    ) -> Result<()> {
        ensure!(
            !self.updating,
            Error::argument(
                "adamw",
                "the last step panicked, leaving the state partly updated; replace it with `load_state_dict`"
            )
        );
        if let Some((name, _)) = named.iter().find(|(_, param)| param.is_broken()) {
            let why = "was left partly updated by a step that panicked; `set` or load it first";
            return Err(Error::argument("adamw", format_args!("`{name}` {why}")));
        }
        self.prepare(named)?;
        let order = order(named.len(), |a, b| named[a].1.leaf().cmp(&named[b].1.leaf()));
        let mut locked: Vec<_> = order.into_iter().map(|index| (index, named[index].1.lock())).collect_vec();
        sort_by(&mut locked, |a, b| a.0.cmp(&b.0));
        let mut states = self.state.iter_mut();
        let mut updates = Vec::with_capacity(named.len());
        for (((name, _), (_, value)), grad) in named.iter().zip(&mut locked).zip(grads) {
            own(value)?;
            // `prepare` made one for every name; both are in alphabetical order.
            let found = states.find(|(key, _)| key.as_str() == *name);
            let Some((_, State { exp_avg, exp_avg_sq, master, step })) = found else { continue };
            let master = master.as_mut();
            updates.push(Update { value, grad, exp_avg, exp_avg_sq, master, step: *step + 1 });
        }
        self.updating = true;
        let done = f(updates);
        self.updating = false;
        done
    }

    /// Counts a step of these parameters.
    pub(super) fn advance<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        for name in names {
            if let Some(state) = self.state.get_mut(name) {
                state.step += 1;
            }
        }
        self.steps += 1;
    }

    /// Enqueues a step whose numbers are on the device when it runs. Gives the norm and the factor of the gradients as
    /// [`clip_on_device`] does, and the names of the parameters, whose step the caller counts.
    ///
    /// `given`: what gradients are multiplied by and the largest norm. `factors`: [`AdamW::factors`].
    #[cfg(feature = "cuda")]
    pub(super) fn record(
        &mut self,
        params: &ParamMap,
        grads: &Gradients,
        given: &Tensor,
        factors: &Tensor,
    ) -> Result<(Tensor, Vec<String>)> {
        let (named, packed) = with_gradients(params, grads)?;
        let norm = clip_on_device(&packed, given)?;
        let grad_scale = norm.narrow(0, 1, 1)?;
        let positions: OrderedMap<&str, usize> = params.unique().map(|(name, _)| name).zip(0..).collect();
        let place = |(name, _): &Named| factors.narrow(0, positions[name], 1)?.address();
        let places = named.iter().map(place).try_collect_vec()?;
        compile("adamw_recorded", kinds(&named, &packed))?;
        self.update(&named, &packed, |updates| adamw_recorded(updates, &places, &grad_scale))?;
        Ok((norm, named.into_iter().map(|(name, _)| name.to_string()).collect_vec()))
    }

    /// Returns the numbers of the next step of every parameter, in the order of [`ParamMap::unique`].
    #[cfg(feature = "cuda")]
    pub(super) fn factors(&self, params: &ParamMap, lr: f64) -> Vec<f64> {
        let settings = self.settings(lr, 1.0);
        let next = |name: &str| self.state.get(name).map_or(1, |state| state.step + 1);
        params.unique().flat_map(|(name, _)| settings.factors(next(name))).collect_vec()
    }

    /// Returns `true` if nothing else shares the tensors of the state, which a recorded step updates in place.
    #[cfg(feature = "cuda")]
    pub(super) fn is_unique(&mut self) -> bool {
        self.state.values_mut().iter_mut().all(|State { exp_avg, exp_avg_sq, master, .. }| {
            exp_avg.is_unique() && exp_avg_sq.is_unique() && master.as_mut().is_none_or(Tensor::is_unique)
        })
    }

    /// Returns the global norm of all gradients.
    fn norm(&self, named: &[Named], grads: &[Tensor]) -> Result<f64> {
        let squares = square_norms(grads)?;
        let norm = squares.iter().sum::<f64>().sqrt();
        if norm.is_finite() {
            return Ok(norm);
        }
        // Finite gradients can add up to infinity in f64; the error then names the largest.
        let largest = || squares.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(index, _)| index);
        let culprit = squares.iter().position(|square| !square.is_finite()).or_else(largest);
        let what = culprit.map_or("gradient norm".to_string(), |index| format!("gradient of {}", named[index].0));
        Err(Error::new(ErrorKind::NonFinite { step: self.steps, what }))
    }

    /// Creates the state of new parameters, and makes every state writable.
    fn prepare(&mut self, named: &[Named]) -> Result<()> {
        for (name, param) in named {
            let value = param.tensor().detach();
            let state = match self.state.get_mut(*name) {
                Some(state) => state,
                None => self.state.or_insert(name.to_string(), State::new(&value)?),
            };
            ensure!(
                state.exp_avg.shape() == value.shape()
                    && state.exp_avg.dtype() == value.dtype().accumulator()
                    && state.exp_avg.device() == value.device()
                    && state.master.is_some() == (value.dtype() != state.exp_avg.dtype()),
                Error::argument(
                    "adamw",
                    format_args!(
                        "the state of {name} is for a parameter {:?} on {}, but the parameter is {:?} {} on {}",
                        state.exp_avg.shape(),
                        state.exp_avg.device(),
                        value.shape(),
                        value.dtype(),
                        value.device()
                    )
                )
            );
            for tensor in [&mut state.exp_avg, &mut state.exp_avg_sq].into_iter().chain(&mut state.master) {
                own(tensor)?;
            }
        }
        Ok(())
    }

    /// Returns the state by name, for a checkpoint: `exp_avg.P`, `exp_avg_sq.P`, `step.P` and, for half types,
    /// `master.P` of each updated parameter `P`, and `steps`.
    pub fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
        let count = |steps: u64| Tensor::scalar(steps as i64, &crate::Device::Cpu);
        let mut dict = BTreeMap::new();
        dict.insert("steps".to_string(), count(self.steps)?);
        for (name, state) in self.state.iter() {
            dict.insert(format!("exp_avg.{name}"), state.exp_avg.clone());
            dict.insert(format!("exp_avg_sq.{name}"), state.exp_avg_sq.clone());
            dict.insert(format!("step.{name}"), count(state.step)?);
            if let Some(master) = &state.master {
                dict.insert(format!("master.{name}"), master.clone());
            }
        }
        Ok(dict)
    }

    /// Replaces the state with one from [`AdamW::state_dict`].
    ///
    /// Errors, with nothing changed: [`ErrorKind::Weights`] with every name that is missing, belongs to no parameter or
    /// has another shape; [`ErrorKind::DType`] for a tensor of another dtype; [`ErrorKind::Argument`] for a negative
    /// count.
    pub fn load_state_dict(&mut self, params: &ParamMap, dict: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut loader = Loader { dict, used: Default::default(), missing: Vec::new(), mismatched: Vec::new() };
        let steps = loader.count("steps")?;
        let mut state = OrderedMap::default();
        for (name, param) in params.unique() {
            let keys = ["exp_avg", "exp_avg_sq", "step", "master"].map(|kind| format!("{kind}.{name}"));
            if !keys.iter().any(|key| dict.contains_key(key)) {
                continue;
            }
            let value = param.tensor();
            let dtype = value.dtype().accumulator();
            let [exp_avg, exp_avg_sq, step, master] = &keys;
            let master =
                if value.dtype() == dtype { Some(None) } else { loader.tensor(master, &value, dtype)?.map(Some) };
            let parts = (loader.tensor(exp_avg, &value, dtype)?, loader.tensor(exp_avg_sq, &value, dtype)?);
            let step = loader.count(step)?;
            if let ((Some(exp_avg), Some(exp_avg_sq)), Some(master), Some(step)) = (parts, master, step) {
                state.insert(name.to_string(), State { exp_avg, exp_avg_sq, master, step });
            }
        }
        self.steps = loader.finish(steps)?;
        self.state = state;
        self.updating = false;
        Ok(())
    }
}

/// Checks the numbers of a step.
pub(super) fn check(lr: f64, clip: Option<f64>) -> Result<()> {
    ensure!(
        lr >= 0.0 && lr.is_finite(),
        Error::option("lr", format_args!("expected a finite number of at least 0, got {lr}"))
    );
    ensure!(
        clip.is_none_or(|clip| clip > 0.0),
        Error::option("clip", format_args!("expected a number above 0, got {}", clip.unwrap_or_default()))
    );
    Ok(())
}

/// A parameter and its name.
type Named<'a> = (&'a str, &'a Param);

/// Parameters that have a gradient, and their gradients, packed.
fn with_gradients<'a>(params: &'a ParamMap, grads: &Gradients) -> Result<(Vec<Named<'a>>, Vec<Tensor>)> {
    let with_grad = params.unique().filter_map(|(name, param)| Some((name, param, grads.param(param)?)));
    let packed = with_grad.map(|(name, param, grad)| Ok(((name, param), grad.detach().contiguous()?)));
    Ok(packed.try_collect_vec()?.into_iter().unzip())
}

/// Returns the types that the kernel of each parameter is compiled for.
fn kinds(named: &[Named], grads: &[Tensor]) -> impl Iterator<Item = (Device, DType, DType)> {
    let kind = |((_, param), grad): (&Named, &Tensor)| {
        let value = param.tensor();
        (value.device().clone(), value.dtype(), grad.dtype())
    };
    named.iter().zip(grads).map(kind)
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.dtype().size()
}

/// Takes tensors out of a state dict and collects mismatches.
struct Loader<'a> {
    dict: &'a BTreeMap<String, Tensor>,
    used: OrderedMap<String, ()>,
    missing: Vec<String>,
    mismatched: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl Loader<'_> {
    fn find(&mut self, key: &str, shape: &[usize], dtype: DType) -> Result<Option<Tensor>> {
        let Some(tensor) = self.dict.get(key) else {
            self.missing.push(key.to_string());
            return Ok(None);
        };
        self.used.insert(key.to_string(), ());
        if **tensor.shape() != *shape {
            self.mismatched.push((key.to_string(), shape.to_vec(), tensor.shape().to_vec()));
            return Ok(None);
        }
        ensure!(
            tensor.dtype() == dtype,
            Error::dtype("load_state_dict", format_args!("{key} is {}, expected {dtype}", tensor.dtype()))
        );
        Ok(Some(tensor.clone()))
    }

    fn tensor(&mut self, key: &str, like: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
        self.find(key, like.shape(), dtype)?.map(|tensor| tensor.to_device(like.device())).transpose()
    }

    fn count(&mut self, key: &str) -> Result<Option<u64>> {
        let Some(tensor) = self.find(key, &[], DType::I64)? else { return Ok(None) };
        let count = tensor.to_vec::<i64>()?[0];
        let count = u64::try_from(count);
        let count = count.map_err(|_| Error::argument("load_state_dict", format_args!("{key} is negative")))?;
        Ok(Some(count))
    }

    fn finish(self, steps: Option<u64>) -> Result<u64> {
        let Self { dict, used, missing, mismatched } = self;
        let unused: Vec<_> = dict.keys().filter(|&key| !used.contains_key(key)).cloned().collect_vec();
        match steps {
            Some(steps) if missing.is_empty() && unused.is_empty() && mismatched.is_empty() => Ok(steps),
            _ => Err(Error::new(ErrorKind::Weights { missing, unused, mismatched })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Init, ParamStore, Tape};

    /// Micro-batches of a half model are summed in f32: gradient and parameter have different dtypes.
    #[test]
    fn adamw_takes_f32_gradients_for_half_parameters() -> Result<()> {
        for dtype in [DType::BF16, DType::F16] {
            let store = ParamStore::new(0, dtype, &Device::Cpu);
            let param = store.param("p", [20_000], Init::Constant(1.0))?;
            let mut tape = Tape::grad();
            let mut grads = tape.backward(&param.tensor().sum(&[])?)?;
            for grad in grads.tensors_mut() {
                // 1 + 2⁻²⁰ is 1 in a half type.
                *grad = grad.to_dtype(DType::F32)?.affine(1.0, 2f64.powi(-20))?;
            }
            let mut optimizer = AdamW::new(AdamWOptions::default())?;
            optimizer.step(&store.params(), &grads, 0.1, None)?;
            let mean = optimizer.state_dict()?["exp_avg.p"].to_f64_vec()?;
            assert!(mean.iter().all(|mean| (mean - 0.1 * (1.0 + 2f64.powi(-20))).abs() < 1e-8), "{}", mean[0]);
            // No parameter takes f64 gradients.
            for grad in grads.tensors_mut() {
                *grad = grad.to_dtype(DType::F64)?;
            }
            assert!(matches!(
                optimizer.step(&store.params(), &grads, 0.1, None).map_err(Error::into_kind),
                Err(ErrorKind::DType { .. })
            ));
            assert_eq!(optimizer.steps(), 1);
        }
        Ok(())
    }
    /// After a step that panics half way, nothing continues as if it were complete.
    #[test]
    fn adamw_refuses_half_updated_weights() -> Result<()> {
        let store = ParamStore::new(0, DType::F32, &Device::Cpu);
        let params: Vec<_> = ["a", "b"].map(|name| store.param(name, [2], Init::Constant(1.0)).unwrap()).into();
        let params = [&params[0], &params[1]];
        let step = |optimizer: &mut AdamW, of: &[&Param]| -> Result<StepInfo> {
            let mut tape = Tape::grad();
            let sums = of.iter().map(|param| param.tensor().square()).collect::<Result<Vec<_>>>()?;
            let grads = tape.backward(&Tensor::cat(&sums.iter().collect::<Vec<_>>(), 0)?.sum(&[])?)?;
            optimizer.step(&store.params(), &grads, 0.1, None)
        };
        let mut optimizer = AdamW::new(AdamWOptions::default())?;
        step(&mut optimizer, &params)?;
        let saved = (store.params().state_dict(), optimizer.state_dict()?);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let named = [("b", params[1])];
            optimizer.update(&named, &[saved.0["b"].clone()], |_| panic!("half way"))
        }));
        assert!(panicked.is_err());
        let refused = |optimizer: &mut AdamW, name: &str| {
            let message = step(optimizer, &params).unwrap_err().to_string();
            assert!(message.starts_with("adamw: ") && message.contains(name), "{message}");
        };
        // The state first, then the parameter, each until it is whole again; what is there can be read.
        assert_eq!(params[1].tensor().numel(), 2);
        refused(&mut optimizer, "`load_state_dict`");
        optimizer.load_state_dict(&store.params(), &saved.1)?;
        refused(&mut optimizer, "`b`");
        step(&mut optimizer, &params[..1])?;
        params[1].set(saved.0["b"].clone())?;
        step(&mut optimizer, &params)?;
        // Loading all is as good.
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let named = [("a", params[0])];
            optimizer.clone().update(&named, &[saved.0["a"].clone()], |_| panic!("half way"))
        }));
        assert!(panicked.is_err());
        refused(&mut optimizer, "`a`");
        store.params().load(&saved.0)?;
        step(&mut optimizer, &params).map(drop)
    }
}
