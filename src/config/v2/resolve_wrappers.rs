//! Options of the wrappers to their plans.

use super::{
    AttentionConfig, AttentionLayersConfig, AttentionPoolConfig, AutoregressiveConfig, ContinuousAutoregressiveConfig,
    ContinuousTransformerWrapperConfig, DpoConfig, LayersKind, MultiInputConfig, NonAutoregressiveConfig, PerLayer,
    SamplingConfig, TransformerWrapperConfig, ViTransformerWrapperConfig, XTransformerConfig, XValAutoregressiveConfig,
    XValConfig, XlAutoregressiveConfig, resolve::tokens_dropout, resolve_attention::attention,
};
use crate::{
    Error, Result,
    collect::CollectVec,
    config::{
        AbsolutePositions, AroundPlan, AttentionPlan, AttentionPoolPlan, AutoregressivePlan,
        ContinuousAutoregressivePlan, ContinuousLoss, ContinuousPlan, CriticPlan, FilterLogits, LayersPlan, LoopedLoss,
        LossPlan, MaskedPlan, MemoryPlan, NormPlan, PoolerPlan, Recurrence, TransformerPlan, ViTransformerPlan,
        VisionHead, XTransformerPlan, options,
        ranges::{at_least_one, probability},
        wrapper_plan::check_longest,
        wrappers,
    },
    error::{ErrorContext, ensure},
};

/// Norm of embeddings and patches, whose scale is stored as it is.
const PLAIN: NormPlan = NormPlan::Gamma { eps: 1e-5, offset: 0.0 };

/// Returns the absolute positions of a wrapper.
fn positions(
    layers: &LayersPlan,
    max_seq_len: usize,
    use_abs_pos_emb: bool,
    sinusoids: bool,
    unit: bool,
    dim: usize,
) -> Result<AbsolutePositions> {
    if max_seq_len == 0 || !use_abs_pos_emb || layers.positions.replace_absolute() {
        return Ok(AbsolutePositions::None);
    }
    if sinusoids {
        ensure!(
            dim.is_multiple_of(2),
            Error::option("scaled_sinu_pos_emb", format_args!("needs an even width of embeddings, got {dim}"))
        );
        return Ok(AbsolutePositions::Sinusoids);
    }
    check_longest(max_seq_len, true)?;
    Ok(if unit { AbsolutePositions::UnitTable } else { AbsolutePositions::ScaledTable })
}

