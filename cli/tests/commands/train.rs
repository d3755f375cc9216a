//! `xt train` writes the files that it reports, and they can be used.

use std::{
    fs,
    io::Read,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::command::{TINY, fails, path, refuses, start, succeeds, text, write_text};

fn no_control_characters(output: &str) {
    let bad: Vec<char> = output.chars().filter(|&c| c.is_control() && c != '\n').collect();
    assert!(bad.is_empty(), "{bad:?} in\n{output}");
}

/// Rows without the speed, which differs from run to run.
fn rows(folder: &Path) -> Vec<String> {
    let table = fs::read_to_string(folder.join("metrics.csv")).expect("metrics.csv");
    table.lines().map(|row| row.rsplit_once(',').expect("six columns").0.to_string()).collect()
}

/// Only steps are profiled: validation and samples are not part of the profile.
#[test]
fn a_profile_of_the_steps() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out, trace) =
        (path(folder.path(), "text.txt"), path(folder.path(), "out"), path(folder.path(), "trace.json"));
    write_text(&corpus);
    let files = ["train", "--text", &corpus, "--out", &out, "--steps", "3", "--profile", "--trace", &trace];
    let output = succeeds(&[&files[..], &TINY].concat());
    let table = output.split_once("profile of the steps").expect("a table").1;
    let calls = |op: &str| {
        let lines = table.lines().filter(|line| line.trim_start().starts_with(op));
        lines.map(|line| line.split_whitespace().nth(1).expect("calls").to_string()).collect::<Vec<_>>()
    };
    // One layer, forward and backward.
    assert_eq!((calls("attention "), calls("adamw ")), (vec!["3".into(); 2], vec!["3".into()]), "{table}");
    assert!(fs::read_to_string(trace).expect("a trace").contains("\"traceEvents\""));
}

#[test]
fn three_steps_leave_everything() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let train = [&["train", "--text", &corpus, "--out", &out, "--steps", "3", "--every", "2"][..], &TINY].concat();
    let output = succeeds(&train);
    no_control_characters(&output);
    for part in
        ["parameters", "to train on", "device", "order-2 model", "step 3/3", "validation", "sample", "metrics.csv"]
    {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }

    let run = folder.path().join("out");
    for file in ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"] {
        assert!(run.join("checkpoint").join(file).is_file(), "{file}");
    }
    let rows = rows(&run);
    assert_eq!(rows[0], "step,split,loss,bits_per_byte,lr");
    let kinds: Vec<String> = rows[1..].iter().map(|row| row.split(',').take(2).collect::<Vec<_>>().join(" ")).collect();
    let expected = ["0 validation", "0 train", "1 validation", "1 train", "2 validation", "2 train", "3 validation"];
    assert_eq!(kinds, expected);
    for row in &rows[1..] {
        let numbers: Vec<f64> = row.split(',').skip(2).take(2).map(|x| x.parse().expect("a number")).collect();
        assert!((numbers[0] / std::f64::consts::LN_2 - numbers[1]).abs() < 1e-5, "{row}");
    }
    let svg = fs::read_to_string(run.join("loss.svg")).expect("loss.svg");
    assert!(svg.starts_with("<svg") && svg.contains("order-2 model"));

    // The output is a model.
    let generate = ["generate", "--checkpoint", &out, "--prompt", "the cat é", "--length", "20", "--seed", "3"];
    let generated = succeeds(&generate);
    assert!(generated.starts_with("the cat é") && generated.ends_with('\n'), "{generated:?}");
    assert_eq!(generated, succeeds(&generate));
    let checkpoint = path(&run, "checkpoint");
    let direct = [&["generate", "--checkpoint", &checkpoint][..], &generate[3..]].concat();
    assert_eq!(generated, succeeds(&direct));
    assert_eq!(succeeds(&["generate", "--checkpoint", &out, "--prompt", "abc", "--length", "0"]), "abc\n");
    let info = succeeds(&["info", "--checkpoint", &out]);
    assert!(info.contains("layer order") && info.contains("a f") && info.contains("total"), "{info}");
    let cold = refuses(&["generate", "--checkpoint", &out, "--temperature", "-1"]);
    assert!(cold.contains("temperature"), "{cold}");

    // A trained model is not overwritten by mistake.
    let again = fails(&train);
    assert!(again.contains("--resume") && again.contains("--overwrite"), "{again}");
    succeeds(&[&train[..], &["--overwrite"]].concat());
    // A finished run has nothing left to do.
    let before = self::rows(&run);
    let resumed = succeeds(&["train", "--resume", &out, "--text", &corpus]);
    assert!(resumed.contains("validation"), "{resumed}");
    assert_eq!(self::rows(&run), before);
}

