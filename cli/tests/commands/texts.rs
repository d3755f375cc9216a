//! The text of `xt generate`: decoding of tokens, ends of texts, and chats. The models here continue each token with
//! one other, so that the right text is known.

use std::{collections::BTreeMap, fs, path::Path};

use crate::command::{TINY, fails, path, refuses, succeeds, text, write_text, xt};
use serde_json::{Value, json};
use tempfile::TempDir;
use x_transformers::{DType, Device, Philox, Tensor, io::write_safetensors};

/// Tokens of the models here.
const TOKENS: usize = 280;

/// A folder with some files and a Llama that continues each token with the next one of its chain in `chains`.
fn model(chains: &[&[usize]], config: &Value, files: &[(&str, &str)]) -> TempDir {
    const DIM: usize = 64;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tensor = |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor");
    // Vectors of random signs are almost at right angles.
    let random = Philox::new(3, 0);
    let sign = |token: usize, at: usize| if random.uniform((token * DIM + at) as u64) < 0.5 { -1.0 } else { 1.0 };
    let vectors: Vec<Vec<f32>> = (0..TOKENS).map(|token| (0..DIM).map(|at| sign(token, at)).collect()).collect();
    let mut head = vec![vec![0.0; DIM]; TOKENS];
    for pair in chains.iter().flat_map(|chain| chain.windows(2)) {
        head[pair[1]].iter_mut().zip(&vectors[pair[0]]).for_each(|(head, value)| *head += value);
    }
    let mut weights: BTreeMap<String, Tensor> = BTreeMap::new();
    let zeros = |shape: &[usize]| Tensor::full(shape, 0.0, DType::F32, &Device::Cpu).expect("a tensor");
    for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] {
        weights.insert(format!("model.layers.0.{name}.weight"), zeros(&[DIM, DIM]));
    }
    for name in ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
        weights.insert(format!("model.layers.0.{name}.weight"), zeros(&[DIM, DIM]));
    }
    for name in ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"] {
        weights.insert(format!("model.{name}.weight"), tensor(vec![1.0; DIM], &[DIM]));
    }
    weights.insert("model.embed_tokens.weight".into(), tensor(vectors.concat(), &[TOKENS, DIM]));
    weights.insert("lm_head.weight".into(), tensor(head.concat(), &[TOKENS, DIM]));
    write_safetensors(folder.path().join("model.safetensors"), &weights, &BTreeMap::new()).expect("a file");
    let mut whole = json!({
        "model_type": "llama", "vocab_size": TOKENS, "hidden_size": DIM, "intermediate_size": DIM, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 200, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": false,
    });
    whole.as_object_mut().expect("an object").extend(config.as_object().expect("an object").clone());
    for (name, text) in [("config.json", &*whole.to_string())].iter().chain(files) {
        fs::write(folder.path().join(name), text).expect("a file");
    }
    folder
}

/// Llama's way with characters that have no token: `<0x00>` and so on from token 3 on, then `▁`, `a` and `b`.
fn byte_fallback() -> String {
    let pieces = ["<unk>", "<s>", "</s>"].map(str::to_string).into_iter();
    let pieces =
        pieces.chain((0..=255).map(|byte| format!("<0x{byte:02X}>"))).chain(["▁", "a", "b"].map(str::to_string));
    let vocabulary: serde_json::Map<String, Value> = pieces.enumerate().map(|(id, piece)| (piece, json!(id))).collect();
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let space = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    json!({
        "version": "1.0", "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space(" ", "▁")]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            space("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocabulary, "merges": [],
        },
    })
    .to_string()
}

const A: usize = 260;
const B: usize = 261;

/// A chain of the bytes of a text after `a`, and the tokens after them.
fn bytes(text: &str, then: &[usize]) -> Vec<usize> {
    [&[A][..], &text.bytes().map(|byte| 3 + usize::from(byte)).collect::<Vec<_>>(), then].concat()
}

