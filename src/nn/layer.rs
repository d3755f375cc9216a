//! One sublayer: norm, branch, norm, residual, norm.

use std::{borrow::Cow, sync::Arc};

use super::{
    Attention, AttentionInput, Branch, FeedForward, Linear, Norm, Past, Residual, Rotation, cache::Decode,
    residual::Stream, wrap::Wrap,
};
use crate::{
    Error, ParamStore, Result, Tensor, checkpoint,
    collect::CollectVec,
    config::{BranchPlan, LayerPlan},
    error::{ErrorContext, ensure},
    ops::PositionBias,
    params::Block,
};

/// One sublayer.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    norms: [Option<Norm>; 3],
    /// If `true`, memories pass the first norm too.
    norms_memories: bool,
    wrap: Wrap,
    function: Function,
    residual: Residual,
    block: Block,
}

/// The function of a sublayer.
#[derive(Clone, Debug)]
enum Function {
    Attention(Box<Attention>),
    FeedForward(Box<FeedForward>),
    Custom(Arc<dyn Branch>),
}

/// Output of a sublayer: the stream before and after it, and, from attention, the scores to pass on and the map.
pub(super) struct LayerOutput {
    pub input: Tensor,
    pub stream: Stream,
    pub scores: Option<Tensor>,
    pub attn: Option<Tensor>,
    pub values: Option<Tensor>,
}

impl Layer {
    /// Creates the planned sublayer, with the branch that the closure returns, if any.
    ///
    /// Errors: a custom branch for which the closure returns none.
    pub fn new(
        plan: &LayerPlan,
        dim: usize,
        norms_memories: bool,
        rotary: Option<&Rotation>,
        store: &ParamStore,
        may_be_skipped: bool,
        custom: impl FnOnce(&ParamStore) -> Result<Option<Arc<dyn Branch>>>,
    ) -> Result<Self> {
        let norm =
            |place: usize| plan.norms[place].map(|norm| Norm::new(norm, dim, &store.at(0).at(place))).transpose();
        let (wrap, place) = Wrap::new(&plan.wrap, dim, &store.at(1))?;
        let function = match (custom(&place)?, &plan.branch) {
            (Some(branch), _) => Function::Custom(branch),
            (None, BranchPlan::SelfAttention(plan)) => {
                Function::Attention(Box::new(Attention::new(plan, rotary, &place)?))
            }
            (None, BranchPlan::CrossAttention(plan)) => {
                let rotary = rotary.filter(|_| plan.rotary.is_some());
                Function::Attention(Box::new(Attention::new(plan, rotary, &place)?))
            }
            (None, BranchPlan::FeedForward(plan)) => Function::FeedForward(Box::new(FeedForward::new(plan, &place)?)),
            (None, BranchPlan::Custom) => {
                return Err(Error::argument("layers", "a custom branch requires `AttentionLayers::with_branches`"));
            }
        };
        let residual = Residual::new(plan.residual, dim, &store.at(2))?;
        let norms = [norm(0)?, norm(1)?, norm(2)?];
        let block = store.block(may_be_skipped);
        Ok(Self { norms, norms_memories, wrap, function, residual, block })
    }

    /// Returns the branch if it is a custom one.
    pub fn custom(&self) -> Option<&dyn Branch> {
        match &self.function {
            Function::Custom(branch) => Some(&**branch),
            Function::Attention(_) | Function::FeedForward(_) => None,
        }
    }

    /// Calls `f` with each linear layer; those of a custom branch are not known.
    pub fn for_linears(&mut self, f: &mut dyn FnMut(&mut Linear) -> Result<()>) -> Result<()> {
        match &mut self.function {
            Function::Attention(attention) => attention.linears_mut().try_for_each(f),
            Function::FeedForward(feedforward) => feedforward.linears_mut().try_for_each(f),
            Function::Custom(_) => Ok(()),
        }
    }

