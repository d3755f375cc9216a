//! Sentence embeddings: a token model followed by the modules of sentence-transformers.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::TransformerWrapper;
use crate::{DType, Error, Result, Tensor, collect::CollectVec, error::ensure, nn::ForwardOptions};

/// Reduction of token embeddings to one vector; padding is ignored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pooling {
    /// Mean over the tokens.
    Mean,
    /// First token.
    FirstToken,
    /// First token through the model's pooler, a linear layer and tanh.
    Pooler,
    /// Maximum of each feature.
    Max,
    /// Sum over the tokens, divided by the square root of their number.
    MeanSqrtLen,
    /// Mean weighted by position: 1 for the first token, 2 for the second, … (Muennighoff,
    /// <https://arxiv.org/abs/2202.08904>).
    WeightedMean,
    /// Last token.
    LastToken,
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mean => "mean",
            Self::FirstToken => "first token",
            Self::Pooler => "pooled head",
            Self::Max => "max",
            Self::MeanSqrtLen => "sum over the root of the length",
            Self::WeightedMean => "mean weighted by position",
            Self::LastToken => "last token",
        })
    }
}

/// Activation of a [`DenseLayer`], by the names of `torch.nn`, with their defaults there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DenseActivation {
    /// `x`.
    Identity,
    /// The hyperbolic tangent.
    Tanh,
    /// `1 / (1 + e^−x)`.
    Sigmoid,
    /// `max(x, 0)`.
    Relu,
    /// `x Φ(x)`.
    Gelu,
    /// `x / (1 + e^−x)`.
    Silu,
    /// `x`, below 0 a hundredth of it.
    LeakyRelu,
    /// `x`, below 0 `e^x − 1`.
    Elu,
    /// `x` between 0 and 6.
    Relu6,
}

impl DenseActivation {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Identity,
        Self::Tanh,
        Self::Sigmoid,
        Self::Relu,
        Self::Gelu,
        Self::Silu,
        Self::LeakyRelu,
        Self::Elu,
        Self::Relu6,
    ];

    /// Applies the function to each element.
    ///
    /// Errors: a dtype that is not float.
    pub fn of(self, x: &Tensor) -> Result<Tensor> {
        // −min(x, 0).
        let below = || x.neg()?.relu();
        match self {
            Self::Identity => Ok(x.clone()),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => x.sigmoid(),
            Self::Relu => x.relu(),
            Self::Gelu => x.gelu(),
            Self::Silu => x.silu(),
            Self::LeakyRelu => x.relu()?.sub(&below()?.affine(0.01, 0.0)?),
            Self::Elu => x.relu()?.add(&below()?.neg()?.exp()?.affine(1.0, -1.0)?),
            Self::Relu6 => x.relu()?.sub(&x.affine(1.0, -6.0)?.relu()?),
        }
    }
}

/// Linear layer with an activation: `f(x Wᵀ + b)`, and an optional residual.
#[derive(Clone, Debug)]
pub struct DenseLayer {
    /// Weight, `[out, in]`.
    pub weight: Tensor,
    /// Bias, `[out]`.
    pub bias: Option<Tensor>,
    /// Activation.
    pub activation: DenseActivation,
    /// Residual, added to the output.
    pub residual: DenseResidual,
}

/// Residual of a [`DenseLayer`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DenseResidual {
    /// No residual.
    None,
    /// The input; both have the same number of features.
    Input,
    /// The input times a weight, `[out, in]`.
    Projected(Tensor),
}

impl DenseLayer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.activation.of(&x.linear(&self.weight, self.bias.as_ref())?)?;
        match &self.residual {
            DenseResidual::None => Ok(out),
            DenseResidual::Input => out.add(x),
            DenseResidual::Projected(weight) => out.add(&x.linear(weight, None)?),
        }
    }
}

/// Vectors that a module transforms.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Features {
    /// Token embeddings, `[b, n, dim]`.
    Tokens,
    /// Text embeddings, `[b, dim]`.
    Texts,
}

