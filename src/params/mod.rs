//! Named parameters: one registration serves initialisation, the optimizer, loading and saving.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
};

mod block;
mod deferred;
mod init;

use crate::{
    DType, Device, Error, ErrorKind, Result,
    collect::CollectVec,
    error::ensure,
    hash::fnv1a,
    ordered::{OrderedMap, ordered},
    philox::Philox,
    shape::{IntoShape, Shape},
    sort::{order, sort},
    tensor::{GradSlot, LeafId, Tensor},
};

use self::deferred::Pending;
pub(crate) use block::{Block, Keeper};
pub use deferred::deferred_init;
pub(crate) use deferred::defers;
pub use init::Init;

/// Trainable tensor. Clones share it: a tied weight is one parameter under two names.
///
/// Any thread may read it while another trains: a reader gets, and keeps, the value from before or after an update,
/// never a mixture. The one exception is an update that panics midway, which only a bug can cause: the value is then
/// partly old and partly new, [`Param::tensor`] returns it unchanged, and optimizers return an error that names it
/// until [`Param::set`] or [`ParamMap::load`] replaces it.
///
/// ```
/// use x_transformers::{DType, Device, Init, ParamStore};
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let weight = store.param("weight", [3], Init::Constant(0.5))?;
/// assert_eq!(weight.tensor().to_vec::<f32>()?, [0.5; 3]); // the present value
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone)]
#[doc(alias = "Parameter")]
#[doc(alias = "Var")]
pub struct Param(Arc<ParamCell>);

struct ParamCell {
    leaf: LeafId,
    value: RwLock<Tensor>,
    /// Source of the value that is still to come.
    pending: Mutex<Option<Pending>>,
    /// If `true`, no gradient is computed.
    frozen: AtomicBool,
    /// If `true`, the value is not moved beside others.
    apart: AtomicBool,
}

impl Param {
    /// Creates a parameter with this value.
    ///
    /// Errors: the dtype is not float.
    pub fn new(value: Tensor) -> Result<Self> {
        ensure!(
            value.dtype().is_float(),
            Error::dtype("param", format_args!("expected a float parameter, got {}", value.dtype()))
        );
        let value = RwLock::new(value.detach());
        let (pending, frozen, apart) = (Mutex::new(None), AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self(Arc::new(ParamCell { leaf: LeafId::new(), value, pending, frozen, apart })))
    }

    /// Returns the current value, as a leaf of the tape, or as a constant if the parameter is frozen.
    pub fn tensor(&self) -> Tensor {
        if self.requires_grad() { self.read().with_slot(GradSlot::Leaf(self.0.leaf)) } else { self.read().clone() }
    }

    /// Returns `false` for a frozen parameter, for which no gradient is computed. Default `true`.
    pub fn requires_grad(&self) -> bool {
        !self.0.frozen.load(Ordering::Relaxed)
    }

    /// Freezes the parameter, or thaws it: optimizers leave a parameter without a gradient as it is, weight decay
    /// included.
    #[doc(alias = "requires_grad_")]
    #[doc(alias = "freeze")]
    pub fn set_requires_grad(&self, requires_grad: bool) {
        self.0.frozen.store(!requires_grad, Ordering::Relaxed);
    }

    fn read(&self) -> RwLockReadGuard<'_, Tensor> {
        self.0.value.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Replaces the value.
    ///
    /// Errors: another shape, dtype or device; a parameter that is divided among ranks (ZeRO 3).
    pub fn set(&self, value: Tensor) -> Result<()> {
        ensure!(!self.read().is_absent() || self.is_deferred(), Tensor::not_here());
        self.replace(value)
    }

    /// Replaces the value, also of a parameter that is divided among ranks, or deferred.
    pub(crate) fn replace(&self, value: Tensor) -> Result<()> {
        let mut old = self.lock();
        ensure!(
            old.shape() == value.shape() && old.dtype() == value.dtype() && old.device() == value.device(),
            Error::shape(
                "set",
                format_args!(
                    "the parameter is {:?} {} {}, but the value is {:?} {} {}",
                    old.shape(),
                    old.dtype(),
                    old.device(),
                    value.shape(),
                    value.dtype(),
                    value.device()
                )
            )
        );
        *old = value.into_constant();
        *self.slot() = None;
        // The value is entirely new, whatever happened to the old one.
        self.0.value.clear_poison();
        Ok(())
    }

