//! `xt quantize`: types of rows, sources of models, and scores of what is written.

use std::{fs, path::PathBuf};

use x_transformers::io::TensorFile;

use crate::{
    command::{fails, path, refuses, succeeds, write_text},
    pretrained::{SMOLLM, files, find, folder, llama, words},
};

/// Files that `xt quantize` writes: types of the rows that there are, a model that generates, and refusals.
#[test]
fn gguf_files_are_quantised() {
    let temporary = tempfile::tempdir().unwrap();
    let model = llama();
    let scored = path(temporary.path(), "text.txt");
    fs::write(&scored, "sphinxofblackquartzjudgemyvow".repeat(4)).unwrap();
    let score = |model: &str, weights: &str| {
        let all = ["generate", "--checkpoint", model, "--device", "cpu", "--score", &scored, "--weights", weights];
        succeeds(&all).split(' ').next().and_then(|bits| bits.parse::<f64>().ok()).expect("a number of bits")
    };
    let exact = score(&model, "f32");
    // Rows of 32 and 64 values are not whole blocks of 256.
    for (kind, of_rows, of_table, most) in [
        ("q8_0", "Q8_0", "Q8_0", 0.05),
        ("q4_0", "Q4_0", "Q8_0", 0.6),
        ("q4_k", "Q5_0", "Q8_0", 0.3),
        ("q5_k", "Q5_1", "Q8_0", 0.6),
    ] {
        let out = path(temporary.path(), &format!("{kind}.gguf"));
        let said = succeeds(&["quantize", &model, &out, "--type", kind]);
        assert!(said.contains(&format!("of {of_rows} (")) && said.contains("stays packed"), "{said}");
        let file = TensorFile::open(&out).unwrap();
        let stored = |name: &str| file.info(name).unwrap().stored.to_string();
        assert_eq!((stored("blk.1.ffn_down.weight"), stored("token_embd.weight")), (of_rows.into(), of_table.into()));
        assert_eq!(stored("blk.0.attn_norm.weight"), "F32");
        assert!(succeeds(&["info", "--checkpoint", &out]).contains(&format!("of {of_rows} (")));
        let (packed, wide) = (score(&out, "stored"), score(&out, "f32"));
        println!("{kind}: {packed} packed, {wide} dequantised, {exact} before");
        assert!((packed - wide).abs() < 0.05 && (wide - exact).abs() < most, "{kind}: {packed} {wide} {exact}");
        let text = succeeds(&["generate", "--checkpoint", &out, "--prompt", "the cat", "--length", "5"]);
        assert!(!text.is_empty());
        // Activations and cache of half types.
        for half in ["bf16", "f16"] {
            let halves = ["generate", "--checkpoint", &out, "--device", "cpu", "--activations", half];
            let scored = succeeds(&[&halves[..], &["--score", &scored]].concat());
            let bits: f64 = scored.split(' ').next().and_then(|bits| bits.parse().ok()).expect("a number of bits");
            assert!((bits - packed).abs() < 0.1, "{kind} {half}: {bits} {packed}");
            let text = succeeds(&[&halves[..], &["--prompt", "the cat", "--length", "5"]].concat());
            assert!(!text.is_empty());
        }
        assert!(fails(&["quantize", &model, &out, "--type", kind]).contains("--overwrite"));
        succeeds(&["quantize", &model, &out, "--type", kind, "--overwrite"]);
    }
    let out = path(temporary.path(), "none.gguf");
    assert!(fails(&["quantize", &files("llama"), &out]).contains("has no tokenizer"));
    let lost = folder("llama", |_| (), ("tokenizer.json", &words()));
    assert!(fails(&["quantize", &lost.path().to_string_lossy(), &out]).contains("is not BPE"));
    assert!(fails(&["quantize", &files("bert"), &out]).contains("does not generate text"));
    assert!(refuses(&["quantize", &model, &out, "--type", "q2_k"]).contains("q4_k"));
    let both = ["generate", "--checkpoint", &model, "--weights", "bf16", "--activations", "f16"];
    assert!(fails(&both).contains("applies to quantized weights"));
    assert!(!PathBuf::from(&out).exists());
}

