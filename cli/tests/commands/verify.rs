//! `xt verify`: cases that agree, cases that do not, and folders that are not cases.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::command::{failed, fails, path, refuses, succeeds, text, xt};
use x_transformers::{
    DType, Device, Tensor,
    io::{read_safetensors, write_safetensors},
};

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/parity");

/// Copies a case into a folder under this name.
fn copy(case: &str, folder: &Path, name: &str) -> PathBuf {
    let to = folder.join(name);
    fs::create_dir_all(&to).expect("create");
    for entry in fs::read_dir(Path::new(CASES).join(case)).expect("a case") {
        let from = entry.expect("an entry").path();
        fs::copy(&from, to.join(from.file_name().expect("a name"))).expect("copy");
    }
    to
}

fn change(case: &Path, file: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let path = case.join(file);
    let mut tensors = read_safetensors(&path).expect("a file of the case");
    change(&mut tensors);
    write_safetensors(&path, &tensors, &BTreeMap::new()).expect("write");
}

/// The lines of a run that must fail, the last one aside, and that one.
#[track_caller]
fn disagrees(arguments: &[&str]) -> (Vec<String>, String) {
    let output = xt(arguments);
    let out = text(&output.stdout);
    assert!(failed(arguments, output).contains("cases failed"));
    let mut lines: Vec<String> = out.lines().map(str::to_string).collect();
    let last = lines.pop().expect("a last line");
    (lines, last)
}

#[test]
fn every_case_of_the_project_agrees() {
    for dtype in ["f64", "f32", "bf16"] {
        let out = succeeds(&["verify", CASES, "--dtype", dtype, "--device", "cpu"]);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(*lines.last().expect("a line"), "128 passed, 0 failed", "{dtype}");
        assert_eq!(lines.len(), 129);
        for line in &lines[..128] {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [mark, case, error, tensor] = words[..] else { panic!("{line}") };
            assert_eq!(mark, "ok");
            assert!(error.parse::<f64>().expect("a number") < 0.5, "{line}");
            let expected = read_safetensors(Path::new(CASES).join(case).join("expected.safetensors")).expect("tensors");
            assert!(expected.contains_key(tensor) || expected.contains_key(&format!("sums.{tensor}")), "{line}");
        }
    }
}

#[test]
fn folders_are_searched() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy("decoder_gpt", folder.path(), "mine/deep/gpt");
    copy("filter_top_k", folder.path(), "mine/filter");
    copy("vit_logits", folder.path(), "other");
    let (mine, other) = (path(folder.path(), "mine"), path(folder.path(), "other"));
    let out = succeeds(&["verify", &mine, &other]);
    let names: Vec<_> = out.lines().filter_map(|line| line.strip_prefix("ok")?.split_whitespace().next()).collect();
    assert_eq!(names, ["deep/gpt", "filter", &other], "{out}");
    assert!(out.ends_with("\n3 passed, 0 failed\n"), "{out}");
}

