//! Files of other programs, which `tests/files/make.py` wrote with PyTorch, safetensors and gguf, whole and damaged.
//!
//! Damage is drawn from a seed. `XT_MUTATION_SECONDS` sets how long each reader gets damaged files, and
//! `XT_MUTATION_SEED` the first seed; a failure names the seed of its file.

#[path = "readers/damaged.rs"]
mod damaged;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use x_transformers::{
    DType, Philox, QuantType, Result, Tensor,
    io::{Format, Metadata, Stored, TensorFile, read_safetensors},
};

/// Counts the allocations of this thread.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Threads that end allocate when their counters are gone.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

fn bytes(name: &str) -> Vec<u8> {
    fs::read(file(name)).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64_vec().unwrap()
}

/// The function `ramp` of `make.py`.
fn ramp(i: usize) -> f64 {
    i as f64 / 4.0 - 3.0
}

/// Checks everything that `tensors()` of `make.py` creates.
fn check_all(tensors: &BTreeMap<String, Tensor>) {
    let names = [
        "bfloat",
        "bool",
        "byte",
        "char",
        "empty",
        "half",
        "int",
        "layers.0.rows",
        "layers.0.transposed",
        "layers.0.weight",
        "layers.1.weight",
        "long",
        "scalar",
        "short",
    ];
    assert_eq!(tensors.keys().map(String::as_str).collect::<Vec<_>>(), names);
    let all: Vec<f64> = (0..24).map(ramp).collect();
    let is = |name: &str, shape: &[usize], dtype: DType, values: &[f64]| {
        let tensor = &tensors[name];
        assert_eq!((&tensor.shape()[..], tensor.dtype()), (shape, dtype), "{name}");
        assert_eq!(floats(tensor), values, "{name}");
    };
    is("layers.0.weight", &[4, 6], DType::F32, &all);
    is("layers.0.rows", &[2, 6], DType::F32, &all[6..18]);
    let transposed: Vec<f64> = (0..24).map(|i| ramp(i % 4 * 6 + i / 4)).collect();
    is("layers.0.transposed", &[6, 4], DType::F32, &transposed);
    let tripled: Vec<f64> = all.iter().map(|x| 3.0 * x).collect();
    is("layers.1.weight", &[4, 6], DType::F64, &tripled);
    is("half", &[6], DType::F16, &all[..6]);
    is("bfloat", &[6], DType::BF16, &all[..6]);
    is("int", &[2], DType::I64, &[-5.0, 2147483647.0]);
    is("short", &[2], DType::I64, &[-5.0, 32767.0]);
    is("char", &[2], DType::I64, &[-128.0, 127.0]);
    is("byte", &[2], DType::I64, &[0.0, 255.0]);
    is("scalar", &[], DType::F32, &[2.5]);
    is("empty", &[0, 3], DType::F32, &[]);
    assert_eq!(tensors["long"].to_vec::<i64>().unwrap(), [-(1 << 62), 0, 7]);
    assert_eq!(tensors["bool"].to_vec::<bool>().unwrap(), [true, false, true]);
}

#[test]
fn pytorch_files_are_read() -> Result<()> {
    for (name, format) in [("archive.pt", Format::PytorchArchive), ("legacy.pt", Format::PytorchLegacy)] {
        let file = TensorFile::open(file(name))?;
        assert_eq!(file.format(), format);
        check_all(&file.tensors()?);
    }
    // A state dict among other things is found under the names of its places.
    let nested = TensorFile::open(file("nested.pt"))?;
    assert_eq!(nested.names().collect::<Vec<_>>(), ["state_dict.weight"]);
    assert_eq!(floats(&nested.tensor("state_dict.weight")?)[23], ramp(23));
    Ok(())
}

/// Checks the tensors that `weights()` of `make_beside.py` creates, below a prefix.
fn check_weights(file: &TensorFile, place: &str) -> Result<()> {
    let ramp: Vec<f64> = (0..12).map(|i| f64::from(i) / 4.0 - 1.0).collect();
    let turned: Vec<f64> = (0..12).map(|i| ramp[i % 3 * 4 + i / 3]).collect();
    for (name, shape, values) in [("w", &[3, 4][..], &ramp[..]), ("b", &[4], &ramp[..4]), ("t", &[4, 3], &turned)] {
        let tensor = file.tensor(&format!("{place}{name}"))?;
        assert_eq!((&tensor.shape()[..], floats(&tensor)), (shape, values.to_vec()), "{place}{name}");
    }
    Ok(())
}

