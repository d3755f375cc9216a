//! Configs of x-transformers 2 in every command that takes a config.

use std::{collections::BTreeMap, fs};

use x_transformers::{Device, Tensor, io::write_safetensors};

use crate::command::{fails, path, succeeds, write_text};

const GPT: &str = r#"{"version": "2", "model": "AutoregressiveWrapper", "net": {"model": "TransformerWrapper",
    "num_tokens": 256, "max_seq_len": 32, "attn_layers": {"kind": "Decoder", "dim": 32, "depth": 2, "heads": 4,
    "attn_dim_head": 8, "rotary_pos_emb": true, "attn_qk_norm": true, "attn_flash": true, "attn_num_mem_kv": 2}}}"#;

#[test]
fn a_run_is_trained_resumed_continued_and_described() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| path(folder.path(), name);
    let (config, text, out) = (at("config.json"), at("text.txt"), at("out"));
    fs::write(&config, GPT).unwrap();
    write_text(&text);
    let train = ["train", "--text", &text, "--device", "cpu"];
    succeeds(&[&train[..], &["--config", &config, "--steps", "2", "--batch-size", "2", "--out", &out]].concat());
    succeeds(&[&train[..], &["--resume", &out, "--steps", "4"]].concat());
    let metrics = fs::read_to_string(format!("{out}/metrics.csv")).unwrap();
    assert!(metrics.lines().any(|line| line.starts_with("4,")), "{metrics}");
    let info = succeeds(&["info", "--checkpoint", &out]);
    assert!(info.contains("options of x-transformers 2") && info.contains("normed queries and keys"), "{info}");
    // A command that starts anew computes what the cache gives.
    let generate =
        ["generate", "--checkpoint", &out, "--device", "cpu", "--prompt", "to be", "--length", "40", "--seed", "3"];
    let sampled = succeeds(&generate);
    assert_eq!(succeeds(&generate), sampled);
    let score = succeeds(&["generate", "--checkpoint", &out, "--device", "cpu", "--score", &text]);
    assert!(score.contains("per byte"), "{score}");
    // A table of positions has a place for the last token that the loss reads.
    let tables = at("tables");
    let steps =
        ["--config", &config, "--set", "rotary_pos_emb=false", "--steps", "1", "--batch-size", "2", "--out", &tables];
    succeeds(&[&train[..], &steps].concat());
    assert!(succeeds(&["generate", "--checkpoint", &tables, "--device", "cpu", "--score", &text]).contains("per byte"));
    // Weights of a run, in a call of `xt run`, and names of the other version in the error.
    let inputs = at("inputs.safetensors");
    let x = Tensor::from_vec((0..24).collect::<Vec<i64>>(), [2, 12], &Device::Cpu).unwrap();
    write_safetensors(&inputs, &BTreeMap::from([("x".to_string(), x)]), &BTreeMap::new()).unwrap();
    let weights = format!("{out}/checkpoint/model.safetensors");
    let run = |config: &str| {
        let outputs = at("outputs.safetensors");
        ["run", "--config", config, "--weights", &weights, "--inputs", &inputs, "--outputs", &outputs, "--grad"]
            .map(str::to_string)
    };
    let arguments = run(&config);
    let said = succeeds(&arguments.each_ref().map(String::as_str));
    assert!(said.contains("of them gradients"), "{said}");
    let first = at("first.json");
    let parts = [r#""version": "2", "#, r#""attn_flash": true, "#, r#""rotary_pos_emb": true, "#];
    fs::write(&first, parts.iter().fold(GPT.to_string(), |config, part| config.replace(part, ""))).unwrap();
    let arguments = run(&first);
    let message = fails(&arguments.each_ref().map(String::as_str));
    assert!(message.contains("\"version\": \"2\"") && message.contains("token_emb.emb"), "{message}");
}

#[test]
fn options_are_set_and_refused_by_the_place_that_has_them() {
    let folder = tempfile::tempdir().unwrap();
    let config = path(folder.path(), "config.json");
    fs::write(&config, GPT).unwrap();
    let info = |option: &str| succeeds(&["info", "--config", &config, "--set", option]);
    assert!(!info("tie_embedding=true").contains("net.to_logits"));
    assert!(info("attn_softclamp_logits=true").contains("soft clamp; fused"));
    assert!(info("depth=1").contains("layer order of net.attn_layers: a f\n"));
    let refused = |option: &str| fails(&["info", "--config", &config, "--set", option]);
    assert!(refused("use_qk_norm_attn=true").contains("0.22"));
    assert!(refused("attn_flash_pack_seq=true").contains("not supported yet"));
    let message = refused("tie_embeddings=true");
    assert!(message.contains("did you mean `tie_embedding`?"), "{message}");
    let bench = succeeds(&["bench", "--config", &config, "--mode", "train", "--repeat", "1", "--batch", "1"]);
    assert!(!bench.is_empty());
}