#[test]
fn a_killed_run_continues_as_if_nothing_had_happened() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let corpus = path(folder.path(), "text.txt");
    write_text(&corpus);
    let (whole, cut) = (path(folder.path(), "whole"), path(folder.path(), "cut"));
    let options = [&["--steps", "60", "--every", "5", "--text", &corpus][..], &TINY].concat();
    succeeds(&[&["train", "--out", &whole][..], &options].concat());

    let mut running = start(&[&["train", "--out", &cut][..], &options].concat()).spawn().expect("xt starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    let saved = folder.path().join("cut/checkpoint/training.json");
    while !saved.is_file() && Instant::now() < deadline {
        sleep(Duration::from_millis(5));
    }
    running.kill().expect("kill");
    running.wait().expect("wait");
    let resumed = succeeds(&["train", "--resume", &cut, "--text", &corpus, "--every", "5"]);
    assert!(resumed.contains("already done"), "{resumed}");
    assert_eq!(rows(&folder.path().join("cut")), rows(&folder.path().join("whole")));
    let weights = |run: &str| fs::read(folder.path().join(run).join("checkpoint/model.safetensors")).expect("read");
    assert!(weights("cut") == weights("whole"));

    let other = path(folder.path(), "other.txt");
    fs::write(&other, "another text ".repeat(1000)).expect("write");
    let message = fails(&["train", "--resume", &cut, "--text", &other]);
    assert!(message.contains("text"), "{message}");
}

/// `--steps` and `--every` change the resumed run, and stay changed.
#[test]
fn a_resumed_run_goes_on_with_other_steps() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let run = folder.path().join("out");
    let validated = || -> Vec<String> {
        let rows = rows(&run).into_iter().filter(|row| row.contains("validation"));
        rows.map(|row| row.split(',').next().expect("a step").to_string()).collect()
    };
    let cpu = ["--device", "cpu"];
    let new = ["train", "--text", &corpus, "--out", &out, "--steps", "4", "--every", "3"];
    succeeds(&[&new[..], &TINY, &cpu].concat());
    assert_eq!(validated(), ["0", "1", "2", "3", "4"]);
    let resume = ["train", "--resume", &out, "--text", &corpus, cpu[0], cpu[1]];
    succeeds(&[&resume[..], &["--steps", "7"]].concat());
    assert_eq!(validated(), ["0", "1", "2", "3", "4", "6", "7"]);
    succeeds(&[&resume[..], &["--steps", "9", "--every", "1"]].concat());
    succeeds(&[&resume[..], &["--steps", "11"]].concat());
    assert_eq!(validated(), ["0", "1", "2", "3", "4", "6", "7", "8", "9", "10", "11"]);
}

/// Obstacles to writing the files of a run are reported before the first step.
#[test]
#[cfg(unix)]
fn links_to_nowhere() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let corpus = path(folder.path(), "text.txt");
    write_text(&corpus);
    let run = |name: &str| path(folder.path(), name);
    let tail = [&["--steps", "1", "--device", "cpu", "--text", &corpus][..], &TINY].concat();
    symlink("none", run("a")).expect("a link");
    fs::create_dir(run("b")).expect("create");
    symlink("none", run("b/checkpoint")).expect("a link");
    fs::create_dir(run("c")).expect("create");
    symlink("none/metrics.csv", run("c/metrics.csv")).expect("a link");
    fs::create_dir(run("d")).expect("create");
    symlink("none/loss.svg", run("d/loss.svg")).expect("a link");
    for out in ["a", "b", "c", "d"] {
        let message = fails(&[&["train", "--out", &run(out)][..], &tail].concat());
        assert!(message.contains("is a symbolic link to ") && message.contains("none"), "{message}");
        assert!(!Path::new(&run(out)).join("checkpoint/config.json").exists(), "{message}");
    }
    // Where the folder of the file exists, so does the file then.
    fs::create_dir(run("e")).expect("create");
    symlink("../curves.csv", run("e/metrics.csv")).expect("a link");
    succeeds(&[&["train", "--out", &run("e")][..], &tail].concat());
    assert!(fs::read_to_string(run("curves.csv")).expect("the table").contains("1,validation"));
    assert!(Path::new(&run("e/metrics.csv")).is_symlink());
}

/// In f16 the loss is scaled: a scale that is too large skips steps, which are logged and counted.
#[test]
fn f16_reports_skipped_steps() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let train = ["train", "--text", &corpus, "--out", &out, "--steps", "2", "--dtype", "f16"];
    let output = succeeds(&[&train[..], &TINY].concat());
    assert!(output.contains("loss scale  65536 at the end, 0 steps skipped"), "{output}");
    let training = folder.path().join("out/checkpoint/training.json");
    let json = fs::read_to_string(&training).expect("training.json");
    let json = json.replacen("\"scale\": 65536.0", "\"scale\": 1099511627776.0", 1);
    fs::write(&training, json.replacen("\"steps\": 2", "\"steps\": 4", 1)).expect("write");
    let resumed = succeeds(&["train", "--resume", &out, "--text", &corpus]);
    for part in ["step 3/4  skipped", "loss scale now 549755813888", "step 4/4  skipped", "2 steps skipped"] {
        assert!(resumed.contains(part), "{part:?} in\n{resumed}");
    }
}