impl TransformerWrapperConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<TransformerPlan> {
        at_least_one("num_tokens", self.num_tokens)?;
        probability("emb_dropout", self.emb_dropout)?;
        let layers = self.attn_layers.plan().context("attn_layers")?;
        let dim = layers.dim;
        let emb_dim = self.emb_dim.unwrap_or(dim);
        at_least_one("emb_dim", emb_dim)?;
        let logits_dim = self.logits_dim.unwrap_or(self.num_tokens);
        at_least_one("logits_dim", logits_dim)?;
        at_least_one("num_output_heads", self.num_output_heads)?;
        ensure!(
            !self.tie_embedding || emb_dim == dim,
            Error::option("tie_embedding", format_args!("needs `emb_dim` = `dim`; they are {emb_dim} and {dim}"))
        );
        ensure!(
            !(self.average_pool_embed && self.use_cls_token),
            Error::option("average_pool_embed", "cannot be used with `use_cls_token`")
        );
        ensure!(
            !(self.attn_pool && self.use_cls_token),
            Error::option("attn_pool", "cannot be used with `use_cls_token`")
        );
        at_least_one("mixture_of_softmax_k", self.mixture_of_softmax_k)?;
        let mixes = self.mixture_of_softmax || self.sigsoftmax_logits;
        ensure!(
            !mixes || self.num_output_heads == 1 && !self.return_only_embed,
            Error::option("mixture_of_softmax", "and `sigsoftmax_logits` need one head of logits")
        );
        let share = self.emb_frac_gradient;
        ensure!(
            share > 0.0 && share <= 1.0,
            Error::option("emb_frac_gradient", format_args!("expected a number above 0 and up to 1, got {share}"))
        );
        let memories = layers.self_attentions();
        ensure!(
            self.shift_mem_down <= memories,
            Error::option(
                "shift_mem_down",
                format_args!("expected at most the number of self-attentions, {memories}, got {}", self.shift_mem_down)
            )
        );
        let every = self.memory_tokens_interspersed_every;
        if let Some(every) = every {
            at_least_one("memory_tokens_interspersed_every", every)?;
            ensure!(
                self.attn_layers.kind == LayersKind::Decoder,
                Error::option("memory_tokens_interspersed_every", "needs `kind` = Decoder")
            );
        }
        let num_memory_tokens = self.num_memory_tokens.unwrap_or(0);
        ensure!(
            num_memory_tokens == 0 || at_least_one("num_memory_tokens", num_memory_tokens).is_ok(),
            Error::option("num_memory_tokens", format_args!("{num_memory_tokens} are too many"))
        );
        let is_encoder = !matches!(self.attn_layers.kind, LayersKind::Decoder) && !self.attn_layers.causal;
        let pool = || {
            let attn = &self.attn_layers;
            let pool = AttentionPoolConfig {
                dim: self.dim_pooled_tokens.unwrap_or(dim),
                dim_context: Some(dim),
                num_pooled_tokens: self.num_pooled_tokens,
                depth: self.attn_pool_depth,
                heads: attn.heads,
                dim_head: attn.dim_head(),
                ..AttentionPoolConfig::default()
            };
            Ok(AttentionPoolPlan { used: is_encoder, ..pool.plan().context("attn_pool")? })
        };
        let (sinusoids, unit) = (self.scaled_sinu_pos_emb, self.l2norm_embed);
        Ok(TransformerPlan {
            num_tokens: self.num_tokens,
            max_seq_len: self.max_seq_len,
            emb_dim,
            token_emb: "token_emb.emb".to_string(),
            l2norm_embed: self.l2norm_embed,
            absolute_positions: positions(&layers, self.max_seq_len, self.use_abs_pos_emb, sinusoids, unit, emb_dim)?,
            emb_dropout: self.emb_dropout,
            emb_frac_gradient: share,
            num_memory_tokens,
            memory_tokens_every: every.filter(|_| num_memory_tokens > 0),
            num_cls_tokens: if self.use_cls_token { self.num_cls_tokens } else { 0 },
            tie_embedding: (self.tie_embedding && !self.return_only_embed)
                .then(|| self.tie_embedding_scale.unwrap_or((dim as f64).powf(-0.5))),
            post_emb_norm: self.post_emb_norm.then_some(PLAIN),
            num_token_types: 0,
            embeds: self.embed_num_tokens.clone(),
            pool: self.attn_pool.then(pool).transpose()?,
            logits: match self.num_output_heads {
                1 => vec![(String::new(), logits_dim)],
                heads => (0..heads).map(|head| (head.to_string(), logits_dim)).collect_vec(),
            },
            numerical_token: None,
            squeeze_logits: self.squeeze_out_last_dim,
            mixture: self.mixture_of_softmax.then_some(self.mixture_of_softmax_k),
            sigsoftmax: self.sigsoftmax_logits,
            recurrence: self.recurrence()?,
            next_embed: self.add_continuous_pred_head,
            average_pool_embed: self.average_pool_embed,
            pooler: false,
            mlm_head: None,
            return_only_embed: self.return_only_embed,
            logits_bias: false,
            memories: MemoryPlan::Last(self.max_mem_len),
            shift_mem_down: self.shift_mem_down,
            layers,
        })
    }
}

