//! Runs by presets, event files, parameter groups, and what `--overwrite` removes.

use std::{fs, path::Path};

use crate::command::{TINY, fails, path, refuses, succeeds, write_text};

#[test]
fn event_files_and_the_best_checkpoint_of_a_run_that_is_replaced() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (corpus, out) = (at("text.txt"), at("out"));
    write_text(&corpus);
    let events = || -> Vec<u64> {
        let entries = fs::read_dir(&out).expect("a folder").map(|entry| entry.expect("an entry"));
        let own = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("events.out.tfevents."));
        own.map(|entry| entry.metadata().expect("a size").len()).collect()
    };
    let train = [&["train", "--text", &corpus, "--out", &out, "--device", "cpu", "--steps", "3"][..], &TINY].concat();
    succeeds(&[&train[..], &["--keep-best", "--tensorboard", "--group", "*emb* lr=0.1 weight_decay=0"]].concat());
    assert!(events().len() == 1 && events()[0] > 500, "{:?}", events());
    assert!(Path::new(&out).join("best/config.json").is_file());
    let training = fs::read_to_string(Path::new(&out).join("checkpoint/training.json")).expect("training.json");
    assert!(training.contains("\"pattern\": \"*emb*\"") && training.contains("\"lr\": 0.1"), "{training}");
    succeeds(&["train", "--resume", &out, "--text", &corpus, "--steps", "4", "--device", "cpu", "--tensorboard"]);
    assert_eq!(events().len(), 2);
    // The new run keeps no best checkpoint and has no events: nothing of the old one is left.
    succeeds(&[&train[..], &["--overwrite"]].concat());
    assert!(events().is_empty() && !Path::new(&out).join("best").exists());
    assert!(refuses(&["train", "--group", "*emb* rate=1"]).contains("expected lr, weight_decay"));
    let message = fails(&[&train[..], &["--overwrite", "--group", "nothing lr=1"]].concat());
    assert!(message.contains("nothing"), "{message}");
}

#[test]
fn presets_and_runs_that_cannot_fit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (corpus, out) = (at("text.txt"), at("out"));
    write_text(&corpus);
    let train = ["train", "--text", &corpus, "--out", &out, "--device", "cpu", "--seq-len", "16", "--batch-size", "1"];
    let small = ["--preset", "modern", "--set", "depth=1", "--set", "dim=64", "--steps", "1"];
    succeeds(&[&train[..], &small].concat());
    let config = fs::read_to_string(Path::new(&out).join("checkpoint/config.json")).expect("a config");
    assert!(config.contains("\"num_tokens\": 256") && config.contains("attn_kv_heads"), "{config}");
    // Presets with Llama's architecture are models of transformers.
    for preset in ["modern", "llama-160m"] {
        let tiny = ["--overwrite", "--preset", preset, "--set", "depth=1", "--set", "dim=64", "--steps", "0"];
        succeeds(&[&train[..], &tiny].concat());
        let said = succeeds(&["export", "--checkpoint", &out, "--output", &at("exported"), "--overwrite"]);
        assert!(said.contains("Llama family"), "{said}");
        assert!(succeeds(&["info", "--checkpoint", &at("exported")]).contains("Llama"));
    }
    refuses(&["train", "--preset", "modern", "--dim", "64"]);
    let huge = ["--overwrite", "--dim", "65536", "--depth", "100", "--heads", "8"];
    #[cfg(target_os = "linux")]
    {
        let message = fails(&[&train[..], &huge].concat());
        assert!(message.contains("a step needs about") && message.contains("are available"), "{message}");
    }
}
