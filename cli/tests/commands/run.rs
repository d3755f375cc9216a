//! `xt run`, with which a user of PyTorch compares a migrated model.

use std::{collections::BTreeMap, fs, path::Path};

use crate::command::{fails, path, refuses, succeeds};
use x_transformers::{
    DType, Device, Tensor,
    io::{read_safetensors, write_safetensors},
};
use x_transformers_parity::{Bounds, Case};

type Tensors = BTreeMap<String, Tensor>;

/// A folder below `tests/parity`.
fn golden(name: &str) -> String {
    path(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/parity")), name)
}

/// The files of one run, at first those of a case.
struct Files {
    folder: tempfile::TempDir,
    config: String,
    weights: String,
    inputs: String,
    outputs: String,
}

impl Files {
    fn of(case: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = |name: &str| path(Path::new(&golden(case)), name);
        Self {
            config: file("config.json"),
            weights: file("weights.safetensors"),
            inputs: file("inputs.safetensors"),
            outputs: path(folder.path(), "out.safetensors"),
            folder,
        }
    }

    fn arguments<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let (config, weights, inputs, outputs) = (&*self.config, &*self.weights, &*self.inputs, &*self.outputs);
        let files = ["--config", config, "--weights", weights, "--inputs", inputs, "--outputs", outputs];
        [&["run"][..], &files, more].concat()
    }

    fn run(&self, more: &[&str]) -> Tensors {
        succeeds(&self.arguments(more));
        read_safetensors(&self.outputs).expect("what was written can be read")
    }

    /// Returns the message of a run that fails and leaves no file behind.
    #[track_caller]
    fn fails(&self, more: &[&str]) -> String {
        let message = fails(&self.arguments(more));
        assert!(!fs::exists(&self.outputs).expect("exists"), "{message}");
        message
    }

    /// Writes other tensors than those of the case.
    fn change(&self, file: &str, change: impl FnOnce(&mut Tensors)) -> String {
        let mut tensors = read_safetensors(file).expect("a file of the case");
        change(&mut tensors);
        let changed = path(self.folder.path(), "changed.safetensors");
        write_safetensors(&changed, &tensors, &BTreeMap::new()).expect("write");
        changed
    }
}