/// A folder of transformers with a tokenizer, and a run of `xt train` with Llama's options, become GGUF files that score
/// texts as they do.
#[test]
fn folders_and_runs_are_quantised() {
    let temporary = tempfile::tempdir().unwrap();
    let scored = path(temporary.path(), "text.txt");
    fs::write(&scored, "abcabdacbbdc".repeat(4)).unwrap();
    let score = |model: &str| {
        let all = ["generate", "--checkpoint", model, "--device", "cpu", "--score", &scored];
        succeeds(&all).split(' ').next().and_then(|bits| bits.parse::<f64>().ok()).expect("a number of bits")
    };
    let letters: Vec<String> = (0..26u8).map(|id| format!("\"{}\": {id}", char::from(b'a' + id))).collect();
    let tokenizer = format!(
        r#"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {{"type": "ByteLevel",
            "add_prefix_space": false, "trim_offsets": true, "use_regex": true}}, "post_processor": null, "decoder":
            {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}},
            "model": {{"type": "BPE", "merges": [], "vocab": {{{}}}}}}}"#,
        letters.join(", ")
    );
    let model = folder("llama", |_| (), ("tokenizer.json", &tokenizer));
    let out = path(temporary.path(), "folder.gguf");
    let said = succeeds(&["quantize", &model.path().to_string_lossy(), &out, "--type", "q8_0"]);
    assert!(said.contains("of Q8_0 ("), "{said}");
    let (before, after) = (score(&model.path().to_string_lossy()), score(&out));
    assert!((before - after).abs() < 0.02, "{before} {after}");

    let text = path(temporary.path(), "words.txt");
    write_text(&text);
    let config = path(temporary.path(), "config.json");
    let layers = r#"{"kind": "Decoder", "dim": 32, "depth": 1, "heads": 2, "use_rmsnorm": true, "norm_eps": 1e-5,
        "final_norm": "same", "rotary_pos_emb": true, "rotary_emb_dim": 16, "rotary_qk_only": true, "attn_dim_head": 16,
        "attn_out_bias": false, "ff_glu": true, "ff_swish": true, "ff_no_bias": true}"#;
    let net = format!(r#"{{"num_tokens": 256, "max_seq_len": 32, "logits_bias": false, "attn_layers": {layers}}}"#);
    fs::write(&config, format!(r#"{{"model": "AutoregressiveWrapper", "net": {net}}}"#)).unwrap();
    let run = path(temporary.path(), "run");
    let more = ["--steps", "3", "--seq-len", "32", "--batch-size", "2", "--device", "cpu"];
    succeeds(&[&["train", "--text", &text, "--config", &config, "--out", &run][..], &more].concat());
    let out = path(temporary.path(), "run.gguf");
    succeeds(&["quantize", &run, &out, "--type", "q8_0"]);
    let (before, after) = (score(&run), score(&out));
    assert!((before - after).abs() < 0.02, "{before} {after}");

    let other = path(temporary.path(), "other");
    let small = ["--dim", "32", "--depth", "1", "--heads", "2"];
    succeeds(&[&["train", "--text", &text, "--out", &other][..], &small, &more].concat());
    let error = fails(&["quantize", &other, &path(temporary.path(), "none.gguf")]);
    assert!(error.contains("expected that of Llama") && error.contains("is the default, expected"), "{error}");
}

/// A real model's perplexity with packed weights is that of the dequantised ones within 1 % on a short text, as stored and
/// rounded anew.
#[test]
fn packed_weights_score_as_dequantised_ones_do() {
    let Some(model) = find(SMOLLM) else { return };
    let temporary = tempfile::tempdir().unwrap();
    let scored = path(temporary.path(), "text.txt");
    let readme = include_str!("../../../README.md");
    fs::write(&scored, readme.chars().take(3000).collect::<String>()).unwrap();
    let model = fs::read_dir(model)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|end| end == "gguf"));
    let model = model.expect("a GGUF file").to_string_lossy().into_owned();
    let score = |model: &str, weights: &str| {
        let all = ["generate", "--checkpoint", model, "--device", "cpu", "--score", &scored, "--weights", weights];
        succeeds(&all).split(' ').next().and_then(|bits| bits.parse::<f64>().ok()).expect("a number of bits")
    };
    for kind in ["", "q8_0", "q4_k"] {
        let file = if kind.is_empty() { model.clone() } else { path(temporary.path(), &format!("{kind}.gguf")) };
        if !kind.is_empty() {
            succeeds(&["quantize", &model, &file, "--type", kind]);
        }
        let (packed, wide) = (score(&file, "stored"), score(&file, "f32"));
        // Bits a byte; a token has about three bytes of this text.
        let off = ((packed - wide).abs() * 3.0 * std::f64::consts::LN_2).exp() - 1.0;
        println!("{kind}: {packed} bits a byte packed, {wide} dequantised: a perplexity off by {off:.4}");
        assert!(off < 0.01, "{kind}: {packed} {wide}");
    }
}
