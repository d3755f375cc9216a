//! Exit codes and messages: 0 success, 1 failure with one line that says what failed and what to do, 2 wrong usage.

use std::fs;

use crate::command::{TINY, failed, fails, path, refuses, start, succeeds, write_text};

#[test]
fn wrong_usage_is_code_2() {
    assert!(refuses(&[]).contains("Usage"));
    assert!(refuses(&["tarin"]).contains("train"));
    assert!(refuses(&["train", "--stepz", "3"]).contains("--steps"));
    assert!(refuses(&["train", "--steps", "many"]).contains("many"));
    assert!(refuses(&["train", "--every", "0"]).contains("every"));
    assert!(refuses(&["train", "--dtype", "f8"]).contains("bf16"));
    assert!(refuses(&["generate"]).contains("--checkpoint"));
    assert!(refuses(&["generate", "--checkpoint", "out", "--prompt", ""]).contains("--prompt"));
    assert!(refuses(&["generate", "--checkpoint", "out", "--top-k", "0"]).contains("--top-k"));
    assert!(refuses(&["info"]).contains("--config"));
    // A negative number belongs to the option in front of it, which is named.
    for wrong in [["--steps", "-1"], ["--batch-size", "-2"], ["--seq-len", "-3"]] {
        assert!(refuses(&[&["train"], &wrong[..]].concat()).contains(wrong[0]), "{wrong:?}");
    }
    for (option, values, expected) in [
        ("--temperature", ["-1", "nan"], "at least 0"),
        ("--top-p", ["1.5", "-0.1"], "0 to 1"),
        ("--min-p", ["2", "inf"], "0 to 1"),
        ("--top-a", ["2", "x"], "0 to 1"),
        ("--repetition-penalty", ["0", "-1"], "above 0"),
    ] {
        for value in values {
            let message = refuses(&["generate", "--checkpoint", "out", option, value]);
            assert!(message.contains(option) && message.contains(value) && message.contains(expected), "{message}");
        }
    }
}

#[test]
fn options_that_contradict_each_other_are_code_2() {
    for option in [["--dim", "8"], ["--depth", "1"], ["--heads", "1"]] {
        assert!(refuses(&["train", "--config", "c.json", option[0], option[1]]).contains("cannot be used with"));
        assert!(refuses(&["train", "--resume", "out", option[0], option[1]]).contains("cannot be used with"));
    }
    for option in
        [["--ema", "0.9"], ["--weight-decay", "0.1"], ["--seed", "1"], ["--out", "elsewhere"], ["--config", "c.json"]]
    {
        assert!(refuses(&["train", "--resume", "out", option[0], option[1]]).contains("cannot be used with"));
    }
    assert!(refuses(&["info", "--config", "c.json", "--checkpoint", "out"]).contains("cannot be used with"));
}

#[test]
fn help_and_devices() {
    for arguments in [&["--help"][..], &["train", "--help"], &["generate", "--help"], &["info", "--help"]] {
        assert!(succeeds(arguments).contains("Usage: xt"));
    }
    let devices = succeeds(&["devices"]);
    let mut lines = devices.lines();
    let threads = lines.next().and_then(|line| line.strip_prefix("cpu: ")?.split_once(" threads, "));
    let (threads, level) = threads.unwrap_or_else(|| panic!("{devices}"));
    assert!(threads.parse::<usize>().is_ok_and(|threads| threads > 0) && level.ends_with("vector code"), "{devices}");
    // A card, or each library: where it was found, or how to get it.
    let known = |line: &str| {
        let library = line.strip_prefix("cuda: ");
        line.starts_with("cuda:0: ")
            || line.starts_with("ranks: one process")
            || line.starts_with("ranks on GPUs: ")
            || library.is_some_and(|line| line.contains(" found in ") || line.contains("install"))
    };
    assert!(lines.clone().count() > 0 && lines.all(known), "{devices}");
}

