//! Vectors of texts, compared with sentence-transformers on folders that `tests/sentence/make.py` wrote.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::TempDir;
use x_transformers::{DType, Device};
use x_transformers_tokenizers::{Cut, Prompt, SentencePipeline};

fn files() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sentence")
}

/// The folder of a case.
fn folder(case: &Value) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = |path: &str| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).expect("a folder");
        path
    };
    for (path, content) in case["files"].as_object().unwrap() {
        fs::write(place(path), content.as_str().unwrap()).expect("a file");
    }
    for (path, source) in case["copies"].as_object().unwrap() {
        fs::copy(files().join(source.as_str().unwrap()), place(path)).expect("a file");
    }
    folder
}

fn cases() -> Vec<Value> {
    serde_json::from_str(&fs::read_to_string(files().join("cases.json")).unwrap()).unwrap()
}

fn rows(value: &Value) -> Vec<Vec<f64>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Returns an error that describes the first difference between a case's results and the expected ones.
fn differs(case: &Value) -> Result<(), String> {
    let folder = folder(case);
    let say = |why: x_transformers::Error| why.to_string();
    let pipeline = SentencePipeline::open(folder.path(), DType::F32, &Device::Cpu).map_err(say)?;
    let texts: Vec<&str> = case["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let prompt = match (case["prompt"]["prompt"].as_str(), case["prompt"]["prompt_name"].as_str()) {
        (Some(text), _) => Prompt::Text(text),
        (None, Some(name)) => Prompt::Named(name),
        (None, None) => Prompt::Default,
    };
    let embedded = pipeline.embed_with(&texts, prompt).map_err(say)?;
    let expected = rows(&case["vectors"]);
    let vectors = embedded.vectors.to_f64_vec().map_err(say)?;
    let dim = expected[0].len();
    if embedded.vectors.shape()[..] != [texts.len(), dim] {
        return Err(format!("has shape {:?}, expected [{}, {dim}]", embedded.vectors.shape(), texts.len()));
    }
    for ((text, vector), expected) in texts.iter().zip(vectors.chunks(dim)).zip(&expected) {
        let off = vector.iter().zip(expected).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max);
        if off.is_nan() || off > 1e-4 {
            return Err(format!("is off by {off:.1e} for {text:?}"));
        }
    }
    let cut = case["cut"].as_array().unwrap().iter();
    let cut: Vec<Cut> = cut
        .map(|cut| [0, 1, 2].map(|at| cut[at].as_u64().unwrap() as usize))
        .map(|[text, tokens, kept]| Cut { text, tokens, kept })
        .collect();
    if embedded.cut != cut {
        return Err(format!("cuts {:?}, expected {cut:?}", embedded.cut));
    }
    let similarity = pipeline.similarity();
    if similarity.to_string() != case["similarity_fn"].as_str().unwrap() {
        return Err(format!("compares by {similarity}, expected {}", case["similarity_fn"]));
    }
    for (a, row) in vectors.chunks(dim).zip(rows(&case["similarity"])) {
        for (b, expected) in vectors.chunks(dim).zip(row) {
            let found = similarity.of(a, b);
            if (found - expected).abs() > 1e-3 * expected.abs().max(1.0) {
                return Err(format!("compares as {found}, expected {expected}"));
            }
        }
    }
    Ok(())
}

#[test]
fn vectors_match_sentence_transformers() {
    let cases = cases();
    assert!(cases.len() > 100, "{}", cases.len());
    let wrong = cases.iter().filter_map(|case| Some(format!("{} {}", case["name"], differs(case).err()?)));
    let wrong: Vec<String> = wrong.collect();
    assert!(wrong.is_empty(), "{} of {} differ\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