impl TransformerWrapperConfig {
    /// Returns the passes through the layers.
    fn recurrence(&self) -> Result<Recurrence> {
        ensure!(!(self.recycling && self.looped), Error::option("looped", "cannot be used with `recycling`"));
        at_least_one("train_max_recycle_steps", self.train_max_recycle_steps)?;
        at_least_one("max_looped_steps", self.max_looped_steps)?;
        ensure!(
            !self.looped || self.attn_layers.pre_and_post_norm,
            Error::option("looped", "requires `pre_and_post_norm = true` in `attn_layers`")
        );
        ensure!(
            !(self.looped && self.add_continuous_pred_head),
            Error::option("add_continuous_pred_head", "cannot be used with `looped`")
        );
        ensure!(
            !self.looped || !(self.mixture_of_softmax || self.sigsoftmax_logits),
            Error::option("looped", "cannot be used with `mixture_of_softmax` or `sigsoftmax_logits`")
        );
        Ok(match (self.recycling, self.looped) {
            (true, _) => Recurrence::Recycled(self.train_max_recycle_steps),
            (_, true) => Recurrence::Looped(self.max_looped_steps),
            _ => Recurrence::Once,
        })
    }
}

impl ContinuousTransformerWrapperConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<ContinuousPlan> {
        at_least_one("dim_in", self.dim_in.unwrap_or(1))?;
        at_least_one("dim_out", self.dim_out.unwrap_or(1))?;
        probability("emb_dropout", self.emb_dropout)?;
        let layers = self.attn_layers.plan().context("attn_layers")?;
        let max_seq_len = self.max_seq_len.unwrap_or(0);
        let dim = layers.dim;
        ensure!(
            !self.probabilistic || self.dim_out.is_some(),
            Error::option("probabilistic", "needs `dim_out`, of which it gives a mean and a variance")
        );
        let width = |dim_out: usize| if self.probabilistic { 2 * dim_out } else { dim_out };
        let projects = |width: usize| !(self.use_identity_if_same_dim && width == dim);
        let (use_table, sinusoids) = (self.use_abs_pos_emb, self.scaled_sinu_pos_emb);
        Ok(ContinuousPlan {
            max_seq_len,
            dim_in: self.dim_in.filter(|&dim_in| projects(dim_in)),
            dim_out: self.dim_out.filter(|&dim_out| projects(width(dim_out))),
            bias: false,
            absolute_positions: positions(&layers, max_seq_len, use_table, sinusoids, false, dim)?,
            post_emb_norm: self.post_emb_norm.then_some(PLAIN),
            emb_dropout: self.emb_dropout,
            num_memory_tokens: self.num_memory_tokens.unwrap_or(0),
            average_pool_embed: self.average_pool_embed,
            probabilistic: self.probabilistic,
            memories: MemoryPlan::LastOfCall(self.max_mem_len),
            layers,
        })
    }
}

impl ViTransformerWrapperConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<ViTransformerPlan> {
        at_least_one("channels", self.channels)?;
        // Checks of both versions.
        let first = wrappers::ViTransformerWrapperConfig {
            image_size: self.image_size,
            patch_size: self.patch_size,
            attn_layers: options::AttentionLayersConfig::encoder(self.attn_layers.dim.max(1), 1),
            num_classes: self.num_classes,
            dropout: 0.0,
            emb_dropout: self.emb_dropout,
        };
        let plan = first.plan()?;
        let layers = self.attn_layers.plan().context("attn_layers")?;
        ensure!(
            !layers.cross_attend,
            Error::option("cross_attend", "an image transformer has no context to attend to").context("attn_layers")
        );
        Ok(ViTransformerPlan {
            channels: self.channels,
            class_token: false,
            registers: self.num_register_tokens,
            post_emb_norm: self.post_emb_norm.then_some(PLAIN),
            head: VisionHead::Mean(self.num_classes),
            layers,
            ..plan
        })
    }
}