/// Whatever is wrong with a case, its line says so, and the others still run.
#[test]
fn cases_that_fail() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = |name: &str| copy("decoder_gpt", folder.path(), name);
    let expected =
        |name: &str, f: &dyn Fn(&mut BTreeMap<String, Tensor>)| change(&case(name), "expected.safetensors", f);
    let gradient = "grad.norm.weight";
    let times = |tensor: &Tensor, factor: f64| tensor.affine(factor, 0.0).expect("floats");
    expected("a-gradient", &|tensors| {
        let other = times(&tensors[gradient], 1.01);
        tensors.insert(gradient.to_string(), other);
    });
    expected("b-nan", &|tensors| {
        let other = times(&tensors["out"], f64::NAN);
        tensors.insert("out".to_string(), other);
    });
    expected("c-missing", &|tensors| {
        tensors.insert("mems.0".to_string(), Tensor::ones([2], DType::F32, &Device::Cpu).expect("a tensor"));
    });
    expected("d-unexpected", &|tensors| drop(tensors.remove(gradient)));
    expected("e-shape", &|tensors| {
        let other = tensors["out"].flatten(0, 1).expect("three dimensions");
        tensors.insert("out".to_string(), other);
    });
    change(&case("f-weights"), "weights.safetensors", |weights| drop(weights.remove("norm.bias")));
    fs::write(case("g-config").join("config.json"), r#"{"model": "Decoder", "dim": 8, "depht": 1}"#).expect("write");
    fs::remove_file(case("h-incomplete").join("expected.safetensors")).expect("remove");
    fs::write(case("i-broken").join("inputs.safetensors"), "short").expect("write");
    change(&copy("generate_greedy", folder.path(), "j-token"), "expected.safetensors", |tensors| {
        let out = &tensors["out"];
        let mut tokens = out.to_vec::<i64>().expect("tokens");
        tokens[0] += 1;
        let out = Tensor::from_vec(tokens, *out.shape(), &Device::Cpu).expect("tokens");
        tensors.insert("out".to_string(), out);
    });
    let summed = "grad.attn_layers.layers.0.1.to_q.weight";
    change(&copy("rel_pos_bias", folder.path(), "k-sums"), "expected.safetensors", |tensors| {
        let key = format!("sums.{summed}");
        let other = times(&tensors[&key], 1.01);
        tensors.insert(key, other);
    });
    case("l-good");

    let (lines, last) = disagrees(&["verify", &path(folder.path(), ""), "--dtype", "f64"]);
    assert_eq!(last, "1 passed, 11 failed");
    let wrong: [&[&str]; 11] = [
        &["a-gradient", "9.9e-3", gradient, "allowed 2e-7"],
        &["b-nan", "NaN", "out"],
        &["c-missing", "mems.0 is missing"],
        &["d-unexpected", gradient, "is unexpected"],
        &["e-shape", "out is [", "expected ["],
        &["f-weights", "norm.bias", "missing"],
        &["g-config", "`depht`", "`depth`"],
        &["h-incomplete", "expected.safetensors", "check the path"],
        &["i-broken", "inputs.safetensors", "too few"],
        &["j-token", "out", "allowed 0e0"],
        &["k-sums", "9.9e-3", summed, "allowed 2e-7"],
    ];
    assert_eq!(lines.len(), 12, "{lines:#?}");
    for (line, parts) in lines.iter().zip(wrong) {
        assert!(line.starts_with("FAILED  "), "{line}");
        assert!(parts.iter().all(|part| line.contains(part)), "{parts:?} in {line}");
    }
    assert!(lines[11].starts_with("ok      l-good"), "{}", lines[11]);
}

#[test]
fn folders_without_a_case() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir(folder.path().join("empty")).expect("create");
    let empty = fails(&["verify", CASES, &path(folder.path(), "empty")]);
    assert!(empty.contains("empty") && empty.contains("config.json"), "{empty}");
    let none = fails(&["verify", &path(folder.path(), "none")]);
    assert!(none.contains("none") && none.contains("check the path"), "{none}");
    let file = path(folder.path(), "file");
    fs::write(&file, "no folder").expect("write");
    let file = fails(&["verify", &file]);
    assert!(file.contains("file") && file.contains("give a folder"), "{file}");
    let device = fails(&["verify", CASES, "--device", "gpu"]);
    assert!(device.contains("gpu") && device.contains("cuda:N"), "{device}");
    assert!(refuses(&["verify"]).contains("DIR"));
    assert!(refuses(&["verify", CASES, "--dtype", "i64"]).contains("bf16"));
    assert!(succeeds(&["verify", "--help"]).contains("Usage: xt verify"));
}

#[test]
#[cfg(unix)]
fn a_folder_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let secret = folder.path().join("secret");
    fs::create_dir(&secret).expect("create");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).expect("permissions");
    // Root may read everything.
    if fs::read_dir(&secret).is_err() {
        let message = fails(&["verify", &path(folder.path(), "")]);
        assert!(message.contains("secret") && message.contains("permissions"), "{message}");
    }
}

/// A link up the tree is not followed.
#[test]
#[cfg(unix)]
fn links_do_not_lead_in_circles() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = copy("decoder_gpt", folder.path(), "gpt");
    let root = folder.path().join("root");
    fs::create_dir(&root).expect("create");
    std::os::unix::fs::symlink(&root, root.join("again")).expect("link");
    std::os::unix::fs::symlink(case, root.join("linked")).expect("link");
    let out = succeeds(&["verify", &path(folder.path(), "root")]);
    assert!(out.starts_with("ok      linked") && out.ends_with("\n1 passed, 0 failed\n"), "{out}");
}
