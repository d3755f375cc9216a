//! Tokens in, logits out.

use std::sync::Arc;

use crate::{
    DType, Error, Init, Param, Result, Store, Tensor,
    config::{self, TransformerPlan, TransformerWrapperConfig},
    error::{At, ensure},
    nn::{AbsolutePositionalEmbedding, AttentionLayers, Embedding, ForwardOptions, Linear, Norm},
};

/// What a wrapper gives.
#[derive(Clone, Debug)]
pub struct Output {
    /// Logits `[b, n, num_tokens]`, or normed hidden states `[b, n, dim]`.
    pub out: Tensor,
    /// New memories, with `return_mems`: one `[b, memories, dim]` per self-attention, detached.
    pub mems: Vec<Tensor>,
    /// Attention maps, with `return_attn`: `[b, heads, i, j]` in the order of the layers.
    pub attn: Vec<Tensor>,
}

/// Token embeddings, positions, attention layers, a LayerNorm and logits.
///
/// ```
/// use x_transformers::{
///     DType, Device, Store, Tensor,
///     config::{AttentionLayersConfig, TransformerWrapperConfig},
///     models::{ForwardOptions, TransformerWrapper},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let config = TransformerWrapperConfig {
///     num_tokens: 256,
///     max_seq_len: 32,
///     attn_layers: AttentionLayersConfig::decoder(16, 1),
///     ..Default::default()
/// };
/// let store = Store::new(0, DType::F32, &Device::Cpu);
/// let model = TransformerWrapper::new(&config, &store)?;
/// let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6], [2, 3], &Device::Cpu)?;
/// let logits = model.forward(&tokens, &ForwardOptions::default())?.out;
/// assert_eq!(logits.shape()[..], [2, 3, 256]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TransformerWrapper {
    plan: Arc<TransformerPlan>,
    token_emb: Embedding,
    pos_emb: Option<AbsolutePositionalEmbedding>,
    project_emb: Option<Linear>,
    memory_tokens: Option<Param>,
    attn_layers: AttentionLayers,
    norm: Norm,
    to_logits: Option<Linear>,
}

impl TransformerWrapper {
    /// A model from its keywords, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: [`Error::Option`] for what is illegal alone or together.
    pub fn new(config: &TransformerWrapperConfig, store: &Store) -> Result<Self> {
        Self::from_plan(&config.plan()?, store, None)
    }

    /// A model from its plan, and perhaps the token embeddings of another one.
    pub(super) fn from_plan(plan: &TransformerPlan, store: &Store, tied: Option<&Embedding>) -> Result<Self> {
        let dim = plan.layers.dim;
        let token_store = store.at("token_emb");
        let token_emb = match tied {
            Some(other) => Embedding::tied(&token_store, other)?,
            None => Embedding::new(&token_store, plan.num_tokens, plan.emb_dim, Init::kaiming_normal(plan.emb_dim))?,
        };
        let positions = || AbsolutePositionalEmbedding::new(plan.emb_dim, plan.max_seq_len, &store.at("pos_emb"));
        let project_emb = || Linear::new(&store.at("project_emb"), plan.emb_dim, dim);
        let memory = || store.param("memory_tokens", [plan.num_memory_tokens, dim], Init::Normal(1.0));
        let to_logits = || Linear::new(&store.at("to_logits"), dim, plan.num_tokens);
        Ok(Self {
            token_emb,
            pos_emb: plan.absolute_positions.then(positions).transpose()?,
            project_emb: (plan.emb_dim != dim).then(project_emb).transpose()?,
            memory_tokens: (plan.num_memory_tokens > 0).then(memory).transpose()?,
            attn_layers: AttentionLayers::new(&plan.layers, &store.at("attn_layers"))?,
            norm: Norm::new(config::Norm::Layer, dim, &store.at("norm"))?,
            to_logits: (!plan.tie_embedding).then(to_logits).transpose()?,
            plan: Arc::new(plan.clone()),
        })
    }

    /// What was built.
    pub fn plan(&self) -> &TransformerPlan {
        &self.plan
    }

    /// The table of token embeddings.
    pub(super) fn token_emb(&self) -> &Embedding {
        &self.token_emb
    }