impl XTransformerConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<XTransformerPlan> {
        let (encoder, decoder) = (self.enc.num_tokens, self.dec.num_tokens);
        ensure!(
            !self.tie_token_emb || encoder == decoder,
            Error::option(
                "tie_token_emb",
                format_args!("needs `enc_num_tokens` = `dec_num_tokens`; they are {encoder} and {decoder}")
            )
        );
        let enc = TransformerWrapperConfig { return_only_embed: true, ..self.enc.clone() };
        let mut dec = self.dec.clone();
        dec.attn_layers.cross_attend = true;
        Ok(XTransformerPlan {
            enc: enc.plan().context("encoder")?,
            dec: dec.plan().context("decoder.net")?,
            tie_token_emb: self.tie_token_emb,
            tokens_dropout: tokens_dropout(self.cross_attn_tokens_dropout)?,
            loss: loss(self.ignore_index, self.pad_value),
            masks: ["mask", "attn_mask"],
        })
    }
}

fn loss(ignore_index: i64, pad_value: i64) -> LossPlan {
    LossPlan { ignore_index, pad_value, reads_all: true, ..LossPlan::default() }
}

impl AutoregressiveConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<AutoregressivePlan> {
        Ok(AutoregressivePlan {
            net: self.net.plan().context("net")?,
            loss: {
                probability("mask_prob", self.mask_prob)?;
                let (mask_prob, attn_z_loss) = (self.mask_prob, self.add_attn_z_loss);
                ensure!(
                    !(attn_z_loss && self.net.looped),
                    Error::option("add_attn_z_loss", "cannot be used with `looped`")
                );
                let looped = LoopedLoss {
                    threshold: self.looped_loss_threshold_exit,
                    slope: self.looped_loss_slope,
                    weight: self.looped_exit_loss_weight,
                };
                let next_embed = self.next_embed_loss_weight;
                LossPlan { mask_prob, attn_z_loss, next_embed, looped, ..loss(self.ignore_index, self.pad_value) }
            },
        })
    }
}

impl MultiInputConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<AroundPlan> {
        let none = || Error::option("num_tokens", "expected at least one input");
        let (first, rest) = self.num_tokens.split_first().ok_or_else(none)?;
        rest.iter().try_for_each(|(name, count)| at_least_one(name, *count)).context("num_tokens")?;
        let net = TransformerWrapperConfig {
            num_tokens: first.1,
            max_seq_len: self.max_seq_len,
            embed_num_tokens: rest.to_vec(),
            emb_dim: self.emb_dim,
            max_mem_len: self.max_mem_len,
            shift_mem_down: self.shift_mem_down,
            emb_dropout: self.emb_dropout,
            post_emb_norm: self.post_emb_norm,
            num_memory_tokens: self.num_memory_tokens,
            memory_tokens_interspersed_every: self.memory_tokens_interspersed_every,
            return_only_embed: self.return_only_embed,
            use_abs_pos_emb: self.use_abs_pos_emb,
            scaled_sinu_pos_emb: self.scaled_sinu_pos_emb,
            emb_frac_gradient: self.emb_frac_gradient,
            attn_layers: self.attn_layers.clone(),
            ..TransformerWrapperConfig::default()
        };
        let (token_emb, logits) = (format!("embeds.{}_embed", first.0), self.num_tokens.clone());
        let names = self.num_tokens.iter().map(|(name, _)| name.clone()).collect_vec();
        Ok(AroundPlan::MultiInput(TransformerPlan { token_emb, logits, ..net.plan()? }, names))
    }
}

impl XValConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<TransformerPlan> {
        let net = TransformerWrapperConfig {
            num_tokens: self.num_tokens,
            max_seq_len: self.max_seq_len,
            max_mem_len: self.max_mem_len,
            emb_dropout: self.emb_dropout,
            num_memory_tokens: self.num_memory_tokens,
            tie_embedding: self.tie_embedding,
            logits_dim: self.logits_dim,
            use_abs_pos_emb: self.use_abs_pos_emb,
            scaled_sinu_pos_emb: self.scaled_sinu_pos_emb,
            attn_layers: self.attn_layers.clone(),
            ..TransformerWrapperConfig::default()
        };
        let token = self.numerical_token_id;
        ensure!(
            token < self.num_tokens,
            Error::option("numerical_token_id", format_args!("expected below {}, got {token}", self.num_tokens))
        );
        let memories = MemoryPlan::LastOfCall(self.max_mem_len);
        Ok(TransformerPlan { numerical_token: Some(token as i64), logits_bias: true, memories, ..net.plan()? })
    }
}

