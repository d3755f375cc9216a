//! `xt train --from` a pretrained model: chats and texts, in full and by adapters, and what uses the checkpoints.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    command::{fails, path, refuses, start, succeeds, text, xt},
    pretrained::llama,
};

/// Chats of the tokens of `llama.gguf`, whose template is ChatML.
fn write_chats(path: &str) {
    let words = ["sphinx", "black", "quartz", "judge", "my", "vow"];
    let chat = |index: usize| {
        let [question, answer] = [index, index * index + 1].map(|at| words[at % words.len()]);
        serde_json::json!({"messages": [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer},
        ]})
    };
    fs::write(path, (0..24).map(|index| format!("{}\n", chat(index))).collect::<String>()).expect("a file");
}

const QUICK: [&str; 12] =
    ["--seq-len", "48", "--batch-size", "4", "--warmup", "0", "--device", "cpu", "--steps", "12", "--every", "3"];

fn read(folder: &str, name: &str) -> Vec<u8> {
    fs::read(Path::new(folder).join("checkpoint").join(name)).expect(name)
}

/// Validation losses of a run.
fn losses(folder: &str) -> Vec<f64> {
    let table = fs::read_to_string(Path::new(folder).join("metrics.csv")).expect("metrics.csv");
    let rows = table.lines().filter(|row| row.contains("validation"));
    rows.map(|row| row.split(',').nth(2).and_then(|loss| loss.parse().ok()).expect("a loss")).collect()
}

/// A run, and the same one that was killed after its first checkpoint and resumed.
fn whole_and_resumed(folder: &Path, data: &[&str], options: &[&str]) -> [String; 2] {
    let [whole, cut] = ["whole", "cut"].map(|name| path(folder, name));
    let output = succeeds(&[&["train", "--out", &whole][..], data, options, &QUICK].concat());
    assert!(!output.contains("order-2"), "{output}");
    let mut running =
        start(&[&["train", "--out", &cut][..], data, options, &QUICK].concat()).spawn().expect("xt starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !Path::new(&cut).join("checkpoint/training.json").is_file() && Instant::now() < deadline {
        sleep(Duration::from_millis(2));
    }
    running.kill().expect("kill");
    running.wait().expect("wait");
    succeeds(&[&["train", "--resume", &cut, "--device", "cpu"][..], data].concat());
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(read(&whole, name) == read(&cut, name), "{name}");
    }
    [whole, cut]
}