#[test]
fn a_config_is_trained_as_written() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, config, out) =
        (path(folder.path(), "text.txt"), path(folder.path(), "c.json"), path(folder.path(), "out"));
    write_text(&corpus);
    let json = r#"{"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 12, "attn_layers":
        {"kind": "Decoder", "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 32, "rotary_pos_emb": true}}"#;
    fs::write(&config, json).expect("write");
    let train = ["train", "--text", &corpus, "--config", &config, "--out", &out, "--steps", "1", "--batch-size", "2"];
    succeeds(&train);
    let saved = fs::read_to_string(folder.path().join("out/checkpoint/config.json")).expect("read");
    assert!(saved.contains("rotary_pos_emb") && saved.contains("AutoregressiveWrapper"), "{saved}");
    // Longer than the model.
    let message = fails(&[&train[..], &["--seq-len", "13", "--overwrite"]].concat());
    assert!(message.contains("seq_len") && message.contains("12"), "{message}");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let options = ["--steps", "50", "--every", "1", "--lr", "1e4", "--warmup", "1"];
    let message = fails(&[&["train", "--text", &corpus, "--out", &out][..], &TINY[..10], &options].concat());
    assert!(message.contains("step") && message.contains("not finite"), "{message}");
    // The last good checkpoint stays.
    succeeds(&["info", "--checkpoint", &out]);
}

#[test]
#[cfg(unix)]
fn a_closed_pipe_is_not_an_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    succeeds(&[&["train", "--text", &corpus, "--out", &out, "--steps", "1"][..], &TINY].concat());
    for arguments in [
        &["generate", "--checkpoint", &out, "--prompt", "x", "--length", "100000"][..],
        &["info", "--checkpoint", &out],
        &[&["train", "--text", &corpus, "--out", &out, "--overwrite", "--steps", "2"][..], &TINY].concat(),
    ] {
        let mut running = start(arguments).spawn().expect("xt starts");
        let mut first = [0; 1];
        let mut stdout = running.stdout.take().expect("piped");
        stdout.read_exact(&mut first).expect("output");
        drop(stdout);
        let output = running.wait_with_output().expect("wait");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{arguments:?}");
    }
}

/// The first validations come early, and none of them saves.
#[test]
fn early_validations() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let train = ["train", "--text", &corpus, "--out", &out, "--steps", "25", "--every", "15", "--device", "cpu"];
    let output = succeeds(&[&train[..], &TINY].concat());
    let validated: Vec<String> = rows(&folder.path().join("out"))
        .iter()
        .filter(|row| row.contains("validation"))
        .map(|row| row.split(',').next().expect("a step").to_string())
        .collect();
    assert_eq!(validated, ["0", "1", "2", "5", "10", "15", "25"]);
    assert_eq!(output.matches("saved").count(), 2, "{output}");
}

/// Ctrl-C saves the step that it ends, and the resumed run is the run that nothing interrupted.
#[test]
#[cfg(unix)]
fn ctrl_c_saves() {
    use std::process::Command;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let corpus = path(folder.path(), "text.txt");
    write_text(&corpus);
    let (whole, cut) = (path(folder.path(), "whole"), path(folder.path(), "cut"));
    // A first checkpoint, then none for as long as the test takes.
    let options = [&["--text", &corpus, "--device", "cpu", "--steps", "400", "--every", "390"][..], &TINY].concat();
    let mut running = start(&[&["train", "--out", &cut][..], &options].concat()).spawn().expect("xt starts");
    let table = folder.path().join("cut/metrics.csv");
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::read_to_string(&table).map_or(0, |rows| rows.lines().count()) < 20 && Instant::now() < deadline {
        sleep(Duration::from_millis(2));
    }
    let id = running.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().expect("kill").success());
    let _ = running.wait();
    let output = running.wait_with_output().expect("its output");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("interrupted after step ") && message.contains("train --resume"), "{message}");
    let step: u64 =
        message.split("after step ").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok()).expect("a step");
    let state = fs::read_to_string(folder.path().join("cut/checkpoint/training.json")).expect("a state");
    assert!(step < 390 && state.contains(&format!("\"step\": {step},")), "{state}");
    succeeds(&["train", "--resume", &cut, "--text", &corpus, "--device", "cpu"]);
    succeeds(&[&["train", "--out", &whole][..], &options].concat());
    assert_eq!(rows(&folder.path().join("cut")), rows(&folder.path().join("whole")));
    let weights = |run: &str| fs::read(folder.path().join(run).join("checkpoint/model.safetensors")).expect("read");
    assert!(weights("cut") == weights("whole"));
}