    /// Copies the values of parameters to these tensors, of which they become the owners. Returns `false`, and changes
    /// nothing, if a value has another shape, dtype or device by now or is replaced meanwhile, or a parameter occurs twice.
    pub(crate) fn move_to(params: &[&Self], mut to: Vec<Tensor>) -> Result<bool> {
        let order = order(params.len(), |a, b| params[a].leaf().cmp(&params[b].leaf()));
        if order.windows(2).any(|pair| params[pair[0]].leaf() == params[pair[1]].leaf()) || to.len() != params.len() {
            return Ok(false);
        }
        // Copied before the locks are taken, since a copy may wait for a thread that waits for a lock. An optimizer that
        // finds these handles writes its results elsewhere, which shows below.
        let values: Vec<Tensor> = params.iter().map(|param| param.read().clone()).collect_vec();
        let fits = |(old, new): (&Tensor, &Tensor)| {
            !old.is_absent()
                && old.is_contiguous()
                && (old.shape(), old.dtype(), old.device()) == (new.shape(), new.dtype(), new.device())
        };
        if !values.iter().zip(&to).all(fits) {
            return Ok(false);
        }
        values.iter().zip(&mut to).try_for_each(|(old, new)| old.copy_into(new))?;
        let mut locked: Vec<_> = order.into_iter().map(|at| (at, params[at].lock())).collect_vec();
        if !locked.iter().all(|(at, value)| value.is_same(&values[*at]) && !params[*at].is_broken()) {
            return Ok(false);
        }
        let mut to: Vec<Option<Tensor>> = to.into_iter().map(Some).collect_vec();
        for (at, value) in &mut locked {
            if let Some(moved) = to[*at].take() {
                **value = moved;
            }
        }
        Ok(true)
    }

    /// Leaves the value where it is from now on: it is never moved beside others.
    pub(crate) fn keep_apart(&self) {
        self.0.apart.store(true, Ordering::Relaxed);
    }

    /// Returns `true` after [`Param::keep_apart`].
    pub(crate) fn is_kept_apart(&self) -> bool {
        self.0.apart.load(Ordering::Relaxed)
    }

    /// Locks the source of the value that is still to come.
    fn slot(&self) -> MutexGuard<'_, Option<Pending>> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the identity under which gradients are stored.
    pub fn leaf(&self) -> LeafId {
        self.0.leaf
    }

    /// Returns `true` if an update of the value panicked midway.
    pub(crate) fn is_broken(&self) -> bool {
        self.0.value.is_poisoned()
    }

    /// Locks the value for changing it in place together with others; readers wait until the guard is dropped.
    ///
    /// Lock several in the order of [`Param::leaf`], and do nothing that may wait for other threads meanwhile.
    pub(crate) fn lock(&self) -> RwLockWriteGuard<'_, Tensor> {
        self.0.value.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.tensor();
        write!(f, "Param({:?} {})", value.shape(), value.dtype())
    }
}

/// Tensor that is saved but not trained. Clones share it, so [`ParamMap::load`] updates it in every module.
#[derive(Clone)]
pub struct Buffer(Arc<RwLock<Tensor>>);

impl Buffer {
    fn new(value: Tensor) -> Self {
        Self(Arc::new(RwLock::new(value.detach())))
    }

    /// Returns the current value.
    pub fn tensor(&self) -> Tensor {
        self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn set(&self, value: Tensor) {
        *self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = value.detach();
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.tensor();
        write!(f, "Buffer({:?} {})", value.shape(), value.dtype())
    }
}

/// Named parameters and buffers of a model: state dict, optimizer list, loader and saver in one.
///
/// Names match PyTorch's `state_dict()`.
///
/// ```
/// use x_transformers::{DType, Device, ParamStore, nn::Linear};
/// let trained = ParamStore::new(1, DType::F32, &Device::Cpu);
/// Linear::new(&trained, 4, 2)?;
/// let store = ParamStore::zeros(DType::F32, &Device::Cpu);
/// let linear = Linear::new(&store, 4, 2)?;
/// store.params().load(&trained.params().state_dict())?; // everything or nothing
/// assert_eq!(store.params().numel(), 4 * 2 + 2);
/// # let _ = linear;
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Default, Debug)]
pub struct ParamMap {
    params: OrderedMap<String, Param>,
    buffers: OrderedMap<String, Buffer>,
    blocks: Vec<Block>,
}

