//! Options of x-transformers 2.31 that are not supported yet, with their defaults, which change nothing; and options that
//! never change a number.

/// Options of attention layers.
pub(super) const LAYERS: &str = "
    use_derf=false polar_bias_uniform_init=false attn_aggregated_residuals=false attn_aggregated_residual_kwargs={}
    orthog_residual=false gated_multi_residual=false qkv_receive_diff_residuals=false rel_pos_kwargs={}
    residual_fn_kwargs={}
";

/// Options of attention, without the prefix `attn_`.
pub(super) const ATTENTION: &str = "
    output_proj_depth=null gumbel_softmax=false gumbel_softmax_temp=1.0 gumbel_softmax_hard=true custom_attn_fn=null
    hybrid_module=null hybrid_mask_kwarg=null hybrid_fold_axial_dim=null hybrid_learned_mix=false dim_out=null
    rotate_num_heads=null cope_soft_onehot_pos=false data_dependent_alibi_kwargs={} orthog_projected_values=false
    orthog_projected_values_per_head=false qkv_receive_diff_residuals=false project_out=null flash_pack_seq=false
";

/// Options of the feedforward, without the prefix `ff_`.
pub(super) const FEEDFORWARD: &str = "dim_out=null output_proj_depth=null";

/// Options of `TransformerWrapper`.
pub(super) const TRANSFORMER: &str = "
    recycling=false train_max_recycle_steps=4 looped=false max_looped_steps=4 token_emb=null ff_deep_embed=false
    to_logits=null add_continuous_pred_head=false
";

/// Options of `ContinuousTransformerWrapper`.
pub(super) const CONTINUOUS: &str = "project_in=null project_out=null";

/// Options of `XTransformer`.
pub(super) const ENCODER_DECODER: &str = "";

/// Options of `AutoregressiveWrapper`.
pub(super) const AUTOREGRESSIVE: &str =
    "next_embed_loss_weight=0.1 looped_loss_threshold_exit=0.05 looped_loss_slope=50 looped_exit_loss_weight=1.0";

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
    verbose hyper_conn_sinkhorn_iters attn_z_loss_weight input_not_include_cache attn_onnxable
    attn_attend_sdp_kwargs cross_attn_onnxable cross_attn_attend_sdp_kwargs
";