fn ones(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(shape, dtype, &Device::Cpu).expect("a small tensor")
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` in `{message}`");
    }
}

/// Names, shapes and values are PyTorch's in every case, including generated tokens and filters.
#[test]
fn every_case_gives_what_pytorch_gives() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let outputs = path(folder.path(), "out.safetensors");
    let cases = Case::folders(golden("")).expect("cases");
    assert_eq!(cases.len(), 128);
    for case in cases {
        let files =
            Files { outputs: outputs.clone(), ..Files::of(&case.file_name().expect("a name").to_string_lossy()) };
        let actual = files.run(&["--grad", "--dtype", "f64", "--device", "cpu"]);
        let comparison = Case::read(&case).expect("a case").compare(&actual, &Bounds::of(DType::F64)).expect("tensors");
        assert!(comparison.passed(), "{}: {:?}", case.display(), comparison.wrong);
    }
}

#[test]
fn gradients_are_returned_on_request_in_the_dtype_of_the_model() {
    let files = Files::of("decoder_cross_context_mask");
    assert_eq!(files.run(&[]).into_keys().collect::<Vec<_>>(), ["out"]);
    for (name, dtype) in [("f32", DType::F32), ("f64", DType::F64), ("bf16", DType::BF16), ("f16", DType::F16)] {
        let outputs = files.run(&["--grad", "--dtype", name]);
        assert!(outputs.contains_key("grad.input.context") && outputs.contains_key("grad.to_logits.bias"), "{name}");
        assert!(outputs.values().all(|tensor| tensor.dtype() == dtype), "{name}");
    }
    // A loss is f32 at least.
    let loss = Files::of("autoregressive_loss").run(&["--dtype", "bf16"]);
    assert_eq!((loss["loss"].dtype(), &loss["loss"].shape()[..]), (DType::F32, &[1][..]));
}

#[test]
fn a_filter_has_no_weights() {
    let files = Files::of("filter_entmax");
    succeeds(&["run", "--config", &files.config, "--inputs", &files.inputs, "--outputs", &files.outputs]);
    let files = Files::of("decoder_gpt");
    let message = fails(&["run", "--config", &files.config, "--inputs", &files.inputs, "--outputs", &files.outputs]);
    says(&message, &["--weights"]);
}

/// One message lists everything that is wrong.
#[test]
fn weights_of_another_config() {
    let mut files = Files::of("decoder_gpt");
    files.weights = files.change(&files.weights, |weights| {
        let norm = weights.remove("norm.weight").expect("a name of PyTorch's");
        weights.remove("attn_layers.layers.0.1.to_q.weight");
        weights.insert("norm.gamma".to_string(), norm);
        weights.insert("attn_layers.rotary_pos_emb.inv_freq".to_string(), ones(&[16], DType::F32));
        weights.insert("norm.bias".to_string(), ones(&[7], DType::F32));
    });
    let message = files.fails(&[]);
    says(
        &message,
        &[
            "changed.safetensors",
            "missing         attn_layers.layers.0.1.to_q.weight",
            "missing         norm.weight",
            "unused          norm.gamma",
            "unused          attn_layers.rotary_pos_emb.inv_freq",
            "shape mismatch  norm.bias: [32] in the model, [7] in the file",
            "trained with",
        ],
    );
}

#[test]
fn weights_of_another_dtype_or_not_tied() {
    let mut files = Files::of("decoder_gpt");
    files.weights = files.change(&files.weights, |weights| {
        weights.insert("norm.bias".to_string(), ones(&[32], DType::I64));
    });
    says(&files.fails(&[]), &["norm.bias", "i64", "float"]);

    // Separate tables in a file for a model that has one.
    let mut files = Files::of("xtransformer_tied");
    let (own, shared) = ("decoder.net.token_emb.weight", "encoder.token_emb.weight");
    files.weights = files.change(&files.weights, |weights| {
        let other = weights[own].affine(2.0, 0.0).expect("floats");
        weights.insert(own.to_string(), other);
    });
    says(&files.fails(&[]), &[own, shared, "tied", "different values"]);
    // PyTorch may save a tied tensor once.
    let tied = Files::of("xtransformer_tied");
    let both = tied.run(&[]);
    for name in [own, shared] {
        files.weights = tied.change(&tied.weights, |weights| drop(weights.remove(name)));
        assert_eq!(files.run(&[])["loss"].to_f64_vec().expect("floats"), both["loss"].to_f64_vec().expect("floats"));
        fs::remove_file(&files.outputs).expect("remove");
    }
}

#[test]
fn mismatched_inputs() {
    let with = |change: &dyn Fn(&mut Tensors)| {
        let files = Files::of("decoder_gpt");
        Files { inputs: files.change(&files.inputs, change), ..files }
    };
    let insert =
        |name: &'static str, tensor: Tensor| with(&move |inputs| drop(inputs.insert(name.to_string(), tensor.clone())));
    let shape = *read_safetensors(Files::of("decoder_gpt").inputs).expect("inputs")["x"].shape();
    let tokens = Tensor::full(shape, 1e6, DType::I64, &Device::Cpu).expect("a small tensor");
    let long = [shape[0], 2000];
    let cases: [(Files, &[&str]); 11] = [
        (with(&|inputs| drop(inputs.remove("x"))), &["changed.safetensors", "missing `x`"]),
        (with(&|inputs| drop(inputs.remove("cotangent"))), &["`cotangent` input of shape", "[2, "]),
        (insert("cotangent", ones(&[2, 3], DType::F32)), &["cotangent", "[2, 3]"]),
        (insert("cotangent", ones(&[2, 3], DType::I64)), &["cotangent", "i64"]),
        (insert("x", ones(&shape, DType::F32)), &["tokens", "i64", "f32"]),
        (insert("x", tokens), &["token_emb", "1000000", "out of range"]),
        (insert("x", ones(&long, DType::I64)), &["2000", "max_seq_len"]),
        (insert("mask", ones(&shape, DType::I64)), &["mask", "bool", "i64"]),
        (insert("mask", ones(&[1, 3], DType::Bool)), &["mask", "[1, 3]"]),
        (insert("context", ones(&[2, 3, 32], DType::F32)), &["context", "requires layers with cross-attention"]),
        (insert("src", ones(&shape, DType::I64)), &["`src`", "not used by this call"]),
    ];
    for (files, parts) in cases {
        says(&files.fails(&["--grad"]), parts);
    }
}

#[test]
fn files_that_are_not_a_model() {
    let mut files = Files::of("decoder_gpt");
    let (inputs, broken) = (files.inputs.clone(), path(files.folder.path(), "broken"));
    fs::write(&broken, &fs::read(&files.inputs).expect("read")[..100]).expect("write");
    files.inputs = broken.clone();
    says(&files.fails(&[]), &["broken", "truncated"]);
    files.inputs = path(files.folder.path(), "none");
    says(&files.fails(&[]), &["none", "check the path"]);
    files.inputs = inputs;

    files.config = broken.clone();
    let config = |json: &str| fs::write(&broken, json).expect("write");
    config("{");
    says(&files.fails(&[]), &["broken", "JSON"]);
    config(r#"{"model": "Decoder", "dim": 32, "depth": 1, "collab_heads": true}"#);
    says(&files.fails(&[]), &["broken", "collab_heads", "attn_collab_heads"]);
    config(r#"{"model": "Decoder", "dim": 32, "depth": 1, "call": {"return_embedding": true}}"#);
    says(&files.fails(&[]), &["broken", "call", "return_embeddings"]);
    config(r#"{"model": "Decoder", "dim": 32, "depth": 1, "alibi_pos_bias": true, "rel_pos_bias": true}"#);
    says(&files.fails(&[]), &["broken", "alibi_pos_bias", "rel_pos_bias"]);
    // An option that is only missing from the call.
    let text = fs::read_to_string(Files::of("decoder_gpt").config).expect("read");
    config(&text.replacen('{', r#"{"call": {"return_mems": true}, "#, 1));
    says(&files.fails(&[]), &["broken", "max_mem_len", "return_mems"]);
}

/// The old file stays unchanged unless a new one is complete.
#[test]
fn outputs_are_replaced_in_one_step() {
    let files = Files::of("decoder_gpt");
    let folder = || fs::read_dir(files.folder.path()).expect("read").count();
    fs::write(&files.outputs, "precious").expect("write");
    let message = fails(&files.arguments(&["--device", "tpu"]));
    says(&message, &["tpu", "cuda:N"]);
    assert_eq!(fs::read(&files.outputs).expect("read"), b"precious");
    files.run(&[]);
    assert_eq!(folder(), 1, "no temporary file is left");

    let nowhere = Files { outputs: path(files.folder.path(), "none/out.safetensors"), ..Files::of("decoder_gpt") };
    says(&nowhere.fails(&[]), &["none/out.safetensors", "check the path"]);
    let into = Files { outputs: path(files.folder.path(), ""), ..Files::of("decoder_gpt") };
    says(&fails(&into.arguments(&[])), &["is a folder"]);
    assert_eq!(folder(), 1);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk() {
    let files = Files { outputs: "/dev/full".to_string(), ..Files::of("decoder_gpt") };
    says(&fails(&files.arguments(&[])), &["/dev/full", "free some space"]);
}

#[test]
fn wrong_usage() {
    let files = Files::of("decoder_gpt");
    says(&refuses(&["run"]), &["--config", "--inputs", "--outputs"]);
    says(&refuses(&files.arguments(&["--dtype", "f8"])), &["f8", "bf16", "f64"]);
    says(&refuses(&files.arguments(&["--gradient"])), &["--grad"]);
    assert!(succeeds(&["run", "--help"]).contains("Usage: xt run"));
}

/// Weights written by `torch.save`, plain and as trainers save them, must still match the model.
#[test]
fn weights_of_every_format_are_loaded() {
    let mut files = Files::of("length_none_longer");
    let expected = files.run(&[]);
    let saved = |name: &str| path(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/files")), name);
    for name in ["run.pt", "run-nested.pt"] {
        files.weights = saved(name);
        let actual = files.run(&[]);
        assert_eq!(actual["out"].to_f64_vec().unwrap(), expected["out"].to_f64_vec().unwrap(), "{name}");
    }
    // An extra tensor is an error, in a wrapper as well.
    files.weights = path(files.folder.path(), "more.safetensors");
    let golden = read_safetensors(golden("length_none_longer") + "/weights.safetensors").expect("weights");
    let one = Tensor::ones([1], DType::F32, &Device::Cpu).expect("one");
    for wrapper in ["", "module.", "state_dict.model."] {
        let named = |(name, tensor): (&String, &Tensor)| (format!("{wrapper}{name}"), tensor.clone());
        let mut weights: Tensors = golden.iter().map(named).collect();
        write_safetensors(&files.weights, &weights, &BTreeMap::new()).expect("a file");
        assert_eq!(files.run(&[])["out"].to_f64_vec().unwrap(), expected["out"].to_f64_vec().unwrap(), "{wrapper}");
        fs::remove_file(&files.outputs).expect("the outputs");
        weights.insert(format!("{wrapper}more.weight"), one.clone());
        write_safetensors(&files.weights, &weights, &BTreeMap::new()).expect("a file");
        assert!(files.fails(&[]).contains("unused          more.weight"), "{wrapper}");
        weights.retain(|name, _| !name.contains("norm"));
        write_safetensors(&files.weights, &weights, &BTreeMap::new()).expect("a file");
        assert!(files.fails(&[]).contains("missing         norm.weight"), "{wrapper}");
    }
    files.weights = saved("run.pt");
    files.inputs = saved("unread.pt");
    assert!(files.fails(&[]).contains("complex"), "unreadable inputs");
}
