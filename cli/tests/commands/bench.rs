//! `xt bench`: every class of model in every mode, and figures that agree with each other.

use std::{fs, io::Write, path::Path, process::Stdio};

use crate::command::{failed, fails, path, refuses, start, succeeds, text};
use serde_json::Value;

const GPT: &str = r#"{"model": "AutoregressiveWrapper", "net": {"num_tokens": 50, "max_seq_len": 24,
    "attn_layers": {"kind": "Decoder", "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8}}}"#;
const BERT: &str = r#"{"model": "TransformerWrapper", "num_tokens": 50, "max_seq_len": 24,
    "attn_layers": {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8}}"#;
const TRANSLATOR: &str = r#"{"model": "XTransformer", "dim": 16, "enc_num_tokens": 40, "enc_depth": 1, "enc_heads": 2,
    "enc_max_seq_len": 24, "dec_num_tokens": 50, "dec_depth": 1, "dec_heads": 2, "dec_max_seq_len": 24}"#;
const VECTORS: &str = r#"{"model": "ContinuousTransformerWrapper", "dim_in": 6, "dim_out": 5, "max_seq_len": 24,
    "attn_layers": {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2}}"#;
const IMAGES: &str = r#"{"model": "ViTransformerWrapper", "image_size": 16, "patch_size": 8, "num_classes": 7,
    "attn_layers": {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2}}"#;
const EMBEDDED_IMAGES: &str = r#"{"model": "ViTransformerWrapper", "image_size": 16, "patch_size": 8,
    "attn_layers": {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2}}"#;
const CAPTIONS: &str = r#"{"model": "TransformerWrapper", "num_tokens": 50, "max_seq_len": 24,
    "attn_layers": {"kind": "Decoder", "dim": 16, "depth": 1, "heads": 2, "cross_attend": true}}"#;
const LAYERS: &str = r#"{"model": "CrossAttender", "dim": 16, "depth": 1, "heads": 2}"#;

/// A temporary folder with a config in it.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn config(&self, json: &str) -> String {
        let config = path(self.folder.path(), "c.json");
        fs::write(&config, json).expect("write");
        config
    }

    fn json(&self, config: &str, more: &[&str]) -> Value {
        let config = self.config(config);
        let out =
            succeeds(&[&["bench", "--config", &config, "--json", "--repeat", "3", "--threads", "1"], more].concat());
        assert_eq!(out.lines().count(), 1, "{out}");
        serde_json::from_str(&out).expect("JSON")
    }

    fn fails(&self, config: &str, more: &[&str]) -> String {
        let config = self.config(config);
        fails(&[&["bench", "--config", &config, "--repeat", "1"], more].concat())
    }
}

#[track_caller]
fn number(report: &Value, key: &str) -> f64 {
    report[key].as_f64().unwrap_or_else(|| panic!("{key} in {report}"))
}

/// Operations by hand: two of each step of a product, for two sequences of twelve tokens.
#[test]
fn operations_of_a_small_gpt() {
    let bench = Bench::new();
    let (dim, tokens) = (16.0, 50.0);
    let products = 2.0 * 24.0 * (4.0 * dim * dim + 8.0 * dim * dim + dim * tokens);
    // Query and key, weight and value, for the keys up to each query.
    let attention = 2.0 * 2.0 * 2.0 * dim * (12.0 * 13.0 / 2.0);
    for (mode, expected) in [("forward", products + attention), ("train", 3.0 * products + 3.5 * attention)] {
        let report = bench.json(GPT, &["--mode", mode, "--batch", "2", "--seq-len", "12"]);
        assert_eq!(number(&report, "flop"), expected, "{report}");
    }
}

#[test]
fn every_class_in_every_mode() {
    let bench = Bench::new();
    for config in [GPT, BERT, TRANSLATOR, VECTORS, IMAGES, EMBEDDED_IMAGES, CAPTIONS, LAYERS] {
        for mode in ["forward", "train"] {
            let image = config.contains("ViT");
            let length: &[&str] = if image { &[] } else { &["--seq-len", "12"] };
            let report = bench.json(config, &[&["--mode", mode, "--batch", "2"], length].concat());
            assert_eq!(report["mode"], mode);
            assert_eq!(report["seconds"].as_array().map(Vec::len), Some(3), "{report}");
            let [least, median, most] =
                ["min_seconds", "median_seconds", "max_seconds"].map(|key| number(&report, key));
            assert!(0.0 < least && least <= median && median <= most && number(&report, "first_seconds") > 0.0);
            let tokens = if image { 2 * 5 } else { 2 * 12 };
            assert_eq!(number(&report, "tokens"), tokens as f64, "{report}");
            for (rate, count) in [("tokens_per_second", "tokens"), ("flop_per_second", "flop")] {
                let ratio = number(&report, rate) * median / number(&report, count);
                assert!(number(&report, count) > 0.0 && (ratio - 1.0).abs() < 1e-9, "{report}");
            }
            assert_eq!(report["threads"], 1);
            assert!(number(&report, "peak_tensor_bytes") > 4.0 * number(&report, "parameters"));
            if cfg!(target_os = "linux") {
                assert!(number(&report, "peak_resident_bytes") >= number(&report, "peak_tensor_bytes") / 2.0);
            }
        }
    }
}

