//! Cost of each option: its training step (loss, backward pass, AdamW) relative to that of the plain decoder of the
//! same size and version. The two alternate, and the medians of the ratios are printed: other load on the machine affects both, and
//! affects the ratio of CPU times even less than that of wall-clock times.
//!
//!     cargo bench --bench options [-- FILTER]

use std::time::Instant;

use serde_json::{Value, json};
use x_transformers::{
    DType, Device, ParamMap, ParamStore, Philox, Result, Tape, Tensor,
    config::{AttentionPath, BranchPlan, Config, LayersPlan, ModelPlan},
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{AdamW, AdamWOptions, Optimizer},
};

/// Sizes of the model in the table, or of one that only shows that every option runs.
#[derive(Clone, Copy)]
struct Sizes {
    dim: usize,
    depth: usize,
    heads: usize,
    length: usize,
    /// Steps of each of the two models.
    rounds: usize,
}

const MEASURED: Sizes = Sizes { dim: 512, depth: 6, heads: 8, length: 1024, rounds: 3 };
const TESTED: Sizes = Sizes { dim: 32, depth: 2, heads: 2, length: 24, rounds: 1 };

const NUM_TOKENS: usize = 256;

/// Part of the model that an option belongs to.
#[derive(Clone, Copy)]
enum Place {
    Layers,
    Wrapper,
    Call,
    /// Layers of a config of version 2.
    LayersTwo,
    /// A call of a model of version 2.
    CallTwo,
}

use Place::{Call, CallTwo, Layers, LayersTwo, Wrapper};

impl Place {
    /// Returns the place of an option without a value, whose model is the plain one.
    fn plain(self) -> Self {
        match self {
            Layers | Wrapper | Call => Call,
            LayersTwo | CallTwo => CallTwo,
        }
    }
}

