//! Hyperparameters of each optimizer.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, error::ensure};

/// Hyperparameters of [`AdamW`](super::AdamW); the learning rate is an argument of each step.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
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

/// Hyperparameters of [`Sgd`](super::Sgd), by default PyTorch's: no momentum, no decay.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct SgdOptions {
    /// Decay of the sum of gradients; at 0 there is none. Default 0.
    pub momentum: f64,
    /// Part of each gradient, after the first, that the sum does not take. Default 0.
    pub dampening: f64,
    /// If `true`, steps look ahead by one update of the momentum. Default `false`.
    pub nesterov: bool,
    /// Weight decay, added to the gradient. Default 0.
    pub weight_decay: f64,
}

/// Hyperparameters of [`Lion`](super::Lion).
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct LionOptions {
    /// Weight of the running mean in the direction of a step, β₁. Default 0.9.
    pub beta1: f64,
    /// Decay of the running mean of gradients, β₂. Default 0.99.
    pub beta2: f64,
    /// Decoupled weight decay: each step shrinks every weight by the fraction `lr · weight_decay`. Default 0.
    pub weight_decay: f64,
}

impl Default for LionOptions {
    /// The paper's values.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

/// Hyperparameters of [`Adafactor`](super::Adafactor).
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct AdafactorOptions {
    /// Exponent `c` of the decay `1 − tᶜ` of second moments at update `t`. Default −0.8.
    pub beta2_decay: f64,
    /// Smallest denominator; `None` is the machine epsilon of the state's type. Default `None`.
    pub eps1: Option<f64>,
    /// Smallest size of a parameter that its steps are relative to. Default 1e-3.
    pub eps2: f64,
    /// Largest root mean square of an update before it is scaled down. Default 1.
    pub d: f64,
    /// Decoupled weight decay: each step shrinks every weight by the fraction `lr · weight_decay`. Default 0.
    pub weight_decay: f64,
}

impl Default for AdafactorOptions {
    /// PyTorch's values.
    fn default() -> Self {
        Self { beta2_decay: -0.8, eps1: None, eps2: 1e-3, d: 1.0, weight_decay: 0.0 }
    }
}

/// Hyperparameters of [`Muon`](super::Muon).
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct MuonOptions {
    /// Decay of the running mean of gradients. Default 0.95.
    pub momentum: f64,
    /// If `true`, the direction is the mean of the gradient and the running mean. Default `true`.
    pub nesterov: bool,
    /// Decoupled weight decay: each step shrinks every weight by the fraction `lr · weight_decay`. Default 0.1.
    pub weight_decay: f64,
    /// Coefficients `a`, `b` and `c` of a Newton–Schulz step, `X ← a X + (b X Xᵀ + c (X Xᵀ)²) X`. Default 3.4445,
    /// −4.775, 2.0315.
    pub ns_coefficients: [f64; 3],
    /// Number of Newton–Schulz steps, below 100. Default 5.
    pub ns_steps: usize,
    /// Smallest norm that a direction is divided by. Default 1e-7.
    pub eps: f64,
    /// Rate of a matrix by its shape. Default [`AdjustLr::Original`].
    pub adjust_lr: AdjustLr,
    /// Hyperparameters of AdamW, for the other parameters.
    pub adamw: AdamWOptions,
}

impl Default for MuonOptions {
    /// PyTorch's values.
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            weight_decay: 0.1,
            ns_coefficients: [3.4445, -4.7750, 2.0315],
            ns_steps: 5,
            eps: 1e-7,
            adjust_lr: AdjustLr::Original,
            adamw: AdamWOptions::default(),
        }
    }
}

/// Ratio of the rate of a matrix, `[rows, cols]`, to the learning rate: PyTorch's `adjust_lr_fn`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdjustLr {
    /// `√max(1, rows / cols)`, as by Jordan.
    Original,
    /// `0.2 √max(rows, cols)` (Liu et al., <https://arxiv.org/abs/2502.16982>): steps as large as those of AdamW, whose
    /// rate and decay can be used.
    MatchRmsAdamw,
    /// `√(rows / cols)`, as by Bernstein.
    SpectralUnclamped,
}

impl AdjustLr {
    pub(super) fn ratio(self, rows: usize, cols: usize) -> f64 {
        let (rows, cols) = (rows as f64, cols as f64);
        match self {
            Self::Original => (rows / cols).max(1.0).sqrt(),
            Self::MatchRmsAdamw => 0.2 * rows.max(cols).sqrt(),
            Self::SpectralUnclamped => (rows / cols).sqrt(),
        }
    }
}

/// Hyperparameters of an optimizer of any kind.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum OptimizerOptions {
    /// Those of [`AdamW`](super::AdamW).
    AdamW(AdamWOptions),
    /// Those of [`Sgd`](super::Sgd).
    Sgd(SgdOptions),
    /// Those of [`Lion`](super::Lion).
    Lion(LionOptions),
    /// Those of [`Adafactor`](super::Adafactor).
    Adafactor(AdafactorOptions),
    /// Those of [`Muon`](super::Muon).
    Muon(MuonOptions),
}

/// Kind of an optimizer; its text is the lower-case name, `adamw`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// [`AdamW`](super::AdamW), the default.
    #[default]
    AdamW,
    /// [`Sgd`](super::Sgd).
    Sgd,
    /// [`Lion`](super::Lion).
    Lion,
    /// [`Adafactor`](super::Adafactor).
    Adafactor,
    /// [`Muon`](super::Muon).
    Muon,
}

