//! Memory used by loading: the model, and at most one copy of the file; nothing for sizes that a file only claims.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use x_transformers::{DType, Device, Result, io::TensorFile, pretrained::Pretrained};

/// Counts the process's allocations; only the file is mapped.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Each test runs by itself, with its files: the counters belong to the process.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the result of a call and its peak of allocated bytes.
fn peak_of<R>(call: impl FnOnce() -> R) -> (R, usize) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = call();
    (result, PEAK.load(Relaxed) - before)
}

/// A folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xt-loading-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const VOCABULARY: usize = 16384;
const DIM: usize = 128;

/// Names and shapes of a Llama of one layer.
fn tensors() -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("model.embed_tokens.weight", vec![VOCABULARY, DIM]),
        ("model.layers.0.input_layernorm.weight", vec![DIM]),
        ("model.layers.0.post_attention_layernorm.weight", vec![DIM]),
        ("model.layers.0.self_attn.q_proj.weight", vec![DIM, DIM]),
        ("model.layers.0.self_attn.k_proj.weight", vec![DIM, DIM]),
        ("model.layers.0.self_attn.v_proj.weight", vec![DIM, DIM]),
        ("model.layers.0.self_attn.o_proj.weight", vec![DIM, DIM]),
        ("model.layers.0.mlp.gate_proj.weight", vec![256, DIM]),
        ("model.layers.0.mlp.up_proj.weight", vec![256, DIM]),
        ("model.layers.0.mlp.down_proj.weight", vec![DIM, 256]),
        ("model.norm.weight", vec![DIM]),
        ("lm_head.weight", vec![VOCABULARY, DIM]),
    ]
}

