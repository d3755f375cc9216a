//! Step, state and checkpoints of all optimizers: a rule for each parameter, and one pass over all of them.

#[cfg(feature = "cuda")]
mod recorded;

use std::{borrow::Cow, collections::BTreeMap, fmt};

use serde_json::{Value, json};

use super::{
    AdamWOptions, LionOptions, OptimizerOptions, ParamGroup, SgdOptions, adafactor, check,
    groups::{self, Matched, Resolved},
    muon,
};
use crate::{
    DType, Device, Error, ErrorKind, Gradients, ParamMap, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    ops::{
        adamw::{Rule, Settings, Update, check_gradient, compile, own, square_norms, update},
        momentum::{Lion, Sgd},
    },
    ordered::OrderedMap,
    params::Param,
    profile::{self, Phase},
    shape::Shape,
    sort::{order, sort_by},
};

/// Result of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct StepInfo {
    /// Global norm of all gradients, before clipping.
    pub grad_norm: f64,
    /// Number of parameters that had a gradient and were updated.
    pub updated: usize,
}

/// Everything of an optimizer but its type.
#[derive(Clone)]
pub(in crate::train) struct Engine {
    options: OptimizerOptions,
    groups: Vec<ParamGroup>,
    state: OrderedMap<String, State>,
    steps: u64,
    /// If `true`, an update is in progress or has panicked.
    updating: bool,
}

/// State of a parameter.
#[derive(Clone)]
struct State {
    /// Tensors of the rule, in the order of [`slots`], and their names.
    tensors: Vec<Tensor>,
    kinds: Vec<&'static str>,
    master: Option<Tensor>,
    step: u64,
}

/// Returns names and shapes of the tensors that a rule keeps for a parameter of this shape.
fn slots(rule: &OptimizerOptions, shape: &Shape) -> Vec<(&'static str, Shape)> {
    match rule {
        OptimizerOptions::AdamW(_) => vec![("exp_avg", *shape), ("exp_avg_sq", *shape)],
        OptimizerOptions::Sgd(SgdOptions { momentum: 0.0, .. }) => Vec::new(),
        OptimizerOptions::Sgd(_) | OptimizerOptions::Muon(_) => vec![("momentum_buffer", *shape)],
        OptimizerOptions::Lion(_) => vec![("exp_avg", *shape)],
        OptimizerOptions::Adafactor(_) => match shape.len() {
            0 | 1 => vec![("variance", *shape)],
            dims => vec![("row_var", shape.with_dim(dims - 1, 1)), ("col_var", shape.with_dim(dims - 2, 1))],
        },
    }
}

impl State {
    fn new(value: &Tensor, rule: &OptimizerOptions) -> Result<Self> {
        let dtype = value.dtype().accumulator();
        let (kinds, shapes): (Vec<_>, Vec<_>) = slots(rule, value.shape()).into_iter().unzip();
        let zeros = |shape: Shape| Tensor::zeros(shape, dtype, value.device());
        let master = if value.dtype() == dtype { None } else { Some(value.to_dtype(dtype)?) };
        Ok(Self { tensors: shapes.into_iter().map(zeros).try_collect_vec()?, kinds, master, step: 0 })
    }

    /// Returns the parameter in the state's type: the master, unless the value was set elsewhere since.
    fn exact(&self, value: &Tensor) -> Result<Tensor> {
        match &self.master {
            Some(master) => {
                master.to_dtype(value.dtype())?.eq(value)?.where_cond(master, &value.to_dtype(master.dtype())?)
            }
            None => Ok(value.clone()),
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options, groups, state, steps, .. } = self;
        f.debug_struct("Optimizer")
            .field("options", options)
            .field("groups", groups)
            .field("parameters", &state.len())
            .field("steps", steps)
            .finish()
    }
}

/// Step of one parameter: its rule, and the gradient or the direction that the rule takes.
struct Planned<'a> {
    rule: Rule,
    grad: Cow<'a, Tensor>,
    /// Tensors of the state after the step, where the rule does not write them itself.
    next: Option<Vec<Tensor>>,
}

impl Engine {
    pub fn new(options: OptimizerOptions) -> Result<Self> {
        options.check()?;
        Ok(Self { options, groups: Vec::new(), state: OrderedMap::default(), steps: 0, updating: false })
    }