impl XValAutoregressiveConfig {
    /// Resolves the options.
    ///
    /// Errors: those of [`XValConfig::plan`].
    pub fn plan(&self) -> Result<AroundPlan> {
        let loss = loss(self.ignore_index, self.pad_value);
        Ok(AroundPlan::XValLoss(self.net.plan().context("net")?, loss, self.numerical_loss_weight))
    }
}

impl XlAutoregressiveConfig {
    /// Resolves the options.
    ///
    /// Errors: those of [`TransformerWrapperConfig::plan`].
    pub fn plan(&self) -> Result<AroundPlan> {
        at_least_one("tbptt_steps", self.tbptt_steps)?;
        let loss = loss(self.ignore_index, self.pad_value);
        Ok(AroundPlan::Xl(self.net.plan().context("net")?, loss, self.tbptt_steps))
    }
}

impl NonAutoregressiveConfig {
    /// Resolves the options.
    ///
    /// Errors: those of [`TransformerWrapperConfig::plan`]; shares that are not probabilities.
    pub fn plan(&self) -> Result<AroundPlan> {
        at_least_one("steps", self.steps)?;
        probability("self_cond_train_prob", self.self_cond_train_prob)?;
        probability("no_replace_prob", self.no_replace_prob)?;
        probability("random_token_prob", self.random_token_prob)?;
        let (tokens, mask_id) = (self.net.num_tokens, self.mask_id);
        ensure!(mask_id < tokens, Error::option("mask_id", format_args!("expected below {tokens}, got {mask_id}")));
        let cosine = match self.schedule.as_deref() {
            None | Some("linear") => false,
            Some("cosine") => true,
            Some(other) => {
                return Err(Error::option("schedule", format_args!("expected linear or cosine, got {other}")));
            }
        };
        let critic = match (&self.token_critic, self.self_token_critic) {
            (None, false) => CriticPlan::None,
            (None, true) => CriticPlan::Own,
            (Some(critic), false) => {
                ensure!(
                    critic.logits_dim == Some(1),
                    Error::option("logits_dim", "must be 1: a score for each token").context("token_critic")
                );
                CriticPlan::Other(Box::new(critic.plan().context("token_critic")?))
            }
            (Some(_), true) => return Err(Error::option("self_token_critic", "cannot be used with `token_critic`")),
        };
        let plan = MaskedPlan {
            mask_id: mask_id as i64,
            steps: self.steps,
            self_cond: self.self_cond.then_some(self.self_cond_train_prob),
            no_replace: self.no_replace_prob,
            random_token: self.random_token_prob,
            cosine,
            can_mask_prev_unmasked: self.can_mask_prev_unmasked,
            critic,
            critic_loss_weight: self.critic_loss_weight,
            weighted: self.use_simple_mdlm_loss_weight,
        };
        Ok(AroundPlan::Masked(self.net.plan().context("net")?, Box::new(plan)))
    }
}

impl DpoConfig {
    /// Resolves the options.
    ///
    /// Errors: those of [`TransformerWrapperConfig::plan`].
    pub fn plan(&self) -> Result<AroundPlan> {
        Ok(AroundPlan::Dpo(self.net.plan().context("net")?, self.beta, self.pad_id.map(|pad| pad as i64)))
    }
}

impl ContinuousAutoregressiveConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<ContinuousAutoregressivePlan> {
        let loss = ContinuousLoss { l1: self.use_l1_loss, equal_rows: self.equal_loss_weight_batch };
        Ok(ContinuousAutoregressivePlan { net: self.net.plan().context("net")?, loss })
    }
}

