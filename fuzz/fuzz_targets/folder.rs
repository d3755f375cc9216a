//! Any files in the folder of a pretrained model give a model with a tokenizer or an error, within bounded memory.
//!
//! The input is several files, each after a line `=== NAME`; their weights are a safetensors file of zeros with the tensors
//! that the lines of `tensors` name. Begin from the folders in tests/files.

#![no_main]

use std::{env, fs, path::PathBuf, process};

use libfuzzer_sys::fuzz_target;
use x_transformers::{DType, Device, io::Pretrained};
use x_transformers_tokenizers::Tokenizer;

const NAMES: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "model.safetensors.index.json",
    "added_tokens.json",
];

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let folder = env::temp_dir().join(format!("fuzz-folder-{}", process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(folder.join("1_Pooling")).unwrap();
    let mut tensors = String::new();
    for part in text.split("=== ").skip(1) {
        let (name, content) = part.split_once('\n').unwrap_or((part, ""));
        if NAMES.contains(&name) {
            fs::write(folder.join(name), content).unwrap();
        } else if name == "tensors" {
            tensors = content.to_string();
        }
    }
    weights(&tensors, folder.join("model.safetensors"));
    let Ok(pretrained) = Pretrained::open(&folder) else { return };
    if let Ok(tokenizer) = Tokenizer::of(&pretrained, None) {
        let _ = tokenizer.encode("the é").map(|tokens| tokenizer.decode(&tokens));
    }
    if pretrained.family().is_causal() {
        let _ = pretrained.autoregressive(DType::F32, &Device::Cpu);
    }
});

/// Writes zeros of the names and sizes in lines such as `lm_head.weight 4 8`, a few at most.
fn weights(tensors: &str, path: PathBuf) {
    let mut header = String::from("{");
    let mut end = 0u64;
    for line in tensors.lines().take(64) {
        let mut words = line.split(' ');
        let Some(name) = words.next().filter(|name| !name.contains(['"', '\\']) && !name.contains(char::is_control))
        else {
            continue;
        };
        let sizes: Vec<u64> = words.filter_map(|word| word.parse().ok()).take(4).collect();
        let Some(bytes) = sizes.iter().try_fold(4u64, |bytes, size| bytes.checked_mul(*size)) else { continue };
        if end + bytes > 1 << 16 {
            continue;
        }
        if end > 0 || header.len() > 1 {
            header.push(',');
        }
        header += &format!(r#""{name}":{{"dtype":"F32","shape":{sizes:?},"data_offsets":[{end},{}]}}"#, end + bytes);
        end += bytes;
    }
    header.push('}');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + end as usize, 0);
    fs::write(path, file).unwrap();
}