    /// Computes the sublayer on whole sequences, or on the next positions of those in a cache.
    pub fn forward(
        &self,
        stream: Stream,
        input: &AttentionInput,
        mut decode: Option<Decode<'_>>,
    ) -> Result<LayerOutput> {
        // The tape keeps the weights that the backward pass needs: those of one block, as a checkpoint's segment.
        let _weights = self.block.hold()?;
        let condition = input.condition.as_ref();
        let (stream, hyper) = match self.residual.hyper() {
            Some(hyper) => {
                let [read, mixed, weights] = hyper.prepare(&stream.whole()?).context(2)?;
                (Stream::Whole(read), Some((hyper, mixed, weights)))
            }
            None => (stream, None),
        };
        let mut input = Cow::Borrowed(input);
        let (x, normed) = match &input.branch_inputs[..] {
            [] => stream.normed(self.norms[0].as_ref(), condition).context("0.0")?,
            [first, others @ ..] => {
                let norm = |x: &Tensor| match &self.norms[0] {
                    Some(norm) => norm.forward_given(x, condition).context("0.0"),
                    None => Ok(x.clone()),
                };
                let normed = norm(first)?;
                if let [keys, values] = others {
                    let sources = [norm(keys)?, norm(values)?];
                    input.to_mut().sources = Some(sources);
                }
                (stream.whole()?, normed)
            }
        };
        if let (true, Some(norm), Some(mem)) = (self.norms_memories, &self.norms[0], &input.mem) {
            let mem = norm.forward_given(mem, condition).context("0.0")?;
            input.to_mut().mem = Some(mem);
        }
        let input = &*input;
        // Only attention handles padding.
        let attends = matches!(self.function, Function::Attention(_));
        let mask = input.query_mask.as_ref();
        let normed = self.wrap.input(&normed, mask.filter(|_| attends), decode.as_mut()).context(1)?;
        let (mut scores, mut attn, mut values) = (None, None, None);
        let out = match (&self.function, decode) {
            (Function::Attention(attention), decode) => {
                let output = match decode {
                    Some(Decode { cache, tables, step }) => {
                        attention.extend(&normed, input, &mut cache.attention, tables, step)
                    }
                    None => attention.forward(&normed, input),
                }
                .context(1)?;
                (scores, attn, values) = (output.scores, output.attn, output.values);
                output.out
            }
            (Function::FeedForward(feedforward), _) => feedforward.forward(&normed).context(1)?,
            (Function::Custom(branch), decode) => {
                custom(&**branch, &normed, &mut Past::new(mask, decode)).context(1)?
            }
        };
        drop(normed);
        let out = Stream::Whole(self.wrap.output(out, condition).context(1)?);
        let out = out.normed(self.norms[1].as_ref(), condition).context("0.1")?.1;
        let mut stream = match hyper {
            Some((hyper, mixed, weights)) => Stream::Whole(hyper.join(&out, &mixed, &weights).context(2)?),
            None => self.residual.stream(out, x.clone(), mask).context(2)?,
        };
        if let Some(norm) = &self.norms[2] {
            stream = Stream::Whole(stream.normed(Some(norm), condition).context("0.2")?.1);
        }
        Ok(LayerOutput { input: x, stream, scores, attn, values })
    }

    /// Computes the sublayer on whole sequences, keeping only the inputs for the backward pass.
    pub fn forward_checkpointed(&self, stream: Stream, input: &AttentionInput) -> Result<LayerOutput> {
        let x = stream.whole()?;
        let mut input = input.clone();
        // Tensors that receive gradients must be inputs of the checkpoint; the closure captures the rest.
        let flowing: Vec<Tensor> = flowing_mut(&mut input).map(|tensor| tensor.clone()).collect_vec();
        let inputs: Vec<&Tensor> = std::iter::once(&x).chain(&flowing).collect_vec();
        let layer = self.clone();
        let run = move |given: &[Tensor]| {
            let mut input = input.clone();
            for (slot, given) in flowing_mut(&mut input).zip(&given[1..]) {
                *slot = given.clone();
            }
            layer.forward(Stream::Whole(given[0].clone()), &input, None)?.stream.whole()
        };
        let out = checkpoint(run, &inputs)?;
        Ok(LayerOutput { input: x, stream: Stream::Whole(out), scores: None, attn: None, values: None })
    }
}

/// Runs a custom branch and checks the shape of its output, on which the residual relies.
fn custom(branch: &dyn Branch, x: &Tensor, past: &mut Past<'_>) -> Result<Tensor> {
    let out = branch.forward(x, past)?;
    ensure!(
        out.shape() == x.shape() && out.dtype() == x.dtype(),
        Error::shape(
            "branch",
            format_args!("expected an output {:?} {}, got {:?} {}", x.shape(), x.dtype(), out.shape(), out.dtype())
        )
    );
    Ok(out)
}

/// Returns the inputs of attention that receive gradients.
fn flowing_mut(input: &mut AttentionInput) -> impl Iterator<Item = &mut Tensor> {
    let bias = input.bias.as_mut().map(PositionBias::weights_mut);
    let tensors = [
        input.context.as_mut(),
        input.mem.as_mut(),
        bias,
        input.dense_bias.as_mut(),
        input.condition.as_mut(),
        input.value_residual.as_mut(),
    ];
    tensors.into_iter().flatten().chain(&mut input.branch_inputs)
}