/// Module after the token model, by the names of sentence-transformers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SentenceModule {
    /// Pools token embeddings to a text embedding; several modes are concatenated.
    Pooling {
        /// Modes, in the order of their features.
        modes: Vec<Pooling>,
        /// If `false`, pooling ignores the tokens of a prompt; see [`SentenceEncoder::embed_after`].
        include_prompt: bool,
    },
    /// Linear layer with an activation.
    Dense(DenseLayer, Features),
    /// PyTorch's `nn.LayerNorm` of the text embedding, eps 1e-5.
    LayerNorm {
        /// `[dim]`.
        weight: Tensor,
        /// `[dim]`.
        bias: Tensor,
    },
    /// Normalization to length 1, which makes dot products cosine similarities.
    Normalize(Features),
    /// Truncation to the first features of the text embedding, if it has more.
    Truncate(usize),
}

impl fmt::Display for SentenceModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pooling { modes, include_prompt } => {
                let modes: Vec<String> = modes.iter().map(ToString::to_string).collect_vec();
                let prompt = if *include_prompt { "" } else { ", without the prompt" };
                write!(f, "pooling: {}{prompt}", modes.join(" + "))
            }
            Self::Dense(DenseLayer { weight, activation, residual, .. }, features) => {
                let shape = weight.shape();
                let (columns, rows) = (shape.get(1).unwrap_or(&0), shape.first().unwrap_or(&0));
                write!(f, "dense: {columns} -> {rows}, {activation:?}")?;
                f.write_str(if matches!(residual, DenseResidual::None) { "" } else { ", residual" })?;
                f.write_str(if *features == Features::Tokens { ", of each token" } else { "" })
            }
            Self::LayerNorm { .. } => f.write_str("LayerNorm"),
            Self::Normalize(Features::Tokens) => f.write_str("normalize each token"),
            Self::Normalize(Features::Texts) => f.write_str("normalize"),
            Self::Truncate(dim) => write!(f, "the first {dim} features"),
        }
    }
}

/// Encoder with one vector for each text (Reimers and Gurevych, <https://arxiv.org/abs/1908.10084>).
///
/// ```
/// use x_transformers::{models::{Pooling, SentenceEncoder}, prelude::*};
/// let config = TransformerWrapperConfig::new(100, 16, AttentionLayersConfig::encoder(32, 1));
/// let model = TransformerWrapper::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// let encoder = SentenceEncoder::new(model, Pooling::Mean, true)?;
/// let tokens = Tensor::from_slice(&[5i64, 6, 7, 8, 9, 0], [2, 3], &Device::Cpu)?;
/// let mask = Tensor::from_slice(&[true, true, true, true, true, false], [2, 3], &Device::Cpu)?;
/// assert_eq!(encoder.embed(&tokens, Some(&mask))?.shape()[..], [2, 32]);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "SentenceTransformer")]
pub struct SentenceEncoder {
    /// Token model.
    pub model: TransformerWrapper,
    modules: Vec<SentenceModule>,
}

impl SentenceEncoder {
    /// Creates an encoder around a model; `normalize` scales all vectors to length 1, which makes dot products cosine
    /// similarities.
    ///
    /// Errors: a model that already returns one vector per text, or [`Pooling::Pooler`] for one without a pooler.
    pub fn new(model: TransformerWrapper, pooling: Pooling, normalize: bool) -> Result<Self> {
        let mut modules = vec![SentenceModule::Pooling { modes: vec![pooling], include_prompt: true }];
        modules.extend(normalize.then_some(SentenceModule::Normalize(Features::Texts)));
        Self::with_modules(model, modules)
    }

    /// Creates an encoder around a model, with modules in the order in which they are applied.
    ///
    /// Errors: a model that already returns one vector per text; [`Pooling::Pooler`] for one without a pooler; modules
    /// that produce no text embedding, or use it before there is one.
    pub fn with_modules(model: TransformerWrapper, modules: Vec<SentenceModule>) -> Result<Self> {
        const OP: &str = "sentence modules";
        ensure!(
            !model.plan().average_pool_embed,
            Error::option("average_pool_embed", "must be false: the modules need one vector per token")
        );
        let mut pooled = false;
        for module in &modules {
            match module {
                SentenceModule::Pooling { modes, .. } => {
                    ensure!(!modes.is_empty(), Error::argument(OP, "a pooling module has no mode"));
                    ensure!(
                        !modes.contains(&Pooling::Pooler) || model.plan().pooler,
                        Error::option("pooler", "must be true: a pooling module uses it")
                    );
                    pooled = true;
                }
                SentenceModule::Dense(_, Features::Tokens) | SentenceModule::Normalize(Features::Tokens) => {}
                other => ensure!(
                    pooled,
                    Error::argument(OP, format_args!("`{other}` comes before the first pooling module"))
                ),
            }
        }
        ensure!(pooled, Error::argument(OP, "expected at least one pooling module"));
        Ok(Self { model, modules })
    }

