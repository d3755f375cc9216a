//! GGUF files of llama.cpp and other programs: every block type, models in several files, metadata of all kinds, and
//! the rotations that files specify. `tests/files/make_gguf.py` wrote files and expected values.

mod folders;
mod writer;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use x_transformers::{
    DType, Device, QuantType, Result, Tensor,
    io::{Metadata, RawTensor, Stored, TensorFile, read_safetensors, write_safetensors},
    models::ForwardOptions,
    pretrained::{Family, Pretrained},
};

use writer::{float, gguf, number, pair, size, text, with_metadata};

fn files(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

/// A folder for this test, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("xt-gguf-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Random blocks, including the largest, smallest and zero scales, decode to the same bits as with the package gguf.
#[test]
fn blocks_have_the_bits_of_the_package_gguf() -> Result<()> {
    let file = TensorFile::open(files("blocks.gguf"))?;
    let expected = read_safetensors(files("blocks.safetensors"))?;
    assert_eq!(file.names().count(), QuantType::ALL.len());
    for kind in QuantType::ALL {
        let name = kind.to_string();
        let info = file.info(&name).unwrap();
        assert_eq!((info.stored, &info.shape[..]), (Stored::Quantized(kind), &[2, 1024][..]));
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let expected = bits(expected[&name].to_vec()?);
        assert_eq!(bits(file.tensor(&name)?.to_vec()?), expected, "{name}");
        // The same by hand, a row at a time.
        let RawTensor { stored, shape, bytes } = file.raw(&name)?;
        assert_eq!(stored, Stored::Quantized(kind));
        let (values, size) = kind.block();
        assert_eq!(bytes.len(), shape[0] * shape[1] / values * size);
        let mut row = vec![0.0; shape[1]];
        kind.dequantize(&bytes[bytes.len() / 2..], &mut row)?;
        assert_eq!(bits(row), expected[1024..], "{name}");
    }
    Ok(())
}

/// Values are rounded to the blocks that the package gguf rounds them to; types that it has none of, to close ones.
#[test]
fn values_are_rounded_as_by_the_package_gguf() -> Result<()> {
    let file = TensorFile::open(files("rounded.safetensors"))?;
    let values: Vec<f32> = file.tensor("values")?.to_vec()?;
    let energy: f32 = values.iter().map(|value| value * value).sum();
    for kind in QuantType::ALL.into_iter().filter(|kind| kind.is_packed()) {
        let blocks = kind.quantize(&values)?;
        if file.info(kind.name()).is_some() {
            assert_eq!(blocks, file.raw(kind.name())?.bytes, "{kind}");
        }
        let mut near = vec![0.0; values.len()];
        kind.dequantize(&blocks, &mut near)?;
        let error = values.iter().zip(&near).map(|(value, near)| (value - near).powi(2)).sum::<f32>() / energy;
        let most = match kind {
            QuantType::Q8_0 => 1e-4,
            QuantType::Q6K => 6e-4,
            QuantType::Q5_0 | QuantType::Q5_1 | QuantType::Q5K => 3e-3,
            _ => 8e-3,
        };
        println!("{kind}: {error:.1e} of the energy");
        assert!(error < most, "{kind}: {error}");
        // What is a block's value already stays it.
        let mut again = vec![0.0; values.len()];
        kind.dequantize(&kind.quantize(&near)?, &mut again)?;
        let moved = near.iter().zip(&again).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / energy;
        assert!(moved < most / 2.0, "{kind}: {moved}");
    }
    assert!(QuantType::Q2K.quantize(&values).is_err() && QuantType::Q8_0.quantize(&values[..33]).is_err());
    assert!(QuantType::Q8_0.quantize(&[f32::INFINITY; 32]).is_err());
    Ok(())
}

/// Packed matrices of every type, with the largest and the smallest scales: their products are those of the values that
/// the package gguf gives, for inputs that 8 bits hold.
#[test]
fn packed_matrices_multiply_the_values_of_the_package_gguf() -> Result<()> {
    let file = TensorFile::open(files("blocks.gguf"))?;
    let expected = read_safetensors(files("blocks.safetensors"))?;
    let inputs: Vec<f32> =
        (0..3 * 1024).map(|i| if i % 32 == 5 { 127.0 } else { (i * 37 % 251) as f32 - 125.0 }).collect();
    let x = Tensor::from_slice(&inputs, [3, 1024], &Device::Cpu)?;
    for kind in QuantType::ALL {
        let Ok(matrix) = file.packed(kind.name()) else {
            assert!(!kind.is_packed());
            continue;
        };
        assert_eq!((matrix.kind(), matrix.shape()), (kind, [2, 1024]));
        let values = expected[kind.name()].to_vec::<f32>()?;
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&matrix.dequantize(DType::F32)?.to_vec::<f32>()?), bits(&values), "{kind}");
        let y = matrix.linear(&x, None)?.to_vec::<f32>()?;
        for (at, &y) in y.iter().enumerate() {
            let terms = inputs[at / 2 * 1024..][..1024].iter().zip(&values[at % 2 * 1024..]);
            let terms: Vec<f64> = terms.map(|(x, w)| f64::from(*x) * f64::from(*w)).collect();
            let (sum, size) = (terms.iter().sum::<f64>(), terms.iter().map(|term| term.abs()).sum::<f64>());
            assert!((f64::from(y) - sum).abs() <= 1e-5 * size, "{kind}: {y}, expected {sum}");
        }
    }
    assert!(file.packed("Q2_K").unwrap_err().to_string().contains("Q2_K"));
    let wrong = TensorFile::from_bytes(gguf(&[], &[("w", &[32, 1], 8, vec![0xFF; 34])]))?;
    assert!(wrong.packed("w").unwrap_err().to_string().contains("`w` holds NaN or infinity"));
    Ok(())
}