impl ParamMap {
    /// Returns the blocks of layers, in the order of their creation.
    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Returns all parameters by name, in alphabetical order; a tied one appears under each of its names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Param)> {
        self.params.iter().map(|(name, param)| (name.as_str(), param))
    }

    /// Returns each parameter once, under the first of its names.
    pub fn unique(&self) -> impl Iterator<Item = (&str, &Param)> {
        let mut places = self.by_leaf();
        sort(&mut places);
        places.into_iter().map(|at| (self.params.keys()[at].as_str(), &self.params.values()[at]))
    }

    /// Returns each parameter once, in the order in which several are [locked](Param::lock).
    #[cfg(feature = "cuda")]
    pub(crate) fn in_order_of_locks(&self) -> impl Iterator<Item = &Param> {
        self.by_leaf().into_iter().map(|at| &self.params.values()[at])
    }

    /// Returns the place of each parameter once, under the first of its names, in the order of [`Param::leaf`].
    fn by_leaf(&self) -> Vec<usize> {
        let leaf = |at: usize| self.params.values()[at].leaf();
        let mut places = order(self.params.len(), |a, b| leaf(a).cmp(&leaf(b)));
        places.dedup_by_key(|at| leaf(*at));
        places
    }

    /// Returns the tensors that are saved but not trained.
    pub fn buffers(&self) -> impl Iterator<Item = (&str, Tensor)> {
        self.buffers.iter().map(|(name, buffer)| (name.as_str(), buffer.tensor()))
    }

    /// Returns a parameter by name.
    pub fn get(&self, name: &str) -> Option<&Param> {
        self.params.get(name)
    }

    /// Returns the number of trainable values, counting tied ones once.
    pub fn numel(&self) -> usize {
        self.unique().map(|(_, param)| param.tensor().numel()).sum()
    }

    /// Returns all parameters and buffers by name, like PyTorch's `state_dict()`.
    ///
    /// While another thread trains, it holds the weights of a single step: all from before an update, or all from after
    /// it.
    pub fn state_dict(&self) -> BTreeMap<String, Tensor> {
        // Optimizers lock all parameters in this order before they change any.
        let cells = self.by_leaf().into_iter().map(|at| &self.params.values()[at]);
        let values: OrderedMap<LeafId, _> = cells.map(|param| (param.leaf(), param.read())).collect();
        let params = self.params.iter().map(|(name, param)| (name.clone(), values[&param.leaf()].clone()));
        ordered(params.chain(self.buffers.iter().map(|(name, buffer)| (name.clone(), buffer.tensor()))))
    }

    /// Loads a state dict, converting to each parameter's dtype and device.
    ///
    /// Buffers start with the values of the config; the state dict may omit them, or override them with tensors of the
    /// right shape, as in PyTorch. A tied parameter may appear under any of its names, or under several with equal
    /// values.
    ///
    /// Errors, with nothing changed: [`ErrorKind::Weights`] with every missing, unused and mismatched name; values that
    /// are not float; a tied parameter with different values; parameters that are divided among ranks (ZeRO 3). Of deferred
    /// parameters those of conversion and memory come when they take their values.
    #[doc(alias = "load_state_dict")]
    pub fn load(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let given = self.params.iter().filter(|(name, _)| state.contains_key(*name));
        let mut given: Vec<LeafId> = given.map(|(_, param)| param.leaf()).collect_vec();
        sort(&mut given);
        let missing: Vec<_> = self
            .params
            .iter()
            .filter(|(_, param)| given.binary_search(&param.leaf()).is_err())
            .map(|(name, _)| name.clone())
            .collect_vec();
        let known = |name: &str| self.params.contains_key(name) || self.buffers.contains_key(name);
        let unused: Vec<_> = state.keys().filter(|&name| !known(name)).cloned().collect_vec();
        let shape = |name: &String| match self.params.get(name) {
            Some(param) => Some(*param.tensor().shape()),
            None => self.buffers.get(name).map(|buffer| *buffer.tensor().shape()),
        };
        let mismatched: Vec<_> = state
            .iter()
            .filter_map(|(name, tensor)| {
                let expected = shape(name)?;
                (expected != *tensor.shape()).then(|| (name.clone(), expected.to_vec(), tensor.shape().to_vec()))
            })
            .collect_vec();
        ensure!(
            missing.is_empty() && unused.is_empty() && mismatched.is_empty(),
            Error::new(ErrorKind::Weights { missing, unused, mismatched })
        );
        // Converted first, so that a failure midway leaves the model unchanged.
        let mut values: OrderedMap<LeafId, (&str, &Param, Tensor)> = OrderedMap::default();
        for (name, param) in self.params.iter() {
            let Some(tensor) = state.get(name) else { continue };
            ensure!(
                tensor.dtype().is_float(),
                Error::dtype("load", format_args!("{name}: expected a float dtype, got {}", tensor.dtype()))
            );
            if let Some((other, ..)) = values.get(&param.leaf()) {
                ensure!(
                    tensor.to_f64_vec()? == state[*other].to_f64_vec()?,
                    Error::argument(
                        "load",
                        format_args!(
                            "`{other}` and `{name}` are tied in the model, but have different values in the file"
                        )
                    )
                );
                continue;
            }
            if param.is_deferred() {
                values.insert(param.leaf(), (name, param, tensor.detach()));
                continue;
            }
            let old = param.tensor();
            ensure!(!old.is_absent(), Tensor::not_here());
            values.insert(param.leaf(), (name, param, tensor.packed()?.on(old.device())?.converted(old.dtype())?));
        }
        let mut buffers = Vec::new();
        for (name, buffer) in self.buffers.iter() {
            let Some(tensor) = state.get(name) else { continue };
            let old = buffer.tensor();
            ensure!(
                tensor.dtype().is_float() == old.dtype().is_float(),
                Error::dtype("load", format_args!("buffer {name}: expected {}, got {}", old.dtype(), tensor.dtype()))
            );
            buffers.push((buffer, tensor.packed()?.on(old.device())?.converted(old.dtype())?));
        }
        buffers.into_iter().for_each(|(buffer, value)| buffer.set(value));
        // All together, in the order of the optimizers' locks: readers see all old values or all new ones.
        let mut locked = Vec::new();
        for (_, (_, param, value)) in values {
            if param.is_deferred() {
                param.defer(value);
                continue;
            }
            let old = param.lock();
            // No change, unless another thread has given a deferred parameter its value meanwhile.
            let value = value.packed()?.on(old.device())?.converted(old.dtype())?;
            locked.push((param, old, value));
        }
        for (param, old, value) in &mut locked {
            **old = value.detach();
            param.0.value.clear_poison();
        }
        Ok(())
    }
}