/// A run that starts with the weights of another: its first validation is the last one of that run on the same text.
#[test]
fn from_another_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, first, second) =
        (path(folder.path(), "text.txt"), path(folder.path(), "first"), path(folder.path(), "second"));
    write_text(&corpus);
    let cpu = ["--device", "cpu"];
    succeeds(
        &[&["train", "--text", &corpus, "--out", &first, "--steps", "20", "--lr", "0.01"][..], &TINY, &cpu].concat(),
    );
    let tune = ["train", "--text", &corpus, "--from", &first, "--out", &second, "--steps", "2", "--seq-len", "8"];
    succeeds(&[&tune[..], &["--lr", "0.001"], &cpu].concat());
    let [before, after] = ["first", "second"].map(|name| rows(&folder.path().join(name)));
    let loss = |row: &String| row.split(',').nth(2).expect("a loss").to_string();
    assert_eq!(loss(&after[1]), loss(before.last().expect("a row")));
    assert!(after[1].starts_with("0,validation,"), "{after:?}");
    let config = |run: &str| fs::read(folder.path().join(run).join("checkpoint/config.json")).expect("a config");
    assert!(config("first") == config("second"));
    // The checkpoint itself may be named; the model comes from it alone.
    let checkpoint = path(folder.path(), "first/checkpoint");
    let third = path(folder.path(), "third");
    succeeds(
        &[&["train", "--text", &corpus, "--from", &checkpoint, "--out", &third, "--steps", "1"][..], &cpu].concat(),
    );
    let long = fails(&[&tune[..9], &["--overwrite", "--seq-len", "9"], &cpu].concat());
    assert!(long.contains("seq_len"), "{long}");
    assert!(fails(&["train", "--from", "none", "--text", &corpus]).contains("none"));
    for conflict in [&["--dim", "16"][..], &["--set", "ff_glu=true"], &["--resume", &first]] {
        refuses(&[&["train", "--from", &first][..], conflict].concat());
    }
}

#[test]
fn a_dry_run_writes_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let train = ["train", "--text", &corpus, "--out", &out, "--dry-run", "--steps", "1000"];
    let output = succeeds(&[&train[..], &TINY].concat());
    for part in ["parameters  ", "memory  ", "tokens/s", "for 1000 steps", "nothing was written"] {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    assert!(!Path::new(&out).exists());
    // It refuses all that the run would refuse.
    assert!(fails(&[&train[..], &["--seq-len", "8", "--lr", "0"]].concat()).contains("lr"));
}

/// A run whose loss does not become lower stops, and keeps the best weights; killed or not, it ends alike.
#[test]
fn early_stopping_keeps_the_best() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    // Far too fast after a while.
    let options =
        ["--steps", "400", "--every", "5", "--patience", "4", "--lr", "0.3", "--warmup", "200", "--device", "cpu"];
    let output = succeeds(&[&["train", "--text", &corpus, "--out", &out][..], &options, &TINY[..10]].concat());
    assert!(output.contains("no lower loss in ") && output.contains("best"), "{output}");
    let table = rows(&folder.path().join("out"));
    let validations: Vec<(u64, f64)> = table
        .iter()
        .filter(|row| row.contains("validation"))
        .map(|row| {
            let columns: Vec<&str> = row.split(',').collect();
            (columns[0].parse().expect("a step"), columns[2].parse().expect("a loss"))
        })
        .collect();
    let saved: Vec<_> = validations.iter().filter(|(step, _)| step % 5 == 0 && *step > 0).collect();
    let lowest = validations.iter().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
    let last = saved.last().expect("a validation").0;
    assert!(last < 400 && saved.len() > 5, "{validations:?}");
    let state = fs::read_to_string(folder.path().join("out/best/training.json")).expect("the best");
    let best: u64 = validations.iter().find(|(_, loss)| *loss == lowest).expect("the lowest").0;
    if best.is_multiple_of(5) {
        assert!(state.contains(&format!("\"step\": {best},")), "{best}: {state}");
    }
    succeeds(&["generate", "--checkpoint", &path(folder.path(), "out/best"), "--length", "5"]);
    // Nothing is left to do, also when the best was not saved any more.
    let before = fs::read(folder.path().join("out/checkpoint/model.safetensors")).expect("weights");
    let resumed = succeeds(&["train", "--resume", &out, "--text", &corpus, "--device", "cpu"]);
    assert!(resumed.contains("stopped at step") && !resumed.contains("validation loss"), "{resumed}");
    assert!(fs::read(folder.path().join("out/checkpoint/model.safetensors")).expect("weights") == before);
}
