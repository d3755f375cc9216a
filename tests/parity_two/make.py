#!/usr/bin/env python3
"""Writes golden parity cases computed with PyTorch x-transformers 2.31.10.

    python make.py --set public --out DIR
    python make.py --verify DIR      # re-check cases on disk, with finite differences
    python make.py --toggle DIR      # does every option and input of a case matter?
    python make.py --pack DIR        # put these cases into cases.json and cases.safetensors here, for tests/parity_two.rs

One folder per case: config.json, weights.safetensors, inputs.safetensors, expected.safetensors, as
tests/parity/README.md describes; `xt verify DIR` runs them. A case may have several outputs: `cotangent.0` belongs to
`out.0`, `cotangent.embeddings` to `embeddings`.

Expected values are computed in float64 from the stored float32 weights and inputs, then rounded to float32.
x-transformers 2 casts to float32 in places (softmax, `.float()`), whatever the dtype of the model; in the float64 run
those casts are lifted, so that the values carry no float32 noise. The float32 run is the package as it is, and must
agree within 1e-5.

Packed cases keep the checkout small: weights and float inputs are rounded to eight-bit floats times a power of two per
tensor, and evaluated again; of each gradient there are eight sums with drawn signs.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import zlib

CASES = {"public": {}}
D = 24  # width of the models


def case(which, name, cfg, inputs, after=None, tweak=None, same=()):
    """after: the case whose mems and weights this one continues from.
    tweak: parameter name ending -> values to set.
    same: options (or inputs) that are known not to change the numbers here."""
    assert name not in CASES[which], name
    CASES[which][name] = dict(cfg={"version": "2", **cfg}, inputs=inputs, after=after, tweak=tweak, same=same)


# input makers: each returns a spec tuple, turned into a tensor later

def tok(b, n, vocab):
    return ("tokens", (b, n), vocab)


def flt(*shape, scale=1.0):
    return ("float", shape, scale)


def lens(n, *lengths):
    """Prefix mask: row i has lengths[i] leading True values."""
    return ("lens", n, lengths)


def tail(n, *lengths):
    """Suffix mask: row i has lengths[i] trailing True values (padding on the left)."""
    return ("tail", n, lengths)


def rmask(*shape, p=0.7, diag=True):
    """Random boolean mask; with diag the last two dims keep their diagonal."""
    return ("rmask", shape, p, diag)


def rmask1(b, n, p=0.7):
    """Random boolean per-token mask, first token always kept."""
    return ("rmask1", (b, n), p)


def ints(*rows):
    return ("ints", rows)


def layers(kind, **kw):
    d = dict(kind=kind, dim=D, depth=2, heads=4, attn_dim_head=6, ff_mult=1)
    d.update(kw)
    return {k: v for k, v in d.items() if v is not None}


def dec(**kw):
    return layers("Decoder", **kw)


def enc(**kw):
    return layers("Encoder", **kw)


def tw(attn_layers, num_tokens=26, max_seq_len=24, call=None, **kw):
    d = dict(model="TransformerWrapper", num_tokens=num_tokens, max_seq_len=max_seq_len, **kw)
    d["attn_layers"] = attn_layers
    if call:
        d["call"] = call
    return d


def bare(attn_layers, call=None):
    d = dict(attn_layers)
    out = {"model": d.pop("kind")}
    out.update(d)
    if call:
        out["call"] = call
    return out


def cont(attn_layers, call=None, **kw):
    d = dict(model="ContinuousTransformerWrapper", **kw)
    d["attn_layers"] = attn_layers
    if call:
        d["call"] = call
    return d


def ar(net, call=None, **kw):
    d = dict(model="AutoregressiveWrapper", **kw, net=net)
    if call:
        d["call"] = call
    return d


def public_cases():
    P = lambda name, cfg, inputs, **kw: case("public", name, cfg, inputs, **kw)
    V = 26
    x12 = dict(x=tok(2, 12, V))

    # --- whole models, everything at its default ------------------------------------------------------------------
    P("decoder_gpt", tw(dec(ff_mult=None)), dict(x=tok(2, 17, V)))
    P("decoder_gpt_flash", tw(dec(attn_flash=True)), dict(x=tok(2, 17, V)), same=("attn_flash",))
    P("decoder_rotary", tw(dec(rotary_pos_emb=True, attn_dim_head=8)), dict(x=tok(2, 17, V)))
    P("decoder_mask", tw(dec(depth=1)), dict(x=tok(2, 14, V), mask=lens(14, 14, 9)))
    P("decoder_mask_left", tw(dec(depth=2)), dict(x=tok(2, 12, V), mask=tail(12, 12, 7)))
    P("decoder_one_head", tw(dec(depth=1, heads=1, attn_dim_head=D)), x12)
    P("encoder_bert", tw(enc(ff_mult=2)), dict(x=tok(2, 16, V)))
    P("encoder_bert_mask", tw(enc()), dict(x=tok(2, 15, V), mask=lens(15, 10, 15)))
    P("encoder_bert_random_mask", tw(enc(depth=2)), dict(x=tok(2, 13, V), mask=rmask1(2, 13)))
    P("return_embeddings", tw(dec(depth=1), call=dict(return_embeddings=True)), dict(x=tok(2, 11, V)))
    P("return_logits_and_embeddings", tw(dec(depth=1), call=dict(return_logits_and_embeddings=True)),
      dict(x=tok(2, 9, V)))
    P("return_attn", tw(dec(), call=dict(return_attn=True)), dict(x=tok(2, 9, V)))
    vit = dict(model="ViTransformerWrapper", image_size=16, patch_size=4, attn_layers=enc())
    P("vit_logits", {**vit, "num_classes": 10}, dict(img=flt(2, 3, 16, 16)))
    P("vit_return_embeddings", {**vit, "num_classes": 10, "call": dict(return_embeddings=True)},
      dict(img=flt(2, 3, 16, 16)))
    P("vit_return_logits_and_embeddings", {**vit, "num_classes": 5, "call": dict(return_logits_and_embeddings=True)},
      dict(img=flt(1, 3, 16, 16)))
    P("vit_without_classes", {**vit, "image_size": 20, "patch_size": 5, "attn_layers": enc(depth=1)},
      dict(img=flt(2, 3, 20, 20)))
    P("vit_channels_registers_norm",
      {**vit, "num_classes": 4, "channels": 1, "num_register_tokens": 3, "post_emb_norm": True,
       "attn_layers": enc(depth=1)}, dict(img=flt(2, 1, 16, 12)))
    xt = dict(model="XTransformer", dim=D,
              enc_num_tokens=V, enc_depth=1, enc_heads=4, enc_attn_dim_head=8, enc_max_seq_len=24, enc_ff_mult=1,
              dec_num_tokens=V, dec_depth=1, dec_heads=4, dec_attn_dim_head=8, dec_max_seq_len=24, dec_ff_mult=1)
    P("xtransformer_tied", {**xt, "tie_token_emb": True},
      dict(src=tok(2, 13, V), tgt=tok(2, 12, V), mask=lens(13, 13, 9)), same=("tie_token_emb",))
    P("xtransformer_no_mask", {**xt, "dec_num_tokens": 29, "enc_depth": 2}, dict(src=tok(2, 9, V), tgt=tok(2, 8, 29)))
    P("xtransformer_ignore_index", {**xt, "ignore_index": 0, "pad_value": 3},
      dict(src=tok(2, 9, V), tgt=("padded", 11, (11, 6), V), mask=lens(9, 9, 5)), same=("pad_value",))
    P("xtransformer_positions",
      {**xt, "enc_scaled_sinu_pos_emb": True, "dec_use_abs_pos_emb": False, "enc_num_memory_tokens": 2},
      dict(src=tok(2, 9, V), tgt=tok(2, 10, V), mask=lens(9, 4, 9)))
    P("xtransformer_attn_mask", xt, dict(src=tok(2, 9, V), tgt=tok(2, 8, V), attn_mask=rmask(9, 9)))
    P("xtransformer_src_prepend_embeds", xt,
      dict(src=tok(2, 7, V), tgt=tok(2, 8, V), src_prepend_embeds=flt(2, 3, D), mask=lens(7, 7, 4)))
    P("cross_attend", tw(dec(depth=1, cross_attend=True)), dict(x=tok(2, 13, V), context=flt(2, 17, D)))
    P("cross_attend_masks", tw(dec(depth=1, cross_attend=True)),
      dict(x=tok(2, 12, V), mask=lens(12, 12, 8), context=flt(2, 9, D), context_mask=lens(9, 5, 9)))
    P("cross_attend_context_mask_empty", tw(dec(depth=1, cross_attend=True)),
      dict(x=tok(2, 7, V), context=flt(2, 6, D), context_mask=lens(6, 6, 0)))
    P("cross_attn_dim_context", tw(dec(depth=1, cross_attend=True, cross_attn_dim_context=20, cross_attn_kv_heads=2)),
      dict(x=tok(2, 9, V), context=flt(2, 6, 20)))
    P("bare_encoder", bare(enc(depth=1)), dict(x=flt(2, 7, D), mask=lens(7, 7, 4)))
    P("bare_decoder", bare(dec(depth=1)), dict(x=flt(2, 10, D)))
    P("cross_attender", bare(layers("CrossAttender")),
      dict(x=flt(2, 3, D), context=flt(2, 5, D), mask=lens(3, 3, 2), context_mask=lens(5, 5, 3)))
    P("transformer_block", bare(layers("TransformerBlock", depth=None, causal=True)), dict(x=flt(2, 9, D)))
    P("prefix_decoder", tw(layers("PrefixDecoder"), call=dict(prefix_attn_len=4)), dict(x=tok(2, 11, V)))
    P("prefix_decoder_each", tw(layers("PrefixDecoder", depth=1)),
      dict(x=tok(3, 10, V), prefix_attn_len=ints(2, 7, 0)))
    P("attention_pool", dict(model="AttentionPool", dim=D, num_pooled_tokens=3, dim_context=20, heads=4, dim_head=6,
                             add_residual=True), dict(context=flt(2, 9, 20), mask=lens(9, 9, 4)))

    # --- losses -----------------------------------------------------------------------------------------------------
    P("autoregressive_loss", ar(tw(dec(depth=1))), dict(x=tok(2, 16, V)))
    P("autoregressive_loss_mask", ar(tw(dec(depth=1))), dict(x=tok(2, 16, V), mask=lens(16, 16, 9)))
    P("autoregressive_loss_lens", ar(tw(dec(depth=1)), ignore_index=-1, pad_value=2),
      dict(x=tok(2, 14, V), lens=ints(14, 6)), same=("pad_value", "ignore_index"))
    P("autoregressive_loss_prepend_embeds", ar(tw(dec(depth=1, rotary_pos_emb=True))),
      dict(x=tok(2, 10, V), prepend_embeds=flt(2, 3, D)))
    P("autoregressive_return_outputs", ar(tw(dec(depth=1)), call=dict(return_outputs=True)), dict(x=tok(2, 9, V)))
    P("xl_autoregressive_tbptt", dict(model="XLAutoregressiveWrapper", tbptt_steps=2,
                                      net=tw(dec(depth=1, alibi_pos_bias=True), max_seq_len=5, max_mem_len=5)),
      {"x": tok(2, 16, V), "mems.0": flt(2, 4, D)})
    P("autoregressive_attn_z_loss", ar(tw(dec(depth=2)), add_attn_z_loss=True), dict(x=tok(2, 10, V)))
    P("xl_autoregressive_loss", dict(model="XLAutoregressiveWrapper",
                                     net=tw(dec(depth=2, rotary_pos_emb=True, attn_dim_head=8), max_seq_len=6, max_mem_len=6)),
      dict(x=tok(2, 17, V)))
    P("dpo_loss", dict(model="DPO", beta=5.0, pad_id=0, net=tw(dec(depth=1))),
      dict(preferred_seq=("padded", 12, (12, 8), V), unpreferred_seq=("padded", 12, (9, 12), V),
           prompt_mask=lens(12, 4, 3)))

    # --- norms ------------------------------------------------------------------------------------------------------
    P("use_scalenorm", tw(dec(use_scalenorm=True)), x12)
    P("use_rmsnorm", tw(dec(use_rmsnorm=True)), x12)
    P("use_simple_rmsnorm", tw(dec(use_simple_rmsnorm=True)), x12)
    P("norm_add_unit_offset_false", tw(dec(depth=1, norm_add_unit_offset=False)), x12)
    P("norm_add_unit_offset_false_rms", tw(dec(depth=1, use_rmsnorm=True, norm_add_unit_offset=False)), x12)
    P("rmsnorm_tiny_inputs", bare(enc(depth=1, use_rmsnorm=True)), dict(x=("rowscale", (2, 7, D), (1.0, 2e-14))))
    P("post_norm", tw(enc(pre_norm=False)), dict(x=tok(2, 12, V), mask=lens(12, 12, 8)))
    P("pre_norm_has_final_norm_false", tw(dec(depth=1, pre_norm_has_final_norm=False)), x12)
    P("sandwich_norm", tw(dec(depth=1, sandwich_norm=True)), dict(x=tok(2, 12, V), mask=lens(12, 12, 8)))
    P("use_adaptive_layernorm", bare(enc(use_adaptive_layernorm=True, dim_condition=12)),
      dict(x=flt(2, 7, D), condition=flt(2, 12)))
    P("use_adaptive_rmsnorm_layerscale_mlp",
      bare(dec(depth=1, use_adaptive_rmsnorm=True, use_adaptive_layerscale=True, dim_condition=10,
               adaptive_condition_mlp=True, adaptive_condition_mlp_expansion=2)),
      dict(x=flt(2, 7, D), condition=flt(2, 7, 10)))
    P("use_layerscale", tw(dec(depth=1, use_layerscale=True)), x12)

    # --- feedforward ------------------------------------------------------------------------------------------------
    # the only width that can be added to the input
    P("ff_dim_out", tw(dec(ff_dim_out=D, depth=1)), x12, same=("ff_dim_out",))
    P("ff_glu", tw(dec(ff_glu=True, depth=1)), x12)
    P("ff_swish", tw(dec(ff_swish=True, depth=1)), x12)
    P("ff_glu_swish_no_bias", tw(dec(ff_glu=True, ff_swish=True, ff_no_bias=True, depth=1)), x12)
    P("ff_no_bias", tw(dec(ff_no_bias=True, depth=1)), x12)
    P("ff_glu_mult_bias", tw(dec(ff_glu=True, ff_glu_mult_bias=True, depth=1)), x12)
    P("ff_relu_squared", tw(dec(ff_relu_squared=True)), x12)
    P("ff_post_act_ln", tw(dec(depth=1, ff_post_act_ln=True)), x12)
    P("ff_post_act_ln_glu", tw(dec(depth=1, ff_post_act_ln=True, ff_glu=True)), x12)
    P("ff_custom_activation_relu", tw(dec(depth=1, ff_custom_activation="relu")), x12)

    # --- attention --------------------------------------------------------------------------------------------------
    P("attn_kv_heads", tw(dec(attn_kv_heads=2)), x12)
    P("attn_one_kv_head", tw(enc(depth=1, attn_one_kv_head=True, attn_num_mem_kv=2)),
      dict(x=tok(2, 12, V), mask=lens(12, 12, 7)))
    P("attn_value_dim_head", tw(dec(depth=1, attn_value_dim_head=9)), x12)
    P("attn_num_mem_kv", tw(dec(depth=1, attn_num_mem_kv=4)), x12)
    P("attn_num_mem_kv_mask", tw(enc(depth=1, attn_num_mem_kv=3)), dict(x=tok(2, 12, V), mask=lens(12, 7, 0)))
    P("attn_num_mem_kv_rel_pos", tw(dec(depth=1, rel_pos_bias=True, attn_num_mem_kv=2)), x12)
    P("attn_add_zero_kv", tw(enc(depth=1, attn_add_zero_kv=True)), dict(x=tok(2, 12, V), mask=lens(12, 7, 12)))
    P("attn_head_learned_sink", tw(dec(depth=1, attn_head_learned_sink=True), call=dict(return_attn=True)), x12)
    P("attn_softclamp_logits", tw(dec(depth=1, attn_softclamp_logits=True, attn_logit_softclamp_value=2.0)), x12)
    P("softclamp_output", tw(dec(depth=1, softclamp_output=True, softclamp_output_value=2.0)), x12)
    P("attn_talking_heads", tw(dec(attn_pre_talking_heads=True, attn_post_talking_heads=True)), x12)
    P("attn_pre_talking_heads_mask", tw(enc(depth=1, attn_pre_talking_heads=True)),
      dict(x=tok(2, 12, V), mask=lens(12, 12, 6)))
    P("attn_head_scale", tw(dec(depth=1, attn_head_scale=True)), x12)
    P("attn_on_attn", tw(enc(depth=1, attn_on_attn=True)), x12)
    P("attn_gate_values", tw(enc(depth=1, attn_gate_values=True)), x12)
    P("attn_gate_value_heads", tw(enc(depth=1, attn_gate_value_heads=True)), x12)
    P("attn_swiglu_values", tw(dec(depth=1, attn_gate_values=True, attn_swiglu_values=True)), x12)
    P("attn_qk_norm", tw(dec(depth=1, attn_qk_norm=True)), x12)
    P("attn_qk_norm_groups_scale", tw(dec(depth=1, attn_dim_head=8, attn_qk_norm=True, attn_qk_norm_groups=2,
                                         attn_qk_norm_scale=5)), x12)
    P("attn_qk_norm_dim_scale", tw(enc(depth=1, attn_qk_norm=True, attn_qk_norm_dim_scale=True, attn_num_mem_kv=2,
                                       attn_kv_heads=2)), dict(x=tok(2, 12, V), mask=lens(12, 12, 10)))
    P("attn_qk_rmsnorm", tw(dec(depth=1, attn_qk_rmsnorm=True, rotary_pos_emb=True, attn_dim_head=8)), x12)
    P("attn_k_rmsnorm_value_rmsnorm", tw(dec(depth=1, attn_k_rmsnorm=True, attn_value_rmsnorm=True)), x12)
    P("attn_sparse_topk", tw(dec(attn_sparse_topk=4)), dict(x=tok(2, 15, V)))
    P("attn_sparse_topk_mask", tw(enc(depth=1, attn_sparse_topk=5)), dict(x=tok(2, 13, V), mask=lens(13, 13, 3)))
    P("attn_sparse_topk_straight_through", tw(dec(depth=1, attn_sparse_topk=3, attn_sparse_topk_straight_through=True)),
      x12, same=("attn_sparse_topk_straight_through",))
    P("attn_hard", tw(dec(depth=1, attn_hard=True)), x12)
    P("attn_sigmoid", tw(dec(depth=1, attn_sigmoid=True, attn_num_mem_kv=2)), x12)
    P("attn_sigmoid_encoder", tw(enc(depth=1, attn_sigmoid=True, attn_softclamp_logits=True)),
      dict(x=tok(2, 13, V), mask=lens(13, 13, 5)))
    P("attn_l2_distance", tw(dec(depth=1, attn_l2_distance=True, attn_kv_heads=2, alibi_pos_bias=True)), x12)
    P("attn_cog_signed", tw(dec(attn_cog_signed=True)), x12)
    P("attn_cog_signed_sink", tw(enc(depth=1, attn_cog_signed=True, attn_head_learned_sink=True)),
      dict(x=tok(2, 13, V), mask=lens(13, 13, 5)))
    P("attn_selective", tw(dec(attn_selective=True)), x12)
    P("attn_selective_mem_kv", tw(dec(depth=1, attn_selective=True, attn_num_mem_kv=2, attn_head_learned_sink=True)), x12)
    P("attn_laser", tw(dec(depth=1, attn_laser=True, attn_laser_softclamp_value=3.0)), x12)
    P("attn_max_attend_past", tw(dec(depth=1, attn_max_attend_past=3)), dict(x=tok(2, 14, V)))
    P("attn_max_attend_past_layers_mem_kv", tw(dec(depth=2, attn_max_attend_past=[2, 5], attn_num_mem_kv=2)), x12)
    P("attn_mask_2d", tw(enc(depth=1)), dict(x=tok(2, 11, V), attn_mask=rmask(11, 11)))
    P("attn_mask_3d", tw(dec(depth=1)), dict(x=tok(2, 11, V), attn_mask=rmask(4, 11, 11)))
    P("attn_mask_4d", tw(enc(depth=1)),
      dict(x=tok(2, 11, V), attn_mask=rmask(2, 1, 11, 11), mask=lens(11, 11, 8)))
    P("attn_mask_blocks_rows", tw(enc(depth=1)), dict(x=tok(2, 9, V), attn_mask=rmask(9, 9, p=0.15, diag=False)))
    P("self_attn_kv_mask", tw(dec(depth=1)), dict(x=tok(2, 12, V), self_attn_kv_mask=rmask1(2, 12)))
    P("attn_bias", tw(dec(depth=1)), dict(x=tok(2, 12, V), attn_bias=flt(4, 12, 12)))
    P("add_value_residual", tw(dec(depth=3, add_value_residual=True)), x12)
    P("add_value_residual_fixed", tw(dec(depth=2, add_value_residual=True, learned_value_residual_mix=False)), x12)

    # --- positions --------------------------------------------------------------------------------------------------
    P("rotary_emb_dim", tw(enc(depth=1, attn_dim_head=10, rotary_pos_emb=True, rotary_emb_dim=6)),
      dict(x=tok(2, 14, V), mask=lens(14, 11, 14)))
    P("rotary_interpolation_factor", tw(dec(depth=1, attn_dim_head=8, rotary_pos_emb=True, rotary_interpolation_factor=2.5)), x12)
    P("rotary_base_rescale_factor", tw(dec(depth=1, attn_dim_head=16, rotary_pos_emb=True, rotary_base_rescale_factor=4.0)), x12)
    P("rotary_xpos", tw(dec(depth=1, attn_dim_head=8, rotary_xpos=True, rotary_xpos_scale_base=16)), dict(x=tok(2, 15, V)))
    P("rotary_pos", tw(dec(depth=1, attn_dim_head=8, rotary_pos_emb=True)),
      dict(x=tok(2, 9, V), pos=ints(0, 1, 2, 5, 6, 9, 10, 30, 31)))
    P("rotary_context_pos", bare(dec(depth=1, attn_dim_head=8, rotary_pos_emb=True, cross_attend=True)),
      dict(x=flt(2, 6, D), context=flt(2, 5, D), context_pos=ints(0, 3, 4, 8, 9)))
    P("rotary_mem_kv", tw(dec(depth=1, attn_dim_head=8, rotary_pos_emb=True, attn_num_mem_kv=2)), x12)
    P("polar_pos_emb", tw(dec(depth=1, polar_pos_emb=True)), x12)
    P("rel_pos_bias", tw(dec(rel_pos_bias=True)), dict(x=tok(2, 24, V)))
    P("rel_pos_bias_bidirectional", tw(enc(rel_pos_bias=True)), dict(x=tok(2, 24, V), mask=lens(24, 24, 20)))
    P("rel_pos_bias_small_buckets", tw(dec(depth=1, rel_pos_bias=True, rel_pos_num_buckets=8, rel_pos_max_distance=16)),
      dict(x=tok(2, 23, V)))
    # memory key/values have no bias: without one of them a constant of the bias would have no gradient
    P("dynamic_pos_bias", tw(dec(depth=1, dynamic_pos_bias=True, attn_num_mem_kv=1)), x12)
    P("dynamic_pos_bias_log_norm", tw(enc(depth=1, dynamic_pos_bias=True, dynamic_pos_bias_log_distance=True,
                                          dynamic_pos_bias_norm=True, dynamic_pos_bias_mlp_depth=3, attn_num_mem_kv=2)), x12)
    P("alibi_pos_bias", tw(dec(alibi_pos_bias=True)), dict(x=tok(2, 15, V)))
    P("alibi_pos_bias_encoder", tw(enc(depth=1, alibi_pos_bias=True, alibi_num_heads=3)),
      dict(x=tok(2, 15, V), mask=lens(15, 15, 9)))
    P("alibi_mem_kv_flash", tw(dec(depth=1, alibi_pos_bias=True, attn_num_mem_kv=2, attn_flash=True)), x12, same=("attn_flash",))
    P("alibi_pos", tw(dec(depth=1, alibi_pos_bias=True), use_abs_pos_emb=False),
      dict(x=tok(2, 8, V), pos=ints(0, 1, 2, 3, 10, 11, 12, 13)))
    P("scaled_sinu_pos_emb", tw(dec(depth=1), scaled_sinu_pos_emb=True), x12)
    P("use_abs_pos_emb_false", tw(dec(depth=1), use_abs_pos_emb=False), x12)
    P("disable_abs_pos_emb_false", tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8, disable_abs_pos_emb=False)), x12)
    P("l2norm_embed", tw(dec(depth=1), l2norm_embed=True), x12)
    P("pos_absolute", tw(dec(depth=1)), dict(x=tok(2, 8, V), pos=ints(3, 4, 5, 6, 0, 1, 2, 3)))
    P("seq_start_pos", tw(dec(depth=1)), dict(x=tok(2, 12, V), seq_start_pos=ints(0, 5)))

    # --- order, residuals -------------------------------------------------------------------------------------------
    P("macaron", tw(enc(depth=1, macaron=True)), x12)
    P("sandwich_coef", tw(enc(depth=3, sandwich_coef=1)), dict(x=tok(2, 10, V)))
    P("par_ratio", tw(dec(depth=4, par_ratio=4)), x12)
    P("custom_layers", tw(dec(depth=None, custom_layers=["a", "f", "f", "a"])), x12)
    P("weight_tie_layers", tw(dec(depth=3, weight_tie_layers=True)), x12)
    P("layers_execute_order", tw(dec(depth=2, layers_execute_order=[0, 1, 0, 1, 2, 3])), x12)
    P("residual_attn", tw(enc(depth=3, residual_attn=True)), x12)
    P("residual_attn_rel_pos_causal", tw(dec(depth=3, residual_attn=True, rel_pos_bias=True)), x12)
    P("cross_residual_attn", tw(dec(depth=2, cross_attend=True, cross_residual_attn=True)),
      dict(x=tok(2, 10, V), context=flt(2, 6, D), context_mask=lens(6, 6, 4)))
    P("gate_residual", tw(dec(depth=1, gate_residual=True)), x12)
    P("scale_residual", tw(dec(scale_residual=True)), x12)
    P("scale_residual_constant", tw(dec(depth=1, scale_residual_constant=1.5)), x12)
    P("shift_tokens_1", tw(dec(depth=1, shift_tokens=1)), x12)
    P("shift_tokens_encoder", tw(enc(shift_tokens=[1, 0, 2, 1])), dict(x=tok(2, 12, V), mask=lens(12, 7, 12)))
    # the clamp comes before the sum of the streams: without it the last mixings, whose rows sum to 1, had no gradient
    P("num_residual_streams", tw(dec(depth=1, num_residual_streams=3, softclamp_output=True, softclamp_output_value=0.3)),
      dict(x=tok(2, 9, V)))

    # --- the wrapper ------------------------------------------------------------------------------------------------
    P("emb_dim", tw(dec(depth=1), emb_dim=20), x12)
    P("tie_embedding", tw(dec(depth=1), tie_embedding=True), x12)
    P("tie_embedding_scale", tw(dec(depth=1), tie_embedding=True, tie_embedding_scale=0.7), x12)
    P("post_emb_norm", tw(dec(depth=1), post_emb_norm=True), x12)
    P("emb_frac_gradient", tw(dec(depth=1), emb_frac_gradient=0.3), x12, same=("emb_frac_gradient",))
    P("num_memory_tokens", tw(enc(depth=1), num_memory_tokens=3), dict(x=tok(2, 11, V), mask=lens(11, 11, 6)))
    P("memory_tokens_interspersed_every", tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8), num_memory_tokens=2,
                                             memory_tokens_interspersed_every=4), dict(x=tok(2, 10, V)))
    P("embed_num_tokens", tw(enc(depth=1), embed_num_tokens={"segment": 2, "letter": 5}),
      {"x": tok(2, 10, V), "embed_ids.segment": tok(2, 10, 2), "embed_ids.letter": tok(2, 10, 5)})
    P("logits_dim", tw(dec(depth=1), logits_dim=9), x12)
    P("num_output_heads", tw(dec(depth=1), num_output_heads=2), x12)
    P("squeeze_out_last_dim", tw(enc(depth=1), logits_dim=1, squeeze_out_last_dim=True), x12)
    P("return_only_embed", tw(enc(depth=1), return_only_embed=True), x12)
    P("average_pool_embed", tw(enc(depth=1), average_pool_embed=True), dict(x=tok(2, 12, V), mask=lens(12, 5, 12)))
    P("use_cls_token", tw(enc(depth=1), use_cls_token=True), dict(x=tok(2, 12, V), mask=lens(12, 5, 12)))
    P("num_cls_tokens", tw(enc(depth=1), use_cls_token=True, num_cls_tokens=2), x12)
    P("attn_pool", tw(enc(depth=1), attn_pool=True, num_pooled_tokens=2), dict(x=tok(2, 12, V), mask=lens(12, 5, 12)))
    P("attn_pool_depth", tw(enc(depth=1), attn_pool=True, attn_pool_depth=2), dict(x=tok(2, 9, V)))
    P("prepend_embeds", tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8)),
      dict(x=tok(2, 9, V), prepend_embeds=flt(2, 3, D), mask=lens(9, 9, 5)))
    P("prepend_embeds_excised", tw(enc(depth=1), call=dict(excise_prepend_embeds=True)),
      dict(x=tok(2, 9, V), prepend_embeds=flt(2, 3, D), prepend_mask=lens(3, 3, 1)))
    P("sum_embeds", tw(dec(depth=1)), dict(x=tok(2, 9, V), sum_embeds=flt(2, 9, D)))

    # --- recurrence -------------------------------------------------------------------------------------------------
    xl = tw(dec(rel_pos_bias=True), max_seq_len=16, max_mem_len=14, call=dict(return_mems=True))
    P("transformer_xl_seg1", xl, dict(x=tok(2, 9, V)))
    P("transformer_xl_seg2", xl, dict(x=tok(2, 9, V)), after="transformer_xl_seg1")
    P("transformer_xl_seg3", xl, dict(x=tok(2, 9, V)), after="transformer_xl_seg2")
    er = tw(dec(depth=3, attn_dim_head=8, rotary_pos_emb=True), max_seq_len=16, max_mem_len=12, shift_mem_down=1,
            call=dict(return_mems=True))
    P("enhanced_recurrence_seg1", er, dict(x=tok(2, 7, V)), same=("shift_mem_down",))
    P("enhanced_recurrence_seg2", er, dict(x=tok(2, 7, V)), after="enhanced_recurrence_seg1")
    P("mems_alibi_mask", tw(dec(depth=1, alibi_pos_bias=True), max_mem_len=10, call=dict(return_mems=True)),
      {"x": tok(2, 8, V), "mems.0": flt(2, 6, D), "mask": lens(8, 8, 5)})
    P("mems_dynamic_pos_bias", tw(dec(depth=1, dynamic_pos_bias=True, attn_num_mem_kv=1)), {"x": tok(2, 8, V), "mems.0": flt(2, 6, D)})
    P("mem_masks", tw(dec(depth=1)), {"x": tok(2, 8, V), "mems.0": flt(2, 6, D), "mem_masks.0": tail(6, 6, 2)})
    P("max_mem_len_default", tw(dec(depth=1), call=dict(return_mems=True)), dict(x=tok(2, 5, V)))

    # --- continuous -------------------------------------------------------------------------------------------------
    P("continuous", cont(dec(), dim_in=12, dim_out=21, max_seq_len=24), dict(x=flt(2, 13, 12), mask=lens(13, 13, 10)))
    P("continuous_without_max_seq_len", cont(enc(depth=1)), dict(x=flt(2, 13, D), lens=ints(13, 6)))
    P("continuous_memory_tokens", cont(enc(depth=1), dim_in=7, max_seq_len=24, num_memory_tokens=2, post_emb_norm=True),
      dict(x=flt(2, 9, 7), mask=lens(9, 9, 5)))
    P("continuous_average_pool", cont(enc(depth=1), dim_in=7, dim_out=3, max_seq_len=24, average_pool_embed=True),
      dict(x=flt(2, 9, 7), mask=lens(9, 9, 5)))
    P("continuous_probabilistic", cont(dec(depth=1), dim_in=5, dim_out=5, max_seq_len=24, probabilistic=True),
      dict(x=flt(2, 9, 5)))
    P("continuous_identity_if_same_dim", cont(dec(depth=1), dim_in=D, dim_out=D, max_seq_len=24,
                                              use_identity_if_same_dim=True), dict(x=flt(2, 9, D)),
      same=("dim_in", "dim_out"))
    P("continuous_sinu_prepend", cont(dec(depth=1), dim_in=6, max_seq_len=24, scaled_sinu_pos_emb=True),
      dict(x=flt(2, 9, 6), prepend_embeds=flt(2, 2, D)))
    P("continuous_return_mems", cont(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8), dim_in=6, max_seq_len=16,
                                     max_mem_len=5, call=dict(return_mems=True)),
      {"x": flt(2, 8, 6), "mems.0": flt(2, 4, D)})
    car = lambda **kw: dict(model="ContinuousAutoregressiveWrapper", **kw,
                            net=cont(dec(depth=1), dim_in=6, dim_out=6, max_seq_len=24))
    P("continuous_autoregressive_loss", car(), dict(x=flt(2, 12, 6)))
    P("continuous_autoregressive_l1_mask", car(use_l1_loss=True), dict(x=flt(2, 12, 6), mask=lens(12, 12, 5)))
    P("continuous_autoregressive_equal_weight", car(equal_loss_weight_batch=True),
      dict(x=flt(2, 12, 6), lens=ints(11, 4)))
    P("continuous_autoregressive_probabilistic",
      dict(model="ContinuousAutoregressiveWrapper",
           net=cont(dec(depth=1), dim_in=4, dim_out=4, max_seq_len=24, probabilistic=True)), dict(x=flt(2, 9, 4)))
    P("continuous_generate", {**car(), "call": dict(method="generate", seq_len=5)}, dict(start_tokens=flt(2, 4, 6)))

    # --- several inputs, numbers ------------------------------------------------------------------------------------
    P("multi_input", dict(model="MultiInputTransformerWrapper", num_tokens={"note": 12, "pitch": 9}, max_seq_len=20,
                          attn_layers=dec(depth=1)), {"x.note": tok(2, 11, 12), "x.pitch": tok(2, 11, 9)})
    xval = dict(model="XValTransformerWrapper", num_tokens=8, max_seq_len=16, numerical_token_id=3,
                attn_layers=dec(depth=1))
    P("xval", xval, dict(x=tok(2, 12, 8), x_num=flt(2, 12)))
    P("xval_loss", dict(model="XValAutoregressiveWrapper", numerical_loss_weight=0.5, net=xval),
      dict(x=tok(2, 12, 8), x_num=flt(2, 12), mask=lens(12, 12, 7)))

    # --- tokens that are filled in: draws are inputs ------------------------------------------------------------------
    nar = dict(model="NonAutoregressiveWrapper", mask_id=25, no_replace_prob=0.0, random_token_prob=0.0,
               net=tw(enc(depth=1), max_seq_len=9), call=dict(generator_sample_temperature=0.0))
    drawn = {"x": tok(2, 9, 25), "times": ints(0.3, 0.8), "order": ints((3, 1, 8, 0, 2, 7, 4, 6, 5), (8, 7, 0, 1, 5, 2, 6, 3, 4))}
    P("nonautoregressive", nar, drawn, same=("generator_sample_temperature",))
    P("nonautoregressive_cosine_self_cond", {**nar, "schedule": "cosine", "self_cond": True, "self_cond_train_prob": 1.0,
                                             "use_simple_mdlm_loss_weight": False}, drawn)
    P("nonautoregressive_null_embed_critic", {**nar, "self_cond": True, "self_cond_train_prob": 0.0, "schedule": "cosine",
                                              "self_token_critic": True, "critic_loss_weight": 0.7}, drawn)
    P("nonautoregressive_token_critic",
      {**nar, "token_critic": tw(enc(depth=1, heads=2), max_seq_len=9, logits_dim=1), "steps": 4}, drawn)
    fills = dict(method="generate", start_temperature=0.0, noise_level_scale=0.0)
    P("nonautoregressive_generate", {**nar, "steps": 5, "call": {**fills, "batch_size": 2}}, {})
    P("nonautoregressive_generate_again",
      {**nar, "steps": 4, "schedule": "cosine", "self_cond": True, "can_mask_prev_unmasked": True, "call": fills}, {})
    P("nonautoregressive_fill_critic",
      {**nar, "steps": 4, "self_token_critic": True, "call": {**fills, "filter_thres": 0.9}}, {})

    # --- one paper each -----------------------------------------------------------------------------------------------
    cross6 = dict(x=tok(2, 7, V), context=flt(2, 6, D), context_mask=lens(6, 6, 4), mask=lens(7, 7, 5))
    P("use_dynamic_tanh", tw(dec(depth=1, use_dynamic_tanh=True, dynamic_tanh_init_alpha=0.7)), x12)
    P("use_dynamic_tanh_without_offset", tw(enc(depth=1, use_dynamic_tanh=True, norm_add_unit_offset=False, sandwich_norm=True)), x12)
    P("rotate_num_heads", tw(dec(depth=1, rotary_pos_emb=True, rotate_num_heads=1, attn_dim_head=8)), x12)
    P("mv_split_residual", tw(enc(depth=1, mv_split_residual=True)), dict(x=tok(2, 9, V), mask=lens(9, 9, 5)))
    P("scale_residual_number", tw(dec(depth=1, scale_residual=0.8)), x12)
    P("depth_scale_residual_number", tw(dec(depth=1, depth_scale_residual=0.6, macaron=True)), x12)
    P("unet_skips", tw(enc(depth=4, unet_skips=True)), dict(x=tok(2, 8, V)))
    P("integrate_layers", tw(dec(depth=2, integrate_layers=True, rotary_pos_emb=True, attn_dim_head=8)), x12)
    P("integrate_layers_relu_cross", tw(enc(depth=2, integrate_layers=True, layer_integrate_use_softmax=False, cross_attend=True)), cross6)
    P("reinject_input", tw(dec(depth=1, reinject_input=True, learned_reinject_input_gate=True)), x12)
    P("reinject_input_layers", tw(enc(depth=2, reinject_input=True, integrate_layers=True)), x12)
    P("attn_pre_scale_post_talking_heads", tw(dec(depth=1, attn_pre_scale_post_talking_heads=True)), x12)
    P("attn_gate_values_rank", tw(dec(depth=1, attn_gate_values=True, attn_gate_values_rank=5)), x12)
    P("attn_output_gate", tw(dec(depth=1, attn_output_gate=True, attn_output_gate_rank=4, attn_low_rank_silu_gates=False)), x12)
    P("attn_gate_values_headwise_output_gate",
      tw(enc(depth=1, attn_gate_values=True, attn_gate_values_headwise=True, attn_output_gate=True, attn_swiglu_values=True)), x12)
    P("attn_output_gate_headwise", tw(enc(depth=1, attn_output_gate=True, attn_output_gate_headwise=True, attn_gate_values=True)), x12)
    P("cross_attn_inverted_attention", tw(enc(depth=1, cross_attend=True, cross_attn_inverted_attention=True)), cross6)
    P("cross_attn_inverted_attention_mem_kv",
      tw(dec(depth=1, cross_attend=True, cross_attn_inverted_attention=True, cross_attn_num_mem_kv=1, cross_attn_kv_heads=2)),
      dict(x=tok(2, 7, V), context=flt(2, 6, D)))
    P("attn_data_dependent_alibi", tw(dec(depth=1, attn_data_dependent_alibi=True)), x12)
    P("attn_data_dependent_alibi_encoder", tw(enc(depth=1, attn_data_dependent_alibi=True, attn_num_mem_kv=2)),
      dict(x=tok(2, 9, V), mask=lens(9, 9, 6)))
    P("attn_data_dependent_alibi_per_row",
      tw(dec(depth=1, attn_data_dependent_alibi=True, attn_data_dependent_alibi_per_row=True,
             attn_data_dependent_alibi_per_row_dim_head=5)), x12)
    P("attn_use_rel_proj_pos_bias", tw(dec(depth=1, attn_use_rel_proj_pos_bias=True, attn_rel_proj_num_distance_basis=3,
                                           attn_rel_proj_max_dist=7)), x12)
    P("attn_use_rel_proj_pos_bias_alibi",
      tw(enc(depth=1, attn_use_rel_proj_pos_bias=True, attn_rel_proj_num_distance_basis=3, alibi_pos_bias=True,
             attn_rel_proj_max_dist=20), max_mem_len=5), {"x": tok(2, 7, V), "mems.0": flt(2, 5, D)})
    P("attn_use_cope", tw(dec(depth=1, attn_use_cope=True, attn_cope_max_pos=5)), x12)
    P("attn_use_cope_talking", tw(dec(depth=1, attn_use_cope=True, attn_cope_max_pos=6, attn_cope_talking_heads=True,
                                      rotary_pos_emb=True, attn_dim_head=8, attn_kv_heads=2)), x12)
    P("attn_use_latent", tw(dec(depth=1, attn_use_latent_q=True, attn_dim_latent_q=9, attn_use_latent_kv=True,
                                attn_dim_latent_kv=7)), x12)
    P("attn_latent_rope_subheads", tw(dec(depth=1, attn_use_latent_kv=True, attn_dim_latent_kv=7, attn_dim_head=8,
                                          attn_latent_rope_subheads=2, rotary_pos_emb=True)), x12)
    P("ff_solu", tw(dec(depth=1, ff_solu=True)), x12)
    P("ff_solu_glu", tw(dec(depth=1, ff_solu=True, ff_glu=True, ff_post_act_ln=True)), x12)
    P("ff_softclamp_value", tw(dec(depth=1, ff_softclamp_value=0.8)), x12)
    P("ff_solu_softclamp", tw(dec(depth=1, ff_softclamp_value=1.5, ff_solu=True)), x12)
    P("ff_glu_softclamp", tw(dec(depth=1, ff_glu=True, ff_glu_softclamp=True, ff_glu_gate_softclamp_value=0.7,
                                 ff_glu_up_softclamp_value=1.1)), x12)
    P("ff_glu_softclamp_swish", tw(dec(depth=1, ff_glu=True, ff_swish=True, ff_glu_softclamp=True, ff_glu_mult_bias=True)), x12)
    P("mixture_of_softmax", tw(dec(depth=1), mixture_of_softmax=True, mixture_of_softmax_k=3), x12)
    P("mixture_of_softmax_loss", ar(tw(dec(depth=1), mixture_of_softmax=True, tie_embedding=True)), x12)
    P("sigsoftmax_logits", tw(dec(depth=1), sigsoftmax_logits=True), x12)
    P("sigsoftmax_mixture_loss", ar(tw(dec(depth=1), sigsoftmax_logits=True, mixture_of_softmax=True)), x12)

    P("attn_gumbel_softmax", tw(dec(depth=1, attn_gumbel_softmax=True, attn_gumbel_softmax_temp=0.7)), x12,
      same=("attn_gumbel_softmax_temp",))
    P("attn_gumbel_softmax_soft",
      tw(enc(depth=1, attn_gumbel_softmax=True, attn_gumbel_softmax_hard=False, attn_gumbel_softmax_temp=1.7)),
      dict(x=tok(2, 12, V), mask=lens(12, 12, 7)))
    P("use_derf", tw(dec(depth=1, use_derf=True)), x12)
    P("use_derf_without_offset", tw(enc(depth=1, use_derf=True, norm_add_unit_offset=False, pre_norm=False)), x12)
    P("orthog_residual", tw(enc(depth=1, orthog_residual=True, scale_residual=True)), dict(x=tok(2, 9, V), mask=lens(9, 9, 5)))
    P("attn_aggregated_residuals", tw(dec(depth=2, attn_aggregated_residuals=True, attn_aggregated_residual_kwargs={"lora_rank": 5})), x12)
    P("attn_aggregated_residuals_order",
      tw(enc(depth=1, attn_aggregated_residuals=True, layers_execute_order=[0, 1, 0], scale_residual=0.7, reinject_input=True,
             attn_aggregated_residual_kwargs={"lora_rank": 3})), dict(x=tok(2, 7, V), mask=lens(7, 7, 4)))
    P("recycling", tw(dec(depth=1), recycling=True, call=dict(recycle_steps=3)), x12)
    P("recycling_loss", ar(tw(dec(depth=1), recycling=True, num_memory_tokens=2), call=dict(recycle_steps=2)), x12)
    P("recycling_generate", ar(tw(dec(depth=1), recycling=True), call=dict(method="generate", temperature=0.0, seq_len=5,
                                                                         recycle_steps=2)), dict(prompts=tok(2, 4, V)))
    loop = lambda **kw: tw(dec(depth=1, pre_and_post_norm=True), looped=True, max_looped_steps=3, **kw)
    P("looped", loop(), x12)
    P("looped_steps", loop(call=dict(looped_steps=2)), dict(x=tok(2, 9, V)))
    P("looped_loss", ar(loop(), looped_loss_threshold_exit=0.1, looped_loss_slope=3.0, looped_exit_loss_weight=0.7, ignore_index=3),
      dict(x=tok(2, 12, V)))
    P("looped_generate", ar(loop(), call=dict(method="generate", temperature=0.0, seq_len=5, cache_kv=False)), dict(prompts=tok(1, 4, V)))
    P("add_continuous_pred_head", ar(tw(dec(depth=1), add_continuous_pred_head=True), next_embed_loss_weight=0.4),
      dict(x=tok(2, 10, V), lens=ints(10, 6)))

    belief = lambda **kw: dict(model="BeliefStateWrapper", forward_decoder=tw(dec(depth=1), num_tokens=9), **kw)
    P("belief_state", belief(), dict(seq=tok(2, 6, 9)))
    P("belief_state_backward_decoder",
      belief(backward_decoder=tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8), num_tokens=9), pred_distance=True,
             pred_distance_loss_weight=0.4, max_pred_distance=4, backward_ar_loss_weight=0.7), dict(seq=tok(2, 6, 9)))
    P("belief_state_generate", belief(call=dict(method="generate_with_suffix_cond", temperature=0.0, seq_len=5)),
      dict(prompts=tok(2, 3, 9), suffix=tok(2, 4, 9)))
    neo = dict(model="NeoMLP", dim_in=3, dim_hidden=4, dim_out=2, dim_model=D, depth=1)
    P("neo_mlp", neo, dict(x=flt(2, 3)))
    P("neo_mlp_one", {**neo, "encoder_kwargs": dict(heads=2, attn_dim_head=6, ff_mult=1, use_rmsnorm=True)}, dict(x=flt(3)))
    vae = dict(model="GPTVAE", num_tokens=9, dim=D, depth=1, enc_depth=1, max_seq_len=12, attn_dim_head=6, heads=4, ff_mult=1,
               dim_latent=5, pad_id=0, vae_kl_loss_weight=0.3, vae_kl_div_floor=0.05)
    P("gpt_vae", {**vae, "dec_kwargs": dict(alibi_pos_bias=True)}, dict(seq=("padded", 9, (9, 6), 9), noise=flt(2, 5)))
    P("gpt_vae_other_sequence", {**vae, "enc_kwargs": dict(use_rmsnorm=True)},
      dict(seq=("padded", 9, (9, 6), 9), seq_for_latents=("padded", 7, (4, 7), 9), noise=flt(2, 5)))
    P("gpt_vae_generate", {**vae, "call": dict(method="generate", temperature=0.0, seq_len=4, cache_kv=False)},
      dict(prompts=tok(2, 3, 9), latents=flt(2, 5)))

    # --- combinations that were once off ------------------------------------------------------------------------------
    P("layers_execute_order_leaves_out", tw(dec(depth=2, layers_execute_order=[0, 3, 0, 3])), x12)
    P("pre_and_post_norm", tw(dec(depth=1, pre_and_post_norm=True)), x12)
    P("pre_and_post_norm_without_pre", tw(enc(depth=1, pre_norm=False, pre_and_post_norm=True)), x12, same=("pre_and_post_norm",))
    P("continuous_pos", cont(enc(depth=1, rotary_pos_emb=True, disable_abs_pos_emb=False, attn_dim_head=8), dim_in=6, max_seq_len=24),
      dict(x=flt(2, 8, 6), pos=ints(0, 1, 2, 5, 6, 9, 10, 20), seq_start_pos=ints(0, 3)))
    P("attn_z_loss_alibi", ar(tw(dec(depth=2, alibi_pos_bias=True)), add_attn_z_loss=True), dict(x=tok(2, 10, V)))
    P("attn_z_loss_sink_selective", ar(tw(dec(depth=1, attn_head_learned_sink=True, attn_selective=True)), add_attn_z_loss=True),
      dict(x=tok(2, 10, V)))
    P("attn_selective_residual_attn", tw(dec(depth=2, attn_selective=True, residual_attn=True)), x12)
    P("rotary_mem_kv_mems", tw(dec(depth=1, rotary_pos_emb=True, attn_num_mem_kv=2, attn_dim_head=8), max_mem_len=6),
      {"x": tok(2, 6, V), "mems.0": flt(2, 5, D)})
    P("cross_attn_rel_proj_pos_bias", tw(dec(depth=1, cross_attend=True, attn_use_rel_proj_pos_bias=True,
                                             attn_rel_proj_num_distance_basis=3, attn_rel_proj_max_dist=7)),
      dict(x=tok(2, 7, V), context=flt(2, 4, D)))
    P("beam_search_logits_dim", ar(tw(dec(depth=1), logits_dim=9), call=dict(method="beam_search", seq_len=4, beams=3, cache_kv=False)),
      dict(prompts=tok(2, 4, V)))
    P("xl_generate_shift_mem_down", dict(model="XLAutoregressiveWrapper", call=dict(method="generate", temperature=0.0, seq_len=6),
                                         net=tw(dec(depth=2, alibi_pos_bias=True), max_seq_len=5, max_mem_len=5, shift_mem_down=1)),
      dict(start_tokens=tok(2, 8, V)))
    P("rotary_xpos_mems", tw(dec(depth=1, rotary_xpos=True, rotary_xpos_scale_base=16, attn_num_mem_kv=1, attn_dim_head=8), max_mem_len=6),
      {"x": tok(2, 6, V), "mems.0": flt(2, 5, D)})
    P("rotary_mem_kv_cross", tw(dec(depth=1, rotary_pos_emb=True, cross_attend=True, attn_num_mem_kv=2, attn_dim_head=8)),
      dict(x=tok(2, 6, V), context=flt(2, 5, D)))
    P("attn_pool_logits_and_embeddings", tw(enc(depth=1), attn_pool=True, call=dict(return_logits_and_embeddings=True)),
      dict(x=tok(2, 9, V)), same=("attn_pool",))
    P("polar_pos_emb_one_kv_head", tw(dec(depth=1, polar_pos_emb=True, attn_one_kv_head=True)), x12)
    P("cross_attn_learned_value_residual_mix",
      tw(dec(depth=2, cross_attend=True, add_value_residual=True, cross_attn_learned_value_residual_mix=True)),
      dict(x=tok(2, 6, V), context=flt(2, 6, D)))

    # --- arguments of calls ---------------------------------------------------------------------------------------------
    P("detach_mems_false", tw(dec(depth=2, rel_pos_bias=True), max_mem_len=6, call=dict(return_mems=True, detach_mems=False)),
      {"x": tok(2, 5, V), "mems.0": flt(2, 3, D), "mems.1": flt(2, 3, D)})
    P("call_layers_execute_order", tw(dec(depth=2), call=dict(layers_execute_order=[0, 1, 0, 1, 2, 3])), x12)
    P("call_layers_execute_order_scores", bare(dec(depth=2, residual_attn=True, alibi_pos_bias=True),
                                               call=dict(layers_execute_order=[0, 3, 2])), dict(x=flt(2, 7, D)))
    P("return_attn_z_loss", tw(dec(depth=2), call=dict(return_attn_z_loss=True, attn_z_loss_weight=0.3)), dict(x=tok(2, 8, V)))
    P("attn_z_loss_weight", ar(tw(dec(depth=1)), add_attn_z_loss=True, call=dict(attn_z_loss_weight=0.2)), dict(x=tok(2, 8, V)))
    P("pos_float", tw(dec(depth=1)), dict(x=tok(2, 7, V), pos=flt(2, 7, D)))
    P("continuous_mem_masks_sum_prepend", cont(enc(depth=1), dim_in=6, max_seq_len=24),
      {"x": flt(2, 8, 6), "mems.0": flt(2, 6, D), "mem_masks.0": tail(6, 6, 2), "sum_embeds": flt(2, 8, D),
       "prepend_embeds": flt(2, 3, D), "prepend_mask": lens(3, 3, 1)})

    # --- generation: greedy, so that there is nothing to draw ---------------------------------------------------------
    greedy = dict(method="generate", temperature=0.0)
    g = tw(dec(depth=1), max_seq_len=16)
    P("generate_greedy", ar(g, call={**greedy, "seq_len": 7}), dict(prompts=tok(2, 4, V)))
    P("generate_top_k_one", ar(g, call=dict(method="generate", seq_len=6, temperature=1.0, filter_logits_fn="top_k",
                                            filter_kwargs={"k": 1})), dict(prompts=tok(2, 4, V)))
    P("generate_prompt_lens", ar(tw(dec(depth=2, rotary_pos_emb=True, attn_dim_head=8), max_seq_len=20),
                                 call={**greedy, "seq_len": 6}), dict(prompts=tok(3, 7, V), prompt_lens=ints(7, 3, 5)))
    P("generate_prompts_list", ar(tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8), max_seq_len=20),
                                  call={**greedy, "seq_len": 5}), {"prompts.0": ("row", 3, V), "prompts.1": ("row", 6, V)})
    P("generate_prompt_lens_absolute", ar(g, call={**greedy, "seq_len": 6}),
      dict(prompts=tok(2, 7, V), prompt_lens=ints(4, 7)))
    P("generate_sliding_window", ar(tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8), max_seq_len=8),
                                    call={**greedy, "seq_len": 9, "cache_kv": False}), dict(prompts=tok(2, 5, V)))
    P("generate_unrestricted", ar(tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8), max_seq_len=6),
                                  call={**greedy, "seq_len": 8, "restrict_to_max_seq_len": False}), dict(prompts=tok(2, 4, V)))
    P("beam_search_unrestricted", ar(tw(dec(depth=1, alibi_pos_bias=True, disable_abs_pos_emb=True), max_seq_len=5),
                                     call=dict(method="beam_search", seq_len=6, beams=2, cache_kv=False, restrict_to_max_seq_len=False)),
      dict(prompts=tok(2, 4, V)))
    P("generate_xtransformer", {**xt, "call": {**greedy, "seq_len": 6}},
      dict(seq_in=tok(2, 9, V), seq_out_start=tok(2, 1, V), mask=lens(9, 9, 6)))
    P("generate_prepend_embeds", ar(tw(dec(depth=1, rotary_pos_emb=True, attn_dim_head=8)),
                                    call={**greedy, "seq_len": 5, "cache_kv": False}),
      dict(prompts=tok(2, 3, V), prepend_embeds=flt(2, 2, D)))
    P("beam_search", ar(g, call=dict(method="beam_search", seq_len=5, beams=3, return_beams_and_scores=True,
                                     cache_kv=False)), dict(prompts=tok(2, 4, V)))
    P("xl_generate", dict(model="XLAutoregressiveWrapper", call={**greedy, "seq_len": 7},
                          net=tw(dec(depth=2, rotary_pos_emb=True, attn_dim_head=8), max_seq_len=5, max_mem_len=5)),
      dict(start_tokens=tok(2, 12, V)))
    P("xval_generate", dict(model="XValAutoregressiveWrapper", net={**xval, "max_seq_len": 9},
                            call=dict(method="generate", seq_len=7, filter_logits_fn="top_k", filter_kwargs={"k": 1})),
      dict(start_tokens=("rows", ((3, 1, 3, 2), (5, 3, 3, 0))), start_numbers=flt(2, 4)))
    for nm, c in (("top_k", dict(frac_num_tokens=0.1)), ("top_k_k", dict(k=4)), ("top_p", dict(thres=0.9)),
                  ("top_a", dict(min_p_pow=2.0, min_p_ratio=0.02)), ("min_p", dict(min_p=0.1))):
        fn = "top_k" if nm == "top_k_k" else nm
        P("filter_" + nm, dict(model="SamplingFilter", filter_logits_fn=fn, filter_kwargs=c, temperature=0.8),
          dict(logits=flt(3, 30, scale=2.0)))


def late_cases():
    V = 6
    case("public", "generate_eos",
         ar(tw(dec(depth=1), num_tokens=V, max_seq_len=20), pad_value=1,
            call=dict(method="generate", temperature=0.0, seq_len=14, eos_token="AUTO")),
         dict(prompts=tok(2, 3, V)))


# ----------------------------------------------------------------------------
# models
# ----------------------------------------------------------------------------

KINDS = ("Encoder", "Decoder", "PrefixDecoder", "CrossAttender", "TransformerBlock")
WRAPPED = ("net",)


def tuples(value):
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


class Ref:
    def __init__(self):
        import torch
        torch.set_num_threads(1)
        from loguru import logger
        logger.remove()
        import x_transformers
        import x_transformers.x_transformers as xt
        import x_transformers.attend as attend
        import x_transformers.autoregressive_wrapper as arw
        from importlib.metadata import version
        assert version("x-transformers") == "2.31.10", version("x-transformers")
        self.torch, self.pkg, self.xt, self.attend, self.arw = torch, x_transformers, xt, attend, arw
        nn = torch.nn
        self.activations = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "tanh": nn.Tanh(),
                            "gelu_tanh": nn.GELU(approximate="tanh"), "sigmoid": nn.Sigmoid()}
        # Noise is drawn in training only here: without it, all draws are 0.
        torch.Tensor.exponential_ = lambda t, *a, **k: t.fill_(1.0)
        # In the float64 run `.float()` is lifted to `.double()`, except where it decides a bucket of T5.
        self.plain_float = torch.Tensor.float
        bias_forward = xt.RelativePositionBias.forward

        @functools.wraps(bias_forward)
        def with_plain_float(*a, **k):
            lifted = torch.Tensor.float
            torch.Tensor.float = self.plain_float
            try:
                return bias_forward(*a, **k)
            finally:
                torch.Tensor.float = lifted
        xt.RelativePositionBias.forward = with_plain_float

    @contextlib.contextmanager
    def in_dtype(self, dtype, model=None):
        torch = self.torch
        if dtype != torch.float64:
            yield
            return
        for m in model.modules() if model is not None else ():
            if isinstance(m, self.attend.Attend):
                fn = m.attn_fn
                if isinstance(fn, functools.partial) and fn.keywords.get("dtype") == torch.float32:
                    m.attn_fn = functools.partial(fn.func, **{k: v for k, v in fn.keywords.items() if k != "dtype"})
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
        try:
            yield
        finally:
            torch.Tensor.float = self.plain_float
            torch.set_default_dtype(torch.float32)

    # -- building ------------------------------------------------------------

    def keywords(self, cfg):
        out = {}
        for k, v in cfg.items():
            if k.endswith("ff_custom_activation"):
                v = self.activations[v]
            out[k] = tuples(v)
        return out

    def attn_layers(self, cfg):
        cfg = dict(cfg)
        kind = cfg.pop("kind")
        klass = getattr(self.xt, kind)
        return klass(**{"verbose": False, **self.keywords(cfg)})

    def build(self, cfg):
        cfg = {k: v for k, v in cfg.items() if k not in ("call", "version")}
        model = cfg.pop("model")
        if model in KINDS:
            return self.attn_layers({"kind": model, **cfg})
        if model == "BeliefStateWrapper":
            decoders = [self.build(cfg.pop(k)) if k in cfg else None for k in ("forward_decoder", "backward_decoder")]
            return self.pkg.BeliefStateWrapper(*decoders, **cfg)
        if model == "NeoMLP":
            if "encoder_kwargs" in cfg:
                cfg["encoder_kwargs"] = {"verbose": False, **self.keywords(cfg["encoder_kwargs"])}
            return self.pkg.NeoMLP(**cfg)
        if model == "GPTVAE":
            from x_transformers.gpt_vae import GPTVAE
            return GPTVAE(verbose=False, **self.keywords(cfg))
        if "net" in cfg:
            net = self.build(cfg.pop("net"))
            if "token_critic" in cfg:
                cfg["token_critic"] = self.build(cfg.pop("token_critic"))
            out = getattr(self.pkg, model)(net, **self.keywords(cfg))
            return out
        if model == "XTransformer":
            return self.xt.XTransformer(enc_verbose=False, dec_verbose=False, **self.keywords(cfg))
        if model == "AttentionPool":
            return self.xt.AttentionPool(**self.keywords(cfg))
        al = self.attn_layers(cfg.pop("attn_layers"))
        return getattr(self.pkg, model)(attn_layers=al, **self.keywords(cfg))

    def perturb(self, model, g):
        """Moves parameters off their constant or tiny initial values."""
        torch, xt = self.torch, self.xt

        def r(t):
            return torch.randn(t.shape, generator=g, dtype=torch.float32)

        with torch.no_grad():
            for p in model.parameters():
                flat = p.view(-1)
                if p.numel() and bool((flat == flat[0]).all()) and p.numel() > 1:
                    first = float(flat[0])
                    fan = p.shape[-1] if p.ndim == 2 and p.shape[0] > 1 else 1
                    if first >= 5:  # gates that start wide open
                        p.copy_(0.5 + 0.7 * r(p))
                    elif fan > 1 and first == 0:  # zero-initialised projections
                        p.copy_(0.7 * fan ** -0.5 * r(p))
                    else:
                        p.add_(0.3 * r(p))
                elif p.numel() == 1:
                    p.add_(0.2 * r(p) + (0.3 if abs(float(flat[0])) < 0.1 else 0.0))
            for m in model.modules():
                if isinstance(m, xt.Attention):
                    # sharper attention than the default initialisation gives
                    m.to_q.weight.mul_(2.0)
                    m.to_k.weight.mul_(2.0)
                    a = m.attend
                    for conv in (a.pre_softmax_talking_heads, a.post_softmax_talking_heads,
                                 a.pre_scale_post_talking_heads):
                        if conv is not None:
                            conv.weight.add_(0.4 * r(conv.weight))
                elif isinstance(m, (xt.TokenEmbedding, xt.AbsolutePositionalEmbedding)) and m.l2norm_embed:
                    m.emb.weight.copy_(r(m.emb.weight))
                elif isinstance(m, xt.AttentionPool) and m.queries is not None:
                    m.queries.copy_(r(m.queries))
                elif isinstance(m, xt.TransformerWrapper) and m.cls_token is not None:
                    m.cls_token.copy_(r(m.cls_token))
                elif isinstance(m, xt.HyperConnection):
                    m.static_alpha.add_(1.0 * r(m.static_alpha))
                    m.dynamic_alpha_fn.copy_(0.5 * r(m.dynamic_alpha_fn))
                elif isinstance(m, xt.ScaledSinusoidalEmbedding):
                    m.scale.fill_(0.6)

    # -- running -------------------------------------------------------------

    @staticmethod
    def arguments(inp):
        """`mems.0`, `mems.1` become a list, `embed_ids.kind` a dict."""
        args = {}
        for k, v in inp.items():
            if k.startswith("cotangent"):
                continue
            head, dot, rest = k.partition(".")
            if not dot:
                args[k] = v
            elif rest.isdigit():
                args.setdefault(head, {})[int(rest)] = v
            else:
                args.setdefault(head, {})[rest] = v
        return {k: ([v[i] for i in sorted(v)] if isinstance(v, dict) and all(isinstance(i, int) for i in v) else v)
                for k, v in args.items()}

    @contextlib.contextmanager
    def given_draws(self, times, order):
        """Gives the draws of NonAutoregressiveWrapper: times of rows, and the ranks of the positions."""
        torch = self.torch
        uniform, rand = torch.Tensor.uniform_, torch.rand

        def drawn(t, *a, **k):
            with torch.no_grad():
                return t.copy_(times.detach()) if t.shape == times.shape else t.fill_(0.5)
        torch.Tensor.uniform_, torch.rand = drawn, lambda *a, **k: order.argsort(dim=-1).double()
        try:
            yield
        finally:
            torch.Tensor.uniform_, torch.rand = uniform, rand

    def forward(self, model, cfg, inp):
        """Returns (outputs with gradients, extras without)."""
        call = {k: tuples(v) for k, v in cfg.get("call", {}).items()}
        if cfg["model"] == "NonAutoregressiveWrapper":
            with self.given_draws(inp["times"], inp["order"]):
                loss = model(inp["x"], **call)
            # x-transformers has the weights of masked diffusion with the wrong sign
            weighted = cfg.get("use_simple_mdlm_loss_weight", True)
            critic = 0.0 if loss.critic_loss is None else model.critic_loss_weight * loss.critic_loss
            return {"out": (-loss.generator_loss if weighted else loss.generator_loss) + critic}, {}
        if cfg["model"] == "GPTVAE":
            args, drawn = self.arguments(inp), self.torch.randn_like
            noise = args.pop("noise")
            self.torch.randn_like = lambda t: noise
            try:
                return {"out": model(**args, **call)}, {}
            finally:
                self.torch.randn_like = drawn
        out = model(**self.arguments(inp), **call)
        extras = {}
        if call.get("return_attn_z_loss"):
            out, intermediates = out
            return {"out": out, "attn_z_loss": intermediates.attn_z_loss}, extras
        if call.get("detach_mems") is False:
            out, mems = out
            return {"out": out, **{f"mems.{i}": t for i, t in enumerate(mems)}}, extras
        if call.get("return_mems") or call.get("return_attn"):
            out, rest = out
            tag = "mems" if call.get("return_mems") else "attn"
            extras = {f"{tag}.{i}": t.detach() for i, t in enumerate(rest)}
        if call.get("return_outputs"):
            out, (logits, _) = out
            extras = {"logits": logits.detach()}
        if call.get("return_logits_and_embeddings"):
            logits, embeddings = out
            return {"out": logits, "embeddings": embeddings}, extras
        if isinstance(out, dict):
            return {f"out.{k}": v for k, v in out.items()}, extras
        if isinstance(out, (tuple, list)):
            return {f"out.{i}": v for i, v in enumerate(out)}, extras
        return {"out": out}, extras

    def generate(self, model, cfg, inp, margins=None):
        torch = self.torch
        call = dict(cfg["call"])
        method = call.pop("method")
        net = model.decoder.net if cfg["model"] == "XTransformer" else getattr(model, "net", model)
        net = model.decoder if cfg["model"] == "GPTVAE" else net
        hook = None
        if margins is not None and method == "generate" and cfg["model"] != "ContinuousAutoregressiveWrapper":
            every = cfg["model"] == "NonAutoregressiveWrapper"

            def grab(_m, _i, out):
                if every and not isinstance(out, tuple):
                    return  # embeddings for the critic
                logits = out[0] if isinstance(out, tuple) else out
                t = (logits if every else logits[:, -1:]).topk(2, dim=-1).values.flatten(0, 1)
                margins.append(float((t[:, 0] - t[:, 1]).min()))
            hook = net.register_forward_hook(grab)
        torch.manual_seed(0)
        if cfg["model"] == "XValAutoregressiveWrapper" and "filter_logits_fn" in call:
            call["filter_logits_fn"] = self.arw.FILTER_LOGITS_FN[call["filter_logits_fn"]]
        if cfg["model"] == "NonAutoregressiveWrapper":
            with self.given_draws(torch.zeros(0), torch.zeros(0)):
                return {"out": model.generate(**call)}
        out = getattr(model, method)(**self.arguments(inp), **call)
        if hook:
            hook.remove()
        if cfg["model"] == "XValAutoregressiveWrapper":
            return {"out": out[0], "numbers": torch.nan_to_num(out[1], nan=0.0)}
        if method == "beam_search" and call.get("return_beams_and_scores"):
            return {"out": out[0], "scores": out[1]}
        return {"out": out}

    def filter_probs(self, cfg, logits):
        f = self.arw.FILTER_LOGITS_FN[cfg["filter_logits_fn"]](logits.clone(), **cfg["filter_kwargs"])
        return self.torch.softmax(f / cfg["temperature"], dim=-1)

    def evaluate(self, cfg, sd, inp, dtype):
        """Runs forward and backward from stored tensors; returns expected dict."""
        torch = self.torch
        if cfg["model"] == "SamplingFilter":
            return {"out": self.filter_probs(cfg, inp["logits"].to(dtype))}
        model = self.build(cfg)
        model.load_state_dict(sd, strict=True)
        model = model.to(dtype).eval()
        inp = {k: (v.to(dtype) if v.is_floating_point() else v) for k, v in inp.items()}
        with self.in_dtype(dtype, model):
            if "method" in cfg.get("call", {}):
                margins = []
                with torch.no_grad():
                    res = self.generate(model, cfg, inp, margins)
                assert not margins or min(margins) > 1e-3, f"ambiguous argmax: {min(margins)}"
                return {k: v.detach() for k, v in res.items()}
            diff = [k for k, v in inp.items()
                    if v.is_floating_point() and not k.startswith(("cotangent", "mems."))]
            for k in diff:
                inp[k] = inp[k].clone().requires_grad_(True)
            outs, extras = self.forward(model, cfg, inp)
            res = {}
            if outs.get("out") is not None and outs["out"].ndim == 0:
                res["loss"] = outs["out"].detach().reshape(1)
                outs["out"].backward()
            else:
                res.update({k: v.detach() for k, v in outs.items()})
                cots = {k: inp.get(cotangent_name(k)) for k in outs}
                if any(c is None for c in cots.values()):
                    return res
                sum((outs[k] * c).sum() for k, c in cots.items()).backward()
            res.update(extras)
            for n, p in self.named_parameters(model):
                if p.grad is not None:
                    res["grad." + n] = p.grad.detach()
            for k in diff:
                if inp[k].grad is not None:
                    res["grad.input." + k] = inp[k].grad.detach()
            return res

    @staticmethod
    def named_parameters(model):
        # DPO hides its reference's parameters from `parameters()`; those of the policy have the long names.
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def loss_value(self, model, cfg, inp):
        with self.torch.no_grad(), self.in_dtype(self.torch.float64):
            outs, _ = self.forward(model, cfg, inp)
            if outs.get("out") is not None and outs["out"].ndim == 0:
                return float(outs["out"])
            return float(sum((v * inp[cotangent_name(k)]).sum() for k, v in outs.items()))


def cotangent_name(output):
    return "cotangent" + output[3:] if output.startswith("out") else "cotangent." + output


# ----------------------------------------------------------------------------
# inputs
# ----------------------------------------------------------------------------

def make_input(torch, spec, g):
    kind = spec[0]
    if kind == "tokens":
        return torch.randint(0, spec[2], spec[1], generator=g)
    if kind == "float":
        return spec[2] * torch.randn(spec[1], generator=g)
    if kind == "ints":
        return torch.tensor(spec[1])
    if kind == "rows":
        return torch.tensor(spec[1])
    if kind == "row":
        return torch.randint(0, spec[2], (spec[1],), generator=g)
    if kind == "rowscale":  # alternating row magnitudes
        scale = torch.tensor([spec[2][i % len(spec[2])] for i in range(spec[1][1])])
        return torch.randn(spec[1], generator=g) * scale[None, :, None]
    if kind == "lens":
        return torch.arange(spec[1])[None, :] < torch.tensor(spec[2])[:, None]
    if kind == "tail":
        return torch.arange(spec[1])[None, :] >= spec[1] - torch.tensor(spec[2])[:, None]
    if kind == "rmask1":
        m = torch.rand(spec[1], generator=g) < spec[2]
        m[:, 0] = True
        return m
    if kind == "rmask":
        m = torch.rand(spec[1], generator=g) < spec[2]
        if spec[3]:
            i, j = m.shape[-2:]
            m = m | (torch.arange(j)[None, :] == torch.arange(i)[:, None] + (j - i))
        return m
    if kind == "padded":
        _, n, ls, vocab = spec
        t = torch.randint(1, vocab, (len(ls), n), generator=g)
        return t * (torch.arange(n)[None, :] < torch.tensor(ls)[:, None])
    if kind == "last_ignored":
        _, n, rows, b, vocab = spec
        t = torch.randint(0, vocab, (b, n), generator=g)
        for i in rows:
            t[i, -1] = -100
        return t
    raise ValueError(kind)


def nonconst(t):
    return t.contiguous().clone()


def generate_set(ref, which, out_dir, only=None):
    torch = ref.torch
    from safetensors.torch import load_file, save_file
    public_cases()
    if which == "public":
        late_cases()
    total, report, failed = 0, [], []
    stored_weights = {}
    for name, c in CASES[which].items():
        if only and not any(o in name for o in only):
            continue
        try:
            size, worst, where, dead, tiny, attempt = generate_case(ref, which, name, c, out_dir, stored_weights,
                                                                    load_file, save_file)
        except Exception as e:  # the list of what failed is the output
            failed.append((name, f"{type(e).__name__}: {e}"))
            print(f"{name:44s} FAILED {type(e).__name__}: {str(e)[:200]}", flush=True)
            continue
        total += size
        report.append((name, size, worst, where))
        print(f"{name:44s} {size/1024:7.1f} KiB  f32 err {worst:.1e} {where if worst > 5e-6 else '':30s}"
              f"{' dead=' + ','.join(dead) if dead else ''}{' tiny=' + ','.join(tiny) if tiny else ''}"
              f"{' attempt=' + str(attempt) if attempt else ''}", flush=True)
    if report:
        big = max(report, key=lambda r: r[1])
        print(f"{len(report)} cases, {total/2**20:.2f} MiB, largest {big[0]} {big[1]/1024:.0f} KiB, "
              f"worst float32 error {max(r[2] for r in report):.1e}")
    for name, why in failed:
        print("FAILED", name, why)
    return not failed


def generate_case(ref, which, name, c, out_dir, stored_weights, load_file, save_file, attempts=90):
    torch = ref.torch
    cfg = json.loads(json.dumps(c["cfg"]))
    root = name
    while CASES[which][root]["after"]:
        root = CASES[which][root]["after"]
    seed = zlib.crc32(f"2x/{which}/{name}".encode()) & 0x7FFFFFFF
    folder = os.path.join(out_dir, name)
    os.makedirs(folder, exist_ok=True)
    last = None
    for attempt in range(attempts):
        g = torch.Generator().manual_seed(seed + 7919 * attempt)
        if cfg["model"] == "SamplingFilter":
            sd = {}
        elif root != name:
            sd = stored_weights[root]
        else:
            torch.manual_seed(seed + 7919 * attempt)
            model = ref.build(cfg)
            ref.perturb(model, g)
            if cfg["model"] == "DPO":  # a reference that is not the policy
                with torch.no_grad():
                    for p in model.ref_model.parameters():
                        p.add_(0.2 * torch.randn(p.shape, generator=g))
            sd = {k: nonconst(v.detach().float() if v.is_floating_point() else v) for k, v in model.state_dict().items()}
            for end, vals in (c["tweak"] or {}).items():
                for k in [k for k in sd if k.endswith(end)]:
                    sd[k] = torch.tensor(vals).reshape(sd[k].shape)
        inp = {k: nonconst(make_input(torch, s, g)) for k, s in c["inputs"].items()}
        if c["after"]:
            prev = load_file(os.path.join(out_dir, c["after"], "expected.safetensors"))
            inp.update({k: v for k, v in prev.items() if k.startswith("mems.")})
        if cfg.get("call", {}).get("eos_token") is not None:
            if not pick_eos(ref, cfg, c["cfg"], sd, inp):
                last = "no end token"
                continue
        try:
            res = ref.evaluate(cfg, sd, inp, torch.float64)
            attached = cfg.get("call", {}).get("detach_mems") is False
            if any(k.startswith(("out", "embeddings")) for k in res) and cfg["model"] != "SamplingFilter" \
                    and "method" not in cfg.get("call", {}):
                for k in [k for k in res if k.startswith("out") or k in ("embeddings", "attn_z_loss")
                          or attached and k.startswith("mems.")]:
                    inp[cotangent_name(k)] = torch.randn(res[k].shape, generator=g)
                res = ref.evaluate(cfg, sd, inp, torch.float64)
            low = ref.evaluate(cfg, sd, inp, torch.float32)
        except AssertionError as e:
            if "ambiguous" in str(e):
                last = str(e)
                continue
            raise
        worst, where = max(((rel(torch, low[k], v), k) for k, v in res.items()), default=(0, ""))
        # a float32 run that strays means an ill-conditioned draw (a near tie, say): draw again
        if worst < 1e-5:
            break
        last = f"{worst:.1e} at {where}"
    else:
        raise RuntimeError(f"no well-conditioned draw (last: {last})")
    # gradients that vanish identically say nothing a relative error can judge: leave them out
    dead = [k for k, v in res.items() if k.startswith("grad.") and not bool(v.abs().sum() > 0)]
    for k in dead:
        del res[k]
    tiny = [k for k, v in res.items() if v.is_floating_point() and 0 < float(v.norm()) < 1e-4]
    exp = {}
    for k, v in res.items():
        assert not v.is_floating_point() or bool(torch.isfinite(v).all()), (name, k)
        exp[k] = nonconst(v.float() if v.is_floating_point() else v)
    stored_weights[name] = sd
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(cfg, f, indent=2)
        f.write("\n")
    save_file(sd, os.path.join(folder, "weights.safetensors"))
    save_file(inp, os.path.join(folder, "inputs.safetensors"))
    save_file(exp, os.path.join(folder, "expected.safetensors"))
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    return size, worst, where, dead, tiny, attempt


def pick_eos(ref, cfg, spec_cfg, sd, inp):
    """Chooses an eos token that every row emits, at different steps, before seq_len."""
    probe = json.loads(json.dumps(spec_cfg))
    probe["call"]["eos_token"] = None
    try:
        out = ref.evaluate(probe, sd, inp, ref.torch.float64)["out"]
    except AssertionError:
        return False
    start = inp["prompts"]
    for t in range(cfg["net"]["num_tokens"]):
        if t == cfg.get("pad_value") or bool((start == t).any()):
            continue
        firsts = [next((i for i, v in enumerate(row.tolist()) if v == t), None) for row in out]
        if None in firsts or len(set(firsts)) < 2 or max(firsts) >= cfg["call"]["seq_len"] - 2:
            continue
        cfg["call"]["eos_token"] = t
        return True
    return False


def rel(torch, a, e):
    if not e.is_floating_point():
        return 0.0 if torch.equal(a, e) else 1.0
    if a.shape != e.shape:
        return float("inf")
    a, e = a.double(), e.double()
    if not a.numel():
        return 0.0
    return float((a - e).norm() / max(float(e.norm()), 1e-6))


# ----------------------------------------------------------------------------
# checks of cases on disk
# ----------------------------------------------------------------------------

def folders(root):
    for name in sorted(os.listdir(root)):
        folder = os.path.join(root, name)
        if os.path.isfile(os.path.join(folder, "config.json")):
            yield name, folder


def load_case(folder):
    from safetensors.torch import load_file
    cfg = json.load(open(os.path.join(folder, "config.json")))
    return (cfg, *(load_file(os.path.join(folder, f + ".safetensors")) for f in ("weights", "inputs", "expected")))


# a draw of the straight-through estimators is not the derivative of the forward pass
NO_DIFFERENCES = ("attn_hard", "straight_through", "attn_sparse_topk", "emb_frac_gradient")


def verify(ref, root, fd_params=3, fd_entries=2):
    torch = ref.torch
    bad = nfd = 0
    worst_fd = worst = (0.0, "")
    for name, folder in folders(root):
        files = sorted(os.listdir(folder))
        assert files == ["config.json", "expected.safetensors", "inputs.safetensors", "weights.safetensors"], (name, files)
        cfg, sd, inp, exp = load_case(folder)
        res = ref.evaluate(cfg, sd, inp, torch.float64)
        res = {k: v for k, v in res.items() if not k.startswith("grad.") or bool(v.abs().sum() > 0)}
        if set(res) != set(exp):
            print(name, "tensor names differ", set(res) ^ set(exp))
            bad += 1
            continue
        err, k = max((rel(torch, res[k], exp[k]), k) for k in exp)
        worst = max(worst, (err, f"{name}:{k}"))
        if not err < 1e-6:
            print(name, "values differ", err, k)
            bad += 1
        if cfg["model"] == "SamplingFilter" or "method" in cfg.get("call", {}):
            continue
        text = json.dumps(cfg)
        if any(s in text for s in NO_DIFFERENCES) or cfg["model"] == "XLAutoregressiveWrapper":
            continue
        model = ref.build(cfg)
        model.load_state_dict(sd)
        model = model.double().eval()
        inp = {k: (v.double() if v.is_floating_point() else v) for k, v in inp.items()}
        with ref.in_dtype(torch.float64, model):
            pass
        g = torch.Generator().manual_seed(1)
        targets = [(n, p) for n, p in ref.named_parameters(model) if "grad." + n in exp]
        order = torch.randperm(len(targets), generator=g).tolist()[:fd_params]
        picks = [(n, p, "grad." + n) for n, p in (targets[i] for i in order)]
        picks += [(k[11:], inp[k[11:]], k) for k in exp if k.startswith("grad.input.")]
        for n, t, key in picks:
            flat, grad = t.data.view(-1), exp[key].double().view(-1)
            idx = [int(grad.abs().argmax())] + torch.randint(0, flat.numel(), (fd_entries - 1,), generator=g).tolist()
            for i in idx:
                old, an = float(flat[i]), float(grad[i])
                for h in (1e-5, 1e-7, 1e-11, 1e-16):
                    flat[i] = old + h
                    up = ref.loss_value(model, cfg, inp)
                    flat[i] = old - h
                    down = ref.loss_value(model, cfg, inp)
                    flat[i] = old
                    fd = (up - down) / (2 * h)
                    e = abs(fd - an) / max(abs(fd), abs(an), 1e-2 * float(grad.abs().max()), 1e-5)
                    if e <= 1e-4:
                        break
                nfd += 1
                worst_fd = max(worst_fd, (e, f"{name}:{key}[{i}] fd={fd:.6g} grad={an:.6g}"))
                if e > 1e-4:
                    print(f"{name}: {key}[{i}] finite difference {fd:.8g} gradient {an:.8g}")
                    bad += 1
    print(f"verify: worst reload error {worst[0]:.1e} ({worst[1]}); {nfd} finite differences, "
          f"worst {worst_fd[0]:.1e} ({worst_fd[1]}); {bad} problems")
    return bad


# ----------------------------------------------------------------------------
# packed cases
# ----------------------------------------------------------------------------

# Numbers that a gradient is summed up in: sums of its elements with signs that a hash draws.
SKETCHES = 8
BUFFERS = ("loss_weights", "rotary_pos_emb.inv_freq", "rotary_pos_emb.scale", "polar_pos_emb.inv_freq")


def fnv1a(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def names_hash(names):
    return f"{fnv1a(chr(10).join(names).encode()):016x}"


def signs(n):
    """Signs [SKETCHES, n]: the top bits of multiples of odd numbers, mixed."""
    import numpy
    index = numpy.arange(n, dtype=numpy.uint64)
    rows = []
    for k in range(SKETCHES):
        with numpy.errstate(over="ignore"):
            x = (index + numpy.uint64(1)) * numpy.uint64(0x9E3779B97F4A7C15) + numpy.uint64(k + 1) * numpy.uint64(0xD1B54A32D192ED03)
            x ^= x >> numpy.uint64(32)
            x *= numpy.uint64(0xD6E8FEB86659FD93)
            x ^= x >> numpy.uint64(32)
        rows.append(1.0 - 2.0 * (x >> numpy.uint64(63)).astype(numpy.float64))
    return numpy.stack(rows)


def to_eight_bits(torch, t):
    """Returns the nearest tensor of eight-bit floats times a power of two, and that power."""
    largest = float(t.abs().max()) if t.numel() else 0.0
    if largest == 0.0:
        return t, 0
    power = math.ceil(math.log2(largest / 448.0))
    return (t / 2.0 ** power).to(torch.float8_e4m3fn).float() * 2.0 ** power, power


def pack(ref, root, out, only=None):
    """Rounds weights and float inputs of cases to eight bits, evaluates them, and stores all in two files."""
    from safetensors.torch import save_file
    torch = ref.torch
    tensors, rows = {}, []
    # cases that are not in the folder stay as they are
    from safetensors.torch import load_file
    public_cases()
    late_cases()
    new = {name for name, _ in folders(root) if not only or any(part in name for part in only)}
    with open(os.path.join(out, "cases.json")) as f:
        rows = [row for row in json.load(f) if row["name"] in CASES["public"] and row["name"] not in new]
    kept = {row["name"] for row in rows}
    old = load_file(os.path.join(out, "cases.safetensors"))
    tensors = {k: v for k, v in old.items() if k.rpartition(".")[0] in kept}
    for name, folder in folders(root):
        if name not in new:
            continue
        cfg, sd, inp, _ = load_case(folder)
        weights = sorted(k for k in sd if not k.endswith(BUFFERS))
        powers = {}
        for k in weights:
            sd[k], powers[k] = to_eight_bits(torch, sd[k].float())
        floats = sorted(k for k, v in inp.items() if v.is_floating_point())
        for k in floats:
            # logits stay as they are: eight bits would make ties
            inp[k], powers["input " + k] = (inp[k], 0) if k == "logits" else to_eight_bits(torch, inp[k])
        try:
            res = ref.evaluate(cfg, sd, inp, torch.float64)
        except AssertionError as e:
            print(name, "left out:", e)
            continue
        row = {"name": name, "config": cfg, "weights": names_hash(weights)}
        flat = [sd[k].flatten() / 2.0 ** powers[k] for k in weights]
        if flat:
            tensors[name + ".weights"] = torch.cat(flat).to(torch.float8_e4m3fn)
            tensors[name + ".powers"] = torch.tensor([powers[k] for k in weights], dtype=torch.float16)
        row["inputs"] = {}
        values = []
        for k in sorted(inp):
            v = inp[k]
            if v.is_floating_point():
                row["inputs"][k] = [list(v.shape), powers["input " + k]]
                values.append(v.flatten() / 2.0 ** powers["input " + k])
            else:
                row["inputs"][k] = v.int().tolist() if v.dtype != torch.bool else v.tolist()
        if values:
            values = torch.cat(values)
            tensors[name + ".inputs"] = values if "logits" in inp else values.to(torch.float8_e4m3fn)
        grads = sorted(k for k, v in res.items() if k.startswith("grad.") and bool(v.abs().sum() > 0))
        row["gradients"] = names_hash(grads)
        if grads:
            tensors[name + ".gradients"] = torch.cat(
                [torch.tensor(signs(res[k].numel()) @ res[k].double().flatten().numpy()) for k in grads]).float()
        outs = sorted(k for k in res if not k.startswith("grad."))
        row["outputs"] = {k: [list(res[k].shape), "int" if not res[k].is_floating_point() else "float"] for k in outs}
        if outs:
            tensors[name + ".outputs"] = torch.cat([res[k].double().flatten() for k in outs]).float()
        rows.append(row)
    rows.sort(key=lambda row: row["name"])
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "cases.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(out, "cases.safetensors"))
    sizes = [os.path.getsize(os.path.join(out, f)) for f in ("cases.json", "cases.safetensors")]
    print(f"{len(rows)} cases, {sizes[0]} + {sizes[1]} bytes")


BASE = {"model", "version", "kind", "dim", "depth", "heads", "attn_dim_head", "num_tokens", "max_seq_len", "net",
        "attn_layers", "image_size", "patch_size", "ff_mult", "call", "numerical_token_id", "channels", "causal"}


def options(cfg, path=()):
    for k, v in cfg.items():
        if k in ("net", "attn_layers", "call"):
            yield from options(v, path + (k,))
        elif k not in BASE and not k.endswith(("_num_tokens", "_max_seq_len", "_depth", "_heads", "_attn_dim_head", "_ff_mult")):
            yield path + (k,)


def without(cfg, path):
    cfg = json.loads(json.dumps(cfg))
    at = cfg
    for k in path[:-1]:
        at = at[k]
    del at[path[-1]]
    return cfg


def toggle(ref, root, which):
    """Runs each case without each of its options and inputs: something must change, or the model must."""
    torch = ref.torch
    if which:
        public_cases()
        if which == "public":
            late_cases()
    same = n = 0
    for name, folder in folders(root):
        cfg, sd, inp, exp = load_case(folder)
        excused = CASES[which][name]["same"] if which else ()
        if cfg["model"] == "SamplingFilter":
            continue
        cotangents = {k: v for k, v in inp.items() if k.startswith("cotangent")}

        def run(cfg, inp):
            model = ref.build(cfg)
            have = model.state_dict()
            if set(have) != set(sd) or any(have[k].shape != sd[k].shape for k in have):
                return "parameters"
            # buffers of the rotation would hide what its options do
            model.load_state_dict({k: v for k, v in sd.items() if "_pos_emb." not in k or k.endswith("learned_bias")}, strict=False)
            model = model.double().eval()
            inp = {k: (v.double() if v.is_floating_point() else v) for k, v in inp.items()}
            with torch.no_grad(), ref.in_dtype(torch.float64, model):
                if "method" in cfg.get("call", {}):
                    return ref.generate(model, cfg, inp)
                outs, extras = ref.forward(model, cfg, inp)
                return {**{("loss" if v.ndim == 0 else k): (v.reshape(1) if v.ndim == 0 else v) for k, v in outs.items()},
                        **extras}

        trials = [("option " + ".".join(p), without(cfg, p), inp) for p in options(cfg) if p[-1] not in excused
                  and p[-1] not in ("method", "seq_len", "cache_kv", "beams", "temperature", "filter_logits_fn")]
        trials += [("input " + k, cfg, {i: v for i, v in inp.items() if i != k}) for k in inp
                   if k not in cotangents and k not in excused]
        for what, c, i in trials:
            n += 1
            try:
                got = run(c, i)
            except Exception:
                continue  # without it the model or the call is not even legal
            if got == "parameters":
                continue
            keys = [k for k in exp if not k.startswith("grad.")]
            change = max((rel(torch, got[k], exp[k]) if k in got else 1.0) for k in keys) if keys else 1.0
            if set(got) - set(exp):
                change = max(change, 1.0)
            if change < 1e-4:
                same += 1
                print(f"{name}: {what} changes nothing ({change:.1e})")
    print(f"toggle: {n} options and inputs left out, {same} without effect")
    return same


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--set", choices=("public",))
    ap.add_argument("--out")
    ap.add_argument("--only", nargs="*", help="only cases whose name contains one of these")
    ap.add_argument("--verify", metavar="DIR")
    ap.add_argument("--toggle", metavar="DIR")
    ap.add_argument("--pack", metavar="DIR", help="write the cases of this folder into cases.json and cases.safetensors here")
    a = ap.parse_args()
    if bool(a.out) and not a.set or not (a.out or a.verify or a.toggle or a.pack):
        ap.error("give --set and --out together, or --verify DIR, or --set and --toggle DIR, or --pack DIR")
    ref = Ref()
    ok = True
    if a.out:
        ok = generate_set(ref, a.set, a.out, a.only)
    if a.pack:
        pack(ref, a.pack, os.path.dirname(os.path.abspath(__file__)), a.only)
    if a.verify:
        ok = not verify(ref, a.verify) and ok
    if a.toggle:
        ok = not toggle(ref, a.toggle, a.set) and ok
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
