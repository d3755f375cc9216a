//! Presets: models that people train.

use clap::ValueEnum;
use x_transformers::{
    config::{
        AttentionConfig, AttentionLayersConfig, FeedForwardConfig, FinalNorm, TransformerWrapperConfig,
        ViTransformerWrapperConfig,
    },
    ops::Activation,
};

use crate::failure::{Failure, Result};

/// A model by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Preset {
    /// GPT-2's smallest model: 12 blocks of width 768, learned positions up to 1024
    #[value(name = "gpt2-124m")]
    Gpt2_124m,
    /// A Llama of 12 blocks of width 768, 2048 positions, which `xt export` writes for transformers
    #[value(name = "llama-160m")]
    Llama160m,
    /// A small Llama with grouped queries: 8 blocks of width 512, 2 of 8 heads for keys
    Modern,
    /// BERT's smaller encoder, for --task classify, regress and mlm: 12 blocks of width 768, positions up to 512
    BertBase,
    /// ViT-S/16, for --task image and caption: 12 blocks of width 384, images of 224 pixels in patches of 16
    VitSmall,
}

impl Preset {
    /// Returns the model, for a vocabulary of this size; by default that of the original.
    pub fn config(self, num_tokens: Option<usize>) -> Result<TransformerWrapperConfig> {
        Ok(match self {
            Self::Gpt2_124m => {
                let layers = AttentionLayersConfig {
                    heads: 12,
                    attn: AttentionConfig { dim_head: 64, qkv_bias: true, ..Default::default() },
                    ff: FeedForwardConfig { activation: Activation::GeluTanh, ..Default::default() },
                    ..AttentionLayersConfig::decoder(768, 12)
                };
                let net = TransformerWrapperConfig::new(num_tokens.unwrap_or(50257), 1024, layers);
                TransformerWrapperConfig { tie_embedding: true, scale_pos_emb: false, ..net }
            }
            Self::Llama160m => llama([768, 12, 12, 12, 3072], num_tokens.unwrap_or(32000), false),
            Self::Modern => llama([512, 8, 8, 2, 1408], num_tokens.unwrap_or(32000), true),
            Self::BertBase => {
                return Err(Failure::new("`--preset bert-base` requires `--task classify`, `regress` or `mlm`"));
            }
            Self::VitSmall => return Err(Failure::new("`--preset vit-small` requires `--task image` or `caption`")),
        })
    }

    /// Returns the encoder, for a vocabulary of this size, with a pooled vector.
    pub fn encoder(self, num_tokens: Option<usize>) -> Result<TransformerWrapperConfig> {
        if self != Self::BertBase {
            return Err(Failure::new("this task requires a `--preset` for encoders: bert-base"));
        }
        let layers = AttentionLayersConfig {
            heads: 12,
            pre_norm: false,
            norm_eps: Some(1e-12),
            attn: AttentionConfig { dim_head: 64, qkv_bias: true, dropout: 0.1, ..Default::default() },
            ff: FeedForwardConfig { dropout: 0.1, ..Default::default() },
            ..AttentionLayersConfig::encoder(768, 12)
        };
        let net = TransformerWrapperConfig::new(num_tokens.unwrap_or(30522), 512, layers);
        Ok(TransformerWrapperConfig {
            num_token_types: 2,
            scale_pos_emb: false,
            post_emb_norm: true,
            pooler: true,
            return_only_embed: true,
            emb_dropout: 0.1,
            ..net
        })
    }

    /// Returns the vision transformer, without its head.
    pub fn vision(self) -> Result<ViTransformerWrapperConfig> {
        if self != Self::VitSmall {
            return Err(Failure::new("this task requires a `--preset` for images: vit-small"));
        }
        let layers = AttentionLayersConfig {
            heads: 6,
            attn: AttentionConfig { dim_head: 64, qkv_bias: true, ..Default::default() },
            ..AttentionLayersConfig::encoder(384, 12)
        };
        Ok(ViTransformerWrapperConfig { image_size: 224, patch_size: 16, attn_layers: layers, ..Default::default() })
    }
}

/// Returns a Llama of these sizes: width, blocks, heads, heads of keys, inner features.
fn llama([dim, depth, heads, kv_heads, inner]: [usize; 5], num_tokens: usize, tied: bool) -> TransformerWrapperConfig {
    let dim_head = dim / heads;
    let layers = AttentionLayersConfig {
        heads,
        use_rmsnorm: true,
        norm_eps: Some(1e-6),
        final_norm: FinalNorm::Same,
        rotary_pos_emb: true,
        rotary_emb_dim: Some(dim_head),
        rotary_qk_only: true,
        attn: AttentionConfig { dim_head, kv_heads: Some(kv_heads), out_bias: false, ..Default::default() },
        ff: FeedForwardConfig {
            // The plan rounds down.
            mult: (inner as f64 + 0.5) / dim as f64,
            glu: true,
            activation: Activation::Silu,
            no_bias: true,
            ..Default::default()
        },
        ..AttentionLayersConfig::decoder(dim, depth)
    };
    let net = TransformerWrapperConfig::new(num_tokens, 2048, layers);
    TransformerWrapperConfig { tie_embedding: tied, logits_bias: tied, ..net }
}

#[cfg(test)]
mod tests {
    use x_transformers::{
        DType, Device, ParamStore,
        models::{TransformerWrapper, ViTransformerWrapper},
    };

    use super::*;

    /// The published numbers of parameters.
    #[test]
    fn presets_have_their_sizes() {
        for (preset, count) in
            [(Preset::Gpt2_124m, 124_439_808), (Preset::Llama160m, 162_417_408), (Preset::Modern, 38_937_088)]
        {
            let config = preset.config(None).expect("a language model");
            let store = ParamStore::shapes(DType::F32, &Device::Cpu);
            TransformerWrapper::new(&config, &store).expect("a model");
            assert_eq!(store.params().numel(), count, "{preset:?}");
        }
        // BERT with its pooler.
        let store = ParamStore::shapes(DType::F32, &Device::Cpu);
        TransformerWrapper::new(&Preset::BertBase.encoder(None).expect("an encoder"), &store).expect("a model");
        assert_eq!(store.params().numel(), 109_482_240);
        // ViT-S/16 without a head.
        let store = ParamStore::shapes(DType::F32, &Device::Cpu);
        ViTransformerWrapper::new(&Preset::VitSmall.vision().expect("a vision transformer"), &store).expect("a model");
        assert_eq!(store.params().numel(), 21_665_664);
        assert!(Preset::VitSmall.config(None).is_err() && Preset::Modern.vision().is_err());
    }
}