    /// Returns the modules after the token model.
    pub fn modules(&self) -> &[SentenceModule] {
        &self.modules
    }

    /// Embeds tokens `[b, n]`, with a padding mask, Bool `[b, n]`, in which `true` marks a real token: `[b, dim]`.
    ///
    /// Errors: no tokens, and those of [`TransformerWrapper::forward`].
    pub fn embed(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        self.embed_after(tokens, mask, 0)
    }

    /// Like [`SentenceEncoder::embed`], but for texts whose first `prompt_len` real tokens are a prompt: a pooling with
    /// `include_prompt: false` ignores them, though the model attends to them.
    ///
    /// Errors: those of [`SentenceEncoder::embed`].
    pub fn embed_after(&self, tokens: &Tensor, mask: Option<&Tensor>, prompt_len: usize) -> Result<Tensor> {
        embed_by(&self.model, &self.modules, tokens, mask, prompt_len, false)
    }
}

/// Embeds tokens like [`SentenceEncoder::embed_after`], with a model and modules; with `checkpoint_layers`, layers are
/// computed again in the backward pass.
pub(crate) fn embed_by(
    model: &TransformerWrapper,
    modules: &[SentenceModule],
    tokens: &Tensor,
    mask: Option<&Tensor>,
    prompt_len: usize,
    checkpoint_layers: bool,
) -> Result<Tensor> {
    ensure!(
        tokens.rank() == 2 && tokens.shape()[1] > 0,
        Error::shape("tokens", format_args!("expected i64 [batch, n] with n of at least 1, got {:?}", tokens.shape()))
    );
    let mask_ = mask.cloned();
    let options =
        ForwardOptions { mask: mask_, return_embeddings: true, checkpoint_layers, ..ForwardOptions::default() };
    let mut hidden = model.forward(tokens, &options)?.out;
    let mut text = None;
    for module in modules {
        let pooled =
            || text.as_ref().ok_or_else(|| Error::argument("sentence modules", "expected at least one pooling module"));
        match module {
            SentenceModule::Pooling { modes, include_prompt } => {
                let kept = Kept::new(&hidden, mask, if *include_prompt { 0 } else { prompt_len })?;
                let parts = modes.iter().map(|&mode| pool(model, mode, &hidden, &kept)).try_collect_vec()?;
                text = Some(match &parts[..] {
                    [one] => one.clone(),
                    several => Tensor::cat(&several.iter().collect_vec(), -1)?,
                });
            }
            SentenceModule::Dense(layer, Features::Tokens) => hidden = layer.forward(&hidden)?,
            SentenceModule::Dense(layer, Features::Texts) => text = Some(layer.forward(pooled()?)?),
            SentenceModule::LayerNorm { weight, bias } => {
                text = Some(pooled()?.layer_norm(Some(weight), Some(bias), 1e-5)?);
            }
            SentenceModule::Normalize(Features::Tokens) => hidden = normalized(&hidden)?,
            SentenceModule::Normalize(Features::Texts) => text = Some(normalized(pooled()?)?),
            SentenceModule::Truncate(dim) => {
                let vectors = pooled()?;
                text = Some(vectors.narrow(-1, 0, vectors.dim(-1)?.min(*dim))?);
            }
        }
    }
    text.ok_or_else(|| Error::argument("sentence modules", "expected at least one pooling module"))
}

