//! Key/value caches of models of version 2: sequences that continue have the numbers of whole ones, or the config says why
//! not.

use serde_json::{Value, json};
use x_transformers::{
    DType, Device, ParamStore, Philox, QuantType, Result, Tensor,
    config::{Config, ModelPlan},
    models::{AutoregressiveWrapper, BeamOptions, ForwardOptions, GenerateOptions, TransformerWrapper},
};

fn device() -> Device {
    Device::parse(&std::env::var("XT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_string())).unwrap()
}

/// Options of a decoder, and of its wrapper.
fn configs() -> Vec<(Value, Value)> {
    let layers = [
        json!({}),
        json!({"rotary_pos_emb": true}),
        json!({"rotary_pos_emb": true, "rotary_interpolation_factor": 2.0, "rotary_base_rescale_factor": 3.0, "attn_dim_head": 16}),
        json!({"alibi_pos_bias": true}),
        json!({"alibi_pos_bias": true, "alibi_num_heads": 3, "attn_kv_heads": 2}),
        json!({"alibi_pos_bias": true, "attn_num_mem_kv": 2}),
        json!({"rel_pos_bias": true}),
        json!({"rel_pos_bias": true, "attn_num_mem_kv": 2, "attn_kv_heads": 2}),
        json!({"dynamic_pos_bias": true}),
        json!({"dynamic_pos_bias": true, "attn_num_mem_kv": 1, "attn_add_zero_kv": true}),
        json!({"attn_kv_heads": 2, "rotary_pos_emb": true}),
        json!({"attn_one_kv_head": true}),
        json!({"attn_max_attend_past": 3}),
        json!({"attn_max_attend_past": 3, "attn_num_mem_kv": 2, "attn_kv_heads": 2}),
        json!({"attn_max_attend_past": [2, 4], "depth": 2}),
        json!({"attn_add_zero_kv": true}),
        json!({"attn_qk_norm": true, "rotary_pos_emb": true}),
        json!({"attn_qk_norm": true, "attn_qk_norm_dim_scale": true, "attn_num_mem_kv": 2}),
        json!({"attn_qk_norm": true, "attn_qk_norm_groups": 2}),
        json!({"attn_qk_rmsnorm": true, "attn_value_rmsnorm": true}),
        json!({"attn_value_dim_head": 12}),
        json!({"add_value_residual": true, "depth": 3}),
        json!({"add_value_residual": true, "learned_value_residual_mix": false, "depth": 2}),
        json!({"attn_gate_value_heads": true, "attn_gate_values": true, "attn_swiglu_values": true}),
        json!({"attn_head_learned_sink": true}),
        json!({"attn_softclamp_logits": true, "attn_logit_softclamp_value": 2.0, "rel_pos_bias": true}),
        json!({"attn_laser": true}),
        json!({"attn_hard": true}),
        json!({"attn_gumbel_softmax": true}),
        json!({"attn_gumbel_softmax": true, "attn_gumbel_softmax_hard": false, "attn_gumbel_softmax_temp": 0.5}),
        json!({"use_derf": true}),
        json!({"attn_aggregated_residuals": true, "attn_aggregated_residual_kwargs": {"lora_rank": 4}, "depth": 2}),
        json!({"attn_sigmoid": true, "attn_num_mem_kv": 2}),
        json!({"attn_l2_distance": true, "attn_kv_heads": 2}),
        json!({"attn_cog_signed": true, "attn_head_learned_sink": true}),
        json!({"attn_sparse_topk": 3}),
        json!({"attn_pre_talking_heads": true, "attn_post_talking_heads": true}),
        json!({"residual_attn": true, "depth": 2, "rel_pos_bias": true}),
        json!({"use_layerscale": true, "layerscale_init_value": 0.5, "macaron": true, "shift_tokens": 1}),
        json!({"num_residual_streams": 3, "depth": 2, "softclamp_output": true}),
        json!({"use_simple_rmsnorm": true, "sandwich_norm": true}),
        json!({"pre_norm": false, "gate_residual": true}),
        json!({"scale_residual": true, "scale_residual_constant": 1.5, "use_scalenorm": true}),
        json!({"layers_execute_order": [0, 1, 0, 1]}),
        json!({"weight_tie_layers": true, "depth": 2, "pre_and_post_norm": true}),
        json!({"use_dynamic_tanh": true, "depth_scale_residual": 0.5}),
        json!({"rotary_pos_emb": true, "rotate_num_heads": 1}),
        json!({"unet_skips": true, "depth": 4}),
        json!({"integrate_layers": true, "depth": 2, "rotary_pos_emb": true}),
        json!({"reinject_input": true, "learned_reinject_input_gate": true, "depth": 2}),
        json!({"attn_pre_scale_post_talking_heads": true}),
        json!({"attn_gate_values": true, "attn_gate_values_rank": 3, "attn_output_gate": true}),
        json!({"attn_use_latent_q": true, "attn_dim_latent_q": 6, "attn_use_latent_kv": true, "attn_dim_latent_kv": 5}),
        json!({"attn_use_latent_kv": true, "attn_dim_latent_kv": 5, "attn_latent_rope_subheads": 2, "rotary_pos_emb": true}),
        json!({"ff_solu": true, "ff_softclamp_value": 0.7}),
        json!({"ff_glu": true, "ff_glu_softclamp": true}),
    ];
    let wrappers = [
        json!({"scaled_sinu_pos_emb": true}),
        json!({"l2norm_embed": true}),
        json!({"num_memory_tokens": 2}),
        json!({"tie_embedding": true}),
        json!({"post_emb_norm": true, "emb_dim": 8}),
        json!({"use_abs_pos_emb": false, "max_seq_len": 0}),
        json!({"mixture_of_softmax": true, "sigsoftmax_logits": true}),
        json!({"add_continuous_pred_head": true}),
    ];
    let of_layers = layers.into_iter().map(|layers| (layers, json!({})));
    of_layers.chain(wrappers.into_iter().map(|wrapper| (json!({}), wrapper))).collect()
}

fn model(layers: &Value, wrapper: &Value) -> Result<TransformerWrapper> {
    let mut config = json!({"version": "2", "model": "TransformerWrapper", "num_tokens": 11, "max_seq_len": 12,
        "attn_layers": {"kind": "Decoder", "dim": 32, "depth": 1, "heads": 4, "attn_dim_head": 8, "ff_mult": 1}});
    config.as_object_mut().unwrap().extend(wrapper.as_object().unwrap().clone());
    config["attn_layers"].as_object_mut().unwrap().extend(layers.as_object().unwrap().clone());
    let config = Config::from_value(config)?;
    assert_eq!(Config::from_json(&config.to_json())?, config);
    let ModelPlan::Transformer(plan) = config.plan()? else { panic!("{config:?}") };
    let store = ParamStore::new(3, DType::F64, &device());
    let model = TransformerWrapper::from_plan(plan, &store)?;
    // Away from constant starts, so that each part matters.
    for (index, (_, param)) in store.params().unique().enumerate() {
        let value = param.tensor().detach();
        let wave = |i: usize| 0.3 * ((i * 7 + index * 13) as f64).sin();
        param.set(value.add(&Tensor::generate(*value.shape(), DType::F64, &device(), wave)?)?)?;
    }
    Ok(model)
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let differences = a.detach().sub(&b.detach())?.to_f64_vec()?;
    Ok(differences.into_iter().fold(0.0, |most: f64, x| if x.is_nan() { x } else { most.max(x.abs()) }))
}

/// Options drawn from the list, a few at a time.
fn drawn(count: u64) -> Vec<(Value, Value)> {
    let all = configs();
    let extend =
        |into: &mut Value, more: &Value| into.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let draw = |seed: u64| {
        let random = Philox::new(seed, 0);
        let (mut layers, mut wrapper) = (json!({}), json!({}));
        for at in 0..4 {
            let (more, of_wrapper) = &all[random.below(at, all.len() as u64) as usize];
            extend(&mut layers, more);
            extend(&mut wrapper, of_wrapper);
        }
        (layers, wrapper)
    };
    (0..count).map(draw).collect()
}

#[test]
fn random_options_have_a_cache_or_say_why_not() -> Result<()> {
    let (mut cached, mut refused) = (0, 0);
    for (layers, wrapper) in drawn(60) {
        // Options that cannot be combined name themselves.
        let Ok(model) = model(&layers, &wrapper) else { continue };
        match model.supports_kv_cache(&ForwardOptions::default()) {
            Ok(()) => {
                compare(&model, &format!("{layers} {wrapper}"))?;
                cached += 1;
            }
            Err(why) => {
                assert!(why.contains('`'), "{why}");
                refused += 1;
            }
        }
    }
    assert!(cached > 20, "{cached} cached, {refused} refused");
    Ok(())
}

#[test]
fn cached_sequences_have_the_numbers_of_whole_ones() -> Result<()> {
    configs().iter().try_for_each(|(layers, wrapper)| compare(&model(layers, wrapper)?, &format!("{layers} {wrapper}")))
}

/// Compares a model's calls on whole sequences and on parts of them.
fn compare(model: &TransformerWrapper, name: &str) -> Result<()> {
    let tokens = Tensor::from_vec((0..20i64).map(|i| i * i % 11).collect(), [2, 10], &device())?;
    let options = ForwardOptions { return_embeddings: true, ..ForwardOptions::default() };
    let whole = model.forward(&tokens, &options)?.out;
    let mut cache = model.cache(2, 12, &ForwardOptions::default())?;
    // A beginning, single tokens, and several at once.
    let mut at = 0;
    for n in [3, 1, 1, 2, 3] {
        let new = model.extend(&tokens.narrow(1, at, n)?, &[n, n], None, &mut cache)?;
        let off = difference(&new, &whole.narrow(1, at, n)?)?;
        assert!(off < 1e-9, "{name}: tokens {at} to {} are off by {off}", at + n);
        at += n;
    }
    // Rows of different lengths, padded.
    let mut cache = model.cache(2, 12, &ForwardOptions::default())?;
    let _ = model.extend(&tokens.narrow(1, 0, 4)?, &[4, 2], None, &mut cache)?;
    let next = Tensor::cat(&[&tokens.narrow(0, 0, 1)?.narrow(1, 4, 2)?, &tokens.narrow(0, 1, 1)?.narrow(1, 2, 2)?], 0)?;
    let new = model.extend(&next, &[2, 2], None, &mut cache)?;
    let expected =
        Tensor::cat(&[&whole.narrow(0, 0, 1)?.narrow(1, 4, 2)?, &whole.narrow(0, 1, 1)?.narrow(1, 2, 2)?], 0)?;
    let off = difference(&new, &expected)?;
    assert!(off < 1e-9, "{name}: rows of different lengths are off by {off}");
    Ok(())
}

#[test]
fn generation_beams_and_packed_weights_take_the_options() -> Result<()> {
    let mut greedy = GenerateOptions::default();
    greedy.sampling.temperature = 0.0;
    for (layers, wrapper) in configs() {
        let mut decoder = AutoregressiveWrapper::around(model(&layers, &wrapper)?)?;
        let prompt = Tensor::from_vec(vec![1i64, 2, 3, 4, 5, 6], [2, 3], &device())?;
        let new = decoder.generate(&prompt, 5, &greedy, &mut |_| true)?.to_vec::<i64>()?;
        let anew = GenerateOptions { recompute: true, ..greedy.clone() };
        assert_eq!(decoder.generate(&prompt, 5, &anew, &mut |_| true)?.to_vec::<i64>()?, new, "{layers} {wrapper}");
        let beams = BeamOptions { beams: 1, ..BeamOptions::default() };
        let found = decoder.beam_search(&prompt, 5, &beams, &GenerateOptions::default())?;
        let found: Vec<i64> = found.iter().flat_map(|row| row[0].tokens.clone()).collect();
        assert_eq!(found, new, "{layers} {wrapper}");
        // The model is its own draft, and every guess is right.
        let draft = AutoregressiveWrapper::around(decoder.net.clone())?;
        let (guessed, stats) = decoder.generate_with_draft(&draft, 2, &prompt, 5, &greedy, &mut |_| true)?;
        assert_eq!(guessed.to_vec::<i64>()?, new, "{layers} {wrapper}: {stats:?}");
        let before = decoder.net.forward(&prompt, &ForwardOptions::default())?.out;
        decoder.quantize(QuantType::Q8_0)?;
        let off = difference(&decoder.net.forward(&prompt, &ForwardOptions::default())?.out, &before)?;
        assert!(off > 0.0 && off.is_finite(), "{layers} {wrapper}: {off}");
        let new = decoder.generate(&prompt, 5, &greedy, &mut |_| true)?.to_vec::<i64>()?;
        assert_eq!(decoder.generate(&prompt, 5, &anew, &mut |_| true)?.to_vec::<i64>()?, new, "{layers} {wrapper}");
    }
    Ok(())
}

#[test]
fn options_without_a_cache_say_why() -> Result<()> {
    for (layers, wrapper, why) in [
        (json!({"rotary_xpos": true}), json!({}), "rotary_xpos"),
        (json!({"polar_pos_emb": true}), json!({}), "polar_pos_emb"),
        (json!({"attn_selective": true}), json!({}), "attn_selective"),
        (json!({"attn_data_dependent_alibi": true}), json!({}), "attn_data_dependent_alibi"),
        (json!({"attn_use_cope": true}), json!({}), "attn_use_cope"),
        (json!({"attn_use_rel_proj_pos_bias": true}), json!({}), "attn_use_rel_proj_pos_bias"),
        (json!({"mv_split_residual": true}), json!({}), "mv_split_residual"),
        (json!({"orthog_residual": true}), json!({}), "orthog_residual"),
        (json!({"pre_and_post_norm": true}), json!({"looped": true}), "looped"),
        (json!({"kind": "PrefixDecoder"}), json!({}), "PrefixDecoder"),
        (json!({}), json!({"num_memory_tokens": 2, "memory_tokens_interspersed_every": 4}), "interspersed"),
    ] {
        let model = model(&layers, &wrapper)?;
        let reason = model.supports_kv_cache(&ForwardOptions::default()).unwrap_err();
        assert!(reason.contains(why), "{reason}");
        // Generation computes such models anew in each step.
        let decoder = AutoregressiveWrapper::around(model)?;
        let prompt = Tensor::from_vec(vec![1i64, 2, 3, 4, 5, 6], [2, 3], &device())?;
        let new = decoder.generate(&prompt, 4, &GenerateOptions::default(), &mut |_| true)?;
        assert_eq!(new.shape()[..], [2, 4]);
    }
    Ok(())
}