    pub fn with_groups(options: OptimizerOptions, groups: &[ParamGroup], params: &ParamMap) -> Result<Self> {
        let engine = Self::new(options)?;
        groups::check(&options, groups, params)?;
        Ok(Self { groups: groups.to_vec(), ..engine })
    }

    fn name(&self) -> &'static str {
        self.options.kind().name()
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn to_json(&self) -> Value {
        let mut json = json!(self.options);
        json["groups"] = json!(self.groups);
        json
    }

    pub fn step_scaled(
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
        let resolved = self.resolve(params, &named);
        self.prepare(&named, &resolved)?;
        let plan = self.plan(&named, &resolved, &packed, grad_scale, lr)?;
        let name = self.name();
        self.update(&named, &plan, |updates| {
            // Everything except the gradient is read and written.
            let moved = |at: &Update| {
                let state = at.means.iter().chain([&at.master]).flatten().map(|tensor| bytes(tensor)).sum::<usize>();
                bytes(at.grad) + 2 * (bytes(at.value) + state)
            };
            let moved: usize = if profile::active() { updates.iter().map(moved).sum() } else { 0 };
            update(updates)?;
            profile::done(name, Phase::Update, &device, || moved)
        })?;
        for ((name, _), Planned { next, .. }) in named.iter().zip(plan) {
            if let (Some(state), Some(next)) = (self.state.get_mut(*name), next) {
                state.tensors = next;
            }
        }
        self.advance(named.iter().map(|(name, _)| *name));
        Ok(StepInfo { grad_norm, updated: named.len() })
    }

    /// Returns the hyperparameters of each parameter.
    fn resolve(&self, params: &ParamMap, named: &[Named]) -> Vec<Resolved> {
        let matched = Matched::new(&self.groups, params);
        named.iter().map(|(_, param)| matched.resolve(self.options, &self.groups, param)).collect_vec()
    }