/// Models whose matrices stay packed compute nearly what those with dequantised ones do, and have the gradients of their
/// other parameters; matrices of types that are not packed, or that are stacked from two types, are dequantised.
#[test]
fn packed_models_are_close() -> Result<()> {
    for name in ["mixture.gguf", "biases.gguf", "qwen2.gguf", "llama.gguf"] {
        let tokens = Tensor::from_slice(&(0..24i64).collect::<Vec<_>>(), [2, 12], &Device::Cpu)?;
        let logits = |pretrained: &Pretrained, dtype| -> Result<Vec<f64>> {
            let model = pretrained.model(dtype, &Device::Cpu)?;
            model.forward(&tokens, &ForwardOptions::default())?.out.to_f64_vec()
        };
        let packed = Pretrained::open(files(name))?;
        let (near, half) = (logits(&packed, DType::F32)?, logits(&packed, DType::BF16)?);
        // Not rounded in f64.
        let exact = logits(&packed, DType::F64)?;
        let wide = logits(&packed.dequantized(), DType::F64)?;
        let off = |a: &[f64], b: &[f64]| {
            let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
            (squares(&mut a.iter().zip(b).map(|(a, b)| a - b)) / squares(&mut b.iter().copied())).sqrt()
        };
        println!(
            "{name}: packed {:.1e}, bf16 {:.1e}, f64 {:.1e}",
            off(&near, &wide),
            off(&half, &wide),
            off(&exact, &wide)
        );
        assert!(near != wide && off(&near, &wide) < 4e-2 && off(&half, &wide) < 6e-2, "{name}");
        assert!(off(&exact, &wide) < 1e-12, "{name}");
    }
    Ok(())
}

/// Tensors whose blocks are read in many parts by many threads have the same values.
#[test]
fn large_tensors_are_read_in_parts() -> Result<()> {
    let file = TensorFile::open(files("blocks.gguf"))?;
    for (kind, rows) in [(QuantType::Q4K, 700), (QuantType::Q5_0, 333)] {
        let RawTensor { bytes, .. } = file.raw(kind.name())?;
        let values: Vec<f32> = file.tensor(kind.name())?.to_vec()?;
        let row = [&bytes[..], &bytes].concat();
        let large = gguf(&[], &[("large", &[4096, rows], number(kind), row.repeat(rows as usize))]);
        let read = TensorFile::from_bytes(large)?.tensor("large")?.to_vec::<f32>()?;
        assert!(read.chunks(2048).all(|chunk| chunk == values), "{kind}");
    }
    Ok(())
}

