//! From tokens to the input of the layers.

use super::{
    TransformerWrapper,
    positions::{Absolute, add_positions, prepend, with_real_tokens},
};
use crate::{
    DType, Error, Result, Tensor,
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, unit_length},
};

/// Input of the layers, `[b, n, dim]`, and its padding mask.
pub(super) struct Embedded {
    pub x: Tensor,
    pub mask: Option<Tensor>,
}

impl TransformerWrapper {
    /// Computes the input of the layers, `[b, n] → [b, memory and class tokens + n, dim]`, and its padding mask.
    pub(super) fn embed(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Embedded> {
        self.check_tokens(tokens)?;
        let mut mask = options.mask.clone();
        let x = prepend(self.initial(tokens, options)?, &mut mask, options)?;
        let x = self.projected(x)?;
        let x = self.prepend_class_tokens(&x)?;
        let mask = with_real_tokens(mask.as_ref(), self.plan.num_cls_tokens)?;
        match self.plan.memory_tokens_every {
            Some(every) => Ok(Embedded { x: self.intersperse_memory_tokens(&x, every)?, mask }),
            None => Ok(Embedded {
                x: self.prepend_memory_tokens(&x)?,
                mask: with_real_tokens(mask.as_ref(), self.plan.num_memory_tokens)?,
            }),
        }
    }

    /// Embeds tokens, with positions and other embeddings: `[b, n] → [b, n, emb_dim]`.
    pub(super) fn initial(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        let x = self.with_numbers(self.token_embeddings(tokens)?, tokens, options)?;
        self.summed(add_positions(x, self.pos_emb.as_ref(), options)?, tokens, options)
    }

    /// Looks up tokens: `[b, n] → [b, n, emb_dim]`.
    fn token_embeddings(&self, tokens: &Tensor) -> Result<Tensor> {
        let x = self.token_emb.forward(tokens).context("token_emb")?;
        if self.plan.l2norm_embed { unit_length(&x) } else { Ok(x) }
    }

    /// Multiplies the embeddings of numerical tokens by their numbers.
    fn with_numbers(&self, x: Tensor, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        let Some(token) = self.plan.numerical_token else { return Ok(x) };
        let missing = || Error::argument("x_num", "is missing: numbers of the numerical tokens");
        let numbers = options.numbers.as_ref().ok_or_else(missing)?;
        let numerical = tokens.eq(&Tensor::full((), token as f64, DType::I64, tokens.device())?)?;
        let one = Tensor::ones((), numbers.dtype(), numbers.device())?;
        x.mul(&numerical.where_cond(numbers, &one)?.unsqueeze(-1)?)
    }

    /// Adds embeddings other than those of tokens and positions, and applies the norm after them.
    fn summed(&self, mut x: Tensor, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        if let Some(types) = self.token_types(tokens, options.token_types.as_ref())? {
            x = x.add(&types)?;
        }
        for (name, table) in &self.embeds {
            let missing = || Error::argument("embed_ids", format_args!("`{name}` is missing"));
            let ids = options.embed_ids.get(name).ok_or_else(missing)?;
            x = x.add(&table.forward(ids).context(format_args!("embeds.{name}_embed"))?)?;
        }
        let unknown = options.embed_ids.keys().find(|id| !self.embeds.iter().any(|(name, _)| name == *id));
        if let Some(unknown) = unknown {
            let why = format_args!("`{unknown}` is given, but `embed_num_tokens` has no such table").to_string();
            return Err(Error::argument("embed_ids", why));
        }
        if let Some(embeds) = &options.sum_embeds {
            x = x.add(embeds).context("sum_embeds")?;
        }
        match &self.post_emb_norm {
            Some(norm) => norm.forward(&x).context("post_emb_norm"),
            None => Ok(x),
        }
    }

    /// Applies the share of the gradient, the dropout and the projection of embeddings.
    fn projected(&self, mut x: Tensor) -> Result<Tensor> {
        let share = self.plan.emb_frac_gradient;
        if share != 1.0 {
            x = x.affine(share, 0.0)?.add(&x.detach().affine(1.0 - share, 0.0)?)?;
        }
        x = x.dropout(self.plan.emb_dropout)?;
        match &self.project_emb {
            Some(project) => project.forward(&x).context("project_emb"),
            None => Ok(x),
        }
    }

    fn prepend_class_tokens(&self, x: &Tensor) -> Result<Tensor> {
        let Some(class) = &self.cls_token else { return Ok(x.clone()) };
        let class = class.tensor();
        Tensor::cat(&[&class.expand([x.dim(0)?, class.dim(0)?, class.dim(1)?])?, x], 1)
    }

    /// Puts memory tokens in front of each group of `every` tokens; the last group is filled up with zeros.
    fn intersperse_memory_tokens(&self, x: &Tensor, every: usize) -> Result<Tensor> {
        let Some(memory) = &self.memory_tokens else { return Ok(x.clone()) };
        let (b, n, dim) = (x.dim(0)?, x.dim(1)?, x.dim(2)?);
        let groups = n.div_ceil(every);
        let zeros = Tensor::zeros([b, groups * every - n, dim], x.dtype(), x.device())?;
        let x = Tensor::cat(&[x, &zeros], 1)?.reshape([b, groups, every, dim])?;
        let memory = memory.tensor();
        let count = memory.dim(0)?;
        let memory = memory.reshape([1, 1, count, dim])?.expand([b, groups, count, dim])?;
        Tensor::cat(&[&memory, &x], 2)?.reshape([b, groups * (count + every), dim])
    }

    /// Removes the memory tokens from the output of the layers; the input had `n` tokens.
    pub(super) fn without_memory_tokens(&self, x: Tensor, n: usize, options: &ForwardOptions) -> Result<Tensor> {
        let count = self.plan.num_memory_tokens;
        let Some(every) = self.plan.memory_tokens_every.filter(|_| count > 0) else {
            return x.narrow(1, count, x.dim(1)? - count);
        };
        let (b, groups, dim) = (x.dim(0)?, x.dim(1)? / (count + every), x.dim(2)?);
        let x = x.reshape([b, groups, count + every, dim])?.narrow(2, count, every)?;
        let prepended = options.prepend_embeds.as_ref().map_or(Ok(0), |embeds| embeds.dim(1))?;
        x.reshape([b, groups * every, dim])?.narrow(1, 0, n + prepended + self.plan.num_cls_tokens)
    }

    /// Checks that `tokens` is an i64 tensor of shape `[batch, n]`.
    pub(super) fn check_tokens(&self, tokens: &Tensor) -> Result<()> {
        ensure!(
            tokens.rank() == 2 && tokens.dtype() == DType::I64,
            Error::shape(
                "tokens",
                format_args!("expected i64 [batch, n], got {:?} {}", tokens.shape(), tokens.dtype())
            )
        );
        Ok(())
    }

    /// Embeds tokens with the positions that the closure looks up: `[b, n] → [b, n, dim]`.
    pub(super) fn embed_tokens(
        &self,
        tokens: &Tensor,
        positions_of: impl FnOnce(&Absolute) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = self.token_embeddings(tokens)?;
        if let Some(positions) = &self.pos_emb {
            x = x.add(&positions_of(positions)?).context("pos_emb")?;
        }
        self.projected(self.summed(x, tokens, &ForwardOptions::default())?)
    }

    /// Prepends memory tokens to embedded ones, if there are any.
    pub(super) fn prepend_memory_tokens(&self, x: &Tensor) -> Result<Tensor> {
        let Some(memory) = &self.memory_tokens else { return Ok(x.clone()) };
        let memory = memory.tensor();
        let memory = memory.expand([x.dim(0)?, memory.dim(0)?, memory.dim(1)?])?;
        Tensor::cat(&[&memory, x], 1)
    }

    /// Returns the embeddings of token types, if the model has them: `[b, n, dim]`, or `[1, dim]` if all types are 0.
    fn token_types(&self, tokens: &Tensor, types: Option<&Tensor>) -> Result<Option<Tensor>> {
        let (table, types) = match (&self.token_type_emb, types) {
            (Some(table), Some(types)) => (table, types),
            (Some(table), None) => return table.table()?.narrow(0, 0, 1).map(Some),
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return Err(Error::argument("token_types", "require a model with `num_token_types` above 0"));
            }
        };
        ensure!(
            types.shape() == tokens.shape() && types.dtype() == DType::I64,
            Error::shape(
                "token_types",
                format_args!(
                    "expected i64 {:?}, the shape of the tokens, got {:?} {}",
                    tokens.shape(),
                    types.shape(),
                    types.dtype()
                )
            )
        );
        table.forward(types).context("token_type_emb").map(Some)
    }
}
