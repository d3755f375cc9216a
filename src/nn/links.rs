//! Inputs of sublayers from before others: skip connections, mixtures of hidden states, the input of the layers.

use super::{Linear, Norm, residual::Stream};
use crate::{
    ParamStore, Result, Tensor,
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
        let reinject = |gated: bool| -> Result<(Linear, Option<Linear>)> {
            let gate = || Linear::without_bias(&store.at("learned_reinject_input_gate"), dim, 1);
            let project = Linear::without_bias(&store.at("reinject_input_proj"), dim, dim)?;
            Ok((project, gated.then(gate).transpose()?))
        };
        Ok(Self {
            skips: plan.links.skips.iter().enumerate().map(skip).try_collect_vec()?,
            mixtures,
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

    /// Returns the stream before a sublayer, and the inputs of its branch before the norm if these are not the stream.
    pub fn join(&self, stream: Stream, linked: &mut Linked, module: usize) -> Result<(Stream, Vec<Tensor>)> {
        if self.skips.is_empty() && self.mixtures.is_empty() && self.reinject.is_none() {
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
        if let Some(mixture) = self.mixtures.get(module) {
            linked.hiddens.push(x.clone());
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

impl Mixture {
    /// Mixes hidden states `[b, n, dim]`, the last of which is `x`.
    fn forward(&self, x: &Tensor, hiddens: &[Tensor]) -> Result<Vec<Tensor>> {
        let logits = self.to_weights.forward(&self.norm.forward(x)?)?;
        let (b, n, count) = (x.dim(0)?, x.dim(1)?, hiddens.len());
        let logits = logits.reshape([b, n, self.views, count])?;
        let weights = if self.softmax { logits.softmax()? } else { logits.relu()? };
        let states: Vec<Tensor> = hiddens.iter().map(|hidden| hidden.unsqueeze(2)).try_collect_vec()?;
        let states = Tensor::cat(&states.iter().collect_vec(), 2)?;
        // [b, n, views, dim]
        let mixed = weights.matmul(&states)?;
        (0..self.views).map(|view| mixed.select(2, view)).try_collect_vec()
    }
}