/// Source of a module's parameters: a place in the tree of names, initial values, and the map.
///
/// ```
/// use x_transformers::{DType, Device, Init, ParamStore, nn::Linear};
/// let store = ParamStore::new(42, DType::F32, &Device::Cpu); // seed, dtype, device
/// let scale = store.param("scale", [4], Init::Constant(1.0))?;
/// let linear = Linear::new(&store.at("encoder").at("fc"), 4, 2)?; // names below `encoder.fc`
/// let params = store.params();
/// let names: Vec<&str> = params.iter().map(|(name, _)| name).collect();
/// assert_eq!(names, ["encoder.fc.bias", "encoder.fc.weight", "scale"]);
/// assert_eq!(scale.tensor().shape()[..], [4]);
/// # let _ = linear;
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone)]
#[doc(alias = "VarBuilder")]
#[doc(alias = "VarMap")]
#[doc(alias = "Module")]
pub struct ParamStore {
    prefix: String,
    start: Start,
    dtype: DType,
    device: Device,
    map: Arc<Mutex<ParamMap>>,
}

impl fmt::Debug for ParamStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prefix, start, dtype, device, .. } = self;
        f.debug_struct("ParamStore")
            .field("prefix", prefix)
            .field("start", start)
            .field("dtype", dtype)
            .field("device", device)
            .finish_non_exhaustive()
    }
}

/// Source of the initial values of parameters.
#[derive(Clone, Copy, Debug)]
enum Start {
    Random(u64),
    Zeros,
    Shapes,
}

