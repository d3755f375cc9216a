//! Options of x-transformers 2.31 that are not supported yet, with their defaults, which change nothing; and options that
//! never change a number.

/// Options of attention layers.
pub(super) const LAYERS: &str = "
    use_dynamic_tanh=false use_derf=false dynamic_tanh_init_alpha=1.0 rotate_num_heads=null 
    polar_bias_uniform_init=false attn_aggregated_residuals=false attn_aggregated_residual_kwargs={}
    orthog_residual=false mv_split_residual=false gated_multi_residual=false depth_scale_residual=false
    unet_skips=false integrate_layers=false
    layer_integrate_use_softmax=true qkv_receive_diff_residuals=false reinject_input=false
    learned_reinject_input_gate=false rel_pos_kwargs={} residual_fn_kwargs={}
";

/// Options of attention, without the prefix `attn_`.
pub(super) const ATTENTION: &str = "
    pre_scale_post_talking_heads=false gate_values_rank=null gate_values_headwise=false output_gate=false
    output_gate_rank=null output_gate_headwise=false low_rank_silu_gates=true output_proj_depth=null
    gumbel_softmax=false gumbel_softmax_temp=1.0 gumbel_softmax_hard=true
    custom_attn_fn=null hybrid_module=null hybrid_mask_kwarg=null
    hybrid_fold_axial_dim=null hybrid_learned_mix=false dim_out=null rotate_num_heads=null
    data_dependent_alibi=false data_dependent_alibi_per_row=false data_dependent_alibi_per_row_dim_head=8
    data_dependent_alibi_kwargs={} use_rel_proj_pos_bias=false rel_proj_num_distance_basis=16
    rel_proj_max_dist=1024 use_cope=false cope_max_pos=16 cope_soft_onehot_pos=false cope_talking_heads=false
    orthog_projected_values=false orthog_projected_values_per_head=false
    qkv_receive_diff_residuals=false project_out=null use_latent_q=false dim_latent_q=null use_latent_kv=false
    dim_latent_kv=null latent_rope_subheads=null inverted_attention=false flash_pack_seq=false
";

/// Options of the feedforward, without the prefix `ff_`.
pub(super) const FEEDFORWARD: &str = "
    dim_out=null solu=false output_proj_depth=null softclamp_value=null glu_softclamp=false
    glu_gate_softclamp_value=4.0 glu_up_softclamp_value=25.0
";

/// Options of `TransformerWrapper`.
pub(super) const TRANSFORMER: &str = "
    recycling=false train_max_recycle_steps=4 looped=false max_looped_steps=4 attn_z_loss_weight=0.0001 token_emb=null
    mixture_of_softmax=false mixture_of_softmax_k=4 sigsoftmax_logits=false ff_deep_embed=false to_logits=null
    add_continuous_pred_head=false input_not_include_cache=false
";

/// Options of `ContinuousTransformerWrapper`.
pub(super) const CONTINUOUS: &str = "project_in=null project_out=null";

/// Options of `XTransformer`.
pub(super) const ENCODER_DECODER: &str = "";

/// Options of `AutoregressiveWrapper`.
pub(super) const AUTOREGRESSIVE: &str = "
    next_embed_loss_weight=0.1 looped_loss_threshold_exit=0.05
    looped_loss_slope=50 looped_exit_loss_weight=1.0
";

/// Options of `ContinuousAutoregressiveWrapper`.
pub(super) const CONTINUOUS_AUTOREGRESSIVE: &str = "loss_fn=null";

/// Options of `AttentionPool`.
pub(super) const POOL: &str = "attn_kwargs={}";

/// Options of `XLAutoregressiveWrapper`.
pub(super) const XL: &str = "
    ttt_module_paths=[] ttt_lr=0.001 ttt_wd=0.01 ttt_use_muon=false ttt_muon_steps=5 ttt_muon_lr=0.01
    ttt_low_rank_paths=[] ttt_custom_loss_module=null ttt_next_latent_loss=false episodic_mem_len=0
";

/// Options that never change a number, with the prefixes of their groups.
pub(super) const WITHOUT_EFFECT: &str = "
    verbose hyper_conn_sinkhorn_iters attn_onnxable attn_attend_sdp_kwargs cross_attn_onnxable
    cross_attn_attend_sdp_kwargs
";
