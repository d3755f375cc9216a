//! Inputs of sublayers from before others: skip connections, mixtures of hidden states, the input of the layers.

use super::{Linear, Norm, residual::Stream};
use crate::{
    DType, Init, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{BranchPlan, Gain, LayersPlan, NormPlan},
    error::ErrorContext,
};

/// Parameters of links between sublayers.
#[derive(Clone, Debug, Default)]
pub(super) struct Links {
    /// For each module, the sublayer whose input is joined to its own, and the layer that joins them.
    skips: Vec<Option<(usize, Linear)>>,
    /// For each module, the mixture of the hidden states up to its input.
    mixtures: Vec<Mixture>,
    /// For each module, the attention to the hidden states up to its input.
    pools: Vec<Pool>,
    /// Projection of the input of the layers, and its gate.
    reinject: Option<(Linear, Option<Linear>)>,
}

/// Learned mixture of hidden states (Gerasimov et al., <https://arxiv.org/abs/2502.09245>).
#[derive(Clone, Debug)]
struct Mixture {
    norm: Norm,
    to_weights: Linear,
    /// Number of mixtures: 3 for queries, keys and values.
    views: usize,
    softmax: bool,
}

/// Attention of a sublayer to the hidden states before it (<https://arxiv.org/abs/2601.21582>,
/// <https://arxiv.org/abs/2603.15031>).
#[derive(Clone, Debug)]
struct Pool {
    to_keys: Norm,
    /// Norm and projection of low rank, whose output is added to the query.
    to_query: (Norm, [Linear; 2]),
    norm: Norm,
}

/// Tensors of a pass over the layers that later layers read.
#[derive(Default)]
pub(super) struct Linked {
    /// Inputs of the sublayers before their skips.
    inputs: Vec<Tensor>,
    /// Hidden states before the sublayers.
    hiddens: Vec<Tensor>,
    injected: Option<Tensor>,
}

impl Links {
    pub fn new(plan: &LayersPlan, store: &ParamStore) -> Result<Self> {
        let dim = plan.dim;
        let skip = |(index, skip): (usize, &Option<usize>)| {
            let place = store.at("skip_combines").at(index).at("combine");
            skip.map(|from| Ok((from, Linear::without_bias(&place, 2 * dim, dim)?))).transpose()
        };
        let mut attends = false;
        let mut mixture = |index: usize, softmax: bool| -> Result<Mixture> {
            let own = matches!(plan.layers[index].branch, BranchPlan::SelfAttention(_));
            let views = if own && attends { 3 } else { 1 };
            attends |= own;
            let place = store.at("layer_integrators").at(index).at("to_weights");
            Ok(Mixture {
                norm: Norm::new(NormPlan::Unit { gain: Gain::Each, offset: 0.0 }, dim, &place.at(0))?,
                to_weights: Linear::new(&place.at(1), dim, views * (index + 1))?,
                views,
                softmax,
            })
        };
        let mixtures = match plan.links.integrate {
            Some(softmax) => (0..plan.layers.len()).map(|index| mixture(index, softmax)).try_collect_vec()?,
            None => Vec::new(),
        };
        let pool = |index: usize, rank: usize| -> Result<Pool> {
            let place = store.at("layer_integrators").at(index);
            // That of PyTorch: the smallest number that changes 1 in the type that it computes in.
            let eps = if store.dtype() == DType::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
            let norm = |place: &ParamStore| {
                let weight = place.param("weight", [dim], Init::Constant(1.0))?;
                Ok(Norm::Rms { g: weight, eps })
            };
            let lora = place.at("to_query").at(1);
            let up = Linear::with_init(&lora.at("up"), rank, dim, Init::Constant(0.0), None)?;
            Ok(Pool {
                to_keys: norm(&place.at("to_keys"))?,
                to_query: (
                    norm(&place.at("to_query").at(0))?,
                    [Linear::without_bias(&lora.at("down"), dim, rank)?, up],
                ),
                norm: norm(&place.at("norm"))?,
            })
        };
        // Repeated sublayers share a module.
        let all = plan.modules.iter().chain(plan.idle.iter().map(|(module, _)| module));
        let modules = all.max().map_or(0, |last| last + 1);
        let pools = match plan.links.aggregate {
            Some(rank) => (0..modules).map(|index| pool(index, rank)).try_collect_vec()?,
            None => Vec::new(),
        };
        let reinject = |gated: bool| -> Result<(Linear, Option<Linear>)> {
            let gate = || Linear::without_bias(&store.at("learned_reinject_input_gate"), dim, 1);
            let project = Linear::without_bias(&store.at("reinject_input_proj"), dim, dim)?;
            Ok((project, gated.then(gate).transpose()?))
        };
        Ok(Self {
            skips: plan.links.skips.iter().enumerate().map(skip).try_collect_vec()?,
            mixtures,
            pools,
            reinject: plan.links.reinject.map(reinject).transpose()?,
        })
    }