#[test]
fn objects_beside_the_weights_are_skipped() -> Result<()> {
    for name in ["beside-1.pt", "beside-2.pt", "beside-4.pt", "beside-legacy.pt"] {
        let file = TensorFile::open(file(name))?;
        check_weights(&file, "")?;
        assert_eq!(floats(&file.tensor("half")?), [1.0; 2], "{name}");
        // No object passes for a tensor.
        let tensors = ["b", "expanded", "generator", "half", "t", "w"];
        assert_eq!(file.names().collect::<Vec<_>>(), tensors, "{name}");
        assert_eq!(file.unreadable().count(), 0, "{name}");
        assert_eq!(floats(&file.tensor("expanded")?), vec![1.0; 4000], "{name}");
        assert!(file.tensor("args").unwrap_err().to_string().contains("`lightning_like.Args`"));
    }
    check_weights(&TensorFile::open(file("trainer.ckpt"))?, "state_dict.model.")?;
    check_weights(&TensorFile::open(file("nano.pt"))?, "model._orig_mod.")
}

#[test]
fn weights_that_are_no_tensors_here_are_refused_by_name() -> Result<()> {
    let file = TensorFile::open(file("unread.pt"))?;
    let expected = [
        ("complex128", "complex128"),
        ("complex64", "complex64"),
        ("csr", "_rebuild_sparse"),
        ("expanded", "contiguous()"),
        ("meta", "_rebuild_meta"),
        ("quantised", "_rebuild_qtensor"),
        ("rank7", "7"),
        ("sparse", "_rebuild_sparse"),
    ];
    let unreadable: Vec<(&str, &str)> = file.unreadable().collect();
    assert_eq!(unreadable.iter().map(|(name, _)| *name).collect::<Vec<_>>(), expected.map(|(name, _)| name));
    for ((name, why), (_, part)) in unreadable.iter().zip(expected) {
        assert!(why.contains(part), "{name}: {why}");
        let refused = file.tensor(name).unwrap_err().to_string();
        assert!(refused.contains(&format!("`{name}`")) && refused.contains(why), "{refused}");
    }
    assert!(file.tensor("array").unwrap_err().to_string().contains("_reconstruct"));
    assert!(file.tensors().unwrap_err().to_string().contains("complex128"));
    // A tensor with an attribute is a tensor.
    assert_eq!(floats(&file.tensor("tagged")?), [1.0; 3]);
    assert_eq!(floats(&file.tensor("plain")?), [1.0; 2]);
    Ok(())
}

#[test]
fn floats_of_eight_bits_and_unsigned_integers_are_read() -> Result<()> {
    let expected = read_safetensors(file("dtypes-expected.safetensors"))?;
    let archive = TensorFile::open(file("dtypes.pt"))?.tensors()?;
    for (format, tensors) in [("PyTorch", archive), ("safetensors", read_safetensors(file("dtypes.safetensors"))?)] {
        assert_eq!(tensors.len(), 9, "{format}");
        for (name, tensor) in &tensors {
            let expected = &expected[name];
            assert_eq!((tensor.shape(), tensor.dtype()), (expected.shape(), expected.dtype()), "{format} {name}");
            let same = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
            assert!(floats(tensor).iter().zip(&floats(expected)).all(same), "{format} {name}: {tensor:?}");
        }
    }
    Ok(())
}

