//! BERT and ALBERT, by the names of `transformers`.

use super::{Described, Names, Options, TensorFile, ff_mult, names::equal};
use crate::{
    Result,
    config::{AttentionConfig, AttentionLayersConfig, FeedForwardConfig, FinalNorm, TransformerWrapperConfig},
    ops::Activation,
};

/// Returns the options common to both, without the heads.
fn encoder(options: &Options, activation: &str) -> Result<TransformerWrapperConfig> {
    options.only("position_embedding_type", "absolute")?;
    options.only("is_decoder", false)?;
    options.only("add_cross_attention", false)?;
    let dim = options.size("hidden_size", Some(768))?;
    let heads = options.size("num_attention_heads", Some(12))?;
    if !dim.is_multiple_of(heads) {
        return Err(
            options.refuse("num_attention_heads", format!("is {heads}, expected a divisor of `hidden_size` ({dim})"))
        );
    }
    let inner = options.size("intermediate_size", Some(3072))?;
    let layers = AttentionLayersConfig {
        heads,
        pre_norm: false,
        norm_eps: Some(options.number("layer_norm_eps", 1e-12)?),
        attn: AttentionConfig { dim_head: dim / heads, qkv_bias: true, ..AttentionConfig::default() },
        ff: FeedForwardConfig { mult: ff_mult(dim, inner), ..activated(options, activation)? },
        ..AttentionLayersConfig::encoder(dim, options.depth(12)?)
    };
    Ok(TransformerWrapperConfig {
        post_emb_norm: true,
        num_token_types: options.size("type_vocab_size", Some(2))?,
        scale_pos_emb: false,
        ..TransformerWrapperConfig::new(
            options.size("vocab_size", Some(30522))?,
            options.size("max_position_embeddings", Some(512))?,
            layers,
        )
    })
}

/// Returns a feedforward with the activation that `hidden_act` names.
fn activated(options: &Options, default: &str) -> Result<FeedForwardConfig> {
    const KEY: &str = "hidden_act";
    let activation = match options.text(KEY, default)? {
        "gelu" | "gelu_python" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "relu" => Activation::Relu,
        "relu2" => Activation::ReluSquared,
        "silu" | "swish" => Activation::Silu,
        other => {
            let known = "gelu, gelu_new, gelu_fast, quick_gelu, relu, relu2, silu, or an alias";
            return Err(options.refuse(KEY, format!("is `{other}`, expected one of {known}")));
        }
    };
    Ok(FeedForwardConfig { activation, ..FeedForwardConfig::default() })
}

/// Names of the token embeddings.
const TABLE: &str = "embeddings.word_embeddings.weight";

/// Selects the heads that the file has weights of. A masked-LM head whose decoder is not tied to the embeddings is
/// omitted: embedding texts does not need it.
fn heads(
    config: &mut TransformerWrapperConfig,
    file: &TensorFile,
    [masked, decoder]: [&str; 2],
    pooler: &str,
) -> Result<()> {
    let own = file.info(decoder).is_some() && file.info(TABLE).is_some() && !equal(file, decoder, TABLE)?;
    config.mlm_head = file.info(masked).is_some() && !own;
    config.tie_embedding = config.mlm_head;
    config.return_only_embed = !config.mlm_head;
    config.pooler = file.info(pooler).is_some();
    Ok(())
}

fn embeddings(names: &mut Names) {
    names.one("token_emb.weight", TABLE);
    names.one("pos_emb.emb.weight", "embeddings.position_embeddings.weight");
    names.one("token_type_emb.weight", "embeddings.token_type_embeddings.weight");
    names.affine("post_emb_norm", "embeddings.LayerNorm");
}

/// The masked-LM head below a place, with `transform` above its dense layer and its norm.
fn masked_head(names: &mut Names, place: &str, transform: &str) {
    names.affine("mlm_head.dense", &format!("{place}{transform}dense"));
    names.affine("mlm_head.norm", &format!("{place}{transform}LayerNorm"));
    names.one("mlm_head.bias", format!("{place}bias"));
    names.copies.push((format!("{place}decoder.weight"), TABLE.to_string()));
    names.copies.push((format!("{place}decoder.bias"), format!("{place}bias")));
}

