//! Attention between the nodes of an MLP.

use super::{RunOptions, model_inputs::Inputs, named::NamedModel};
use crate::{
    Error, Init, Param, ParamStore, Result, Tensor,
    config::{Call, NeoMlpPlan},
    error::{ErrorContext, ensure},
    nn::{AttentionLayers, ForwardOptions, Linear},
};

/// NeoMLP: inputs, hidden units and outputs of an MLP are nodes that pass messages by self-attention
/// (<https://openreview.net/forum?id=A8Vuf2e8y6>).
#[derive(Clone, Debug)]
pub struct NeoMlp {
    /// Vectors of the input, hidden and output nodes, `[nodes, dim]` each.
    embeds: [Param; 3],
    /// Random frequencies and phases, `[dim, 1]` and `[dim]`, which do not learn.
    fourier: [Param; 2],
    project: Linear,
    transformer: AttentionLayers,
    /// Weights `[outputs, dim]` and biases `[outputs]` of the output nodes.
    outputs: [Param; 2],
}

impl NeoMlp {
    /// Creates the planned model.
    ///
    /// Errors: those of the layers.
    pub fn new(plan: &NeoMlpPlan, store: &ParamStore) -> Result<Self> {
        let (dim, [ins, hidden, outs]) = (plan.layers.dim, plan.nodes);
        let embed = |name: &str, nodes: usize| store.param(name, [nodes, dim], Init::Normal(0.02));
        let place = store.at("random_fourier");
        let frequencies = place.at(0).at("proj");
        Ok(Self {
            embeds: [embed("input_embed", ins)?, embed("hidden_embed", hidden)?, embed("output_embed", outs)?],
            fourier: [
                frequencies.param("weight", [dim, 1], Init::linear(1))?,
                frequencies.param("bias", [dim], Init::linear(1))?,
            ],
            project: Linear::new(&place.at(1), dim, dim)?,
            transformer: AttentionLayers::new(&plan.layers, &store.at("transformer"))?,
            outputs: [
                store.param("to_output_weights", [outs, dim], Init::Normal(1.0))?,
                store.param("to_output_bias", [outs], Init::Constant(0.0))?,
            ],
        })
    }

    /// Computes the outputs of numbers: `[b, dim_in] → [b, dim_out]`, or `[dim_in] → [dim_out]`.
    ///
    /// Errors: another number of inputs.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [ins, hidden, outs] = &self.embeds;
        let (ins, hidden, outs) = (ins.tensor(), hidden.tensor(), outs.tensor());
        ensure!(
            (1..=2).contains(&x.rank()) && x.dim(-1)? == ins.dim(0)? && x.dtype().is_float(),
            Error::shape("x", format_args!("expected floats [batch, {}], got {:?}", ins.dim(0)?, x.shape()))
        );
        if x.rank() == 1 {
            return self.forward(&x.unsqueeze(0)?)?.squeeze(0);
        }
        let b = x.dim(0)?;
        let [frequencies, phases] = &self.fourier;
        let turns = x.unsqueeze(-1)?.mul(&frequencies.tensor().detach().squeeze(-1)?)?;
        let angles = turns.add(&phases.tensor().detach())?.affine(std::f64::consts::TAU, 0.0)?;
        let input = self.project.forward(&angles.cos()?).context("random_fourier.1")?.add(&ins)?;
        let nodes = |table: &Tensor| table.unsqueeze(0)?.expand([b, table.dim(0)?, table.dim(1)?]);
        let all = Tensor::cat(&[&input, &nodes(&hidden)?, &nodes(&outs)?], 1)?;
        let all = self.transformer.forward(&all, &ForwardOptions::default()).context("transformer")?.out;
        let last = all.narrow(1, all.dim(1)? - outs.dim(0)?, outs.dim(0)?)?;
        let [weights, bias] = &self.outputs;
        last.mul(&weights.tensor())?.sum(&[-1])?.add(&bias.tensor())
    }
}

impl NamedModel for NeoMlp {
    fn pass(&self, inputs: &mut Inputs, _: &Call, _: &RunOptions) -> Result<(&'static str, Tensor)> {
        Ok(("out", self.forward(&inputs.need("x")?)?))
    }
}