/// The same text in every way: one by one, without a cache, by one beam, with a draft, and in a batch.
#[track_caller]
fn every_way(folder: &Path, prompt: &str, more: &[&str], expected: &str) {
    let folder = folder.to_str().expect("a temporary path is UTF-8");
    let all = [&["generate", "--checkpoint", folder, "--prompt", prompt, "--device", "cpu"][..], more].concat();
    let greedy = ["--temperature", "0"];
    let expected = format!("{expected}\n");
    for way in [
        &greedy[..],
        &[&greedy[..], &["--no-cache"]].concat(),
        &[&greedy[..], &["--draft", folder]].concat(),
        &["--beams", "1"],
    ] {
        assert_eq!(succeeds(&[&all[..], way].concat()), expected, "{way:?}");
    }
    let together = succeeds(&[&all[..], &["--prompt", prompt, "--prompt", "b"], &greedy].concat());
    assert!(together.starts_with(&expected.repeat(2)), "{together:?} does not begin with {expected:?} twice");
}

#[test]
fn characters_of_several_tokens_are_shown_whole() {
    let tokenizer = byte_fallback();
    let files = [("tokenizer.json", &*tokenizer)];
    let ends = json!({"eos_token_id": 2});
    for (text, then, shown) in [
        ("éя", &[B, 2][..], "aéяb"),
        ("éя", &[2], "aéя"),
        ("😀\u{e0067}", &[2], "a😀\u{e0067}"),
        ("각", &[259, B, 2], "a각 b"),
    ] {
        let model = model(&[&bytes(text, then)], &ends, &files);
        every_way(model.path(), "a", &["--length", "20"], shown);
    }
    // A prompt in bytes, and texts that end in the middle of a character.
    let model = model(&[&[3 + 0xa9, 3 + 0xea, 3 + 0xb0, 3 + 0x81, B, 2]], &ends, &files);
    every_way(model.path(), "éé", &["--length", "20"], "éé각b");
    every_way(model.path(), "éé", &["--length", "2"], "éé\u{fffd}\u{fffd}");
}

/// The tokenizer that `tokenizers/tests/chat/make.py` writes: bytes, seven pieces, special tokens from `<s>` on.
const BYTE_LEVEL: &str = include_str!("../../../tokenizers/tests/chat/tokenizer.json");

/// Letters are tokens 64 and so on there.
fn letters(text: &str) -> Vec<usize> {
    text.bytes().map(|byte| usize::from(byte - b'!')).collect()
}

#[test]
fn texts_end_at_each_of_several_tokens() {
    let files = [("tokenizer.json", BYTE_LEVEL)];
    let [eot, im_end] = [267, 269];
    let chains = [&letters("ab")[..], &[eot, letters("c")[0], im_end, letters("d")[0]]].concat();
    let of = |config: Value, more: &[(&str, &str)]| model(&[&chains[..]], &config, &[&files[..], more].concat());
    let whole = "abcd";
    let four = ["--length", "5"];
    every_way(of(json!({"eos_token_id": [im_end, eot]}), &[]).path(), "a", &["--length", "9"], "ab");
    every_way(of(json!({"eos_token_id": im_end}), &[]).path(), "a", &["--length", "9"], "abc");
    let generation = json!({"eos_token_id": [eot]}).to_string();
    let model = of(json!({"eos_token_id": im_end}), &[("generation_config.json", &generation)]);
    every_way(model.path(), "a", &["--length", "9"], "ab");
    // One outside the model's vocabulary ends nothing.
    every_way(of(json!({"eos_token_id": -1}), &[]).path(), "a", &four, whole);
    let model = of(json!({"eos_token_id": null}), &[]);
    every_way(model.path(), "a", &four, whole);
    every_way(model.path(), "a", &["--length", "9", "--eos", "9", "--eos", "269", "--eos", "267"], "ab");
    every_way(model.path(), "a", &["--length", "9", "--stop", "<|im_end|>"], "abc");
    let folder = model.path().to_str().unwrap();
    let error = fails(&["generate", "--checkpoint", folder, "--eos", "5", "--eos", "280"]);
    assert!(error.contains("`--eos`") && error.contains("0..280"), "{error}");
}

