//! `xt train` by several processes with an emulated GPU each, started with the variables of torchrun.
//! Needs the emulated driver (`scripts/emulated`); without it the tests are skipped with a message.

#![cfg(all(feature = "cuda", not(feature = "mpi"), target_os = "linux"))]

mod command;

use std::{
    fs,
    io::Write,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use command::{TINY, path, start, succeeds, text, write_text};

fn is_emulated(test: &str) -> bool {
    let emulated = std::env::var_os("XT_EMULATOR").is_some();
    if !emulated {
        // Straight to the stream: the harness hides what a passing test prints.
        let _ = writeln!(std::io::stderr(), "skipped: {test}: only the emulated NCCL runs without several cards");
    }
    emulated
}

/// Starts a rank for each of these command lines.
fn launch(lines: &[Vec<&str>], variables: &[(&str, &str)]) -> Vec<Child> {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let (size, port) = (lines.len().to_string(), (port - 1).to_string());
    let start = |(rank, line): (usize, &Vec<&str>)| {
        let (rank, mut command) = (rank.to_string(), start(line));
        command.envs([("RANK", &rank), ("LOCAL_RANK", &rank), ("WORLD_SIZE", &size), ("MASTER_PORT", &port)]);
        command.envs([("MASTER_ADDR", "localhost"), ("XT_EMULATOR_CARDS", "2"), ("RAYON_NUM_THREADS", "1")]);
        command.envs(variables.iter().copied()).spawn().expect("xt starts")
    };
    lines.iter().enumerate().map(start).collect()
}

fn ends(children: Vec<Child>) -> Vec<Output> {
    children.into_iter().map(|child| child.wait_with_output().expect("a process")).collect()
}

/// Runs a command line on two ranks, of which rank 0 alone prints.
fn together(line: &[&str]) {
    let outputs = ends(launch(&[line.to_vec(), line.to_vec()], &[]));
    for (rank, output) in outputs.iter().enumerate() {
        assert_eq!(output.status.code(), Some(0), "rank {rank}: {} {}", text(&output.stdout), text(&output.stderr));
    }
    assert_eq!(
        (text(&outputs[1].stdout), text(&outputs[1].stderr)),
        (String::new(), String::new()),
        "rank 1 is silent"
    );
}

/// The library's tests compare the numbers; here each process takes the card of its rank, and rank 0 alone prints.
#[test]
fn ranks_train_together() {
    if !is_emulated("ranks_train_together") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let line =
        ["train", "--text", &corpus, "--out", &out, "--steps", "2", "--every", "2", "--zero", "3", "--recompute"];
    together(&[&line[..], &TINY].concat());
    assert!(Path::new(&out).join("checkpoint/optimizer.safetensors").exists());
}

#[test]
fn what_ranks_cannot_do_is_said() {
    if !is_emulated("what_ranks_cannot_do_is_said") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let line = |more: &[&'static str]| {
        let line = ["train", "--text", &corpus, "--out", &out, "--steps", "4"];
        [&line[..], more, &TINY].concat()
    };
    let outputs = ends(launch(&[line(&[]), line(&["--lr", "0.5"])], &[]));
    let said = outputs.iter().map(|output| (output.status.code(), text(&output.stderr))).collect::<Vec<_>>();
    let words = "rank 1 has `options.lr` = 0.5, rank 0 0.001; start all ranks with the same command";
    assert!(said[0].0 == Some(1) && said[0].1.lines().count() == 1 && said[0].1.contains(words), "{said:?}");
    // Rank 0 has said it; where it takes long to end, rank 1 says it too.
    let (code, second) = &said[1];
    assert!(*code == Some(1) && (second.is_empty() || second.starts_with("xt: rank 1 of 2: ")), "{said:?}");
    for output in ends(launch(&[line(&["--device", "cpu"]), line(&["--device", "cpu"])], &[])) {
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("processes on the CPU need MPI"), "{said}");
    }
    let outputs = ends(launch(&[line(&[]), line(&[])], &[("MASTER_ADDR", "")]));
    let said = outputs.iter().map(|output| text(&output.stderr)).collect::<Vec<_>>();
    assert!(said[0].contains("MASTER_ADDR is not set") && said[1].starts_with("xt: rank 1 of 2: "), "{said:?}");
    assert!(!Path::new(&out).exists(), "a refused run wrote files");
    let outputs = ends(launch(&[vec!["devices"], vec!["devices"]], &[]));
    let said = text(&outputs[1].stdout);
    assert!(
        said.contains("ranks: rank 1 of 2, by torchrun") && said.contains("ranks on GPUs: NCCL 2.21.5 in "),
        "{said}"
    );
}

/// Ends a long run after its first checkpoint by a signal to rank 1, and returns what rank 0 says.
fn long(signal: &str, variables: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let line = ["train", "--text", &corpus, "--out", &out, "--steps", "100000", "--every", "2"];
    let line = [&line[..], &TINY].concat();
    let mut children = launch(&[line.clone(), line], variables);
    let began = Instant::now();
    while !Path::new(&out).join("checkpoint/model.safetensors").exists() {
        assert!(began.elapsed() < Duration::from_secs(120), "no checkpoint");
        sleep(Duration::from_millis(50));
    }
    let mut second = children.pop().expect("rank 1");
    let sent = Command::new("kill").args([signal, &second.id().to_string()]).stdin(Stdio::null()).status();
    assert!(sent.expect("kill").success());
    let began = Instant::now();
    let first = ends(children).remove(0);
    // Not the half hour that ranks wait by default.
    assert!(began.elapsed() < Duration::from_secs(120), "{:?}", began.elapsed());
    // A stopped process cannot end by itself.
    let _ = second.kill();
    let _ = second.wait();
    assert_eq!(first.status.code(), Some(1));
    let said = text(&first.stderr);
    let last = said.lines().filter(|line| line.starts_with("xt: ")).collect::<Vec<_>>();
    assert_eq!(last.len(), 1, "{said}");
    let state: String = fs::read_to_string(Path::new(&out).join("checkpoint/training.json")).expect("whole");
    assert!(state.contains("\"step\""), "{state}");
    succeeds(&["info", "--checkpoint", &out]);
    last[0].to_string()
}

#[test]
fn a_rank_that_dies_or_hangs_ends_the_run() {
    if !is_emulated("a_rank_that_dies_or_hangs_ends_the_run") {
        return;
    }
    let said = long("-KILL", &[]);
    assert!(said.contains("the process of rank 1 of 2 has ended"), "{said}");
    let said = long("-STOP", &[("XT_RANK_TIMEOUT", "15")]);
    assert!(said.contains("rank 0 of 2 has waited 15 s for another rank, which hangs or has died"), "{said}");
}
