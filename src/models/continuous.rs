//! Vectors in, vectors out.

use std::sync::Arc;

use super::{Output, transformer::check_length};
use crate::{
    Error, Result, Store, Tensor,
    config::{self, ContinuousPlan, ContinuousTransformerWrapperConfig},
    error::{At, ensure},
    nn::{AbsolutePositionalEmbedding, AttentionLayers, ForwardOptions, Linear, Norm},
};

/// A projection, positions, attention layers, a LayerNorm and a projection.
#[derive(Clone, Debug)]
pub struct ContinuousTransformerWrapper {
    plan: Arc<ContinuousPlan>,
    project_in: Option<Linear>,
    pos_emb: Option<AbsolutePositionalEmbedding>,
    attn_layers: AttentionLayers,
    norm: Norm,
    project_out: Option<Linear>,
}

impl ContinuousTransformerWrapper {
    /// A model from its keywords, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: [`Error::Option`] for what is illegal alone or together.
    pub fn new(config: &ContinuousTransformerWrapperConfig, store: &Store) -> Result<Self> {
        let plan = config.plan()?;
        let dim = plan.layers.dim;
        let positions = || AbsolutePositionalEmbedding::new(dim, plan.max_seq_len, &store.at("pos_emb"));
        Ok(Self {
            project_in: plan.dim_in.map(|dim_in| Linear::new(&store.at("project_in"), dim_in, dim)).transpose()?,
            pos_emb: plan.absolute_positions.then(positions).transpose()?,
            attn_layers: AttentionLayers::new(&plan.layers, &store.at("attn_layers"))?,
            norm: Norm::new(config::Norm::Layer, dim, &store.at("norm"))?,
            project_out: plan.dim_out.map(|dim_out| Linear::new(&store.at("project_out"), dim, dim_out)).transpose()?,
            plan: Arc::new(plan),
        })
    }

    /// What was built.
    pub fn plan(&self) -> &ContinuousPlan {
        &self.plan
    }

    /// `[b, n, dim_in] → [b, n, dim_out]`, or what the options ask for.
    ///
    /// Errors: an input of another shape, longer than `max_seq_len`, or options that do not fit the model; this wrapper
    /// gives no memories.
    pub fn forward(&self, x: &Tensor, options: &ForwardOptions) -> Result<Output> {
        let features = self.plan.dim_in.unwrap_or(self.plan.layers.dim);
        ensure!(
            x.rank() == 3 && x.shape()[2] == features && x.dtype().is_float(),
            Error::shape("x", format!("expected floats [batch, n, {features}], got {:?} {}", x.shape(), x.dtype()))
        );
        ensure!(
            !options.return_mems,
            Error::argument("return_mems", "is for TransformerWrapper; the continuous wrapper gives no memories")
        );
        let n = x.shape()[1];
        check_length(n, self.plan.max_seq_len)?;
        let mut x = match &self.project_in {
            Some(project) => project.forward(x).at("project_in")?,
            None => x.clone(),
        };
        if let Some(positions) = &self.pos_emb {
            x = x.add(&positions.forward(n)?).at("pos_emb")?;
        }
        let x = x.dropout(self.plan.emb_dropout)?;
        let layers = self.attn_layers.forward(&x, options).at("attn_layers")?;
        let x = self.norm.forward(&layers.out).at("norm")?;
        let out = match &self.project_out {
            Some(project) if !options.return_embeddings => project.forward(&x).at("project_out")?,
            _ => x,
        };
        Ok(Output { out, mems: Vec::new(), attn: layers.attn })
    }
}
