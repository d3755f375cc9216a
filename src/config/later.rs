//! Options that x-transformers added after 0.22.0, up to 2.31: their error says so instead of calling them unknown.

/// Names of the options, without the prefixes of groups.
const LATER: &str = "
    adaptive_condition_mlp adaptive_condition_mlp_expansion add_attn_z_loss add_continuous_pred_head
    add_value_residual add_zero_kv amateur_model attend_sdp_kwargs attn_aggregated_residual_kwargs
    attn_aggregated_residuals attn_pool attn_pool_depth attn_z_loss_weight average_pool_embed cache_kv channels
    cog_signed contrastive_decode_kwargs cope_max_pos cope_soft_onehot_pos cope_talking_heads
    cross_attn_tokens_dropout custom_activation custom_attn_fn data_dependent_alibi data_dependent_alibi_kwargs
    data_dependent_alibi_per_row data_dependent_alibi_per_row_dim_head depth_scale_residual dim_condition
    dim_context dim_latent_kv dim_latent_q dim_out dim_pooled_tokens disable_abs_pos_emb dynamic_pos_bias
    dynamic_pos_bias_log_distance dynamic_pos_bias_mlp_depth dynamic_pos_bias_norm dynamic_tanh_init_alpha
    emb_frac_gradient embed_num_tokens equal_loss_weight_batch ff_deep_embed filter_kwargs flash flash_pack_seq
    gate_value_heads gate_values_headwise gate_values_rank gated_multi_residual glu_gate_softclamp_value
    glu_mult_bias glu_softclamp glu_up_softclamp_value gumbel_softmax gumbel_softmax_hard gumbel_softmax_temp hard
    head_learned_sink hybrid_fold_axial_dim hybrid_learned_mix hybrid_mask_kwarg hybrid_module
    hyper_conn_sinkhorn_iters input_not_include_cache integrate_layers inverted_attention k_rmsnorm kv_heads
    l2_distance l2norm_embed laser laser_softclamp_value latent_rope_subheads layer_dropout
    layer_integrate_use_softmax layers_execute_order layerscale_init_value learned_reinject_input_gate
    learned_value_residual_mix logit_softclamp_value logits_dim looped looped_exit_loss_weight looped_loss_slope
    looped_loss_threshold_exit loss_fn low_rank_silu_gates mask_prob max_looped_steps
    memory_tokens_interspersed_every mixture_of_softmax mixture_of_softmax_k mult mv_split_residual
    next_embed_loss_weight norm_add_unit_offset num_cls_tokens num_output_heads num_pooled_tokens
    num_register_tokens num_residual_streams one_kv_head onnxable orthog_projected_values
    orthog_projected_values_per_head orthog_residual output_gate output_gate_headwise output_gate_rank
    output_proj_depth polar_bias_uniform_init polar_pos_emb post_talking_heads pre_and_post_norm
    pre_norm_has_final_norm pre_scale_post_talking_heads pre_talking_heads probabilistic project_in project_out
    prompt_lens qk_norm qk_norm_dim_scale qk_norm_groups qk_norm_scale qk_rmsnorm qkv_receive_diff_residuals
    recycling reinject_input rel_pos_kwargs rel_proj_max_dist rel_proj_num_distance_basis resi_dual resi_dual_scale
    residual_fn_kwargs restrict_to_max_seq_len return_intermediates rotary_base_rescale_factor
    rotary_interpolation_factor rotary_xpos rotary_xpos_scale_base rotate_num_heads scale_residual_constant
    scaled_sinu_pos_emb selective sigmoid sigsoftmax_logits softclamp_logits softclamp_output softclamp_output_value
    softclamp_value solu sparse_topk_straight_through squeeze_out_last_dim sublayer_dropout swiglu_values
    tie_embedding_scale tie_token_emb to_logits token_emb train_max_recycle_steps unet_skips use_abs_pos_emb
    use_adaptive_layernorm use_adaptive_layerscale use_adaptive_rmsnorm use_cls_token use_cope use_derf
    use_dynamic_tanh use_identity_if_same_dim use_l1_loss use_latent_kv use_latent_q use_layerscale
    use_rel_proj_pos_bias use_simple_rmsnorm value_dim_head value_rmsnorm verbose weight_tie_layers
    zero_init_branch_output
";

/// Returns `true` if this is an option of later versions of x-transformers.
pub(super) fn is_later(key: &str) -> bool {
    const PREFIXES: [&str; 6] = ["enc_", "dec_", "cross_", "attn_", "cross_attn_", "ff_"];
    let known = |name: &str| LATER.split_ascii_whitespace().any(|later| later == name);
    let of_stack = ["enc_", "dec_"].iter().find_map(|prefix| key.strip_prefix(prefix)).unwrap_or(key);
    known(of_stack) || PREFIXES.iter().any(|prefix| of_stack.strip_prefix(prefix).is_some_and(known))
}