/// Pools token embeddings: `[b, n, dim] → [b, dim]`.
fn pool(model: &TransformerWrapper, mode: Pooling, hidden: &Tensor, kept: &Kept) -> Result<Tensor> {
    match mode {
        Pooling::Pooler => model.pooled(hidden),
        Pooling::FirstToken if kept.all => hidden.select(1, 0),
        Pooling::Mean if kept.all => hidden.mean(&[1]),
        Pooling::Max => {
            let (b, n) = (hidden.dim(0)?, hidden.dim(1)?);
            let left_out = kept.rows.iter().flatten().map(|&kept| !kept).collect_vec();
            let left_out = Tensor::from_vec::<bool>(left_out, [b, n, 1], hidden.device())?;
            hidden.masked_fill(&left_out, f64::NEG_INFINITY)?.max(1)
        }
        _ => kept.weighted(hidden, mode),
    }
}

/// Computes `x / max(|x|, 1e-12)` over the last dimension.
pub(crate) fn normalized(x: &Tensor) -> Result<Tensor> {
    // `ScaleNorm`'s norm takes the root mean square for the length, which differs by √dim.
    let scale = (x.dim(-1)? as f64).powf(-0.5);
    x.scale_norm(&Tensor::full([1], scale, x.dtype(), x.device())?, 1e-12 * scale)
}

/// Tokens of each row that a pooling includes.
struct Kept {
    rows: Vec<Vec<bool>>,
    /// First token of each row that is not padding.
    starts: Vec<usize>,
    /// If `true`, all tokens are included.
    all: bool,
}

impl Kept {
    fn new(hidden: &Tensor, mask: Option<&Tensor>, left_out: usize) -> Result<Self> {
        let (b, n) = (hidden.dim(0)?, hidden.dim(1)?);
        let mut rows = vec![vec![true; n]; b];
        if let Some(mask) = mask {
            ensure!(
                mask.rank() == 2 && mask.shape()[..] == [b, n] && mask.dtype() == DType::Bool,
                Error::shape("mask", format_args!("expected bool [{b}, {n}], got {:?} {}", mask.shape(), mask.dtype()))
            );
            let mask = mask.to_vec::<bool>()?;
            rows = mask.chunks(n.max(1)).map(<[bool]>::to_vec).collect_vec();
        }
        let starts: Vec<usize> = rows.iter().map(|row| row.iter().position(|&kept| kept).unwrap_or(0)).collect_vec();
        for (row, &start) in rows.iter_mut().zip(&starts) {
            row.iter_mut().take(start.saturating_add(left_out)).for_each(|kept| *kept = false);
        }
        let all = rows.iter().flatten().all(|&kept| kept);
        Ok(Self { rows, starts, all })
    }

    /// Computes a weighted sum of the tokens: `[b, n, dim] → [b, dim]`. Without tokens it is 0, except for
    /// [`Pooling::FirstToken`], which then takes the token at 0.
    fn weighted(&self, hidden: &Tensor, mode: Pooling) -> Result<Tensor> {
        let (b, n) = (hidden.dim(0)?, hidden.dim(1)?);
        let mut weights = Vec::with_capacity(b * n);
        for (row, &start) in self.rows.iter().zip(&self.starts) {
            let only = |place: Option<usize>| (0..n).map(|at| if Some(at) == place { 1.0 } else { 0.0 }).collect_vec();
            let over = |weight: &dyn Fn(usize) -> f64, whole: &dyn Fn(f64) -> f64| -> Vec<f64> {
                let row = || row.iter().enumerate().map(|(at, &kept)| if kept { weight(at) } else { 0.0 });
                let whole = whole(row().sum()).max(1e-9);
                row().map(|weight| weight / whole).collect_vec()
            };
            weights.extend::<Vec<f64>>(match mode {
                Pooling::FirstToken => only(Some(row.iter().position(|&kept| kept).unwrap_or(0))),
                Pooling::LastToken => only(row.iter().rposition(|&kept| kept)),
                Pooling::MeanSqrtLen => over(&|_| 1.0, &f64::sqrt),
                Pooling::WeightedMean => over(&|at| (at + 1 - start.min(at)) as f64, &|whole| whole),
                Pooling::Mean | Pooling::Max | Pooling::Pooler => over(&|_| 1.0, &|whole| whole),
            });
        }
        // Weights of long texts are too small for half precision.
        let wide = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let weights = Tensor::from_vec(weights, [b, 1, n], hidden.device())?.to_dtype(wide)?;
        weights.matmul(&hidden.to_dtype(wide)?)?.squeeze(1)?.to_dtype(hidden.dtype())
    }
}