pub(super) fn bert(options: &Options, file: &TensorFile) -> Result<Described> {
    let mut config = encoder(options, "gelu")?;
    let masked = ["cls.predictions.transform.dense.weight", "cls.predictions.decoder.weight"];
    heads(&mut config, file, masked, "pooler.dense.weight")?;
    let mut names = Names::default();
    embeddings(&mut names);
    let depth = config.attn_layers.depth;
    for layer in 0..depth {
        let theirs = format!("encoder.layer.{layer}");
        let own = format!("attn_layers.layers.{}", 2 * layer);
        let ff = format!("attn_layers.layers.{}", 2 * layer + 1);
        // The wrapper owns the norm of the last sum.
        let last = if layer + 1 == depth { "norm".to_string() } else { format!("{ff}.0.2") };
        names.affine(&format!("{own}.1.to_q"), &format!("{theirs}.attention.self.query"));
        names.affine(&format!("{own}.1.to_k"), &format!("{theirs}.attention.self.key"));
        names.affine(&format!("{own}.1.to_v"), &format!("{theirs}.attention.self.value"));
        names.affine(&format!("{own}.1.to_out"), &format!("{theirs}.attention.output.dense"));
        names.affine(&format!("{own}.0.2"), &format!("{theirs}.attention.output.LayerNorm"));
        names.affine(&format!("{ff}.1.net.0.0"), &format!("{theirs}.intermediate.dense"));
        names.affine(&format!("{ff}.1.net.3"), &format!("{theirs}.output.dense"));
        names.affine(&last, &format!("{theirs}.output.LayerNorm"));
    }
    if config.pooler {
        names.affine("pooler", "pooler.dense");
    }
    if config.mlm_head {
        masked_head(&mut names, "cls.predictions.", "transform.");
    }
    // Heads of the pretraining: the next sentence, and what AntiBERTy tells of an antibody.
    let left_out = ["cls.seq_relationship.", "cls.species.", "cls.chain.", "cls.graft."];
    names.left_out.extend(left_out.map(str::to_string));
    Ok((config, names))
}

pub(super) fn albert(options: &Options, file: &TensorFile) -> Result<Described> {
    options.only("num_hidden_groups", 1)?;
    options.only("inner_group_num", 1)?;
    let mut config = encoder(options, "gelu_new")?;
    config.emb_dim = Some(options.size("embedding_size", Some(128))?);
    config.attn_layers.weight_tie_layers = true;
    config.attn_layers.final_norm = FinalNorm::None;
    heads(&mut config, file, ["predictions.dense.weight", "predictions.decoder.weight"], "pooler.weight")?;
    let mut names = Names::default();
    embeddings(&mut names);
    if config.emb_dim != Some(config.attn_layers.dim) {
        names.affine("project_emb", "encoder.embedding_hidden_mapping_in");
    }
    let theirs = "encoder.albert_layer_groups.0.albert_layers.0";
    let (own, ff) = ("attn_layers.layers.0", "attn_layers.layers.1");
    names.affine(&format!("{own}.1.to_q"), &format!("{theirs}.attention.query"));
    names.affine(&format!("{own}.1.to_k"), &format!("{theirs}.attention.key"));
    names.affine(&format!("{own}.1.to_v"), &format!("{theirs}.attention.value"));
    names.affine(&format!("{own}.1.to_out"), &format!("{theirs}.attention.dense"));
    names.affine(&format!("{own}.0.2"), &format!("{theirs}.attention.LayerNorm"));
    names.affine(&format!("{ff}.1.net.0.0"), &format!("{theirs}.ffn"));
    names.affine(&format!("{ff}.1.net.3"), &format!("{theirs}.ffn_output"));
    names.affine(&format!("{ff}.0.2"), &format!("{theirs}.full_layer_layer_norm"));
    if config.pooler {
        names.affine("pooler", "pooler");
    }
    if config.mlm_head {
        masked_head(&mut names, "predictions.", "");
    }
    names.left_out.push("sop_classifier.".to_string());
    Ok((config, names))
}