#[test]
fn texts_that_cannot_be_learned_from() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = path(folder.path(), "out");
    let train = |text: &str| fails(&[&["train", "--text", text, "--out", &out, "--steps", "1"][..], &TINY].concat());
    let file = |name: &str, content: &[u8]| {
        let path = path(folder.path(), name);
        fs::write(&path, content).expect("write");
        path
    };

    let missing = train(&path(folder.path(), "none.txt"));
    assert!(missing.contains("none.txt") && missing.contains("check the path"), "{missing}");
    let empty = train(&file("empty.txt", b""));
    assert!(empty.contains("empty.txt") && empty.contains("empty"), "{empty}");
    let binary = train(&file("model.bin", b"\x7fELF\0\0\0\0 and so on"));
    assert!(binary.contains("model.bin") && binary.contains("binary"), "{binary}");
    let short = train(&file("short.txt", b"too short"));
    assert!(short.contains("too few") && short.contains("seq_len"), "{short}");
    // Nothing was begun.
    assert!(!fs::exists(&out).expect("exists"));
}

#[test]
#[cfg(unix)]
fn a_text_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = path(folder.path(), "secret.txt");
    write_text(&text);
    fs::set_permissions(&text, fs::Permissions::from_mode(0o000)).expect("permissions");
    // Root may read everything.
    if fs::read(&text).is_err() {
        let message = fails(&["train", "--text", &text]);
        assert!(message.contains("secret.txt") && message.contains("permissions"), "{message}");
    }
}

