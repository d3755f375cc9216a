//! `xt embed` with small random models of sentence-transformers from `tokenizers/tests/sentence/make.py`.
//! `tokenizers/tests/tokenizers/sentence.rs` checks the vectors of many more.
#![cfg(feature = "tokenizers")]

use std::{fs, path::PathBuf};

use crate::command::{fails, path, refuses, succeeds, text, xt};
use serde_json::Value;
use tempfile::TempDir;
use x_transformers::io::read_safetensors;

/// A model of the list by its name, with some files replaced.
fn model(name: &str, files: &[(&str, &str)]) -> (TempDir, Value) {
    let place = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tokenizers/tests/sentence");
    let cases: Vec<Value> = serde_json::from_str(&fs::read_to_string(place.join("cases.json")).unwrap()).unwrap();
    let case = cases.into_iter().find(|case| case["name"] == name).expect("a case of this name");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |path: &str, content: &[u8]| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).expect("a folder");
        fs::write(path, content).expect("a file");
    };
    case["copies"].as_object().unwrap().iter().for_each(|(path, source)| {
        write(path, &fs::read(place.join(source.as_str().unwrap())).unwrap());
    });
    let own =
        case["files"].as_object().unwrap().iter().map(|(path, content)| (path.as_str(), content.as_str().unwrap()));
    own.chain(files.iter().copied()).for_each(|(path, content)| write(path, content.as_bytes()));
    (folder, case)
}

/// Returns the vectors of texts, with additional arguments.
fn vectors(folder: &TempDir, texts: &[&str], more: &[&str]) -> Vec<f64> {
    let output = tempfile::tempdir().unwrap();
    let output = path(output.path(), "vectors.safetensors");
    let checkpoint = folder.path().to_string_lossy();
    let mut args = vec!["embed", "--checkpoint", &checkpoint, "--device", "cpu", "--output", &output];
    texts.iter().for_each(|text| args.extend(["--text", text]));
    args.extend(more);
    succeeds(&args);
    read_safetensors(&output).unwrap()["embeddings"].to_f64_vec().unwrap()
}

fn close(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4)
}

#[test]
fn prompts_precede_texts() {
    let (folder, case) = model("default prompt", &[]);
    let expected: Vec<Vec<f64>> = serde_json::from_value(case["vectors"].clone()).unwrap();
    let texts = ["The cat sat.", "dogs"];
    let query = vectors(&folder, &texts, &[]);
    assert!(close(&query, &expected[..2].concat()));
    assert!(close(&vectors(&folder, &texts, &["--prompt-name", "query"]), &query));
    assert!(close(&vectors(&folder, &texts, &["--prompt", "query: "]), &query));
    let none = vectors(&folder, &texts, &["--prompt", ""]);
    assert!(close(&vectors(&folder, &["query: The cat sat.", "query: dogs"], &["--prompt", ""]), &query));
    assert!(close(&vectors(&folder, &texts, &["--prompt-name", "document"]), &none) && !close(&none, &query));
    let checkpoint = folder.path().to_string_lossy();
    let other = fails(&["embed", "--checkpoint", &checkpoint, "--text", "a", "--prompt-name", "title"]);
    assert!(other.contains("no prompt `title`, expected one of: `document`, `passage`, `query`"), "{other}");
    let both =
        refuses(&["embed", "--checkpoint", &checkpoint, "--text", "a", "--prompt-name", "query", "--prompt", "b"]);
    assert!(both.contains("--prompt"), "{both}");
}

#[test]
fn truncated_texts_are_reported() {
    let (folder, _) = model("cut to max_seq_length", &[]);
    let checkpoint = folder.path().to_string_lossy();
    let output =
        xt(&["embed", "--checkpoint", &checkpoint, "--text", "dog", "--text", "the cat sat the cat\u{1b}[31m"]);
    let warning = text(&output.stderr);
    assert!(output.status.success(), "{warning}");
    assert!(warning.starts_with("xt: warning: the text `the cat sat the cat"), "{warning}");
    assert!(
        warning.ends_with("truncated: it has 11 tokens, but the model takes 6; its vector ignores the rest\n"),
        "{warning}"
    );
    assert!(warning.lines().count() == 1 && !warning.contains('\u{1b}'), "{warning:?}");
    // The tokens that are kept are those of the shorter text.
    let short = succeeds(&["embed", "--checkpoint", &checkpoint, "--text", "the cat sat the"]);
    let long = xt(&["embed", "--checkpoint", &checkpoint, "--text", "the cat sat the cat sat"]);
    assert_eq!(text(&long.stdout), short);
}