impl ParamStore {
    /// Creates a store that draws parameters at random. A parameter's values depend only on the seed and its name.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        Self { prefix: String::new(), start: Start::Random(seed), dtype, device: device.clone(), map: Arc::default() }
    }

    /// Creates a store of parameters that start as zeros, to be loaded with [`ParamMap::load`].
    pub fn zeros(dtype: DType, device: &Device) -> Self {
        Self { start: Start::Zeros, ..Self::new(0, dtype, device) }
    }

    /// Creates a store of zero parameters with a single stored element each: names and shapes of a model of any size.
    pub fn shapes(dtype: DType, device: &Device) -> Self {
        Self { start: Start::Shapes, ..Self::new(0, dtype, device) }
    }

    /// Returns the place below this one: `store.at("layers").at(3)`.
    #[doc(alias = "push_prefix")]
    #[doc(alias = "pp")]
    pub fn at(&self, name: impl fmt::Display) -> ParamStore {
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        ParamStore { prefix, ..self.clone() }
    }

    /// Returns the name of this place, for messages.
    pub fn name(&self) -> &str {
        &self.prefix
    }

    /// Returns the dtype of the parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the device of the parameters.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Creates and registers a parameter.
    ///
    /// Errors: the name is taken, or the shape is invalid.
    #[doc(alias = "register_parameter")]
    pub fn param(&self, name: &str, shape: impl IntoShape, init: Init) -> Result<Param> {
        self.param_of(name, shape.into_shape(), init)
    }

    fn param_of(&self, name: &str, shape: Result<Shape>, init: Init) -> Result<Param> {
        let full = self.at(name).prefix;
        let shape = shape?;
        let (init, random) = match self.start {
            Start::Random(seed) => (init, Philox::new(seed, fnv1a(full.as_bytes()))),
            Start::Zeros => (Init::Constant(0.0), Philox::new(0, 0)),
            Start::Shapes => {
                let zero = Tensor::zeros((), self.dtype, &self.device)?;
                let param = Param::new(zero.with_layout(zero.layout().expand(shape)))?;
                return self.register(full, param);
            }
        };
        let param = if defers() {
            Param::pending(shape, self.dtype, &self.device, Pending::Draw(init, random))?
        } else {
            Param::new(init.tensor(shape, self.dtype, &self.device, random)?)?
        };
        self.register(full, param)
    }

    /// Registers an existing parameter under another name: tied weights.
    ///
    /// Errors: the name is taken.
    pub fn tie(&self, name: &str, param: &Param) -> Result<Param> {
        self.register(self.at(name).prefix, param.clone())
    }

    /// Registers all that lies at another place under this one too: a module that two others hold.
    ///
    /// Errors: a name is taken.
    pub(crate) fn tie_all(&self, other: &ParamStore) -> Result<()> {
        let place = format!("{}.", other.prefix);
        let all = self.params();
        for (name, param) in all.iter() {
            name.strip_prefix(&place).map(|name| self.tie(name, param)).transpose()?;
        }
        for (name, value) in all.buffers() {
            name.strip_prefix(&place).map(|name| self.buffer(name, value)).transpose()?;
        }
        Ok(())
    }

    /// Registers a tensor that is saved but not trained.
    ///
    /// Errors: the name is taken.
    #[doc(alias = "register_buffer")]
    pub fn buffer(&self, name: &str, value: Tensor) -> Result<Buffer> {
        let full = self.at(name).prefix;
        let mut map = self.lock();
        ensure!(
            !map.params.contains_key(&full) && !map.buffers.contains_key(&full),
            Error::argument("store", format_args!("the name {full} is registered twice"))
        );
        let buffer = Buffer::new(value);
        map.buffers.insert(full, buffer.clone());
        Ok(buffer)
    }

    /// Registers the parameters below this place as a block, whose parameters are used together. `may_be_skipped`: if
    /// `true`, a forward pass may leave it out.
    pub(crate) fn block(&self, may_be_skipped: bool) -> Block {
        let place = format!("{}.", self.prefix);
        let mut map = self.lock();
        let own = map.params.iter().filter(|(name, _)| name.starts_with(&place));
        let block = Block::new(place.clone(), own.map(|(_, param)| param.clone()).collect_vec(), may_be_skipped);
        map.blocks.push(block.clone());
        block
    }

    /// Returns everything registered so far.
    #[doc(alias = "parameters")]
    #[doc(alias = "named_parameters")]
    pub fn params(&self) -> ParamMap {
        self.lock().clone()
    }

    fn register(&self, name: String, param: Param) -> Result<Param> {
        let mut map = self.lock();
        ensure!(
            !map.params.contains_key(&name) && !map.buffers.contains_key(&name),
            Error::argument("store", format_args!("the name {name} is registered twice"))
        );
        map.params.insert(name, param.clone());
        Ok(param)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ParamMap> {
        self.map.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