fn values() -> usize {
    tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

fn config(vocabulary: usize, dim: usize, layers: usize) -> String {
    format!(
        r#"{{"model_type": "llama", "hidden_size": {dim}, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_hidden_layers": {layers}, "vocab_size": {vocabulary}, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": false}}"#
    )
}

/// A safetensors file of zeros.
fn safetensors(dtype: &str, size: usize) -> Vec<u8> {
    let mut header = String::from("{");
    let mut end = 0;
    for (name, shape) in tensors() {
        let start = end;
        end += shape.iter().product::<usize>() * size;
        let comma = if start > 0 { "," } else { "" };
        header += &format!(r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#);
    }
    header.push('}');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + end, 0);
    file
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A GGUF file of zeros: `F16`, or blocks of `Q8_0`.
fn gguf(quantised: bool) -> Vec<u8> {
    let number =
        |key: &str, value: u32| [text(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat();
    let float = |key: &str, value: f32| [text(key), 6u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat();
    let entries = [
        [text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat(),
        number("llama.block_count", 1),
        number("llama.context_length", 64),
        number("llama.embedding_length", DIM as u32),
        number("llama.feed_forward_length", 256),
        number("llama.attention.head_count", 4),
        number("llama.attention.head_count_kv", 4),
        number("llama.rope.dimension_count", (DIM / 4) as u32),
        number("llama.vocab_size", VOCABULARY as u32),
        float("llama.attention.layer_norm_rms_epsilon", 1e-5),
    ];
    let name = |name: &str| {
        let name = name.replace("model.layers.0.", "blk.0.").replace("model.embed_tokens", "token_embd");
        let name = name.replace("input_layernorm", "attn_norm").replace("post_attention_layernorm", "ffn_norm");
        let name = name.replace("self_attn.q_proj", "attn_q").replace("self_attn.k_proj", "attn_k");
        let name = name.replace("self_attn.v_proj", "attn_v").replace("self_attn.o_proj", "attn_output");
        let name = name.replace("mlp.gate_proj", "ffn_gate").replace("mlp.up_proj", "ffn_up");
        name.replace("mlp.down_proj", "ffn_down").replace("model.norm", "output_norm").replace("lm_head", "output")
    };
    let mut infos = Vec::new();
    let mut bytes = 0usize;
    for (tensor, shape) in tensors() {
        let values: usize = shape.iter().product();
        let (kind, size) = match (shape.len(), quantised) {
            (1, _) => (0u32, values * 4),
            (_, false) => (1, values * 2),
            (_, true) => (8, values / 32 * 34),
        };
        infos.extend(text(&name(tensor)));
        infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&size| infos.extend((size as u64).to_le_bytes()));
        infos.extend(kind.to_le_bytes());
        infos.extend((bytes as u64).to_le_bytes());
        bytes += size.next_multiple_of(32);
    }
    let counts = [(tensors().len() as u64).to_le_bytes(), (entries.len() as u64).to_le_bytes()].concat();
    let mut file = [b"GGUF", &3u32.to_le_bytes()[..], &counts, &entries.concat(), &infos].concat();
    file.resize(file.len().next_multiple_of(32) + bytes, 0);
    file
}

/// Loads a model and checks the peak.
fn load(path: &Path, dtype: DType, file: usize) {
    let (model, peak) = peak_of(|| -> Result<_> { Pretrained::open(path)?.autoregressive(dtype, &Device::Cpu) });
    model.unwrap();
    let bytes = values() * if dtype == DType::F32 { 4 } else { 2 };
    // Buffers are pooled in classes of sizes.
    let most = bytes + file + bytes / 8 + (2 << 20);
    assert!(peak <= most, "{}: {peak} bytes, the model has {bytes} and the file {file}", path.display());
}

#[test]
fn loading_peaks_at_the_file_and_the_model() {
    let _alone = alone();
    let folder = Folder::new("peaks");
    for (dtype, size, kind) in [("F32", 4, DType::F32), ("BF16", 2, DType::F32), ("BF16", 2, DType::BF16)] {
        let file = safetensors(dtype, size);
        fs::write(folder.0.as_path().join("config.json"), config(VOCABULARY, DIM, 1)).unwrap();
        fs::write(folder.0.as_path().join("model.safetensors"), &file).unwrap();
        let bytes = file.len();
        drop(file);
        load(folder.0.as_path(), kind, bytes);
    }
    for quantised in [false, true] {
        let file = gguf(quantised);
        let path = folder.0.as_path().join("model.gguf");
        fs::write(&path, &file).unwrap();
        let bytes = file.len();
        drop(file);
        load(&path, DType::F32, bytes);
    }
}

/// Weights that a config claims and the file lacks are an error before memory is allocated for them.
#[test]
fn claimed_sizes_take_no_memory() {
    let _alone = alone();
    let folder = Folder::new("claims");
    let small = safetensors("BF16", 2);
    fs::write(folder.0.as_path().join("model.safetensors"), &small).unwrap();
    drop(small);
    for (vocabulary, dim, layers) in
        [(1 << 30, DIM, 1), (VOCABULARY, 1 << 20, 1), (VOCABULARY, DIM, 1 << 30), (1 << 40, 1 << 40, 1 << 40)]
    {
        fs::write(folder.0.as_path().join("config.json"), config(vocabulary, dim, layers)).unwrap();
        let (model, peak) = peak_of(|| -> Result<_> {
            Pretrained::open(folder.0.as_path())?.autoregressive(DType::F32, &Device::Cpu).map(drop)
        });
        let error = model.unwrap_err().to_string();
        let most = values() * 4 + (4 << 20);
        assert!(peak < most, "{vocabulary}, {dim}, {layers}: {peak} bytes, {error}");
    }
}

/// Headers that claim what the file does not have.
#[test]
fn headers_that_claim_too_much_take_no_memory() {
    let _alone = alone();
    let huge = u64::MAX / 2;
    let header = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let gguf = |tensors: u64, entries: u64, rest: &[u8]| {
        [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &entries.to_le_bytes(), rest].concat()
    };
    let long_text = [text("a"), 8u32.to_le_bytes().to_vec(), huge.to_le_bytes().to_vec()].concat();
    let long_list =
        [text("a"), 9u32.to_le_bytes().to_vec(), 4u32.to_le_bytes().to_vec(), huge.to_le_bytes().to_vec()].concat();
    let files = [
        [&huge.to_le_bytes()[..], b"{}"].concat(),
        [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat(),
        header(r#"{"a":{"dtype":"F32","shape":[4294967296,1024],"data_offsets":[0,17592186044416]}}"#),
        header(r#"{"a":{"dtype":"F32","shape":[18446744073709551615,4],"data_offsets":[0,16]}}"#),
        gguf(huge, 0, &[]),
        gguf(0, huge, &[]),
        gguf(1 << 40, 1 << 40, &[0; 64]),
        gguf(0, 1, &long_text),
        gguf(0, 1, &long_list),
        // The end of a zip archive that has 65535 files.
        [&b"PK\x05\x06"[..], &[0; 4], &[255; 4], &[255; 4], &[0; 6]].concat(),
        // A pickle of 2³¹ bytes of text, and one of a list with as many marks as it has bytes.
        b"\x80\x02X\xff\xff\xff\x7fa.".to_vec(),
        [&b"\x80\x02"[..], &[b'('; 4096], b"."].concat(),
    ];
    for file in files {
        let (read, peak) = peak_of(|| TensorFile::from_bytes(file.as_slice()).map(|file| file.names().count()));
        assert!(read.is_err(), "{read:?}: {file:?}");
        assert!(peak < 1 << 20, "{peak} bytes: {file:?}");
    }
}