/// Options as JSON, or for [`Call`] and [`CallTwo`] the field of [`ForwardOptions`].
const OPTIONS: &[(Place, &str)] = &[
    (Layers, r#""rotary_pos_emb": true"#),
    (Layers, r#""rotary_pos_emb": true, "rotary_qk_only": true"#),
    (Layers, r#""rel_pos_bias": true"#),
    (Layers, r#""alibi_pos_bias": true"#),
    (Layers, r#""alibi_pos_bias": true, "alibi_learned": true"#),
    (Layers, r#""position_infused_attn": true"#),
    (Wrapper, r#""use_pos_emb": false"#),
    (Layers, r#""use_scalenorm": true"#),
    (Layers, r#""use_rmsnorm": true"#),
    (Layers, r#""use_rezero": true"#),
    (Layers, r#""sandwich_norm": true"#),
    (Layers, r#""pre_norm": false"#),
    (Layers, r#""scale_residual": true"#),
    (Layers, r#""gate_residual": true"#),
    (Layers, r#""zero_init_branch_output": true"#),
    (Layers, r#""shift_tokens": 1"#),
    (Layers, r#""macaron": true"#),
    (Layers, r#""sandwich_coef": 2"#),
    (Layers, r#""par_ratio": 4"#),
    (Layers, r#""cross_attend": true"#),
    (Layers, r#""use_qk_norm_attn": true"#),
    (Layers, r#""attn_qk_norm": true"#),
    (Layers, r#""attn_num_mem_kv": 16"#),
    (Layers, r#""attn_head_scale": true"#),
    (Layers, r#""attn_gate_values": true"#),
    (Layers, r#""attn_on_attn": true"#),
    (Layers, r#""attn_collab_heads": true"#),
    (Layers, r#""attn_max_attend_past": 256"#),
    (Layers, r#""attn_dropout": 0.1"#),
    (Layers, r#""ff_glu": true"#),
    (Layers, r#""ff_glu": true, "ff_mult": 2.6667"#),
    (Layers, r#""ff_relu_squared": true"#),
    (Layers, r#""ff_post_act_ln": true"#),
    (Layers, r#""ff_dropout": 0.1"#),
    (Wrapper, r#""emb_dim": 128"#),
    (Wrapper, r#""emb_dropout": 0.1"#),
    (Wrapper, r#""tie_embedding": true"#),
    (Wrapper, r#""num_memory_tokens": 16"#),
    (Call, "mask"),
    (Call, "attn_mask"),
    (Call, "mems"),
    (Layers, r#""attn_talking_heads": true"#),
    (Layers, r#""attn_sparse_topk": 8"#),
    (Layers, r#""attn_use_entmax15": true"#),
    (Layers, r#""residual_attn": true"#),
    (LayersTwo, r#""attn_softclamp_logits": true"#),
    (LayersTwo, r#""attn_head_learned_sink": true"#),
    (LayersTwo, r#""attn_add_zero_kv": true"#),
    (LayersTwo, r#""attn_num_mem_kv": 16"#),
    (LayersTwo, r#""alibi_pos_bias": true"#),
    (LayersTwo, r#""alibi_pos_bias": true, "attn_num_mem_kv": 16"#),
    (LayersTwo, r#""rel_pos_bias": true"#),
    (LayersTwo, r#""rel_pos_bias": true, "attn_num_mem_kv": 16"#),
    (LayersTwo, r#""dynamic_pos_bias": true"#),
    (LayersTwo, r#""attn_softclamp_logits": true, "attn_head_learned_sink": true, "dynamic_pos_bias": true"#),
    (CallTwo, "attn_bias"),
    (CallTwo, "attn_bias with its gradient"),
];

/// A model, its optimizer and its batch.
struct Run {
    model: AutoregressiveWrapper,
    params: ParamMap,
    optimizer: AdamW,
    tokens: Tensor,
    options: ForwardOptions,
    /// Operations of the matrix products and of attention in a forward pass.
    work: f64,
    path: AttentionPath,
}

impl Run {
    fn new(sizes: Sizes, place: Place, option: &str) -> Result<Self> {
        let Sizes { dim, depth, heads, length, .. } = sizes;
        let mut layers = json!({"kind": "Decoder", "dim": dim, "depth": depth, "heads": heads});
        let mut net = json!({"num_tokens": NUM_TOKENS, "max_seq_len": length});
        match place {
            Layers | LayersTwo => extend(&mut layers, option),
            Wrapper => extend(&mut net, option),
            Call | CallTwo => {}
        }
        net["attn_layers"] = layers;
        let mut config = json!({"model": "AutoregressiveWrapper", "net": net});
        if let CallTwo = place.plain() {
            config["version"] = json!("2");
        }
        let ModelPlan::Autoregressive(plan) = Config::from_value(config)?.plan()? else {
            unreachable!("the model is named above")
        };
        let store = ParamStore::new(0, DType::F32, &Device::Cpu);
        let model = AutoregressiveWrapper::from_plan(plan, &store)?;
        let params = store.params();

        let mut options = ForwardOptions::default();
        let plan = &model.net.plan().layers;
        let mut keys = length;
        if plan.cross_attend {
            options.context = Some(floats([1, length, dim], 1)?);
        }
        match (place, option) {
            (Call, "mask") => options.mask = Some(Tensor::ones([1, length], DType::Bool, &Device::Cpu)?),
            (Call, "attn_mask") => options.attn_mask = Some(Tensor::ones([length, length], DType::Bool, &Device::Cpu)?),
            (Call, "mems") => {
                let mem = |layer| floats([1, length / 2, dim], layer as u64);
                options.mems = Some((0..plan.self_attentions()).map(mem).collect::<Result<_>>()?);
                keys += length / 2;
            }
            (CallTwo, "attn_bias") => options.attn_bias = Some(floats([heads, length, length], 2)?),
            (CallTwo, "attn_bias with its gradient") => {
                options.attn_bias = Some(floats([heads, length, length], 2)?.requires_grad()?);
            }
            _ => {}
        }
        let attentions = || plan.layers.iter().filter_map(|layer| layer.branch.attention());
        let path = attentions().next().map_or(AttentionPath::Fused, |attention| attention.path());
        let work = work(&params, plan, model.net.plan().num_memory_tokens + length, keys);
        let random = Philox::new(0, 0);
        let token = |i: usize| random.below(i as u64, NUM_TOKENS as u64) as f64;
        let tokens = Tensor::generate([1, length + 1], DType::I64, &Device::Cpu, token)?;
        let optimizer = AdamW::new(AdamWOptions::default())?;
        Ok(Self { model, params, optimizer, tokens, options, work, path })
    }

    /// Runs one training step and returns its wall-clock seconds and its CPU seconds.
    fn step(&mut self) -> Result<[f64; 2]> {
        let (start, processors) = (Instant::now(), processor_seconds());
        let mut tape = Tape::train(self.optimizer.steps());
        let loss = self.model.loss(&self.tokens, &self.options)?;
        let gradients = tape.backward(&loss)?;
        self.optimizer.step(&self.params, &gradients, 1e-4, Some(1.0))?;
        let elapsed = start.elapsed().as_secs_f64();
        let on_processors = processors.zip(processor_seconds()).map(|(before, after)| after - before);
        Ok([elapsed, on_processors.unwrap_or(elapsed)])
    }
}

/// Returns the CPU seconds that the threads of this process have used, if the system reports them.
fn processor_seconds() -> Option<f64> {
    let nanoseconds = |thread: std::io::Result<std::fs::DirEntry>| -> Option<f64> {
        let times = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        times.split(' ').next()?.parse().ok()
    };
    let threads: Option<Vec<f64>> = std::fs::read_dir("/proc/self/task").ok()?.map(nanoseconds).collect();
    Some(threads?.iter().sum::<f64>() / 1e9)
}

/// Adds options to a JSON object.
fn extend(to: &mut Value, keywords: &str) {
    let keywords: Value = serde_json::from_str(&format!("{{{keywords}}}")).expect("keywords are JSON");
    for (key, value) in keywords.as_object().into_iter().flatten() {
        to[key] = value.clone();
    }
}

fn floats<const N: usize>(shape: [usize; N], stream: u64) -> Result<Tensor> {
    let random = Philox::new(1, stream);
    Tensor::generate(shape, DType::F32, &Device::Cpu, |i| random.normal(i as u64))
}

/// Operations of a forward pass: two for each weight of a matrix product and row that it sees, four for each feature
/// of a score that causality and a limited past keep.
fn work(params: &ParamMap, plan: &LayersPlan, queries: usize, keys: usize) -> f64 {
    let products = params.unique().filter(|(name, _)| !name.contains("_emb.") && !name.contains("rel_pos"));
    let products = products.filter(|(name, param)| name.contains("weight") && param.tensor().rank() == 2);
    let weights: usize = products
        .map(|(name, param)| {
            let of_keys = name.ends_with("to_k.weight") || name.ends_with("to_v.weight");
            param.tensor().numel() * if of_keys { keys.max(queries) } else { queries }
        })
        .sum();
    let scores = plan.layers.iter().map(|layer| match &layer.branch {
        BranchPlan::SelfAttention(attention) => {
            let seen = |query: usize| {
                let behind = keys - queries.min(keys) + query + 1;
                behind - attention.window.first_key(behind as i64 - 1).max(0) as usize + attention.prefix_len()
            };
            attention.heads * (attention.dim_qk() + attention.dim_head) * (0..queries).map(seen).sum::<usize>()
        }
        BranchPlan::CrossAttention(attention) => {
            attention.heads * (attention.dim_qk() + attention.dim_head) * queries * keys
        }
        BranchPlan::FeedForward(_) | BranchPlan::Custom => 0,
    });
    2.0 * (weights + scores.sum::<usize>()) as f64
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A line of the table.
fn measure(sizes: Sizes, place: Place, option: &str) -> Result<String> {
    let (mut plain, mut changed) = (Run::new(sizes, place.plain(), "")?, Run::new(sizes, place, option)?);
    // The first steps make the optimizer's state and the buffers.
    plain.step()?;
    changed.step()?;
    let pairs = (0..sizes.rounds).map(|_| Ok((plain.step()?, changed.step()?))).collect::<Result<Vec<_>>>()?;
    let ratio = |clock: usize| median(pairs.iter().map(|(plain, changed)| changed[clock] / plain[clock]));
    let (time, processors, operations) = (ratio(0), ratio(1), changed.work / plain.work);
    let option = option.replace('"', "");
    Ok(format!("| `{option}` | {time:.2} | {processors:.2} | {operations:.2} | {} |", changed.path))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filter = arguments.iter().find(|argument| !argument.starts_with("--"));
    let mut options = OPTIONS.iter().filter(|(_, option)| filter.is_none_or(|filter| option.contains(filter)));
    if arguments.iter().any(|argument| argument == "--test") {
        // A run that only tests the options has no meaningful times.
        return options.try_for_each(|&(place, option)| measure(TESTED, place, option).map(drop));
    }
    println!("| option | time | processor time | operations | attention |\n|---|---|---|---|---|");
    for &(place, option) in options {
        println!("{}", measure(MEASURED, place, option)?);
    }
    Ok(())
}