/// The operations of a training step are those that `xt info` gives.
#[test]
fn operations_match_info() {
    let bench = Bench::new();
    let forward = number(&bench.json(GPT, &["--mode", "forward", "--batch", "2", "--seq-len", "20"]), "flop");
    let config = bench.config(GPT);
    let info = succeeds(&["info", "--config", &config, "--batch-size", "2", "--seq-len", "20"]);
    // Queries, keys, values and output, a feedforward, logits; causal pairs, for scores and for sums.
    let (dim, tokens) = (16, 40);
    let products = tokens * (4 * dim * dim + 8 * dim * dim + dim * 50);
    let pairs = 2 * (20 * 21 / 2) * dim * 2;
    assert_eq!(forward, 2.0 * (products + pairs) as f64);
    assert!(info.contains(&format!("forward pass   {:.0} kFLOP", forward / 1e3)), "{forward} in\n{info}");
}

#[test]
fn generation() {
    let bench = Bench::new();
    for config in [GPT, TRANSLATOR] {
        let report = |new: &str| {
            bench.json(config, &["--mode", "generate", "--seq-len", "8", "--new-tokens", new, "--batch", "2"])
        };
        let (one, many) = (report("1"), report("9"));
        assert_eq!((number(&one, "tokens"), number(&many, "tokens")), (2.0, 18.0));
        assert_eq!(number(&many, "new_tokens"), 9.0);
        assert!(number(&many, "flop") > number(&one, "flop"), "{one} {many}");
    }
    // Once the beginning slides out of the window, keys and values cannot be cached: FLOPs are not counted.
    let report = bench.json(GPT, &["--mode", "generate", "--seq-len", "20", "--new-tokens", "8"]);
    assert!(report["flop"].is_null() && report["flop_per_second"].is_null(), "{report}");
}

#[test]
fn dtypes_and_precisions() {
    let bench = Bench::new();
    for dtype in ["f64", "bf16", "f16"] {
        for mode in ["forward", "train", "generate"] {
            let report = bench.json(GPT, &["--mode", mode, "--seq-len", "4", "--new-tokens", "2", "--dtype", dtype]);
            assert_eq!(report["dtype"], dtype);
        }
    }
    for precision in ["highest", "high", "medium"] {
        let report = bench.json(GPT, &["--mode", "forward", "--precision", precision]);
        assert_eq!((&report["precision"], &report["seq_len"]), (&precision.into(), &24.into()));
    }
}

#[test]
fn a_report_for_people() {
    let bench = Bench::new();
    let config = bench.config(GPT);
    let report =
        succeeds(&["bench", "--config", &config, "--mode", "train", "--batch", "2", "--threads", "2", "--repeat", "4"]);
    for part in [
        "f32, precision highest, cpu: 2 threads",
        "loss, backward pass, AdamW of 2 x 24",
        "first ",
        "4 more ",
        "median",
        "minimum",
        "maximum",
        "tokens/s",
        "FLOP/s",
        "of tensors",
    ] {
        assert!(report.contains(part), "`{part}` in\n{report}");
    }
}

