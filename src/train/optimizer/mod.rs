//! Optimizers, with the state of each parameter under the parameter's name.

mod adafactor;
mod engine;
mod groups;
mod hyperparameters;
mod muon;

use std::{any::Any, collections::BTreeMap, fmt};

use serde_json::Value;

use self::engine::Engine;
pub(super) use self::groups::usual_groups;
pub use self::{
    engine::StepInfo,
    groups::ParamGroup,
    hyperparameters::{
        AdafactorOptions, AdamWOptions, AdjustLr, LionOptions, MuonOptions, OptimizerKind, OptimizerOptions, SgdOptions,
    },
};
use super::Sharded;
use crate::{Error, Gradients, ParamMap, Result, Tensor, error::ensure};

/// Optimizer of named parameters: [`AdamW`], [`Sgd`], [`Lion`], [`Adafactor`], [`Muon`], or one of your own.
///
/// Gradients are clipped by their global norm in the same pass over the parameters. The state of a half-precision
/// parameter is f32 and includes an f32 master weight, of which the parameter is the rounded value: updates smaller
/// than half a unit of the half type are not lost. Setting such a parameter to another value makes training continue
/// from that value. Results have the same bits for any number of threads, and after a resume.
///
/// Other threads may use the model during a step: a reader of a parameter waits until all of them are updated.
///
/// ```
/// use x_transformers::{
///     DType, Device, Init, ParamStore, Tape,
///     train::{Optimizer, OptimizerKind, OptimizerOptions, ParamGroup},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let weight = store.param("head.weight", [2, 3], Init::Constant(1.0))?;
/// // A tenth of the rate for the head; vectors do not decay.
/// let head = ParamGroup { lr: Some(0.1), ..ParamGroup::new("head.*") };
/// let groups = [head, ParamGroup::vectors_without_decay()];
/// let options = OptimizerOptions::of("lion".parse()?);
/// let mut optimizer: Box<dyn Optimizer> = options.build(&groups, &store.params())?;
/// let mut tape = Tape::train(0);
/// let grads = tape.backward(&weight.tensor().square()?.sum(&[])?)?;
/// optimizer.step(&store.params(), &grads, 0.5, Some(1.0))?;
/// assert_eq!(weight.tensor().to_vec::<f32>()?, [0.95; 6]);
/// # Ok(())
/// # }
/// ```
pub trait Optimizer: fmt::Debug + Send + Sync {
    /// Updates every parameter that has a gradient; the others do not change, not even by weight decay.
    ///
    /// With `clip`, gradients are multiplied by `clip / (norm + 1e-6)` if that is below 1, like PyTorch's
    /// `clip_grad_norm_`. A gradient has its parameter's dtype, or f32 if that is a half type.
    ///
    /// Errors, with nothing changed: [`ErrorKind::NonFinite`](crate::ErrorKind::NonFinite) for a gradient with NaN or
    /// infinity, naming its parameter; a rate that is negative or not finite; a clip that is not positive; a gradient
    /// of another shape or dtype.
    #[doc(alias = "clip_grad_norm_")]
    fn step(&mut self, params: &ParamMap, grads: &Gradients, lr: f64, clip: Option<f64>) -> Result<StepInfo> {
        self.step_scaled(params, grads, 1.0, lr, clip)
    }

    /// Like [`Optimizer::step`], but multiplies all gradients by `scale` before taking their norm: the inverse of a
    /// loss scale or of a number of micro-batches.
    fn step_scaled(
        &mut self,
        params: &ParamMap,
        grads: &Gradients,
        scale: f64,
        lr: f64,
        clip: Option<f64>,
    ) -> Result<StepInfo>;

    /// Returns the number of steps so far.
    fn steps(&self) -> u64;

    /// Returns the state by name, for a checkpoint: `steps`, and of each updated parameter `P` its number of updates
    /// `step.P`, the tensors of the optimizer such as `exp_avg.P` and, for half types, `master.P`.
    fn state_dict(&self) -> Result<BTreeMap<String, Tensor>>;

    /// Replaces the state with one from [`Optimizer::state_dict`].
    ///
    /// Errors, with nothing changed: [`ErrorKind::Weights`](crate::ErrorKind::Weights) with every name that is missing,
    /// belongs to no parameter or has another shape; [`ErrorKind::DType`](crate::ErrorKind::DType) for a tensor of
    /// another dtype; [`ErrorKind::Argument`](crate::ErrorKind::Argument) for a negative count.
    fn load_state_dict(&mut self, params: &ParamMap, dict: &BTreeMap<String, Tensor>) -> Result<()>;

    /// Returns name, hyperparameters and groups as JSON, for logs.
    fn to_json(&self) -> Value;

    /// Returns `true` if each element of a parameter is updated by itself, with a state of the parameter's shape: ranks
    /// can then divide it ([`Sharded`]). Default `false`.
    fn is_elementwise(&self) -> bool {
        false
    }

    /// Returns the optimizer as an AdamW, whose steps graphs of a GPU can hold. Default `None`.
    fn as_adamw(&mut self) -> Option<&mut AdamW> {
        None
    }

    /// Returns the optimizer, if its state is divided among ranks. Default `None`.
    fn sharded(&self) -> Option<&Sharded> {
        None
    }
}

