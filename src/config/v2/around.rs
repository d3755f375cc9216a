//! Options of models around others: text from both sides, styles of sequences, nodes of an MLP.

use serde_json::{Value, json};

use super::{
    AttentionLayersConfig, LayersKind, TransformerWrapperConfig,
    fields::{Options, differing, options, take},
    json::{TRANSFORMER, finish, layers, net, required, transformer, with_model},
    refused,
};
use crate::{
    Error, Result,
    config::{
        AroundPlan, BeliefPlan, GptVaePlan, NeoMlpPlan,
        kwargs::{Map, object},
        ranges::{at_least_one, probability},
    },
    error::{ErrorContext, ensure},
};

options! {
    /// Options of `BeliefStateWrapper`: the next token of a text and the one before what follows it.
    /// <https://arxiv.org/abs/2410.23506>
    pub struct BeliefStateConfig {
        /// Weight of predictions of the text after.
        backward_ar_loss_weight: f64 = 1.0,
        /// If `true`, a small network predicts the distance between both texts.
        pred_distance: bool = false,
        /// Weight of the loss of that distance.
        pred_distance_loss_weight: f64 = 1.0,
        /// Number of distances that are told apart. Default `max_seq_len`.
        max_pred_distance: Option<usize> = None,
    } with {
        /// Options of the decoder of the text before. Required.
        forward_decoder: TransformerWrapperConfig,
        /// Options of the decoder of the text after, in reverse. Default: the same decoder.
        backward_decoder: Option<TransformerWrapperConfig>,
    }
}

options! {
    /// Options of `NeoMLP`: numbers in, numbers out, by attention between the nodes of an MLP.
    /// <https://openreview.net/forum?id=A8Vuf2e8y6>
    pub struct NeoMlpConfig {
        /// Number of input nodes. Required.
        dim_in: usize = 0,
        /// Number of hidden nodes. Required.
        dim_hidden: usize = 0,
        /// Number of output nodes. Required.
        dim_out: usize = 0,
        /// Width of the vectors of the nodes. Required.
        dim_model: usize = 0,
        /// Number of blocks. Required.
        depth: usize = 0,
    } with {
        /// Options of the layers, an encoder; in JSON the object `encoder_kwargs`.
        encoder: AttentionLayersConfig,
    }
}

options! {
    /// Options of `GPTVAE`: a language model with a style for each sequence, which an encoder reads.
    /// <https://arxiv.org/abs/2304.13705>
    pub struct GptVaeConfig {
        /// Size of the vocabulary. Required.
        num_tokens: usize = 0,
        /// Width of both models. Required.
        dim: usize = 0,
        /// Number of blocks of the decoder. Required.
        depth: usize = 0,
        /// Number of blocks of the encoder. Required.
        enc_depth: usize = 0,
        /// Longest sequence. Required.
        max_seq_len: usize = 0,
        /// Width of a style. Default `dim`.
        dim_latent: Option<usize> = None,
        /// Number of features per head.
        attn_dim_head: usize = 64,
        /// Number of heads.
        heads: usize = 8,
        /// Weight of the divergence of styles from a normal distribution.
        vae_kl_loss_weight: f64 = 1.0,
        /// Divergence of each number of a style that is free.
        vae_kl_div_floor: f64 = 0.0,
        /// Share of the sequences whose style training leaves out.
        latents_dropout_prob: f64 = 0.5,
        /// Token that is padding.
        pad_id: i64 = -1,
    } with {
        /// Options of the encoder's layers; in JSON those of both models, and the object `enc_kwargs`.
        enc: AttentionLayersConfig,
        /// Options of the decoder's layers; in JSON those of both models, and the object `dec_kwargs`.
        dec: AttentionLayersConfig,
    }
}