    /// Tokens `[b, n]` to logits, or to what the options ask for.
    ///
    /// Errors: tokens of another rank or dtype, out of the vocabulary ([`Error::Index`]), or more than `max_seq_len`;
    /// options that do not fit the model.
    pub fn forward(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Output> {
        let x = self.embed(tokens)?;
        let memory_tokens = self.plan.num_memory_tokens;
        let options = self.layers_options(options)?;
        let layers = self.attn_layers.forward_normed(&x, &options, &self.norm)?;
        let x = layers.out.narrow(1, memory_tokens, tokens.dim(1)?)?;
        let mems = if options.return_mems { self.new_mems(&layers.hiddens, options.mems.as_deref())? } else { vec![] };
        let out = if options.return_embeddings { x } else { self.logits(&x)? };
        Ok(Output { out, mems, attn: layers.attn })
    }

    /// Normed hidden states `[.., dim]` to logits `[.., num_tokens]`.
    pub fn logits(&self, embeddings: &Tensor) -> Result<Tensor> {
        match &self.to_logits {
            Some(to_logits) => to_logits.forward(embeddings).at("to_logits"),
            None => embeddings.linear(&self.token_emb.table(), None).at("to_logits"),
        }
    }

    /// What enters the layers: `[b, n] → [b, memory tokens + n, dim]`.
    fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        ensure!(
            tokens.rank() == 2 && tokens.dtype() == DType::I64,
            Error::shape("tokens", format!("expected i64 [batch, n], got {:?} {}", tokens.shape(), tokens.dtype()))
        );
        let (b, n) = (tokens.shape()[0], tokens.shape()[1]);
        check_length(n, self.plan.max_seq_len)?;
        let mut x = self.token_emb.forward(tokens).at("token_emb")?;
        if let Some(positions) = &self.pos_emb {
            x = x.add(&positions.forward(n)?).at("pos_emb")?;
        }
        x = x.dropout(self.plan.emb_dropout)?;
        if let Some(project) = &self.project_emb {
            x = project.forward(&x).at("project_emb")?;
        }
        if let Some(memory) = &self.memory_tokens {
            let memory = memory.tensor();
            let memory = memory.expand([b, memory.dim(0)?, memory.dim(1)?])?;
            x = Tensor::cat(&[&memory, &x], 1)?;
        }
        Ok(x)
    }

    /// The options as the layers see them: the mask covers memory tokens, memories are rotated.
    fn layers_options(&self, options: &ForwardOptions) -> Result<ForwardOptions> {
        let mut options = options.clone();
        if let (Some(mask), true) = (&options.mask, self.memory_tokens.is_some()) {
            ensure!(
                mask.rank() == 2 && mask.dtype() == DType::Bool,
                Error::shape("mask", format!("expected bool [batch, n], got {:?} {}", mask.shape(), mask.dtype()))
            );
            let kept = Tensor::ones([mask.dim(0)?, self.plan.num_memory_tokens], DType::Bool, mask.device())?;
            options.mask = Some(Tensor::cat(&[&kept, mask], 1)?);
        }
        ensure!(
            !options.return_mems || self.plan.max_mem_len.is_some(),
            Error::option("max_mem_len", "is needed for `return_mems`: how many memories are kept, 0 for all")
        );
        if let Some(mems) = &mut options.mems {
            // Too few to be rotated are too few for the layers, which say so.
            let down = self.plan.shift_mem_down.min(mems.len());
            mems.rotate_left(down);
        }
        Ok(options)
    }

    /// Old memories and these hidden states, joined and cut.
    fn new_mems(&self, hiddens: &[Tensor], mems: Option<&[Tensor]>) -> Result<Vec<Tensor>> {
        let keep = self.plan.max_mem_len.filter(|&most| most > 0).unwrap_or(usize::MAX);
        let join = |(index, hidden): (usize, &Tensor)| {
            let hidden = hidden.detach();
            let joined = match mems.and_then(|mems| mems.get(index)) {
                Some(mem) => Tensor::cat(&[&mem.detach(), &hidden], 1)?,
                None => hidden,
            };
            let length = joined.dim(1)?;
            let kept = length.min(keep);
            joined.narrow(1, length - kept, kept)
        };
        hiddens.iter().enumerate().map(join).collect()
    }
}

/// Refuses a sequence that is too long.
pub(super) fn check_length(n: usize, max_seq_len: usize) -> Result<()> {
    ensure!(n <= max_seq_len, Error::argument("sequence", format!("has length {n}, `max_seq_len` is {max_seq_len}")));
    Ok(())
}