macro_rules! optimizers {
    ($($(#[$doc:meta])* $name:ident($options:ident);)*) => {$(
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name {
            pub(super) engine: Engine,
            options: $options,
        }

        impl $name {
            /// Creates an optimizer without state, with one group of all parameters.
            ///
            /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for an illegal value.
            pub fn new(options: $options) -> Result<Self> {
                Ok(Self { engine: Engine::new(OptimizerOptions::$name(options))?, options })
            }

            /// Creates an optimizer with groups of parameters; of each value, the first group counts that matches a
            /// parameter and sets it.
            ///
            /// Errors: those of `new`, a pattern that matches no parameter, or a value that the optimizer does not
            /// have.
            pub fn with_groups(options: $options, groups: &[ParamGroup], params: &ParamMap) -> Result<Self> {
                Ok(Self { engine: Engine::with_groups(OptimizerOptions::$name(options), groups, params)?, options })
            }

            /// Returns the hyperparameters.
            pub fn options(&self) -> $options {
                self.options
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.engine.fmt(f)
            }
        }

        impl Optimizer for $name {
            fn step_scaled(
                &mut self,
                params: &ParamMap,
                grads: &Gradients,
                scale: f64,
                lr: f64,
                clip: Option<f64>,
            ) -> Result<StepInfo> {
                self.engine.step_scaled(params, grads, scale, lr, clip)
            }

            fn steps(&self) -> u64 {
                self.engine.steps()
            }

            fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
                self.engine.state_dict()
            }

            fn load_state_dict(&mut self, params: &ParamMap, dict: &BTreeMap<String, Tensor>) -> Result<()> {
                self.engine.load_state_dict(params, dict)
            }

            fn to_json(&self) -> Value {
                self.engine.to_json()
            }

            fn is_elementwise(&self) -> bool {
                use OptimizerOptions as Of;
                matches!(Of::$name(self.options), Of::AdamW(_) | Of::Sgd(_) | Of::Lion(_))
            }

            fn as_adamw(&mut self) -> Option<&mut AdamW> {
                (self as &mut dyn Any).downcast_mut()
            }
        }
    )*

        impl OptimizerOptions {
            /// Creates the optimizer, without state.
            ///
            /// Errors: those of [`AdamW::with_groups`].
            pub fn build(self, groups: &[ParamGroup], params: &ParamMap) -> Result<Box<dyn Optimizer>> {
                Ok(match self {
                    $(Self::$name(options) => Box::new($name::with_groups(options, groups, params)?),)*
                })
            }
        }
    };
}

optimizers! {
    /// AdamW (Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>) as in PyTorch.
    ///
    /// `p ← p · (1 − lr · weight_decay)`, `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
    /// `p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)`, where `t` counts the updates of this parameter. The
    /// state holds `m` as `exp_avg` and `v` as `exp_avg_sq`, f32 (f64 for f64 parameters).
    ///
    /// ```
    /// use x_transformers::{
    ///     DType, Device, Init, ParamStore, Tape,
    ///     train::{AdamW, AdamWOptions, Optimizer},
    /// };
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
    #[doc(alias = "Adam")]
    AdamW(AdamWOptions);
    /// Stochastic gradient descent with momentum (Sutskever et al., 2013) as in PyTorch.
    ///
    /// `g ← g + weight_decay · p`, `m ← momentum · m + (1 − dampening) g` (`m ← g` at first), `p ← p − lr · m`, or
    /// `p ← p − lr · (g + momentum · m)` with `nesterov`. The state holds `m` as `momentum_buffer`, unless `momentum`
    /// is 0.
    #[doc(alias = "SGD")]
    Sgd(SgdOptions);
    /// Lion (Chen et al., <https://arxiv.org/abs/2302.06675>): the sign of a running mean, in half of AdamW's memory.
    ///
    /// `p ← p · (1 − lr · weight_decay)`, `p ← p − lr · sign(β₁ m + (1 − β₁) g)`, `m ← β₂ m + (1 − β₂) g`. The state
    /// holds `m` as `exp_avg`. Rates are three to ten times lower than AdamW's, and weight decays as much higher.
    Lion(LionOptions);
    /// Adafactor (Shazeer and Stern, <https://arxiv.org/abs/1804.04235>) as in PyTorch: second moments of matrices as
    /// sums of rows and columns, steps relative to the size of each parameter.
    ///
    /// `ρ = min(lr, 1 / √t)`, `p ← p · (1 − lr · weight_decay)`,
    /// `p ← p − max(eps2, RMS(p)) · ρ · u / max(1, RMS(u) / d)` with `u = g / √v`. For more than one dimension, `v` is
    /// the product of `row_var`, `[.., n, 1]`, and `col_var`, `[.., 1, m]`, over the mean of `row_var`; else
    /// `variance`. They decay by `1 − t ^ beta2_decay`.
    Adafactor(AdafactorOptions);
    /// Muon (Jordan et al., 2024, <https://kellerjordan.github.io/posts/muon/>) as in PyTorch, for the matrices of
    /// hidden layers; AdamW for what is not a matrix, and for groups with `muon: Some(false)`, which embeddings and
    /// logits should be in.
    ///
    /// `m ← momentum · m + (1 − momentum) g`, `p ← p · (1 − lr · weight_decay)`, `p ← p − lr · ratio · o`, where `o` is
    /// `m` (with `nesterov` the mean of `g` and `m`) with all singular values brought near 1 by Newton–Schulz steps,
    /// and [`MuonOptions::adjust_lr`] gives the ratio. All of this in f32 (f64 for f64 parameters), where PyTorch
    /// orthogonalizes in bf16. The state holds `m` as `momentum_buffer`.
    Muon(MuonOptions);
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