#[test]
fn partial_blocks_are_refused() {
    let error = |kind: QuantType, bytes: usize, values: usize| {
        kind.dequantize(&vec![0; bytes], &mut vec![0.0; values]).unwrap_err().to_string()
    };
    assert!(error(QuantType::Q6K, 209, 256).contains("whole blocks of 210 bytes of Q6_K, got 209"));
    assert!(error(QuantType::Q6K, 420, 256).contains("an output of 512 values, got 256"));
    for kind in QuantType::ALL {
        let (values, size) = kind.block();
        let cut = |row: u64, bytes: usize| {
            let file = gguf(&[], &[("w", &[row, 2], number(kind), vec![0; bytes])]);
            TensorFile::from_bytes(file).unwrap_err().to_string()
        };
        let half = values as u64 / 2;
        assert!(
            cut(half, size).contains(&format!("rows of {half} values, expected a multiple of the block size {values}"))
        );
        assert!(cut(values as u64, size).contains("the file has"), "{}", cut(values as u64, size));
    }
    // Types of other programs are named.
    for (number, name) in [(9, "Q8_1"), (15, "Q8_K"), (16, "IQ2_XXS"), (34, "TQ1_0"), (39, "MXFP4"), (77, "type 77")] {
        let error = TensorFile::from_bytes(gguf(&[], &[("w", &[256], number, vec![0; 512])])).unwrap_err().to_string();
        assert!(error.contains(&format!("`w` is {name}")) || error.contains("unknown type 77"), "{error}");
        assert!(error.contains("Q4_K") && error.contains("IQ4_XS"), "{error}");
    }
}

/// Tensors outside the file are an error before memory is allocated for them.
#[test]
fn sizes_beyond_the_file_are_refused() {
    for kind in QuantType::ALL {
        let rows = (1 << 40) / kind.block().0 as u64;
        let file = gguf(&[], &[("w", &[kind.block().0 as u64, rows], number(kind), vec![0; 4096])]);
        let error = TensorFile::from_bytes(file).unwrap_err().to_string();
        assert!(error.contains("`w`"), "{kind}: {error}");
    }
}

#[test]
fn versions_and_byte_orders_are_named() {
    let with = |version: [u8; 4]| {
        let mut file = gguf(&[], &[]);
        file[4..8].copy_from_slice(&version);
        TensorFile::from_bytes(file).map_err(|error| error.to_string())
    };
    for version in [2u32, 3] {
        assert!(with(version.to_le_bytes()).is_ok());
        let error = with(version.to_be_bytes()).unwrap_err();
        assert!(error.contains(&format!("is big-endian GGUF version {version}")), "{error}");
        assert!(error.contains("gguf-convert-endian"), "{error}");
    }
    assert!(with(1u32.to_le_bytes()).unwrap_err().contains("version 1, which is obsolete"));
    assert!(with(9u32.to_le_bytes()).unwrap_err().contains("version 9, expected 2 or 3"));
}

/// Integers of every width, up to the largest.
#[test]
fn integers_of_every_width() -> Result<()> {
    let integers: [(&str, u32, Vec<u8>, Metadata); 9] = [
        ("u8", 0, vec![200], Metadata::Int(200)),
        ("i8", 1, vec![0xFB], Metadata::Int(-5)),
        ("u16", 2, 60000u16.to_le_bytes().to_vec(), Metadata::Int(60000)),
        ("i16", 3, (-7i16).to_le_bytes().to_vec(), Metadata::Int(-7)),
        ("u32", 4, u32::MAX.to_le_bytes().to_vec(), Metadata::Int(u32::MAX.into())),
        ("i32", 5, i32::MIN.to_le_bytes().to_vec(), Metadata::Int(i32::MIN.into())),
        ("u64", 10, 7u64.to_le_bytes().to_vec(), Metadata::Int(7)),
        ("large", 10, u64::MAX.to_le_bytes().to_vec(), Metadata::Unsigned(u64::MAX)),
        ("i64", 11, i64::MIN.to_le_bytes().to_vec(), Metadata::Int(i64::MIN)),
    ];
    let pairs: Vec<_> = integers.iter().map(|(key, kind, bytes, _)| pair(key, *kind, bytes)).collect();
    let file = TensorFile::from_bytes(gguf(&pairs, &[]))?;
    for (key, _, _, expected) in &integers {
        assert_eq!(&file.metadata()[*key], expected);
    }
    assert_eq!(file.metadata()["large"].as_f64(), Some(u64::MAX as f64));
    assert_eq!(file.metadata()["large"].as_usize(), usize::try_from(u64::MAX).ok());
    Ok(())
}