impl BeliefStateConfig {
    pub(super) fn from_map(mut map: Map) -> Result<Self> {
        let read = |map| transformer(map, "");
        let backward = map.remove("backward_decoder").filter(|value| !value.is_null());
        let backward = backward.map(|value| {
            let mut own = Map::from_iter([("backward_decoder".to_string(), value)]);
            net(&mut own, "backward_decoder", TRANSFORMER, read)
        });
        let forward_decoder = net(&mut map, "forward_decoder", TRANSFORMER, read)?;
        let mut config = Self { forward_decoder, backward_decoder: backward.transpose()?, ..Self::default() };
        take(&mut config, "", &mut map)?;
        finish(map, "", refused::BELIEF, &[Self::NAMES])?;
        Ok(config)
    }

    pub(super) fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        map.insert("forward_decoder".to_string(), with_model(self.forward_decoder.to_map(), TRANSFORMER));
        if let Some(backward) = &self.backward_decoder {
            map.insert("backward_decoder".to_string(), with_model(backward.to_map(), TRANSFORMER));
        }
        map
    }

    /// Resolves the options.
    ///
    /// Errors: those of [`TransformerWrapperConfig::plan`]; decoders that do not fit each other.
    pub fn plan(&self) -> Result<AroundPlan> {
        let forward = self.forward_decoder.plan().context("forward_decoder")?;
        let backward = self.backward_decoder.as_ref().map(TransformerWrapperConfig::plan);
        let backward = backward.transpose().context("backward_decoder")?;
        let (dim, tokens) = (forward.layers.dim, forward.num_tokens);
        let plans = std::iter::once(("forward_decoder", &forward));
        for (name, plan) in plans.chain(backward.iter().map(|plan| ("backward_decoder", plan))) {
            let fits = plan.emb_dim == dim && plan.layers.dim == dim && plan.num_tokens == tokens;
            ensure!(fits, Error::option(name, "requires `emb_dim` = `dim`, the width and vocabulary of both decoders"));
            for (option, on) in [
                ("use_cls_token", plan.num_cls_tokens > 0),
                ("average_pool_embed", plan.average_pool_embed),
                ("num_memory_tokens", plan.num_memory_tokens > 0),
            ] {
                ensure!(!on, Error::option(option, "cannot be used in a BeliefStateWrapper").context(name));
            }
        }
        let longest = self.max_pred_distance.unwrap_or(forward.max_seq_len);
        if self.pred_distance {
            at_least_one("max_pred_distance", longest)?;
        }
        Ok(AroundPlan::Belief(Box::new(BeliefPlan {
            forward,
            backward,
            backward_weight: self.backward_ar_loss_weight,
            distance: self.pred_distance.then_some((longest, self.pred_distance_loss_weight)),
        })))
    }
}

impl NeoMlpConfig {
    pub(super) fn from_map(mut map: Map) -> Result<Self> {
        required(&map, &["dim_in", "dim_hidden", "dim_out", "dim_model", "depth"])?;
        let mut config = Self::default();
        let given = map.remove("encoder_kwargs");
        take(&mut config, "", &mut map)?;
        finish(map, "", "", &[Self::NAMES])?;
        let mut of_layers = match given {
            Some(given) => object("encoder_kwargs", given)?,
            None => Map::from_iter([("attn_dim_head".to_string(), json!(16)), ("heads".to_string(), json!(4))]),
        };
        own_widths(&of_layers).context("encoder_kwargs")?;
        of_layers.insert("dim".to_string(), json!(config.dim_model));
        of_layers.insert("depth".to_string(), json!(config.depth));
        config.encoder = layers(of_layers, Some(LayersKind::Encoder), "").context("encoder_kwargs")?;
        Ok(config)
    }

    pub(super) fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        map.insert("encoder_kwargs".to_string(), kwargs_of(&self.encoder));
        map
    }

    /// Resolves the options.
    ///
    /// Errors: those of [`AttentionLayersConfig::plan`]; no nodes.
    pub fn plan(&self) -> Result<NeoMlpPlan> {
        for (key, nodes) in [("dim_in", self.dim_in), ("dim_hidden", self.dim_hidden), ("dim_out", self.dim_out)] {
            at_least_one(key, nodes)?;
        }
        let layers = self.encoder.plan().context("encoder_kwargs")?;
        ensure!(
            !layers.cross_attend && layers.condition.is_none(),
            Error::option("cross_attend", "nodes have no context or condition").context("encoder_kwargs")
        );
        Ok(NeoMlpPlan { nodes: [self.dim_in, self.dim_hidden, self.dim_out], layers })
    }
}

