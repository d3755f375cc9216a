//! `xt info`: the figures of a model that can be worked out by hand, and quickly.

use std::fs;

use crate::command::{TINY, fails, path, refuses, succeeds, write_text};

const GPT: &str = r#"{"model": "AutoregressiveWrapper", "net": {"model": "TransformerWrapper", "num_tokens": 256,
    "max_seq_len": 128, "attn_layers": {"kind": "Decoder", "dim": 64, "depth": 2, "heads": 2, "attn_dim_head": 24}}}"#;

#[test]
fn figures_of_a_small_gpt() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = path(folder.path(), "c.json");
    fs::write(&config, GPT).expect("write");
    let info = succeeds(&["info", "--config", &config, "--batch-size", "4", "--seq-len", "100"]);
    let row = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in\n{info}"));
        line.split_whitespace().nth(1).expect("a number").replace(',', "").parse::<u64>().expect("a number")
    };
    let (dim, inner, tokens) = (64, 48, 256);
    // A norm, three projections without bias, and one with.
    let attention = 2 * dim + 3 * dim * inner + inner * dim + dim;
    let feedforward = 2 * dim + dim * 4 * dim + 4 * dim + 4 * dim * dim + dim;
    assert_eq!(row("net.token_emb"), tokens * dim);
    assert_eq!(row("net.pos_emb"), 128 * dim);
    assert_eq!(row("net.attn_layers.layers.0 "), attention);
    assert_eq!(row("net.attn_layers.layers.3 "), feedforward);
    assert_eq!(row("net.norm"), 2 * dim);
    assert_eq!(row("net.to_logits"), tokens * dim + tokens);
    let total = 2 * (attention + feedforward) + (2 * tokens + 128) * dim + 2 * dim + tokens;
    assert_eq!(row("total"), total);
    assert!(info.contains("layer order of net.attn_layers: a f a f"), "{info}");
    assert_eq!(info.matches("fused").count(), 2, "{info}");

    // Per sequence and layer: 12 dim² products per token, and causal attention.
    let matrices = (2 * (4 * dim * inner + 8 * dim * dim) + dim * tokens) * 100;
    let attention = 2 * 2 * inner * (100 * 101 / 2);
    let forward = 2.0 * 4.0 * (matrices + attention) as f64;
    assert!(info.contains(&format!("forward pass   {:.1} MFLOP", forward / 1e6)), "{forward} in\n{info}");
}

/// Options on the command line, which override those of a config and of a checkpoint.
#[test]
fn options_of_the_command_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (config, out) = (path(folder.path(), "c.json"), path(folder.path(), "out"));
    fs::write(&config, GPT).expect("write");
    let info = |keyword: &str| succeeds(&["info", "--config", &config, "--set", keyword]);
    assert!(info("ff_glu=true").contains("gated") && info("depth=1").contains("layer order of net.attn_layers: a f\n"));
    let message = fails(&["info", "--config", &config, "--set", "ff_gluu=true"]);
    assert!(message.contains("--set ff_gluu=true") && message.contains("did you mean `ff_glu`?"), "{message}");
    assert!(refuses(&["info", "--config", &config, "--set", "ff_glu"]).contains("KEY=VALUE"));
    let text = path(folder.path(), "text.txt");
    write_text(&text);
    let train = [
        "train",
        "--text",
        &text,
        "--out",
        &out,
        "--steps",
        "2",
        "--set",
        "macaron=true",
        "--set",
        "tie_embedding=true",
    ];
    succeeds(&[&train[..], &TINY].concat());
    let written = fs::read_to_string(folder.path().join("out/checkpoint/config.json")).expect("a config");
    assert!(written.contains("\"macaron\": true") && written.contains("\"tie_embedding\": true"), "{written}");
    assert!(succeeds(&["info", "--checkpoint", &out]).contains("f a f"));
    let message = fails(&["train", "--text", &text, "--resume", &out, "--set", "depth=3"]);
    assert!(message.contains("--set") && message.contains("resumed"), "{message}");
    let bench = ["bench", "--config", &config, "--mode", "forward", "--repeat", "1", "--set", "depth=1", "--json"];
    assert!(succeeds(&bench).contains("seconds"));
}

/// The resolved order, and for each attention the path and the reason against the fused one.
#[test]
fn layers_and_attention_paths() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = path(folder.path(), "c.json");
    let info = |json: &str| {
        fs::write(&config, json).expect("write");
        succeeds(&["info", "--config", &config])
    };
    let layers =
        |options: &str| info(&format!(r#"{{"model": "Decoder", "dim": 32, "depth": 2, "heads": 2{options}}}"#));
    for (options, order) in [
        ("", "a f a f"),
        (r#", "macaron": true"#, "f a f f a f"),
        (r#", "sandwich_coef": 1"#, "a a f f"),
        (r#", "cross_attend": true"#, "a c f a c f"),
        (r#", "cross_attend": true, "only_cross": true"#, "c f c f"),
        (r#", "custom_layers": ["a", "f", "f"]"#, "a f f"),
    ] {
        let info = layers(options);
        assert!(info.contains(&format!("\nlayer order: {order}\n")), "{options}: {info}");
        let attentions = order.matches(['a', 'c']).count();
        assert_eq!(info.matches("; fused\n").count(), attentions, "{options}: {info}");
    }
    let wide = layers(r#", "attn_dim_head": 136"#);
    let why = "; fused, on a GPU explicit: the fused kernels support at most 128 features per head\n";
    assert_eq!(wide.matches(why).count(), 2, "{wide}");
    for (options, why) in [
        (r#", "attn_talking_heads": true"#, "talking heads mix scores across heads"),
        (r#", "attn_sparse_topk": 4"#, "top-k needs whole rows of scores"),
        (r#", "attn_use_entmax15": true"#, "entmax needs whole rows of scores"),
        (r#", "residual_attn": true"#, "residual attention passes scores to the next layer"),
    ] {
        let info = layers(options);
        assert_eq!(info.matches(&format!("; explicit: {why}\n")).count(), 2, "{options}: {info}");
    }
    // Self- and cross-attention separately, on both sides of a pair.
    let info = info(
        r#"{"model": "XTransformer", "dim": 16, "enc_num_tokens": 4, "enc_max_seq_len": 8, "enc_depth": 1, "enc_heads": 2,
            "dec_num_tokens": 4, "dec_max_seq_len": 8, "dec_depth": 1, "dec_heads": 2, "dec_cross_residual_attn": true}"#,
    );
    assert!(info.contains("layer order of encoder.attn_layers: a f\n"), "{info}");
    assert!(info.contains("layer order of decoder.net.attn_layers: a c f\n"), "{info}");
    assert_eq!((info.matches("; fused").count(), info.matches("; explicit").count()), (2, 1), "{info}");
}

#[test]
fn a_large_model_is_described_without_building_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = path(folder.path(), "large.json");
    fs::write(
        &config,
        r#"{"model": "TransformerWrapper", "num_tokens": 50257, "max_seq_len": 2048, "attn_layers":
            {"kind": "Decoder", "dim": 12288, "depth": 96, "heads": 96, "attn_dim_head": 128}}"#,
    )
    .expect("write");
    // The model itself would take 650 GiB.
    let info = succeeds(&["info", "--config", &config]);
    assert!(info.contains("GiB") && info.contains(" PFLOP"), "{info}");
}