/// The last logits of a model, which differ from the expected ones by rounding only.
fn check(name: &str, path: &Path, expected: &BTreeMap<String, Tensor>) -> Result<Pretrained> {
    let pretrained = Pretrained::open(path)?.dequantized();
    let model = pretrained.model(DType::F32, &Device::Cpu)?;
    let logits = model.forward(&expected["tokens"], &ForwardOptions::default())?.out;
    let expected = &expected[name];
    let logits = logits.narrow(1, logits.dim(1)? - expected.dim(1)?, expected.dim(1)?)?;
    assert_eq!(logits.shape(), expected.shape(), "{name}");
    let pairs = logits.to_f64_vec()?.into_iter().zip(expected.to_f64_vec()?);
    let off = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |worst, off| if off <= worst { worst } else { off });
    assert!(off < 1e-4, "{name} is off by {off:.1e}");
    Ok(pretrained)
}

fn expected() -> BTreeMap<String, Tensor> {
    read_safetensors(files("rotations.safetensors")).unwrap()
}

/// A file with tensors of nine types, as `Q4_K_M` and its like mix them.
#[test]
fn mixtures_of_types() -> Result<()> {
    let pretrained = check("mixture", &files("mixture.gguf"), &expected())?;
    let stored = |name: &str| pretrained.file().info(name).unwrap().stored;
    assert_eq!(stored("token_embd.weight"), Stored::Quantized(QuantType::Q4K));
    assert_eq!(stored("blk.0.ffn_gate.weight"), Stored::Quantized(QuantType::Q2K));
    assert_eq!(stored("output.weight"), Stored::Quantized(QuantType::Q6K));
    Ok(())
}

/// Biases of attention and feedforward, factors of the rotation, sizes per layer.
#[test]
fn llama_with_biases_and_lists() -> Result<()> {
    let pretrained = check("biases", &files("biases.gguf"), &expected())?;
    let layers = &pretrained.config().attn_layers;
    assert_eq!((layers.attn.qkv_bias, layers.attn.out_bias, layers.ff.no_bias), (true, true, false));
    assert_eq!(layers.rotary_freq_factors.as_deref(), Some(&[1.0, 3.25, 8.0, 8.0][..]));
    assert_eq!(pretrained.file().metadata()["general.hash"], Metadata::Unsigned(u64::MAX));
    assert!(pretrained.config().tie_embedding);
    Ok(())
}