#[test]
fn a_pretrained_model_is_tuned_on_chats() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (chats, base) = (at("chats.jsonl"), llama());
    write_chats(&chats);
    let data = ["--jsonl", &*chats];
    let [whole, _] = whole_and_resumed(folder.path(), &data, &["--from", &base, "--lr", "0.002"]);
    let losses = losses(&whole);
    assert!(losses.last() < losses.first(), "{losses:?}");
    // The tokenizer is in the checkpoint, and what the file says about the ends of a text.
    let kept = fs::read_dir(Path::new(&whole).join("checkpoint")).expect("a folder");
    let kept: Vec<_> = kept.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_dir()).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    for name in ["tokenizer.json", "tokenizer_config.json", "pretrained.json"] {
        assert!(kept[0].join(name).is_file(), "{name}");
    }
    // With it the model answers, by the tokens that the base has.
    let ask = |checkpoint: &str, more: &[&str]| {
        let command =
            ["generate", "--checkpoint", checkpoint, "--device", "cpu", "--temperature", "0", "--length", "8"];
        let output = xt(&[&command[..], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(!ask(&whole, &["--chat", "--prompt", "sphinx"]).trim().is_empty());
    assert_eq!(ask(&whole, &["--prompt", "the cat"]).split_at(7).0, "the cat");
    // A run without a step is the base: the tokenizer reads the same.
    let same = at("same");
    succeeds(&[&["train", "--from", &base, "--out", &same, "--seq-len", "48", "--steps", "0"][..], &data].concat());
    for more in [&["--prompt", "where is the cat?", "--chat"][..], &["--prompt", "the cat"]] {
        let more = [more, &["--weights", "f32"]].concat();
        assert_eq!(ask(&same, &more), ask(&base, &more));
    }
    // It goes on from there, on texts too.
    let corpus = at("text.txt");
    fs::write(&corpus, "sphinx of black quartz, judge my vow\n".repeat(40)).expect("a file");
    let next = at("next");
    let output =
        succeeds(&["train", "--from", &whole, "--text", &corpus, "--out", &next, "--seq-len", "32", "--steps", "2"]);
    assert!(output.contains("tokens to train on"), "{output}");
}

#[test]
fn an_adapter_of_a_quantized_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (chats, base) = (at("chats.jsonl"), at("base.gguf"));
    write_chats(&chats);
    succeeds(&["quantize", &llama(), &base, "--type", "q8_0"]);
    let data = ["--jsonl", &*chats];
    let lora = ["--from", &base, "--lora-rank", "4", "--lora-targets", "q_proj", "v_proj", "--lora-dropout", "0.1"];
    let options = [&lora[..], &["--lora-rs", "--lr", "0.02"]].concat();
    let [whole, _] = whole_and_resumed(folder.path(), &data, &options);
    let losses = losses(&whole);
    assert!(losses.last() < losses.first(), "{losses:?}");
    assert!(read(&whole, "model.safetensors").len() < 60_000, "only the adapter is saved");
    let ask = |more: &[&str]| {
        let command = ["generate", "--checkpoint", &whole, "--device", "cpu", "--temperature", "0", "--length", "8"];
        let output = xt(&[&command[..], &["--chat", "--prompt", "sphinx"], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    // Beside packed weights and in exact ones.
    assert!(!ask(&[]).trim().is_empty() && !ask(&["--weights", "f32"]).trim().is_empty());
    // As a folder of PEFT, on the same base; and merged, as a folder of transformers.
    let [peft, merged] = ["peft", "merged"].map(at);
    let said = succeeds(&["export", "--checkpoint", &whole, "--layout", "peft", "--output", &peft]);
    assert!(said.contains("--adapter"), "{said}");
    let with = |checkpoint: &str, more: &[&str]| {
        let command =
            ["generate", "--checkpoint", checkpoint, "--device", "cpu", "--temperature", "0", "--length", "8"];
        let output = xt(&[&command[..], &["--chat", "--prompt", "sphinx"], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert_eq!(with(&base, &["--adapter", &peft]), ask(&[]));
    let said = succeeds(&["export", "--checkpoint", &whole, "--output", &merged]);
    assert!(said.contains("a model of the Llama family"), "{said}");
    for name in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        assert!(Path::new(&merged).join(name).is_file(), "{name}");
    }
    assert!(!Path::new(&merged).join("pretrained.json").exists());
    assert_eq!(with(&merged, &[]), ask(&["--weights", "f32"]));
    assert!(fails(&["export", "--checkpoint", &whole, "--output", &merged]).contains("--overwrite"));
    succeeds(&["export", "--checkpoint", &whole, "--output", &merged, "--overwrite", "--dtype", "bf16"]);
    let plain = at("plain");
    succeeds(&["export", "--checkpoint", &whole, "--layout", "x-transformers", "--output", &plain]);
    assert!(succeeds(&["info", "--checkpoint", &plain]).contains("total"));
    let message = fails(&["generate", "--checkpoint", &whole, "--adapter", &peft, "--prompt", "a"]);
    assert!(message.contains("is not a pretrained model"), "{message}");
    // What it is trained on does not fit: another model in the place of the base.
    succeeds(&["quantize", &llama(), &base, "--type", "q4_0", "--overwrite"]);
    let message = fails(&["generate", "--checkpoint", &whole, "--prompt", "sphinx", "--device", "cpu"]);
    assert!(message.contains("base.gguf: has changed since the adapter was trained"), "{message}");
}

#[test]
fn adapters_and_chats_that_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (out, base) = (at("out"), llama());
    let write = |name: &str, content: &str| {
        fs::write(at(name), content).expect("a file");
        at(name)
    };
    let chats = at("chats.jsonl");
    write_chats(&chats);
    let train = |data: &str, more: &[&str]| {
        fails(&[&["train", "--from", &base, "--jsonl", data, "--out", &out, "--seq-len", "48"][..], more].concat())
    };
    let first = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    for (record, expected) in [
        (r#"{"messages": []}"#, "line 2: field `messages` is empty"),
        (r#"{"messages": "a"}"#, "line 2: field `messages` is a string, expected a list"),
        (r#"{"message": []}"#, "line 2: field `messages` is missing; the record has message"),
        (r#"{"messages": [{"role": "user"}]}"#, "line 2: message 1: `content` is missing"),
        (r#"{"messages": [{"role": "user", "content": 1}]}"#, "message 1: `content` is a number, expected a string"),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "line 2: "),
        ("{", "line 2: is not JSON"),
    ] {
        let data = write("bad.jsonl", &format!("{first}\n{record}\n"));
        let message = train(&data, &[]);
        assert!(message.contains("bad.jsonl") && message.contains(expected), "{record}: {message}");
    }
    assert!(train(&write("one.jsonl", first), &[]).contains("found 1 chats, expected at least 2"));
    let lora = ["--lora-rank", "4"];
    let message = train(&chats, &[&lora[..], &["--lora-targets", "to_q"]].concat());
    assert!(message.contains("no linear layer has the name `to_q`"), "{message}");
    assert!(train(&chats, &["--lora-rank", "0"]).contains("expected 1 to 65536, got 0"));
    assert!(train(&chats, &[&lora[..], &["--lora-dropout", "1"]].concat()).contains("lora_dropout"));
    refuses(&["train", "--lora-rank", "4"]);
    refuses(&["train", "--from", &base, "--dora"]);
    assert!(!Path::new(&out).join("checkpoint/config.json").exists(), "nothing was begun");
}

/// A run in Llama's architecture is a model of transformers; another one is refused by the option that differs.
#[test]
fn runs_are_exported() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let text = at("text.txt");
    fs::write(&text, "sphinx of black quartz, judge my vow\n".repeat(40)).expect("a file");
    let (own, out) = (at("own"), at("exported"));
    let tiny = ["--text", &text, "--steps", "1", "--seq-len", "16", "--device", "cpu", "--dim", "32", "--depth", "1"];
    succeeds(&[&["train", "--out", &own][..], &tiny].concat());
    let message = fails(&["export", "--checkpoint", &own, "--output", &out]);
    assert!(message.contains("expected that of Llama"), "{message}");
    let llama = [
        "use_rmsnorm=true",
        "final_norm=same",
        "norm_eps=1e-5",
        "rotary_pos_emb=true",
        "rotary_emb_dim=64",
        "rotary_qk_only=true",
        "ff_glu=true",
        "ff_swish=true",
        "ff_no_bias=true",
        "attn_out_bias=false",
        "logits_bias=false",
    ];
    let set: Vec<&str> = llama.iter().flat_map(|option| ["--set", option]).collect();
    succeeds(&[&["train", "--out", &own, "--overwrite"][..], &tiny, &set].concat());
    let said = succeeds(&["export", "--checkpoint", &own, "--output", &out]);
    assert!(said.contains("Llama family"), "{said}");
    assert!(succeeds(&["info", "--checkpoint", &out]).contains("Llama"));
    assert!(fails(&["export", "--checkpoint", &own, "--layout", "peft", "--output", &out]).contains("--lora-rank"));
}

/// Answers to messages of a pipe, one a line, and what went to standard error.
fn chat(arguments: &[&str], messages: &str) -> (String, String) {
    let command = ["chat", "--device", "cpu", "--temperature", "0", "--length", "12"];
    let mut running = start(&[&command[..], arguments].concat());
    let mut running = running.stdin(Stdio::piped()).spawn().expect("xt starts");
    running.stdin.take().expect("a pipe").write_all(messages.as_bytes()).expect("written");
    let output = running.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn conversations() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = llama();
    let once = |message: &str, more: &[&str]| {
        let command = ["generate", "--device", "cpu", "--temperature", "0", "--length", "12", "--chat"];
        text(&xt(&[&command[..], &["--checkpoint", &model, "--prompt", message], more].concat()).stdout)
    };
    let own = ["--checkpoint", &*model];
    let (answers, notes) = chat(&own, "the cat\n\n/reset\nthe cat\n/what\n/exit\nmore\n");
    assert_eq!(answers, once("the cat", &[]).repeat(2));
    assert!(notes.contains("ChatML") && notes.contains("unknown command /what; /reset forgets"), "{notes}");
    // Without a reset the second question follows the first answer; both do not fit into the context of 64.
    let (answers, _) = chat(&own, "a\nb\n");
    assert!(answers.starts_with(&once("a", &[])) && answers.len() > once("a", &[]).len());
    let (_, notes) = chat(&own, "the cat sat there\nthe cat sat there\n");
    assert!(notes.contains("the oldest question and its answer no longer fit"), "{notes}");
    let (answers, _) = chat(&[&own[..], &["--system", "x"]].concat(), "a\n");
    assert_eq!(answers, once("a", &["--system", "x"]));
    let (answers, notes) = chat(&own, &format!("{}\na", "long".repeat(20)));
    assert!(notes.contains("but the model's context is 64") && answers == once("a", &[]), "{notes}");
    let (_, notes) = chat(&[&own[..], &["--stats"]].concat(), "a\n");
    assert!(notes.contains("tokens/s"), "{notes}");
    // A run of bytes has no chats.
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    fs::write(&corpus, "to be or not to be ".repeat(40)).expect("a file");
    succeeds(&[&["train", "--text", &corpus, "--out", &out, "--steps", "0"][..], &crate::command::TINY].concat());
    assert!(fails(&["chat", "--checkpoint", &out]).contains("chats require a pretrained model"));
}

/// Ctrl-C ends an answer, not the conversation.
#[test]
#[cfg(unix)]
fn an_answer_is_stopped() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (chats, tuned) = (at("chats.jsonl"), at("tuned"));
    write_chats(&chats);
    succeeds(&["train", "--from", &llama(), "--jsonl", &chats, "--out", &tuned, "--seq-len", "48", "--steps", "0"]);
    // A run continues beyond its context: this answer does not end by itself soon.
    let arguments = ["chat", "--checkpoint", &tuned, "--device", "cpu", "--length", "1000000", "--temperature", "0"];
    let mut running = start(&arguments).stdin(Stdio::piped()).spawn().expect("xt starts");
    let (mut input, mut output) = (running.stdin.take().expect("a pipe"), running.stdout.take().expect("a pipe"));
    input.write_all(b"the cat\n").expect("written");
    let mut first = [0; 1];
    output.read_exact(&mut first).expect("an answer begins");
    let pid = running.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill runs").success());
    input.write_all(b"/exit\n").expect("written");
    drop(input);
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).expect("the end of the answer");
    let done = running.wait_with_output().expect("it ends");
    assert_eq!(done.status.code(), Some(0));
    assert!(rest.ends_with(b"\n") && text(&done.stderr).contains("stopped"), "{}", text(&done.stderr));
}