#[test]
fn texts_end_before_stop_strings() {
    let chain = letters("abcdefgh");
    let model = model(&[&chain], &json!({"eos_token_id": null}), &[("tokenizer.json", BYTE_LEVEL)]);
    let folder = model.path();
    every_way(folder, "a", &["--length", "6", "--stop", "def"], "abc");
    every_way(folder, "a", &["--length", "6", "--stop", "x", "--stop", "ef", "--stop", "efg"], "abcd");
    // The prompt's text does not count, and text that only looked like a beginning is shown.
    every_way(folder, "a", &["--length", "4", "--stop", "ab", "--stop", "dex"], "abcde");
    let all =
        ["generate", "--checkpoint", folder.to_str().unwrap(), "--temperature", "0", "--length", "7", "--stop", "d"];
    // Rows that end at other places; the tokens after them do not count.
    let line = xt(&[&all[..], &["--prompt", "a", "--prompt", "c", "--stats"]].concat());
    assert_eq!(text(&line.stdout), "abc\nc\n");
    assert!(text(&line.stderr).starts_with("4 tokens in "), "{}", text(&line.stderr));
    assert!(refuses(&[&all[..], &["--stop", ""]].concat()).contains("--stop"));
    // A model of bytes too.
    let folder = tempfile::tempdir().unwrap();
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    succeeds(
        &[&["train", "--text", &corpus, "--out", &out, "--steps", "30", "--lr", "0.02", "--device", "cpu"][..], &TINY]
            .concat(),
    );
    let all =
        ["generate", "--checkpoint", &out, "--prompt", "Zoë", "--length", "60", "--top-k", "3", "--device", "cpu"];
    let free = succeeds(&all);
    let characters: Vec<(usize, char)> = free.char_indices().collect();
    let stop = &free[characters[30].0..characters[33].0];
    assert!(!stop.contains(char::REPLACEMENT_CHARACTER), "{free}");
    let expected = &free["Zoë".len()..];
    let expected = &expected[..expected.find(stop).unwrap()];
    for more in [&[][..], &["--seed", "0", "--no-cache"]] {
        assert_eq!(succeeds(&[&all[..], &["--stop", stop], more].concat()), format!("Zoë{expected}\n"));
    }
}

#[test]
fn chats_are_in_the_form_of_the_template() {
    let template = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}\
        {% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no such question') }}{% endif %}\
        {{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant:{% endif %}";
    let config = json!({"chat_template": template, "eos_token": "<|eot_id|>"}).to_string();
    let files = [("tokenizer.json", BYTE_LEVEL), ("tokenizer_config.json", &*config)];
    let short = json!({"eos_token_id": 263, "max_position_embeddings": 20});
    let chain = [&letters(":")[..], &letters("ok"), &[267], &letters("z")].concat();
    let refused = model(&[&chain], &short, &files);
    let chat = |model: &TempDir, more: &[&str]| {
        let folder = model.path().to_str().unwrap().to_string();
        xt(&[&["generate", "--checkpoint", &folder, "--chat", "--temperature", "0", "--length", "9"][..], more]
            .concat())
    };
    // The template's system message, or the user's; a spelled-out special token is text. The numbers are those of
    // `apply_chat_template` of transformers, with `sanitize_control_tokens`.
    for (more, tokens) in [
        (&["--prompt", "hi"][..], 39),
        (&["--prompt", "hi", "--system", "Go."], 33),
        (&["--prompt", "hi<|im_end|>"], 47),
    ] {
        let error = text(&chat(&refused, more).stderr);
        assert!(error.contains(&format!("the prompt has {tokens} tokens, but the model's context is 20")), "{error}");
    }
    let long = model(&[&chain], &json!({"eos_token_id": 263}), &files);
    // The tokenizer's own end of a turn ends the answer.
    assert_eq!(text(&chat(&long, &["--prompt", "hi"]).stdout), "ok\n");
    let error = text(&chat(&long, &["--prompt", "no"]).stderr);
    assert!(error.contains("tokenizer_config.json: chat template `default`: line 1: no such question"), "{error}");
    assert!(refuses(&["generate", "--checkpoint", "x", "--system", "a"]).contains("--chat"));
    // Without a template the format follows from the tokens, with a message; or there is none.
    let chatml = model(&[&chain], &json!({"eos_token_id": 263}), &[("tokenizer.json", BYTE_LEVEL)]);
    let output = chat(&chatml, &["--prompt", "hi"]);
    assert!(output.status.success() && text(&output.stderr).contains("ChatML"), "{output:?}");
    let none = model(&[&chain], &json!({"eos_token_id": 263}), &[("tokenizer.json", &byte_fallback())]);
    let error = text(&chat(&none, &["--prompt", "hi"]).stderr);
    assert!(error.contains("has no chat template") && error.contains("omit `--chat`"), "{error}");
}
