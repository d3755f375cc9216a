//! Encoder-decoder models: tied tables, masks.

use super::*;

#[test]
fn encoder_decoder_ties_its_tables() -> Result<()> {
    let side = |kind: AttentionLayersConfig| wrapper(layers(kind));
    let mut config = x_transformers::config::XTransformerConfig {
        enc: side(AttentionLayersConfig::encoder(16, 1)),
        dec: side(AttentionLayersConfig { cross_attend: true, ..AttentionLayersConfig::decoder(16, 1) }),
        tie_token_emb: true,
    };
    let store = ParamStore::new(1, DType::F32, &CPU);
    let model = XTransformer::new(&config, &store)?;
    let params = store.params();
    let leaf = |name: &str| params.get(name).map(|param| param.leaf());
    assert!(leaf("encoder.token_emb.weight").is_some());
    assert_eq!(leaf("encoder.token_emb.weight"), leaf("decoder.net.token_emb.weight"));
    let (src, tgt) = (tokens(2, 6)?, tokens(2, 5)?);
    let mut tape = Tape::train(0);
    let loss = model.loss(&src, &tgt, &EncoderDecoderOptions::default())?;
    let grads = tape.backward(&loss)?;
    // The encoder's own logits are never used.
    assert_eq!(grads.unused(&params), ["encoder.to_logits.bias", "encoder.to_logits.weight"]);
    let generate = GenerateOptions {
        forward: ForwardOptions { context: Some(Tensor::ones([2, 3, 16], DType::F32, &CPU)?), ..Default::default() },
        ..Default::default()
    };
    let outcome = model.generate(&src, &tgt, 2, &EncoderDecoderOptions::default(), &generate, &mut |_| true);
    refused(outcome, &["context", "encoder"]);
    refused(model.loss(&src, &tokens(3, 5)?, &EncoderDecoderOptions::default()), &["context", "[3, length, 16]"]);
    config.enc.tie_embedding = true;
    refused(config.plan(), &["enc", "num_tokens"]);
    Ok(())
}

/// Source masks act in the encoder, and in the decoder's attention to it.
#[test]
fn encoder_decoder_masks() -> Result<()> {
    let side = |kind: AttentionLayersConfig| wrapper(layers(kind));
    let config = x_transformers::config::XTransformerConfig {
        enc: side(AttentionLayersConfig::encoder(16, 1)),
        dec: side(AttentionLayersConfig { cross_attend: true, ..AttentionLayersConfig::decoder(16, 1) }),
        tie_token_emb: false,
    };
    let model = XTransformer::new(&config, &ParamStore::new(1, DType::F64, &CPU))?;
    let (src, tgt) = (tokens(2, 4)?, tokens(2, 5)?);
    let source = bools(&[true, true, true, false, true, true, false, false], &[2, 4])?;
    let target = bools(&[true, false, true, true, true, true, true, true, true, true], &[2, 5])?;
    let pairs = Tensor::arange(4, &CPU)?.unsqueeze(1)?.ge(&Tensor::arange(4, &CPU)?)?;
    let options = EncoderDecoderOptions {
        src_mask: Some(source.clone()),
        tgt_mask: Some(target.clone()),
        src_attn_mask: Some(pairs.clone()),
        ..Default::default()
    };
    let loss = model.loss(&src, &tgt, &options)?.item()?;
    // By hand.
    let encoder = ForwardOptions {
        mask: Some(source.clone()),
        attn_mask: Some(pairs),
        return_embeddings: true,
        ..Default::default()
    };
    let decoder = ForwardOptions {
        mask: Some(target),
        context: Some(model.encoder.forward(&src, &encoder)?.out),
        context_mask: Some(source),
        ..Default::default()
    };
    assert_eq!(model.decoder.loss(&tgt, &decoder)?.item()?, loss);
    let without = |options: EncoderDecoderOptions| model.loss(&src, &tgt, &options)?.item();
    for other in [
        EncoderDecoderOptions { src_mask: None, ..options.clone() },
        EncoderDecoderOptions { tgt_mask: None, ..options.clone() },
        EncoderDecoderOptions { src_attn_mask: None, ..options.clone() },
    ] {
        assert!((without(other)? - loss).abs() > 1e-9);
    }
    let short = Some(Tensor::ones([2, 3], DType::Bool, &CPU)?);
    let wrong = [
        (EncoderDecoderOptions { src_mask: short.clone(), ..Default::default() }, ["encoder", "mask"]),
        (EncoderDecoderOptions { tgt_mask: short.clone(), ..Default::default() }, ["decoder", "mask"]),
        (EncoderDecoderOptions { src_attn_mask: short, ..Default::default() }, ["encoder", "attn_mask"]),
    ];
    for (options, [place, mask]) in wrong {
        refused(model.loss(&src, &tgt, &options), &[place, mask, "[2, 3]"]);
    }
    Ok(())
}