/// The same weights under the names of transformers, whose config says which biases there are.
#[test]
fn llama_of_a_folder_with_biases() -> Result<()> {
    let names = [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    let file = TensorFile::open(files("biases.gguf"))?;
    let mut weights = BTreeMap::new();
    for name in file.names().filter(|&name| name != "rope_freqs.weight") {
        let (module, part) = name.rsplit_once('.').unwrap();
        let short = module.rsplit('.').next().unwrap();
        let theirs = names.iter().find(|(ours, _)| *ours == short).unwrap().1;
        let theirs = match module.strip_prefix("blk.") {
            Some(layer) => format!("model.layers.{}.{theirs}.{part}", layer.split('.').next().unwrap()),
            None => format!("{theirs}.{part}"),
        };
        let tensor = file.tensor(name)?;
        let heads = [("attn_q", 4), ("attn_k", 2)].into_iter().find(|(ours, _)| *ours == short);
        let tensor = match heads {
            // Features that rotate together are halves there.
            Some((_, heads)) => {
                let (shape, rows) = (tensor.shape().to_vec(), tensor.dim(0)?);
                let pairs = tensor.reshape([heads, rows / heads / 2, 2, tensor.numel() / rows])?;
                pairs.transpose(1, 2)?.reshape(&shape[..])?
            }
            None => tensor,
        };
        weights.insert(theirs, tensor);
    }
    let folder = Folder::new("mlp");
    write_safetensors(folder.0.join("model.safetensors"), &weights, &BTreeMap::new())?;
    let config = json!({"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3, "rope_theta": 500.0, "attention_bias": true, "mlp_bias": true,
        "tie_word_embeddings": true});
    folder.write("config.json", config.to_string());
    check("biases.folder", &folder.0, &expected())?;
    Ok(())
}

#[test]
fn qwen2_has_biases_and_halves() -> Result<()> {
    let pretrained = check("qwen2", &files("qwen2.gguf"), &expected())?;
    assert_eq!(pretrained.family(), Family::Qwen2);
    assert!(!pretrained.config().tie_embedding);
    Ok(())
}

/// Old and new keys of a stretched rotation, and keys that leave it unchanged.
#[test]
fn rotations_of_gguf_files() -> Result<()> {
    let kind = |kind: &str| pair("llama.rope.scaling.type", 8, &text(kind));
    let (factor, old) = (float("llama.rope.scaling.factor", 4.0), float("llama.rope.scale_linear", 4.0));
    let original = size("llama.rope.scaling.original_context_length", 16);
    let qwen2 = |key: &str, value: f32| float(&format!("qwen2.rope.scaling.{key}"), value);
    let stretched = vec![
        pair("qwen2.rope.scaling.type", 8, &text("yarn")),
        qwen2("factor", 4.0),
        size("qwen2.rope.scaling.original_context_length", 16),
    ];
    let keys = [("attn_factor", 1.25), ("yarn_beta_fast", 8.0), ("yarn_beta_slow", 0.5), ("yarn_log_multiplier", 0.5)];
    let keys = keys.map(|(key, value)| qwen2(key, value));
    let folder = Folder::new("rotations");
    let cases = [
        ("biases.linear", vec![kind("linear"), factor.clone()]),
        ("biases.linear", vec![factor.clone()]),
        ("biases.linear", vec![old.clone()]),
        // The new key takes precedence.
        ("biases.linear", vec![factor.clone(), float("llama.rope.scale_linear", 9.0)]),
        ("biases", vec![kind("none"), factor.clone()]),
        ("biases", vec![kind("linear")]),
        ("biases", vec![float("llama.rope.scaling.factor", 0.0)]),
        ("biases", vec![old.clone(), kind("none")]),
        ("biases.yarn", vec![kind("yarn"), factor.clone(), original.clone()]),
        ("biases.yarn", vec![kind("yarn"), old.clone(), original, float("llama.rope.scaling.yarn_ext_factor", -1.0)]),
        ("qwen2.yarn", stretched.clone()),
        ("qwen2.yarn_keys", stretched.into_iter().chain(keys).collect()),
    ];
    for (name, pairs) in cases {
        let file = format!("{}.gguf", name.split('.').next().unwrap());
        check(name, &folder.write("m.gguf", with_metadata(&file, &pairs)), &expected())?;
    }
    Ok(())
}

#[test]
fn metadata_that_asks_for_more_is_refused() {
    let folder = Folder::new("refused");
    let error = |pairs: &[Vec<u8>]| {
        let path = folder.write("m.gguf", with_metadata("qwen2.gguf", pairs));
        Pretrained::open(path).unwrap_err().to_string()
    };
    let kind = |kind: &str| pair("qwen2.rope.scaling.type", 8, &text(kind));
    for (pairs, expected) in [
        (vec![kind("longrope")], "`qwen2.rope.scaling.type` is `longrope`, expected none, linear or yarn"),
        (vec![float("qwen2.rope.scaling.type", 1.0)], "`qwen2.rope.scaling.type` is `not a string`"),
        (vec![pair("qwen2.rope.scaling.factor", 8, &text("4"))], "`qwen2.rope.scaling.factor` is Text(\"4\")"),
        (vec![kind("yarn"), float("qwen2.rope.scaling.yarn_ext_factor", 0.5)], "is 0.5, expected 1"),
        (vec![size("qwen2.expert_count", 8)], "mixtures of experts"),
        (vec![pair("qwen2.attention.causal", 7, &[0])], "`qwen2.attention.causal` must be true"),
        (
            vec![size("qwen2.attention.value_length", 8)],
            "`qwen2.attention.value_length` is 8, expected the head size 16",
        ),
        (vec![size("qwen2.rope.dimension_count", 8)], "`qwen2.rope.dimension_count` is 8, expected the head size 16"),
    ] {
        let error = error(&pairs);
        assert!(error.contains(expected), "{error}");
    }
    // Layers that differ, a list of another length, and another architecture.
    let bytes = fs::read(files("biases.gguf")).unwrap();
    let changed = |from: &[u8], to: &[u8]| {
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        let path = folder.write("m.gguf", [&bytes[..at], to, &bytes[at + from.len()..]].concat());
        Pretrained::open(path).unwrap_err().to_string()
    };
    let list = |values: &[u32]| {
        let values: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        [&b"llama.attention.head_count_kv\x09\0\0\0\x05\0\0\0\x02\0\0\0\0\0\0\0"[..], &values].concat()
    };
    let error = changed(&list(&[2, 2]), &list(&[2, 4]));
    assert!(error.contains("expected the same value for all layers"), "{error}");
    let error = changed(&list(&[2, 2]), &list(&[0, 0]));
    assert!(error.contains("expected the same value for all layers"), "{error}");
    let depth = |depth: u32| size("llama.block_count", depth);
    let error = changed(&depth(2), &depth(1));
    assert!(error.contains("has 2 values, expected 1, one per layer"), "{error}");
    let architecture = |name: &str| pair("general.architecture", 8, &text(name));
    let error = changed(&architecture("llama"), &architecture("gemma"));
    assert!(error.contains("is gemma, expected llama or qwen2"), "{error}");
    // Invalid factors.
    let factors = |values: [f32; 4]| values.map(f32::to_le_bytes).concat();
    let error = changed(&factors([1.0, 3.25, 8.0, 8.0]), &factors([1.0, 0.0, 8.0, 8.0]));
    assert!(error.contains("`rope_freqs.weight` contains [1.0, 0.0, 8.0, 8.0], expected numbers above 0"), "{error}");
}

/// A model in three files, opened by the folder or by any of them.
#[test]
fn models_in_several_files() -> Result<()> {
    let folder = Folder::new("split");
    let part = |n: usize| format!("qwen2-0000{n}-of-00003.gguf");
    for n in 1..=3 {
        fs::copy(files(&part(n)), folder.0.join(part(n))).unwrap();
    }
    let expected = expected();
    assert!(Pretrained::is_one(&folder.0));
    for path in [folder.0.clone(), folder.0.join(part(1)), folder.0.join(part(3))] {
        let pretrained = check("qwen2", &path, &expected)?;
        let file = pretrained.file();
        assert_eq!(file.path(), folder.0.join(part(1)));
        assert_eq!(file.names().count(), TensorFile::open(files("qwen2.gguf"))?.names().count());
        assert_eq!(file.metadata()["only.in.the.first"].as_str(), Some("part"));
        let sizes = (1..=3).map(|n| fs::metadata(folder.0.join(part(n))).unwrap().len());
        assert_eq!(file.bytes() as u64, sizes.sum::<u64>());
    }
    let error = |path: &Path| {
        assert!(Pretrained::is_one(path));
        Pretrained::open(path).unwrap_err().to_string()
    };
    // A count of tensors that the parts together do not reach.
    let first = fs::read(folder.0.join(part(1))).unwrap();
    let key = b"split.tensors.count";
    let at = first.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    let mut changed = first.clone();
    changed[at] += 1;
    folder.write(&part(1), changed);
    let count = error(&folder.0);
    assert!(count.contains("says that the model has") && count.contains("but its 3 parts have"), "{count}");
    folder.write(&part(1), first);
    // A part twice, in the place of another one.
    let second = fs::read(folder.0.join(part(2))).unwrap();
    folder.write(&part(2), fs::read(folder.0.join(part(3))).unwrap());
    let twice = error(&folder.0);
    assert!(twice.contains("is named as part 2 of 3"), "{twice}");
    // A part that is missing.
    fs::remove_file(folder.0.join(part(2))).unwrap();
    for path in [folder.0.clone(), folder.0.join(part(3))] {
        let missing = error(&path);
        assert!(missing.contains(&part(2)) && missing.contains("is missing (part 2 of 3"), "{missing}");
    }
    // A part of another name, and two models in one folder.
    let alone = folder.write("alone.gguf", &second);
    let renamed = error(&alone);
    assert!(renamed.contains("its name must end in `-00002-of-00003.gguf`"), "{renamed}");
    let several = error(&folder.0);
    assert!(several.contains("has 3 .gguf files; name one of them"), "{several}");
    // Invalid numbers.
    for (key, pairs) in [
        ("split.count", vec![pair("split.count", 8, &text("3"))]),
        ("part 4 of 3", vec![size("split.count", 3), size("split.no", 3)]),
        ("split.count", vec![size("split.count", 100_000)]),
    ] {
        let path = folder.write("m.gguf", with_metadata("qwen2.gguf", &pairs));
        let error = error(&path);
        assert!(error.contains(key), "{error}");
    }
    Ok(())
}