#[test]
fn configs_that_make_no_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (config, out) = (path(folder.path(), "c.json"), path(folder.path(), "out"));
    let tries = |json: &str| {
        fs::write(&config, json).expect("write");
        let info = fails(&["info", "--config", &config]);
        assert!(info.contains("c.json"), "{info}");
        let train = fails(&["train", "--config", &config, "--out", &out]);
        assert!(!fs::exists(&out).expect("exists"));
        (info, train)
    };
    let model = |layers: &str| {
        format!(r#"{{"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 8, "attn_layers": {layers}}}"#)
    };

    let (info, train) = tries(&model(r#"{"kind": "Decoder", "dim": 8, "depth": 1, "rotary_pos_embd": true}"#));
    for message in [info, train] {
        assert!(message.contains("`rotary_pos_embd`, did you mean `rotary_pos_emb`?"), "{message}");
    }
    let (info, train) = tries(&model(r#"{"kind": "Decoder", "dim": 8, "depth": 1, "heads": 0}"#));
    for message in [info, train] {
        assert!(message.contains("heads") && message.contains('0'), "{message}");
    }
    let (info, _) = tries("{\"model\": ");
    assert!(info.contains("JSON"), "{info}");
    let (_, train) = {
        fs::write(&config, r#"{"model": "Encoder", "dim": 8, "depth": 1, "heads": 1}"#).expect("write");
        ((), fails(&["train", "--config", &config, "--out", &out]))
    };
    assert!(train.contains("AutoregressiveWrapper"), "{train}");
    let missing = fails(&["info", "--config", &path(folder.path(), "none.json")]);
    assert!(missing.contains("none.json") && missing.contains("check the path"), "{missing}");
}

#[test]
fn model_options_that_make_no_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = path(folder.path(), "out");
    let train = |options: &[&str]| fails(&[&["train", "--out", &out][..], options].concat());
    for (options, words) in [
        (&["--heads", "0"][..], &["heads", "0"][..]),
        (&["--dim", "0"], &["dim", "0"]),
        (&["--depth", "0"], &["depth", "0"]),
        (&["--batch-size", "0"], &["batch_size", "0"]),
        (&["--seq-len", "0"], &["seq_len", "expected 1 to 4294967295", "0"]),
        (&["--lr", "0"], &["lr", "0"]),
        (&["--lr", "nan"], &["lr", "NaN"]),
        (&["--device", "tpu"], &["tpu", "cuda:N"]),
    ] {
        let message = train(options);
        for word in words {
            assert!(message.contains(word), "{options:?}: {message}");
        }
    }
    assert!(!fs::exists(&out).expect("exists"));
}

/// Obstacles to a run: a file in place of its folder, and another run.
#[test]
fn folders_that_cannot_be_trained_in() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (text, out, file) = (path(folder.path(), "t.txt"), path(folder.path(), "out"), path(folder.path(), "file"));
    write_text(&text);
    fs::write(&file, "").expect("write");
    let train = |out: &str, more: &[&str]| {
        [&["train", "--text", &text, "--out", out, "--steps", "2"][..], &TINY, more].concat().join("\n")
    };
    let arguments = |joined: &str| joined.split('\n').map(str::to_string).collect::<Vec<_>>();
    let run = |joined: &str| fails(&arguments(joined).iter().map(String::as_str).collect::<Vec<_>>());
    for wrong in [file.clone(), path(folder.path(), "file/below")] {
        assert!(run(&train(&wrong, &[])).contains("give a folder"), "{wrong}");
    }
    let whole = arguments(&train(&out, &[]));
    succeeds(&whole.iter().map(String::as_str).collect::<Vec<_>>());
    // Locked as by a running run.
    let lock = fs::File::create(folder.path().join("out/.lock")).expect("create");
    lock.lock().expect("lock");
    for message in [run(&train(&out, &["--overwrite"])), fails(&["train", "--text", &text, "--resume", &out])] {
        assert!(message.contains("another `xt train` is writing") && message.contains("--out"), "{message}");
    }
    drop(lock);
    succeeds(&["train", "--text", &text, "--resume", &out]);
    // The end can be moved, but not before what is done.
    let message = fails(&["train", "--text", &text, "--resume", &out, "--steps", "1"]);
    assert!(
        message.contains("steps") && message.contains("expected 2 (the steps done)") && message.contains("got 1"),
        "{message}"
    );
    assert!(succeeds(&["train", "--text", &text, "--resume", &out, "--steps", "3"]).contains("step 3/3"));
    // Its output embeds nothing, and has no token 999; the error comes before any output.
    let message = fails(&["embed", "--checkpoint", &out, "--text", "a"]);
    assert!(message.contains("xt generate"), "{message}");
    let message = fails(&["generate", "--checkpoint", &out, "--eos", "999"]);
    assert!(message.contains("`--eos`") && message.contains("0..256"), "{message}");
    let message = fails(&["info", "--checkpoint", &out, "--seq-len", "9"]);
    assert!(message.contains("seq_len") && message.contains("`max_seq_len` (8), got 9"), "{message}");
}

#[test]
fn folders_without_a_checkpoint() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for dir in [path(folder.path(), "nothing"), path(folder.path(), "")] {
        for arguments in [["generate", "--checkpoint"], ["info", "--checkpoint"], ["train", "--resume"]] {
            let message = fails(&[arguments[0], arguments[1], &dir]);
            assert!(message.contains("checkpoint"), "{message}");
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (text, out) = (path(folder.path(), "text.txt"), folder.path().join("out"));
    write_text(&text);
    fs::create_dir(&out).expect("create");
    std::os::unix::fs::symlink("/dev/full", out.join("metrics.csv")).expect("link");
    let out = path(folder.path(), "out");
    let message = fails(&[&["train", "--text", &text, "--out", &out, "--steps", "1"][..], &TINY].concat());
    assert!(message.contains("metrics.csv") && message.contains("free some space"), "{message}");

    // The same for what is printed.
    let mut command = start(&["devices"]);
    command.stdout(fs::OpenOptions::new().write(true).open("/dev/full").expect("open"));
    let message = failed(&["devices"], command.output().expect("xt starts"));
    assert!(message.contains("standard output") && message.contains("No space"), "{message}");
}

#[test]
fn an_unknown_instruction_level() {
    let run = |level: &str| start(&["devices"]).env("XT_CPU", level).output().expect("xt starts");
    let message = failed(&["devices"], run("avx1024"));
    assert!(message.contains("XT_CPU") && message.contains("avx512_bf16") && message.contains("avx1024"), "{message}");
    for level in ["", "portable", "amx"] {
        assert!(run(level).status.success(), "{level}");
    }
}