    /// Begins a pass with the input of the layers.
    pub fn start(&self, stream: &Stream) -> Result<Linked> {
        let mut linked = Linked::default();
        if let (Some((project, gate)), Stream::Whole(x)) = (&self.reinject, stream) {
            let mut injected = project.forward(x).context("reinject_input_proj")?;
            if let Some(gate) = gate {
                injected = injected.mul(&gate.forward(x).context("learned_reinject_input_gate")?.sigmoid()?)?;
            }
            linked.injected = Some(injected);
        }
        Ok(linked)
    }

    /// Returns the stream before a sublayer, and the inputs of its branch before the norm if these are not the stream;
    /// a dropped sublayer needs none.
    pub fn join(
        &self,
        stream: Stream,
        linked: &mut Linked,
        module: usize,
        dropped: bool,
    ) -> Result<(Stream, Vec<Tensor>)> {
        let reads = !self.mixtures.is_empty() || !self.pools.is_empty();
        if self.skips.is_empty() && !reads && self.reinject.is_none() {
            return Ok((stream, Vec::new()));
        }
        let mut x = stream.whole()?;
        if !self.skips.is_empty() {
            linked.inputs.push(x.clone());
            if let Some(Some((from, combine))) = self.skips.get(module) {
                let both = Tensor::cat(&[&linked.inputs[*from], &x], -1)?;
                x = combine.forward(&both).context(format_args!("skip_combines.{module}.combine"))?;
            }
        }
        let mut inputs = Vec::new();
        // Mixtures have a weight for every sublayer before them, dropped or not; pools attend to those that ran.
        if reads && !(dropped && self.mixtures.is_empty()) {
            linked.hiddens.push(x.clone());
        }
        if dropped {
            return Ok((Stream::Whole(x), inputs));
        }
        if let Some(pool) = self.pools.get(module) {
            inputs = vec![pool.forward(&x, &linked.hiddens).context(format_args!("layer_integrators.{module}"))?];
        }
        if let Some(mixture) = self.mixtures.get(module) {
            inputs = mixture.forward(&x, &linked.hiddens).context(format_args!("layer_integrators.{module}"))?;
        }
        if let Some(injected) = &linked.injected {
            if inputs.is_empty() {
                inputs.push(x.clone());
            }
            inputs = inputs.iter().map(|input| input.add(injected)).try_collect_vec()?;
        }
        Ok((Stream::Whole(x), inputs))
    }
}

impl Pool {
    /// Returns the values of the hidden states `[b, n, dim]`, the last of which is `x`, by the weights of an attention.
    fn forward(&self, x: &Tensor, hiddens: &[Tensor]) -> Result<Tensor> {
        let (norm, [down, up]) = &self.to_query;
        let change = up.forward(&down.forward(&norm.forward(x)?)?)?;
        let scale = (x.dim(-1)? as f64).powf(-0.5);
        let query = self.norm.forward(&x.add(&change)?)?.affine(scale, 0.0)?.unsqueeze(2)?;
        let states = stacked(hiddens)?;
        let weights = query.matmul(&self.to_keys.forward(&states)?.transpose(-1, -2)?)?.softmax()?;
        weights.matmul(&states)?.squeeze(2)
    }
}

/// Returns hidden states `[b, n, dim]` as one tensor, `[b, n, states, dim]`.
fn stacked(hiddens: &[Tensor]) -> Result<Tensor> {
    let states: Vec<Tensor> = hiddens.iter().map(|hidden| hidden.unsqueeze(2)).try_collect_vec()?;
    Tensor::cat(&states.iter().collect_vec(), 2)
}

impl Mixture {
    /// Mixes hidden states `[b, n, dim]`, the last of which is `x`.
    fn forward(&self, x: &Tensor, hiddens: &[Tensor]) -> Result<Vec<Tensor>> {
        let logits = self.to_weights.forward(&self.norm.forward(x)?)?;
        let (b, n, count) = (x.dim(0)?, x.dim(1)?, hiddens.len());
        let logits = logits.reshape([b, n, self.views, count])?;
        let weights = if self.softmax { logits.softmax()? } else { logits.relu()? };
        let states = stacked(hiddens)?;
        // [b, n, views, dim]
        let mixed = weights.matmul(&states)?;
        (0..self.views).map(|view| mixed.select(2, view)).try_collect_vec()
    }
}