    /// Chooses the rule of each parameter with its numbers, and computes the directions of those that need more than
    /// their own element of the gradient.
    fn plan<'a>(
        &self,
        named: &[Named],
        resolved: &[Resolved],
        grads: &'a [Tensor],
        grad_scale: f64,
        lr: f64,
    ) -> Result<Vec<Planned<'a>>> {
        let (mut plan, mut matrices) = (Vec::with_capacity(named.len()), Vec::new());
        for (((name, param), resolved), grad) in named.iter().zip(resolved).zip(grads) {
            // `prepare` made it.
            let Some(state) = self.state.get(*name) else { continue };
            let (lr, step) = (lr * resolved.lr, state.step + 1);
            let value = param.tensor().detach();
            let scaled = || -> Result<Tensor> {
                check_gradient(&value, grad)?;
                grad.to_dtype(value.dtype().accumulator())?.affine(grad_scale, 0.0)
            };
            let mut planned =
                Planned { rule: Rule::Sgd(Sgd::direction(1.0, 0.0)), grad: Cow::Borrowed(grad), next: None };
            match resolved.options {
                OptimizerOptions::AdamW(options) => {
                    planned.rule = Rule::AdamW(settings(options, step, lr, grad_scale));
                }
                OptimizerOptions::Sgd(options) => planned.rule = Rule::Sgd(sgd(options, step, lr, grad_scale)),
                OptimizerOptions::Lion(LionOptions { beta1, beta2, weight_decay }) => {
                    planned.rule = Rule::Lion(Lion {
                        scale: grad_scale,
                        beta1,
                        mean1: 1.0 - beta1,
                        beta2,
                        mean2: 1.0 - beta2,
                        decay: 1.0 - lr * weight_decay,
                        rate: lr,
                    });
                }
                OptimizerOptions::Adafactor(options) => {
                    let exact = state.exact(&value)?;
                    let (direction, next) =
                        adafactor::direction(&scaled()?, &exact, &state.tensors, options, step, lr)?;
                    planned.rule = Rule::Sgd(Sgd::direction(1.0 - lr * options.weight_decay, 1.0));
                    (planned.grad, planned.next) = (Cow::Owned(direction), Some(next));
                }
                OptimizerOptions::Muon(options) => {
                    let (mean, direction) = muon::momentum(&scaled()?, &state.tensors[0], options)?;
                    let rate = lr * options.adjust_lr.ratio(value.shape()[0], value.shape()[1]);
                    planned.rule = Rule::Sgd(Sgd::direction(1.0 - lr * options.weight_decay, rate));
                    planned.next = Some(vec![mean]);
                    matrices.push((plan.len(), (direction, options)));
                }
            }
            plan.push(planned);
        }
        let (places, mut matrices): (Vec<usize>, Vec<_>) = matrices.into_iter().unzip();
        muon::orthogonalize(&mut matrices)?;
        for (place, (matrix, _)) in places.into_iter().zip(matrices) {
            plan[place].grad = Cow::Owned(matrix);
        }
        compile(named.iter().zip(&plan).map(|((_, param), Planned { rule, grad, .. })| {
            let value = param.tensor();
            (rule.kernel(), value.device().clone(), [value.dtype(), grad.dtype()])
        }))?;
        Ok(plan)
    }

    /// Calls `f` with the updates of these parameters. The caller has compiled what `f` launches, and prepared the state.
    ///
    /// Parameters are locked all together, so that other threads see the weights of one step, and in the order of their
    /// identity, so that two optimizers of the same parameters do not wait for each other. Below the locks there is
    /// arithmetic alone: `f` must not wait for anything that may need a parameter.
    fn update(
        &mut self,
        named: &[Named],
        plan: &[Planned],
        f: impl FnOnce(Vec<Update<'_>>) -> Result<()>,
    ) -> Result<()> {
        let order = order(named.len(), |a, b| named[a].1.leaf().cmp(&named[b].1.leaf()));
        let mut locked: Vec<_> = order.into_iter().map(|index| (index, named[index].1.lock())).collect_vec();
        sort_by(&mut locked, |a, b| a.0.cmp(&b.0));
        let mut states = self.state.iter_mut();
        let mut updates = Vec::with_capacity(named.len());
        for (((name, _), (_, value)), Planned { rule, grad, next }) in named.iter().zip(&mut locked).zip(plan) {
            own(value)?;
            // `prepare` made one for every name; both are in alphabetical order.
            let found = states.find(|(key, _)| key.as_str() == *name);
            let Some((_, State { tensors, master, .. })) = found else { continue };
            let mut tensors = tensors.iter_mut().filter(|_| next.is_none());
            let means = [tensors.next(), tensors.next()];
            updates.push(Update { value, grad, means, master: master.as_mut(), rule: *rule });
        }
        self.updating = true;
        let done = f(updates);
        self.updating = false;
        done
    }

    /// Counts a step of these parameters.
    pub fn advance<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        for name in names {
            if let Some(state) = self.state.get_mut(name) {
                state.step += 1;
            }
        }
        self.steps += 1;
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
    fn prepare(&mut self, named: &[Named], resolved: &[Resolved]) -> Result<()> {
        let op = self.name();
        ensure!(
            !self.updating,
            Error::argument(
                op,
                "the last step panicked, leaving the state partly updated; replace it with `load_state_dict`"
            )
        );
        if let Some((name, _)) = named.iter().find(|(_, param)| param.is_broken()) {
            let why = "was left partly updated by a step that panicked; `set` or load it first";
            return Err(Error::argument(op, format_args!("`{name}` {why}")));
        }
        for ((name, param), Resolved { options, .. }) in named.iter().zip(resolved) {
            let value = param.tensor().detach();
            let state = match self.state.get_mut(*name) {
                Some(state) => state,
                None => self.state.or_insert(name.to_string(), State::new(&value, options)?),
            };
            let slots = slots(options, value.shape());
            let dtype = value.dtype().accumulator();
            let fits = |(tensor, (_, shape)): (&Tensor, &(_, Shape))| {
                tensor.shape() == shape && tensor.dtype() == dtype && tensor.device() == value.device()
            };
            ensure!(
                state.tensors.len() == slots.len()
                    && state.tensors.iter().zip(&slots).all(fits)
                    && state.master.is_some() == (value.dtype() != dtype),
                Error::argument(
                    op,
                    format_args!(
                        "the state of {name} is for another parameter than {:?} {} on {}",
                        value.shape(),
                        value.dtype(),
                        value.device()
                    )
                )
            );
            state.tensors.iter_mut().chain(&mut state.master).try_for_each(own)?;
        }
        Ok(())
    }

    pub fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
        let count = |steps: u64| Tensor::scalar(steps as i64, &Device::Cpu);
        let mut dict = BTreeMap::new();
        dict.insert("steps".to_string(), count(self.steps)?);
        for (name, state) in self.state.iter() {
            for (tensor, kind) in state.tensors.iter().zip(&state.kinds) {
                dict.insert(format!("{kind}.{name}"), tensor.clone());
            }
            dict.insert(format!("step.{name}"), count(state.step)?);
            if let Some(master) = &state.master {
                dict.insert(format!("master.{name}"), master.clone());
            }
        }
        Ok(dict)
    }

    pub fn load_state_dict(&mut self, params: &ParamMap, dict: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut loader = Loader { dict, used: Default::default(), missing: Vec::new(), mismatched: Vec::new() };
        let steps = loader.count("steps")?;
        let mut state = OrderedMap::default();
        let matched = Matched::new(&self.groups, params);
        for (name, param) in params.unique() {
            let value = param.tensor();
            let dtype = value.dtype().accumulator();
            let slots = slots(&matched.resolve(self.options, &self.groups, param).options, value.shape());
            let key = |kind: &str| format!("{kind}.{name}");
            if !slots.iter().map(|(kind, _)| *kind).chain(["step", "master"]).any(|kind| dict.contains_key(&key(kind)))
            {
                continue;
            }
            let mut tensor = |kind: &str, shape: &Shape| loader.tensor(&key(kind), shape, dtype, value.device());
            let tensors = slots.iter().map(|(kind, shape)| tensor(kind, shape)).try_collect_vec()?;
            let master = (value.dtype() != dtype).then(|| tensor("master", value.shape())).transpose()?;
            let step = loader.count(&key("step"))?;
            let kinds = slots.iter().map(|(kind, _)| *kind).collect_vec();
            let tensors = tensors.into_iter().collect::<Option<Vec<Tensor>>>();
            let has_master = master.as_ref().is_none_or(Option::is_some);
            if let (Some(tensors), true, Some(step)) = (tensors, has_master, step) {
                state.insert(name.to_string(), State { kinds, tensors, master: master.flatten(), step });
            }
        }
        self.steps = loader.finish(steps)?;
        self.state = state;
        self.updating = false;
        Ok(())
    }
}