impl OptimizerKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::AdamW, Self::Sgd, Self::Lion, Self::Adafactor, Self::Muon];

    /// Returns the lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::Sgd => "sgd",
            Self::Lion => "lion",
            Self::Adafactor => "adafactor",
            Self::Muon => "muon",
        }
    }
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for OptimizerKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::option("optimizer", format_args!("expected one of {names}, got `{name}`"))
        })
    }
}

impl OptimizerOptions {
    /// Returns the default hyperparameters of a kind.
    pub fn of(kind: OptimizerKind) -> Self {
        match kind {
            OptimizerKind::AdamW => Self::AdamW(Default::default()),
            OptimizerKind::Sgd => Self::Sgd(Default::default()),
            OptimizerKind::Lion => Self::Lion(Default::default()),
            OptimizerKind::Adafactor => Self::Adafactor(Default::default()),
            OptimizerKind::Muon => Self::Muon(Default::default()),
        }
    }

    /// Returns the kind.
    pub fn kind(&self) -> OptimizerKind {
        match self {
            Self::AdamW(_) => OptimizerKind::AdamW,
            Self::Sgd(_) => OptimizerKind::Sgd,
            Self::Lion(_) => OptimizerKind::Lion,
            Self::Adafactor(_) => OptimizerKind::Adafactor,
            Self::Muon(_) => OptimizerKind::Muon,
        }
    }

    pub(super) fn weight_decay(&mut self) -> &mut f64 {
        match self {
            Self::AdamW(options) => &mut options.weight_decay,
            Self::Sgd(options) => &mut options.weight_decay,
            Self::Lion(options) => &mut options.weight_decay,
            Self::Adafactor(options) => &mut options.weight_decay,
            Self::Muon(options) => &mut options.weight_decay,
        }
    }

    /// Returns β₁ and β₂, if the optimizer has them.
    pub(super) fn betas(&mut self) -> Option<[&mut f64; 2]> {
        match self {
            Self::AdamW(AdamWOptions { beta1, beta2, .. }) | Self::Lion(LionOptions { beta1, beta2, .. }) => {
                Some([beta1, beta2])
            }
            _ => None,
        }
    }

    pub(super) fn momentum(&mut self) -> Option<&mut f64> {
        match self {
            Self::Sgd(SgdOptions { momentum, .. }) | Self::Muon(MuonOptions { momentum, .. }) => Some(momentum),
            _ => None,
        }
    }

    /// Checks the values.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) with the name, what is expected and the value.
    pub fn check(&self) -> Result<()> {
        let fraction = |key: &str, value: f64| {
            ensure!(
                (0.0..1.0).contains(&value),
                Error::option(key, format_args!("expected at least 0 and below 1, got {value}"))
            );
            Ok(())
        };
        let from_zero = |key: &str, value: f64| {
            ensure!(
                value >= 0.0 && value.is_finite(),
                Error::option(key, format_args!("expected a finite number of at least 0, got {value}"))
            );
            Ok(())
        };
        match *self {
            Self::AdamW(AdamWOptions { beta1, beta2, eps, weight_decay }) => {
                fraction("beta1", beta1)?;
                fraction("beta2", beta2)?;
                from_zero("eps", eps)?;
                from_zero("weight_decay", weight_decay)
            }
            Self::Sgd(SgdOptions { momentum, dampening, nesterov, weight_decay }) => {
                from_zero("momentum", momentum)?;
                ensure!(
                    dampening.is_finite(),
                    Error::option("dampening", format_args!("expected a finite number, got {dampening}"))
                );
                ensure!(
                    !nesterov || momentum > 0.0 && dampening == 0.0,
                    Error::option("nesterov", "requires a momentum above 0 and a dampening of 0")
                );
                from_zero("weight_decay", weight_decay)
            }
            Self::Lion(LionOptions { beta1, beta2, weight_decay }) => {
                fraction("beta1", beta1)?;
                fraction("beta2", beta2)?;
                from_zero("weight_decay", weight_decay)
            }
            Self::Adafactor(AdafactorOptions { beta2_decay, eps1, eps2, d, weight_decay }) => {
                ensure!(
                    beta2_decay <= 0.0 && beta2_decay.is_finite(),
                    Error::option(
                        "beta2_decay",
                        format_args!("expected a finite number of at most 0, got {beta2_decay}")
                    )
                );
                from_zero("eps1", eps1.unwrap_or(0.0))?;
                from_zero("eps2", eps2)?;
                ensure!(
                    d >= 1.0 && d.is_finite(),
                    Error::option("d", format_args!("expected a finite number of at least 1, got {d}"))
                );
                from_zero("weight_decay", weight_decay)
            }
            Self::Muon(MuonOptions { momentum, weight_decay, ns_coefficients, ns_steps, eps, adamw, .. }) => {
                fraction("momentum", momentum)?;
                ensure!(
                    ns_coefficients.iter().all(|x| x.is_finite()),
                    Error::option("ns_coefficients", format_args!("expected finite numbers, got {ns_coefficients:?}"))
                );
                ensure!(ns_steps < 100, Error::option("ns_steps", format_args!("expected below 100, got {ns_steps}")));
                from_zero("eps", eps)?;
                from_zero("weight_decay", weight_decay)?;
                Self::AdamW(adamw).check()
            }
        }
    }
}