#[test]
fn tables_compare_as_the_model_says() {
    for name in ["cosine", "dot", "euclidean", "manhattan"] {
        let (folder, case) = model(&format!("similarity {name}"), &[]);
        let checkpoint = folder.path().to_string_lossy();
        let mut args = vec!["embed", "--checkpoint", &checkpoint];
        let texts: Vec<&str> = case["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
        // The last one is truncated, which is tested elsewhere.
        texts[..2].iter().for_each(|text| args.extend(["--text", text]));
        let table = succeeds(&args);
        let mut lines = table.lines();
        assert_eq!(lines.next().unwrap().split_whitespace().collect::<Vec<_>>(), [name, "1", "2"]);
        for (line, row) in lines.zip(case["similarity"].as_array().unwrap()) {
            let numbers = line.split_whitespace().skip(1).map_while(|number| number.parse::<f64>().ok());
            let numbers: Vec<f64> = numbers.take(2).collect();
            let expected: Vec<f64> = serde_json::from_value(row.clone()).unwrap();
            let near = |(a, b): (&f64, &f64)| (a - b).abs() < 2e-3 * b.abs().max(1.0);
            assert!(numbers.len() == 2 && numbers.iter().zip(&expected).all(near), "{table}");
        }
    }
}

/// An unsupported setting that changes vectors is an error that names it.
#[test]
fn unknown_settings_are_refused_by_name() {
    let listed = |last: &str| {
        let module =
            |class: &str, path: &str| format!(r#"{{"idx": 0, "name": "0", "path": "{path}", "type": "{class}"}}"#);
        let first = module("sentence_transformers.models.Transformer", "");
        format!("[{first}, {}]", module(last, "1_Pooling"))
    };
    let of = |class: &str| listed(&format!("sentence_transformers.models.{class}"));
    let dense = r#"{"in_features": 16, "out_features": 8, "bias": true, "#;
    let cases: &[(&str, &str, String, &str)] = &[
        (
            "no modules",
            "modules.json",
            of("WeightedLayerPooling"),
            "the module `WeightedLayerPooling`, expected one of",
        ),
        ("no modules", "modules.json", of("CNN"), "`CNN`"),
        ("no modules", "modules.json", listed("custom.Pooling"), "`custom.Pooling`, expected a class of"),
        ("no modules", "modules.json", "[]".into(), "lists no module"),
        ("no modules", "modules.json", "{}".into(), "not a list of modules"),
        ("no modules", "modules.json", r#"[{"path": ""}]"#.into(), "without `type`"),
        (
            "no modules",
            "modules.json",
            listed("sentence_transformers.models.Pooling").replace("1_Pooling", "../p"),
            "`../p`",
        ),
        ("no modules", "modules.json", of("Normalize"), "`normalize` comes before the first pooling"),
        (
            "pooling mean",
            "modules.json",
            of("Pooling").replacen("Transformer", "StaticEmbedding", 1),
            "`StaticEmbedding`",
        ),
        (
            "pooling mean",
            "1_Pooling/config.json",
            r#"{"pooling_mode": "middle"}"#.into(),
            r#"`pooling_mode` is "middle""#,
        ),
        ("pooling mean", "1_Pooling/config.json", r#"{"pooling_mode": []}"#.into(), "`pooling_mode` is []"),
        (
            "pooling mean",
            "1_Pooling/config.json",
            r#"{"pooling_mode_of_tokens": true}"#.into(),
            "`pooling_mode_of_tokens`",
        ),
        (
            "dense Tanh",
            "2_Dense/config.json",
            dense.to_string() + r#""activation_function": "torch.nn.Softshrink"}"#,
            "Softshrink",
        ),
        ("dense Tanh", "2_Dense/config.json", dense.to_string() + r#""activation_function": "own.Tanh"}"#, "own.Tanh"),
        ("dense Tanh", "2_Dense/config.json", dense.to_string() + r#""scale": 2}"#, "`scale`"),
        ("dense Tanh", "2_Dense/config.json", dense.replace("16", "12").replace("true, ", "true}"), "expected [8, 12]"),
        ("dense Tanh", "2_Dense/config.json", dense.replace("true, ", "false}"), "unused          linear.bias"),
        (
            "dense Tanh",
            "2_Dense/config.json",
            dense.to_string() + r#""module_output_name": "x"}"#,
            "`module_output_name`",
        ),
        ("pooling mean", "sentence_bert_config.json", r#"{"max_seq_length": 0}"#.into(), "`max_seq_length` is 0"),
        (
            "pooling mean",
            "sentence_bert_config.json",
            r#"{"max_seq_length": 1}"#.into(),
            "truncated to 1 tokens, but the model adds 2",
        ),
        ("pooling mean", "sentence_bert_config.json", r#"{"do_lower_cased": true}"#.into(), "`do_lower_cased`"),
        (
            "pooling mean",
            "sentence_bert_config.json",
            r#"{"config_args": {"num_hidden_layers": 1}}"#.into(),
            "`num_hidden_layers`",
        ),
        ("pooling mean", "sentence_bert_config.json", r#"{"transformer_task": "fill-mask"}"#.into(), "fill-mask"),
        (
            "pooling mean",
            "sentence_bert_config.json",
            r#"{"tokenizer_name_or_path": "other"}"#.into(),
            "`other`; name its folder",
        ),
        (
            "pooling mean",
            "config_sentence_transformers.json",
            r#"{"default_prompt_name": "q"}"#.into(),
            "`default_prompt_name` is `q`",
        ),
        (
            "pooling mean",
            "config_sentence_transformers.json",
            r#"{"model_type": "SparseEncoder"}"#.into(),
            "SparseEncoder",
        ),
        ("pooling mean", "config_sentence_transformers.json", r#"{"scale": 2}"#.into(), "`scale`"),
        (
            "no modules",
            "tokenizer_config.json",
            r#"{"tokenizer_class": "BertJapaneseTokenizer"}"#.into(),
            "BertJapaneseTokenizer",
        ),
        ("no modules", "tokenizer_config.json", r#"{"do_lower_case": "yes"}"#.into(), "`do_lower_case` is \"yes\""),
        (
            "no modules",
            "tokenizer_config.json",
            r#"{"cls_token": "<none>"}"#.into(),
            "lacks one of the tokens [UNK], <none> and [SEP]",
        ),
        (
            "no modules",
            "tokenizer_config.json",
            r#"{"truncation_side": "middle"}"#.into(),
            "`truncation_side` is `middle`",
        ),
        ("no modules", "tokenizer_config.json", r#"{"model_max_length": -1}"#.into(), "`model_max_length` is -1"),
        (
            "no modules",
            "tokenizer_config.json",
            r#"{"additional_special_tokens": "x"}"#.into(),
            "`additional_special_tokens`",
        ),
        (
            "no modules",
            "added_tokens.json",
            r#"{"[ENT]": 500}"#.into(),
            "`[ENT]` has the id 500 in the folder's files, but gets 110",
        ),
        ("no modules", "added_tokens.json", r#"{"the": 7}"#.into(), "`the` has the id 7"),
        (
            "no modules",
            "config.json",
            r#"{"model_type": "bert", "hidden_act": "mish"}"#.into(),
            "`hidden_act` is `mish`",
        ),
        (
            "sentence pieces",
            "tokenizer_config.json",
            r#"{"tokenizer_class": "XLNetTokenizer"}"#.into(),
            "`XLNetTokenizer`",
        ),
        (
            "sentence pieces",
            "tokenizer_config.json",
            r#"{"sep_token": "<none>"}"#.into(),
            "lacks the token [CLS] or <none>",
        ),
    ];
    // A model of a generative family.
    let config = |key: &str| {
        format!(
            r#"{{"model_type": "qwen2", "vocab_size": 306, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 48, {key}}}"#
        )
    };
    let both = [
        ("qwen2 by mean", "config.json", config("\"is_causal\": false"), "`is_causal` is false"),
        (
            "qwen2 by mean",
            "config.json",
            config("\"use_bidirectional_attention\": true"),
            "`use_bidirectional_attention`",
        ),
    ];
    for (name, file, content, expected) in cases.iter().chain(&both) {
        let (folder, _) = model(name, &[(file, content)]);
        let error = fails(&["embed", "--checkpoint", &folder.path().to_string_lossy(), "--text", "a"]);
        assert!(error.contains(expected), "{file} {content}: {error}");
    }
}