#[test]
fn files_of_other_kinds_are_named() {
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 669\n";
    let mut tar = vec![0; 1024];
    tar[..9].copy_from_slice(b"model.bin");
    tar[257..262].copy_from_slice(b"ustar");
    let cases: [(&[u8], &str); 12] = [
        (lfs, "Git LFS"),
        (b"<!DOCTYPE html><html><head><title>Not found</title>", "HTML"),
        (b"\n  <html>\n<body>sign in</body></html>", "HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "gzip"),
        (b"BZh91AY&SY\0\0\0\0", "bzip2"),
        (&tar, "tar archive"),
        (b"{\"error\": \"Repository not found\"}", "is JSON"),
        (b"[package]\nname = \"model\"\n\n[[bin]]\n", "is text"),
        ("# Modèle\n".as_bytes(), "is text, not weights"),
        (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}.", "torch.save"),
        (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", "HDF5"),
    ];
    for (bytes, expected) in cases {
        let error = TensorFile::from_bytes(bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        let path = std::env::temp_dir().join(format!("xt-other-{}-{}", std::process::id(), expected.len()));
        fs::write(&path, bytes).unwrap();
        assert!(read_safetensors(&path).unwrap_err().to_string().contains(expected));
        fs::remove_file(path).unwrap();
    }
    // Headers whose length begins as some of these do.
    for length in [0x8B1Fusize, 0x0280] {
        let header = format!("{:length$}", "{}");
        let bytes = [&length.to_le_bytes()[..], header.as_bytes()].concat();
        assert_eq!(TensorFile::from_bytes(bytes).unwrap().names().count(), 0, "{length}");
    }
}

#[test]
fn safetensors_in_several_files_are_read() -> Result<()> {
    let parts = TensorFile::open(file("parts.safetensors.index.json"))?;
    check_all(&parts.tensors()?);
    assert_eq!(parts.metadata()["format"], Metadata::Text("pt".into()));
    assert_eq!(parts.bytes(), bytes("part-1.safetensors").len() + bytes("part-2.safetensors").len());
    Ok(())
}

#[test]
fn gguf_files_are_read_as_their_own_package_reads_them() -> Result<()> {
    let file_ = TensorFile::open(file("quantised.gguf"))?;
    let expected = read_safetensors(file("quantised.safetensors"))?;
    let stored = [
        ("F32", Stored::F32),
        ("F16", Stored::F16),
        ("BF16", Stored::BF16),
        ("Q8_0", Stored::Quantized(QuantType::Q8_0)),
        ("Q4_0", Stored::Quantized(QuantType::Q4_0)),
        ("Q4_1", Stored::Quantized(QuantType::Q4_1)),
    ];
    assert_eq!(file_.names().count(), stored.len());
    for (name, stored) in stored {
        let info = file_.info(name).unwrap();
        assert_eq!((info.stored, &info.shape[..]), (stored, &[2, 64][..]), "{name}");
        let tensor = file_.tensor(name)?;
        assert_eq!(tensor.dtype(), stored.dtype());
        assert_eq!(floats(&tensor), floats(&expected[name]), "{name}");
    }
    let metadata = file_.metadata();
    assert_eq!(metadata["llama.block_count"].as_usize(), Some(2));
    assert_eq!(metadata["llama.rope.freq_base"].as_f64(), Some(100000.0));
    assert_eq!(metadata["tokenizer.ggml.add_bos_token"].as_bool(), Some(false));
    assert_eq!(metadata["negative"], Metadata::Int(-7));
    assert_eq!(metadata["negative"].as_usize(), None);
    assert_eq!(metadata["general.architecture"].as_str(), Some("llama"));
    let tokens: Vec<_> = metadata["tokens"].as_list().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens, ["a", "b", "Ġc"]);
    assert_eq!(metadata["scores"], Metadata::List(vec![Metadata::Float(0.5), Metadata::Float(-1.5)]));
    Ok(())
}

/// Every truncation of every file is an error.
#[test]
fn truncated_files_are_refused() {
    for name in ["archive.pt", "legacy.pt", "part-2.safetensors", "quantised.gguf"] {
        let whole = bytes(name);
        // GGUF fills its last tensor up to a multiple of 32 bytes, which nobody misses.
        let filled = if name.ends_with("gguf") { 32 } else { 1 };
        for length in (0..=whole.len() - filled).step_by(if cfg!(miri) { 211 } else { 1 }) {
            assert!(read(&whole[..length]).is_err(), "{name}: {length} of {} bytes", whole.len());
        }
    }
}

fn read(bytes: &[u8]) -> std::result::Result<usize, String> {
    let file = TensorFile::from_bytes(bytes).map_err(|error| error.to_string())?;
    // One after the other: each is bounded, and together they are bounded by the size of the file.
    file.names().try_fold(0, |sum, name| Ok(sum + file.tensor(name).map_err(|error| error.to_string())?.numel()))
}

/// An old PyTorch file with this pickle in the place of the state dict.
fn legacy(pickle: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    [&magic[..], pickle, b"\x80\x02]."].concat()
}

#[test]
fn pickles_execute_nothing_and_say_what_they_were_asked_for() {
    let storage = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ";
    let cases: [(&str, Vec<u8>, &str); 14] = [
        ("a call", b"cos\nsystem\nX\x04\0\0\0true\x85R.".to_vec(), "`os.system`"),
        ("a call by names on the stack", b"X\x02\0\0\0osX\x06\0\0\0system\x93.".to_vec(), "`os.system`"),
        ("eval", b"cbuiltins\neval\n.".to_vec(), "`builtins.eval`"),
        ("a hidden loader", b"ctorch.storage\n_load_from_bytes\n.".to_vec(), "_load_from_bytes"),
        ("an unknown instruction", b"\x82\0.".to_vec(), "0x82"),
        ("a new protocol", b"\x80\x09.".to_vec(), "protocol 9"),
        ("an empty stack", b".".to_vec(), "expected a value"),
        ("a mark that is not there", b"t.".to_vec(), "expected a mark"),
        ("values below a mark", b"K\x01(\x85.".to_vec(), "expected values"),
        ("a memory that is not there", b"h\x07.".to_vec(), "a memoized value"),
        ("no dictionary", b"K\x01.".to_vec(), "dictionary of tensors"),
        ("text that is none", b"X\x02\0\0\0\xff\xff.".to_vec(), "UTF-8"),
        ("text longer than the file", b"X\xff\xff\xff\xff.".to_vec(), "truncated"),
        ("a storage that is not in the file", [b"(", &storage[..], b"."].concat(), "dictionary of tensors"),
    ];
    for (what, pickle, expected) in cases {
        let error = read(&legacy(&pickle)).expect_err(what);
        assert!(error.contains(expected), "{what}: {error}");
    }
    // Dictionaries and lists that hold themselves, and one dictionary at many places.
    let circle = b"}q\0X\x01\0\0\0ah\0s]q\x01h\x01aX\x01\0\0\0bh\x01s";
    assert!(read(&legacy(b"}q\0X\x01\0\0\0ah\0s.")).is_ok());
    assert!(read(&legacy(&[&circle[..], b"."].concat())).is_err());
    let mut doubled = b"}q\0".to_vec();
    for level in 1..200u8 {
        // Each holds the one before twice.
        doubled.extend([b'}', b'q', level, b'X', 1, 0, 0, 0, b'a', b'h', level - 1, b's']);
        doubled.extend([b'X', 1, 0, 0, 0, b'b', b'h', level - 1, b's']);
    }
    doubled.push(b'.');
    assert_eq!(read(&legacy(&doubled)), Ok(0));
    if cfg!(miri) {
        return;
    }
    // A tuple of a tuple of a tuple, a million deep.
    let deep = [&b")"[..], &vec![0x85; 1_000_000], b"0}."].concat();
    assert_eq!(read(&legacy(&deep)), Ok(0));
    let long = [&b"}"[..], &b"N0".repeat(2_000_000), b"."].concat();
    assert!(read(&legacy(&long)).unwrap_err().contains("too many"));
}

/// A small pickle with the maximum number of values uses memory within the bound that docs/src/pretrained.md states.
#[test]
fn pickles_of_many_values_are_bounded() {
    const MOST: isize = 400 << 20;
    let count = if cfg!(miri) { 1000 } else { 1_990_000 };
    for unit in [
        &b"}"[..],
        b"]",
        b")",
        b"}\x94",
        b"}q\0",
        b"]]a",
        b"}NNs",
        b"K\x01",
        b"((",
        b"N\x94",
        b"\x8f",
        b"cx\ny\n",
        b"(\x91",
    ] {
        let pickle = [&unit.repeat(count / unit.len()), &b"}."[..]].concat();
        let bytes = legacy(&pickle);
        let before = LIVE.get();
        PEAK.set(before);
        let _ = read(&bytes);
        let peak = PEAK.get() - before;
        assert!(peak < MOST + 16 * bytes.len() as isize, "{unit:?} took {peak} bytes");
    }
}

/// An old PyTorch file with one tensor of this view of a storage with four values.
fn view(offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let tuple = |numbers: &[u8]| {
        let numbers: Vec<u8> = numbers.iter().flat_map(|&number| [b'K', number]).collect();
        [&b"("[..], &numbers, b"t"].concat()
    };
    let pickle = [
        &b"}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0"[..],
        b"0X\x03\0\0\0cpuK\x04NtQK",
        &[offset],
        &tuple(shape),
        &tuple(strides),
        b"\x89}tRs.\x80\x02]X\x01\0\0\0",
        b"0a.\x04\0\0\0\0\0\0\0",
        &[1.0f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat(),
    ];
    let whole = legacy(&pickle.concat());
    // The empty list of storages that `legacy` adds comes too late to be read.
    whole[..whole.len() - 4].to_vec()
}

#[test]
fn views_stay_inside_of_their_storage() -> Result<()> {
    let values = |bytes: Vec<u8>| -> Result<Vec<f64>> { TensorFile::from_bytes(bytes)?.tensor("w")?.to_f64_vec() };
    assert_eq!(values(view(0, &[2, 2], &[2, 1]))?, [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(values(view(0, &[2, 2], &[1, 2]))?, [1.0, 3.0, 2.0, 4.0]);
    assert_eq!(values(view(1, &[3], &[1]))?, [2.0, 3.0, 4.0]);
    assert_eq!(values(view(3, &[1, 4], &[9, 0]))?, [4.0; 4]);
    assert!(values(view(4, &[0], &[1]))?.is_empty());
    let outside = [
        (0, &[5][..], &[1][..]),
        (1, &[2, 2], &[2, 1]),
        (4, &[1], &[1]),
        (0, &[3], &[2]),
        (0, &[255, 255], &[0, 0]),
        (0, &[2], &[1, 1]),
    ];
    for (offset, shape, strides) in outside {
        assert!(values(view(offset, shape, strides)).is_err(), "{offset} {shape:?} {strides:?}");
    }
    Ok(())
}

#[test]
fn gguf_lies_are_refused() {
    let whole = bytes("quantised.gguf");
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = whole.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        read(&changed).unwrap_err()
    };
    let find = |text: &str| whole.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    assert!(with(4, &9u32.to_le_bytes()).contains("version 9, expected 2 or 3"));
    assert!(with(8, &u64::MAX.to_le_bytes()).contains("tensors, but"));
    assert!(with(16, &(1u64 << 60).to_le_bytes()).contains("metadata entries, but"));
    let tokens = find("tokens") + "tokens".len();
    assert!(with(tokens, &99u32.to_le_bytes()).contains("unknown type 99"));
    assert!(with(tokens + 8, &(1u64 << 61).to_le_bytes()).contains("values, but"));
    let tensor = find("Q8_0") + "Q8_0".len();
    assert!(with(tensor, &7u32.to_le_bytes()).contains("7 dimensions"));
    assert!(with(tensor + 4, &63u64.to_le_bytes()).contains("multiple of the block size 32"));
    assert!(with(tensor + 12, &(1u64 << 40).to_le_bytes()).contains("`Q8_0`"));
    assert!(with(tensor + 20, &16u32.to_le_bytes()).contains("is IQ2_XXS"));
    assert!(with(tensor + 24, &(u64::MAX - 31).to_le_bytes()).contains("the file has"));
}

#[test]
fn an_index_is_held_to_its_word() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("xt-index-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let part = |name: &str| fs::copy(file(name), folder.join(name)).unwrap();
    part("part-1.safetensors");
    part("part-2.safetensors");
    let index = fs::read_to_string(file("parts.safetensors.index.json")).unwrap();
    let open = |text: &str| {
        let path = folder.join("model.safetensors.index.json");
        fs::write(&path, text).unwrap();
        // A folder is opened by what is in it.
        TensorFile::open(&folder).map(|file| file.names().count()).map_err(|error| error.to_string())
    };
    assert_eq!(open(&index), Ok(14));
    // A tensor is where it is, and a place in the folder may be written as one likes.
    assert_eq!(open(&index.replacen("part-2", "part-1", 1)), Ok(14));
    assert_eq!(open(&index.replace("part-2", "./part-2")), Ok(14));
    assert_eq!(open(&index.replacen("\"bool\": \"part", "\"bool\": \"./part", 1)).map_err(drop), Ok(14));
    // One that is nowhere is missing where it is requested.
    assert_eq!(open(&index.replace("\"bool\"", "\"bowl\"")), Ok(14));
    let whole = TensorFile::open(&folder)?;
    assert_eq!(whole.unreadable().map(|(name, _)| name).collect::<Vec<_>>(), ["bowl"]);
    for refused in [whole.tensor("bowl").map(drop), whole.tensors().map(drop)] {
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("`bowl`") && refused.contains("`part-1.safetensors`"), "{refused}");
    }
    let cases = [
        ("another folder", index.replacen("part-2", "../part-2", 1), "same folder"),
        ("a way out and back", index.replacen("part-2", "below/../../part-2", 1), "same folder"),
        ("the root", index.replacen("part-2", "/part-2", 1), "same folder"),
        ("a file that is not there", index.replace("part-2", "part-3"), "part-3"),
        ("no JSON", "{".into(), "not the index"),
        ("no map", "{}".into(), "weight_map"),
    ];
    for (what, text, expected) in cases {
        let error = open(&text).expect_err(what);
        assert!(error.contains(expected), "{what}: {error}");
    }
    fs::remove_dir_all(&folder).unwrap();
    let missing = TensorFile::open(&folder).unwrap_err().to_string();
    assert!(missing.contains("No such file"), "{missing}");
    Ok(())
}