/// The profile of the timed steps, as text, as JSON and as a trace.
#[test]
fn where_the_time_goes() {
    let bench = Bench::new();
    let trace = path(bench.folder.path(), "trace.json");
    let report = bench.json(GPT, &["--mode", "train", "--profile", "--trace", &trace]);
    let ops = report["profile"].as_array().expect("ops");
    let calls = |phase: &str, op: &str| {
        let found = ops.iter().find(|entry| entry["phase"] == phase && entry["op"] == op);
        found.unwrap_or_else(|| panic!("{phase} {op} in {report}"))["calls"].as_u64().expect("a number")
    };
    assert_eq!([calls("forward", "attention"), calls("backward", "attention"), calls("update", "adamw")], [3, 3, 3]);
    let sum: f64 = ops.iter().map(|op| number(op, "seconds")).sum();
    let whole: f64 = report["seconds"].as_array().expect("times").iter().filter_map(Value::as_f64).sum();
    assert!(sum > 0.5 * whole && sum < 1.1 * whole, "{sum} of {whole}");
    let trace = fs::read_to_string(trace).expect("a trace");
    let trace: Value = serde_json::from_str(&trace).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events").len() as u64;
    assert_eq!(events, ops.iter().filter_map(|op| op["calls"].as_u64()).sum::<u64>());

    let config = bench.config(GPT);
    let text = succeeds(&["bench", "--config", &config, "--mode", "forward", "--profile"]);
    assert!(text.contains("\nforward ") && text.contains("  attention ") && !text.contains("backward"), "{text}");
    let nowhere = path(bench.folder.path(), "none/trace.json");
    let message = bench.fails(GPT, &["--mode", "forward", "--trace", &nowhere]);
    assert!(message.contains("none/trace.json") && message.contains("check the path"), "{message}");
}

/// One step for each line, and the report at the end.
#[test]
fn steps_on_demand() {
    let bench = Bench::new();
    let config = bench.config(GPT);
    let run = |input: &str| {
        let mut child = start(&["bench", "--config", &config, "--mode", "train", "--interleaved", "--json"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("xt starts");
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
        child.wait_with_output().expect("it ends")
    };
    let out = text(&run("\n\n\n\n").stdout);
    let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 5, "{out}");
    let times: Vec<f64> = lines[..4].iter().map(|line| number(line, "seconds")).collect();
    assert_eq!(number(&lines[4], "first_seconds"), times[0], "{out}");
    assert_eq!(lines[4]["seconds"], serde_json::json!(times[2..]), "{out}");
    let nothing = failed(&["bench"], run(""));
    assert!(nothing.contains("--interleaved") && nothing.contains("two"), "{nothing}");
}

#[test]
fn the_configs_of_the_benchmarks_make_models() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/configs"));
    let mut configs = 0;
    for entry in fs::read_dir(folder).expect("benches/configs") {
        let config = entry.expect("an entry").path();
        let config = config.to_str().expect("UTF-8");
        assert!(succeeds(&["info", "--config", config]).contains("forward pass"), "{config}");
        configs += 1;
    }
    assert!(configs >= 5);
}

#[test]
fn configs_that_cannot_be_timed() {
    let bench = Bench::new();
    let forward = ["--mode", "forward"];
    let generate = ["--mode", "generate"];
    assert!(bench.fails(BERT, &generate).contains("AutoregressiveWrapper"));
    assert!(bench.fails(r#"{"model": "SamplingFilter"}"#, &forward).contains("not the config of a model"));
    let message = bench.fails(GPT, &["--mode", "train", "--seq-len", "25"]);
    assert!(message.contains("c.json") && message.contains("max_seq_len") && message.contains("25"), "{message}");
    assert!(bench.fails(IMAGES, &["--mode", "train", "--seq-len", "9"]).contains("--seq-len"));
    let message = bench.fails(BERT, &["--mode", "forward", "--batch", "4294967295"]);
    assert!(message.contains("memory") || message.contains("elements"), "{message}");
    assert!(bench.fails(GPT, &["--mode", "train", "--device", "tpu"]).contains("cuda:N"));
    assert!(bench.fails(r#"{"model": "Encoder", "dim": 8, "depth": 1, "heads": 0}"#, &forward).contains("heads"));
    assert!(bench.fails("{", &forward).contains("JSON"));
    assert!(fails(&["bench", "--config", "nowhere.json", "--mode", "train"]).contains("check the path"));

    let config = bench.config(GPT);
    let usage = |more: &[&str]| refuses(&[&["bench", "--config", &config], more].concat());
    assert!(usage(&[]).contains("--mode"));
    assert!(usage(&["--mode", "sleep"]).contains("forward"));
    for option in ["--batch", "--seq-len", "--new-tokens", "--repeat", "--threads"] {
        assert!(usage(&["--mode", "train", option, "0"]).contains(option), "{option}");
        assert!(usage(&["--mode", "train", option, "many"]).contains(option), "{option}");
    }
    assert!(usage(&["--mode", "train", "--threads", "1000000"]).contains("1024"));
    for option in [&["--repeat", "3"][..], &["--profile"], &["--trace", "t.json"]] {
        assert!(usage(&[&["--mode", "train", "--interleaved"], option].concat()).contains("cannot be used with"));
    }
    assert!(usage(&["--mode", "train", "--dtype", "f8"]).contains("bf16"));
    assert!(usage(&["--mode", "train", "--precision", "low"]).contains("highest"));
}