fn settings(options: AdamWOptions, step: u64, lr: f64, grad_scale: f64) -> Settings {
    let AdamWOptions { beta1, beta2, eps, weight_decay } = options;
    Settings { step, lr, beta1, beta2, eps, weight_decay, grad_scale }
}

fn sgd(options: SgdOptions, step: u64, lr: f64, scale: f64) -> Sgd {
    let SgdOptions { momentum, dampening, nesterov, weight_decay } = options;
    // The sum begins with the first gradient, whole.
    let gain = if step == 1 { 1.0 } else { 1.0 - dampening };
    let [own, mix] = match (momentum == 0.0, nesterov) {
        (true, _) => [1.0, 0.0],
        (false, true) => [1.0, momentum],
        (false, false) => [0.0, 1.0],
    };
    Sgd { scale, couple: weight_decay, momentum, gain, own, mix, decay: 1.0, rate: lr }
}

/// A parameter and its name.
type Named<'a> = (&'a str, &'a Param);

/// Parameters that have a gradient, and their gradients, packed.
fn with_gradients<'a>(params: &'a ParamMap, grads: &Gradients) -> Result<(Vec<Named<'a>>, Vec<Tensor>)> {
    let with_grad = params.unique().filter_map(|(name, param)| Some((name, param, grads.param(param)?)));
    let packed = with_grad.map(|(name, param, grad)| Ok(((name, param), grad.detach().contiguous()?)));
    Ok(packed.try_collect_vec()?.into_iter().unzip())
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

    fn tensor(&mut self, key: &str, shape: &Shape, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
        self.find(key, shape, dtype)?.map(|tensor| tensor.to_device(device)).transpose()
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
    use crate::{
        Init, ParamStore, Tape,
        train::{AdamW, Optimizer},
    };

    /// Panics in the middle of an update of one parameter.
    fn panic_half_way(optimizer: &mut AdamW, named: Named, value: &Tensor) {
        let rule = Rule::Sgd(Sgd::direction(1.0, 0.0));
        let plan = [Planned { rule, grad: Cow::Borrowed(value), next: None }];
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            optimizer.engine.update(&[named], &plan, |_| panic!("half way"))
        }));
        assert!(panicked.is_err());
    }

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
        panic_half_way(&mut optimizer, ("b", params[1]), &saved.0["b"]);
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
        panic_half_way(&mut optimizer.clone(), ("a", params[0]), &saved.0["a"]);
        refused(&mut optimizer, "`a`");
        store.params().load(&saved.0)?;
        step(&mut optimizer, &params).map(drop)
    }
}
