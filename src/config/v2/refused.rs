//! Options of x-transformers 2.31 that are not supported yet, with their defaults, which change nothing; and options
//! that never change a number.

/// Options of attention layers.
pub(super) const LAYERS: &str = "
    polar_bias_uniform_init=false gated_multi_residual=false qkv_receive_diff_residuals=false rel_pos_kwargs={}
    residual_fn_kwargs={}
";

/// Options of attention, without the prefix `attn_`.
pub(super) const ATTENTION: &str = "
    output_proj_depth=null custom_attn_fn=null hybrid_module=null hybrid_mask_kwarg=null hybrid_fold_axial_dim=null
    hybrid_learned_mix=false dim_out=null rotate_num_heads=null cope_soft_onehot_pos=false
    data_dependent_alibi_kwargs={} orthog_projected_values=false
    orthog_projected_values_per_head=false qkv_receive_diff_residuals=false project_out=null flash_pack_seq=false
";

/// Options of the feedforward, without the prefix `ff_`.
pub(super) const FEEDFORWARD: &str = "output_proj_depth=null";

/// Options of `TransformerWrapper`.
pub(super) const TRANSFORMER: &str = "token_emb=null ff_deep_embed=false to_logits=null";

/// Options of `ContinuousTransformerWrapper`.
pub(super) const CONTINUOUS: &str = "project_in=null project_out=null";

/// Options of `XTransformer`.
pub(super) const ENCODER_DECODER: &str = "";

/// Options of `AutoregressiveWrapper`.
pub(super) const AUTOREGRESSIVE: &str = "";

/// Options of `ContinuousAutoregressiveWrapper`.
pub(super) const CONTINUOUS_AUTOREGRESSIVE: &str = "loss_fn=null";

/// Options of `AttentionPool`.
pub(super) const POOL: &str = "attn_kwargs={}";

/// Options of `BeliefStateWrapper`.
pub(super) const BELIEF: &str =
    "train_frac_forward_backward_pairs=1.0 text_head=null cond_on_distance=false cond_on_distance_prob=0.5";

/// Options of `XLAutoregressiveWrapper`.
pub(super) const XL: &str = "
    ttt_module_paths=[] ttt_lr=0.001 ttt_wd=0.01 ttt_use_muon=false ttt_muon_steps=5 ttt_muon_lr=0.01
    ttt_low_rank_paths=[] ttt_custom_loss_module=null ttt_next_latent_loss=false episodic_mem_len=0
";

/// Options that never change a number, with the prefixes of their groups.
pub(super) const WITHOUT_EFFECT: &str = "
    verbose hyper_conn_sinkhorn_iters attn_z_loss_weight input_not_include_cache attn_onnxable
    attn_attend_sdp_kwargs cross_attn_onnxable cross_attn_attend_sdp_kwargs
";

/// Arguments of calls.
pub(super) const CALL: &str = "
    return_intermediates return_embeddings_and_intermediates return_logit_entropies return_next_embed_pred
    transform_token_embeds transform_block_inputs token_emb_kwargs to_logits_kwargs cache cache_age seq_pos_offset
    return_hiddens looped_inference looped_exit_prob_threshold max_looped_steps looped_pred_all_logits rotary_pos_emb
    polar_pos_emb in_attn_cond self_attn_additional_kv additional_kv_mask detach_additional_kv
    route_additional_kv_to_top self_attn_kv_residuals cross_attn_kv_residuals deep_embeds_and_ids repeat_blocks causal
    flash_pack_seq_kwargs flash_pack_seq_context_kwargs return_gumbel_log_probs rollout_steps amateur_model
    contrastive_decode_kwargs stochastic dropout_mems ttt_recurrent_steps q_delta k_delta v_delta o_delta attn_delta
    value_residual additional_key_values kv_input_residual
";

/// Says why an option is not supported, where that is not a lack of use.
pub(super) fn reason(name: &str) -> &'static str {
    match name {
        "custom_attn_fn"
        | "hybrid_module"
        | "hybrid_mask_kwarg"
        | "hybrid_fold_axial_dim"
        | "hybrid_learned_mix"
        | "token_emb"
        | "to_logits"
        | "text_head"
        | "project_in"
        | "project_out"
        | "loss_fn"
        | "ttt_custom_loss_module"
        | "transform_token_embeds"
        | "transform_block_inputs" => ": it is code, which a config cannot hold",
        "train_frac_forward_backward_pairs" | "cond_on_distance" => ": it draws at random outside of training too",
        "polar_bias_uniform_init" => ": it fails in x-transformers",
        "flash_pack_seq" | "flash_pack_seq_kwargs" | "flash_pack_seq_context_kwargs" => {
            ": it needs the package flash-attn"
        }
        "cache" | "cache_age" | "seq_pos_offset" | "return_hiddens" | "return_intermediates" => {
            ": caches are `TransformerWrapper::cache` and `extend`, in Rust"
        }
        name if name.starts_with("ttt_") => {
            ": it takes gradient steps inside of the loss, whose gradients are those of gradients"
        }
        _ => "",
    }
}