impl GptVaeConfig {
    pub(super) fn from_map(mut map: Map) -> Result<Self> {
        required(&map, &["num_tokens", "dim", "depth", "enc_depth", "max_seq_len"])?;
        let mut config = Self::default();
        let mut of_sides = [map.remove("enc_kwargs"), map.remove("dec_kwargs")];
        take(&mut config, "", &mut map)?;
        let encoder = map.remove("encoder").unwrap_or_default();
        ensure!(
            encoder.is_null(),
            Error::option("encoder", "is an option of x-transformers 2 that is not supported yet")
        );
        let mut side = |at: usize, kind, depth: usize| -> Result<AttentionLayersConfig> {
            let key = ["enc_kwargs", "dec_kwargs"][at];
            let own = of_sides[at].take().map_or_else(|| Ok(Map::new()), |own| object(key, own))?;
            own_widths(&own).context(key)?;
            let twice = own.keys().find(|name| *name == "heads" || *name == "attn_dim_head");
            if let Some(name) = twice {
                return Err(Error::option(name, "is that of both models; give it outside").context(key));
            }
            let mut options = map.clone();
            options.extend(own);
            for (name, value) in [("dim", config.dim), ("depth", depth), ("heads", config.heads)] {
                options.insert(name.to_string(), json!(value));
            }
            options.insert("attn_dim_head".to_string(), json!(config.attn_dim_head));
            layers(options, Some(kind), "").context(key)
        };
        let enc = side(0, LayersKind::Encoder, config.enc_depth)?;
        let dec = side(1, LayersKind::Decoder, config.depth)?;
        Ok(Self { enc, dec, ..config })
    }

    pub(super) fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        for (key, layers) in [("enc_kwargs", &self.enc), ("dec_kwargs", &self.dec)] {
            let mut own = kwargs_of(layers);
            if let Value::Object(own) = &mut own {
                ["heads", "attn_dim_head"].iter().for_each(|name| drop(own.remove(*name)));
            }
            map.insert(key.to_string(), own);
        }
        map
    }

    /// Resolves the options.
    ///
    /// Errors: those of [`TransformerWrapperConfig::plan`].
    pub fn plan(&self) -> Result<AroundPlan> {
        at_least_one("max_seq_len", self.max_seq_len)?;
        at_least_one("dim_latent", self.dim_latent.unwrap_or(1))?;
        probability("latents_dropout_prob", self.latents_dropout_prob)?;
        let encoder = TransformerWrapperConfig {
            return_only_embed: true,
            average_pool_embed: true,
            ..TransformerWrapperConfig::new(self.num_tokens, self.max_seq_len + 1, self.enc.clone())
        };
        let decoder = TransformerWrapperConfig::new(self.num_tokens, self.max_seq_len, self.dec.clone());
        Ok(AroundPlan::Vae(Box::new(GptVaePlan {
            encoder: encoder.plan().context("enc_kwargs")?,
            decoder: decoder.plan().context("dec_kwargs")?,
            dim_latent: self.dim_latent.unwrap_or(self.dim),
            divergence: [self.vae_kl_loss_weight, self.vae_kl_div_floor],
            latents_dropout: self.latents_dropout_prob,
            pad: self.pad_id,
        })))
    }
}

/// Checks that options of layers leave to the class what it sets.
fn own_widths(map: &Map) -> Result<()> {
    match ["dim", "depth", "kind"].into_iter().find(|key| map.contains_key(*key)) {
        Some(key) => Err(Error::option(key, "is set by the class")),
        None => Ok(()),
    }
}

/// Returns options of layers without those that the class sets.
fn kwargs_of(layers: &AttentionLayersConfig) -> Value {
    let mut map = layers.to_map();
    ["kind", "dim", "depth"].iter().for_each(|key| drop(map.remove(*key)));
    Value::Object(map)
}