impl AttentionPoolConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<AttentionPoolPlan> {
        at_least_one("dim", self.dim)?;
        let blocks = self.use_transformer_blocks.unwrap_or(self.depth > 1);
        ensure!(blocks || self.depth == 1, Error::option("depth", "above 1 needs `use_transformer_blocks`"));
        ensure!(
            !(blocks && self.add_residual),
            Error::option("add_residual", "cannot be used with blocks, which have residuals")
        );
        let squeeze = self.squeeze_output.unwrap_or(false);
        ensure!(!squeeze || self.num_pooled_tokens <= 1, Error::option("squeeze_output", "needs one pooled token"));
        let dim_context = self.dim_context.unwrap_or(self.dim);
        let own = AttentionConfig { dim_head: self.dim_head, ..AttentionConfig::default() };
        let config = AttentionLayersConfig {
            heads: self.heads,
            cross_attn: Some(PerLayer::All(AttentionConfig { dim_context: Some(dim_context), ..own.clone() })),
            attn: PerLayer::All(own.clone()),
            ..AttentionLayersConfig::cross_attender(self.dim, self.depth)
        };
        let pooler = match blocks {
            true => PoolerPlan::Layers(config.plan()?),
            false => {
                let plan = AttentionPlan { dim_context, ..attention(&config, &own, None, "")? };
                plan.check()?;
                PoolerPlan::Attention(plan)
            }
        };
        Ok(AttentionPoolPlan {
            dim: self.dim,
            tokens: self.num_pooled_tokens,
            residual: self.add_residual,
            squeeze,
            used: true,
            pooler,
        })
    }
}

impl SamplingConfig {
    /// Returns the filter and temperature in the terms of generation here.
    ///
    /// Errors: an unknown filter, or arguments of another one.
    pub fn sampling(&self) -> Result<wrappers::SamplingConfig> {
        let name = self.filter_logits_fn.as_deref().unwrap_or("top_k");
        let filter = &self.filter;
        let given = [
            ("frac_num_tokens", "top_k", filter.frac_num_tokens.is_some()),
            ("k", "top_k", filter.k.is_some()),
            ("thres", "top_p", filter.thres.is_some()),
            ("min_p_pow", "top_a", filter.min_p_pow.is_some()),
            ("min_p_ratio", "top_a", filter.min_p_ratio.is_some()),
            ("min_p", "min_p", filter.min_p.is_some()),
        ];
        if let Some((key, of, _)) = given.into_iter().find(|(_, of, given)| *given && *of != name) {
            let why = format_args!("is an argument of {of}, the filter is {name}").to_string();
            return Err(Error::option(key, why).context("filter_kwargs"));
        }
        let defaults = wrappers::SamplingConfig { temperature: self.temperature, ..Default::default() };
        Ok(match name {
            "top_k" => wrappers::SamplingConfig {
                filter_logits_fn: if filter.k.is_some() { FilterLogits::TopK } else { FilterLogits::TopShare },
                filter_thres: filter.frac_num_tokens.unwrap_or(0.1),
                k: filter.k,
                ..defaults
            },
            "top_p" => wrappers::SamplingConfig {
                filter_logits_fn: FilterLogits::Nucleus,
                filter_thres: filter.thres.unwrap_or(0.9),
                ..defaults
            },
            "top_a" => wrappers::SamplingConfig {
                filter_logits_fn: FilterLogits::RowTopA,
                min_p_pow: filter.min_p_pow.unwrap_or(2.0),
                min_p_ratio: filter.min_p_ratio.unwrap_or(0.02),
                ..defaults
            },
            "min_p" => wrappers::SamplingConfig {
                filter_logits_fn: FilterLogits::MinP,
                min_p_ratio: filter.min_p.unwrap_or(0.1),
                ..defaults
            },
            other => {
                let why = format_args!("expected top_k, top_p, top_a or min_p, got {other}").to_string();
                return Err(Error::option("filter_logits_fn", why));
            }
        })
    }
}
