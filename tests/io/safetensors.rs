//! Safetensors files: a round trip, the bytes of the format, and typed errors for hostile files.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use proptest::prelude::*;
use x_transformers::{
    DType, Device, Error, ErrorKind, Philox, Result, Tensor,
    io::{read_safetensors, write_atomically, write_safetensors},
};

/// A folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xt-safetensors-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A file from its header and values.
fn raw(header: &str, values: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), values].concat()
}

/// Reads a file of these bytes; `Err` has the message.
fn read(folder: &Folder, bytes: &[u8]) -> std::result::Result<BTreeMap<String, Tensor>, String> {
    let path = folder.at("file.safetensors");
    fs::write(&path, bytes).unwrap();
    read_safetensors(&path).map_err(|error| message(&error, &path))
}

/// The message of an error that must be about this file.
fn message(error: &Error, path: &Path) -> String {
    assert!(
        matches!(error.kind(), ErrorKind::File { path: p, .. } | ErrorKind::Io { path: p, .. } if p == path),
        "{error:?}"
    );
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    error.to_string()
}

fn sample() -> Result<BTreeMap<String, Tensor>> {
    let random = Philox::new(3, 0);
    let normal = |i: usize| random.normal(i as u64);
    let cpu = Device::Cpu;
    let tensors = [
        ("b16", Tensor::generate([3, 5], DType::BF16, &cpu, normal)?),
        ("double", Tensor::generate([2, 3, 4], DType::F64, &cpu, normal)?),
        ("empty", Tensor::zeros([0, 7], DType::F32, &cpu)?),
        ("half", Tensor::generate([9], DType::F16, &cpu, normal)?),
        ("mask", Tensor::from_slice(&[true, false, true], [3], &cpu)?),
        ("scalar", Tensor::scalar(-0.0f32, &cpu)?),
        ("tokens", Tensor::from_slice(&[i64::MIN, 0, i64::MAX], [3], &cpu)?),
        ("transposed", Tensor::generate([4, 6], DType::F32, &cpu, normal)?.transpose(0, 1)?),
    ];
    Ok(tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect())
}

#[test]
fn safetensors_round_trip_is_exact() -> Result<()> {
    let folder = Folder::new("round");
    let path = folder.at("a.safetensors");
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string()), ("a \"b\"".into(), "ü\n".into())]);
    let tensors = sample()?;
    write_safetensors(&path, &tensors, &metadata)?;
    let read = read_safetensors(&path)?;
    assert_eq!(read.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
    for (name, tensor) in &tensors {
        assert_eq!((tensor.shape(), tensor.dtype()), (read[name].shape(), read[name].dtype()), "{name}");
        let bits =
            |tensor: &Tensor| -> Result<Vec<u64>> { Ok(tensor.to_f64_vec()?.into_iter().map(f64::to_bits).collect()) };
        assert_eq!(bits(tensor)?, bits(&read[name])?, "{name}");
    }
    // The same tensors give the same bytes, and no other file is left behind.
    let first = fs::read(&path).unwrap();
    write_safetensors(&path, &read, &metadata)?;
    assert_eq!(first, fs::read(&path).unwrap());
    assert_eq!(folder.names(), ["a.safetensors"]);
    // Values are aligned to their element, as the format's own writer does it.
    let parsed = safetensors::SafeTensors::deserialize(&first).unwrap();
    assert_eq!(parsed.len(), tensors.len());
    let (length, header) = safetensors::SafeTensors::read_metadata(&first).unwrap();
    assert_eq!(length % 8, 0);
    for (name, info) in header.tensors() {
        assert_eq!(info.data_offsets.0 % tensors[&name].dtype().size(), 0, "{name}");
    }
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    Ok(())
}

#[test]
fn safetensors_integers_are_widened() {
    let folder = Folder::new("widen");
    let header = r#"{"i":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},"u":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}"#;
    let values = [(-5i32).to_le_bytes(), i32::MAX.to_le_bytes()].concat();
    let read = read(&folder, &raw(header, &[values, vec![0, 7, 255]].concat())).unwrap();
    assert_eq!(read["i"].to_vec::<i64>().unwrap(), [-5, i32::MAX as i64]);
    assert_eq!(read["u"].to_vec::<i64>().unwrap(), [0, 7, 255]);
    // More than one block.
    let header = r#"{"u":{"dtype":"U8","shape":[10000],"data_offsets":[0,10000]}}"#;
    let bytes: Vec<u8> = (0..10_000).map(|i| (i % 251) as u8).collect();
    let expected: Vec<i64> = bytes.iter().map(|&byte| byte as i64).collect();
    assert_eq!(self::read(&folder, &raw(header, &bytes)).unwrap()["u"].to_vec::<i64>().unwrap(), expected);
}

#[test]
fn safetensors_inconsistent_files_are_refused() {
    let folder = Folder::new("lies");
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let pair = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
        )
    };
    let cases = [
        ("past the end", one("F32", "[4]", "[0,16]"), 8, "describes 16 bytes"),
        ("bytes behind the last tensor", one("F32", "[1]", "[0,4]"), 8, "describes 4 bytes"),
        ("overlap", pair("[0,8]", "[4,12]"), 12, "offset"),
        ("the same bytes twice", pair("[0,8]", "[0,8]"), 8, "offset"),
        ("a gap", pair("[0,8]", "[12,20]"), 20, "offset"),
        ("end before start", one("F32", "[1]", "[4,0]"), 4, "offset"),
        ("negative offset", one("F32", "[1]", "[-4,0]"), 4, "`x`"),
        ("shape says more", one("F32", "[3]", "[0,8]"), 8, "shape"),
        ("dtype says more", one("F64", "[2]", "[0,8]"), 8, "shape"),
        ("product overflows", one("F32", "[4294967296,4294967296,4]", "[0,8]"), 8, "overflow"),
        ("empty, but too large to address", one("F32", "[0,4294967296,4294967296]", "[0,0]"), 0, "`x`"),
        ("negative dimension", one("F32", "[-2]", "[0,8]"), 8, "`x`"),
        ("seven dimensions", one("F32", "[1,1,1,1,1,1,2]", "[0,8]"), 8, "at most 6"),
        ("unknown dtype", one("F12", "[2]", "[0,8]"), 8, "`x`"),
        ("dtype that tensors do not have", one("F4", "[16]", "[0,8]"), 8, "`x` is F4"),
        ("complex", one("C64", "[1]", "[0,8]"), 8, "`x` is C64"),
        ("no dtype", r#"{"x":{"shape":[2],"data_offsets":[0,8]}}"#.into(), 8, "dtype"),
        ("an array of bytes that are no bools", one("BOOL", "[8]", "[0,8]"), 8, "0 or 1"),
        (
            "name twice",
            format!("{}{}", &pair("[0,8]", "[8,16]")[..1], pair("[0,8]", "[8,16]")[1..].replace("\"b\"", "\"a\"")),
            16,
            "`a` occurs twice",
        ),
        ("metadata twice", r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "occurs twice"),
        ("metadata that is no text", r#"{"__metadata__":{"a":1}}"#.into(), 0, "header"),
        ("not an object", "[1,2]".into(), 0, "header"),
        ("not JSON", "hello there".into(), 0, "header"),
        ("half of JSON", r#"{"x":{"dtype":"F32","#.into(), 0, "header"),
        ("deep nesting", "[".repeat(100_000), 0, "header"),
        ("deep nesting in an unknown field", format!(r#"{{"x":{{"y":{}"#, "[".repeat(100_000)), 0, "header"),
    ];
    for (what, header, bytes, expected) in cases {
        let error = read(&folder, &raw(&header, &vec![9; bytes])).expect_err(what);
        assert!(error.contains(expected), "{what}: {error}");
    }
    // Not UTF-8.
    let mut bytes = raw(&one("F32", "[2]", "[0,8]"), &[0; 8]);
    bytes[10] = 0xFF;
    assert!(read(&folder, &bytes).is_err());
}

#[test]
fn safetensors_every_truncation_is_refused() -> Result<()> {
    let folder = Folder::new("cut");
    let path = folder.at("whole.safetensors");
    write_safetensors(&path, &sample()?, &BTreeMap::new())?;
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        assert!(read(&folder, &whole[..length]).is_err(), "{length} of {} bytes", whole.len());
    }
    Ok(())
}

#[test]
fn safetensors_huge_header_takes_no_memory() {
    let folder = Folder::new("huge");
    for length in [u64::MAX, u64::MAX - 7, 1 << 40, 100_000_001] {
        let error = read(&folder, &[&length.to_le_bytes()[..], b"{}"].concat()).unwrap_err();
        assert!(error.contains("header"), "{error}");
    }
    // Within the format's limit but longer than the file.
    let error = read(&folder, &[&99_999_999u64.to_le_bytes()[..], b"{}"].concat()).unwrap_err();
    assert!(error.contains("truncated"), "{error}");
}

#[test]
fn safetensors_other_than_regular_files_are_refused() {
    let folder = Folder::new("nofile");
    let missing = folder.at("missing");
    assert!(matches!(read_safetensors(&missing).unwrap_err().kind(), ErrorKind::Io { path, .. } if *path == missing));
    assert!(message(&read_safetensors(&folder.0).unwrap_err(), &folder.0).contains("not a regular file"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let zero = Path::new("/dev/zero");
        assert!(message(&read_safetensors(zero).unwrap_err(), zero).contains("not a regular file"));
        let locked = folder.at("locked");
        fs::write(&locked, raw("{}", &[])).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).unwrap();
        // The administrator may read it all the same.
        match (fs::File::open(&locked), read_safetensors(&locked)) {
            (Ok(_), read) => assert!(read.unwrap().is_empty()),
            (Err(_), read) => {
                assert!(message(&read.unwrap_err(), &locked).contains("denied"));
            }
        }
    }
}

#[test]
fn safetensors_reserved_name_is_refused() -> Result<()> {
    let folder = Folder::new("reserved");
    let path = folder.at("a");
    let tensors = BTreeMap::from([("__metadata__".to_string(), Tensor::scalar(1.0f32, &Device::Cpu)?)]);
    assert!(write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap_err().to_string().contains("__metadata__"));
    assert!(folder.names().is_empty());
    Ok(())
}

/// The bytes of a file without fault.
static VALID: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = Folder::new("valid");
    write_safetensors(folder.at("a"), &sample().unwrap(), &BTreeMap::new()).unwrap();
    fs::read(folder.at("a")).unwrap()
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Reading any damaged file returns tensors that its bytes can hold, or a typed error.
    #[test]
    fn safetensors_mutations_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        digits in prop::option::of((any::<prop::sample::Index>(), prop::sample::select(b"0123456789-e.\"[]{},:".to_vec()))),
        cut in prop::option::of(any::<prop::sample::Index>()),
        insert in prop::option::of((any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..20))),
    ) {
        let folder = Folder::new("mutations");
        let mut bytes = VALID.clone();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        if let Some((at, digit)) = digits {
            // Most of a header is digits: change them more often than at random.
            bytes[8 + at.index(header)] = digit;
        } else {
            for (at, value) in changes {
                let length = bytes.len();
                bytes[at.index(length)] = value;
            }
        }
        if let Some((at, added)) = insert {
            let at = at.index(bytes.len());
            bytes.splice(at..at, added);
        }
        if let Some(at) = cut {
            bytes.truncate(at.index(bytes.len()));
        }
        if let Ok(tensors) = read(&folder, &bytes) {
            let read: usize = tensors.values().map(|tensor| tensor.numel()).sum();
            prop_assert!(read <= bytes.len());
        }
    }
}

#[test]
fn atomic_write_keeps_the_old_file_when_writing_fails() {
    let folder = Folder::new("atomic");
    let path = folder.at("file");
    write_atomically(&path, |file| file.write_all(b"old")).unwrap();
    // Fails after different amounts: before, within and after the buffer.
    for length in [0usize, 1, 3_000_000] {
        let error = write_atomically(&path, |file| {
            file.write_all(&vec![7; length])?;
            Err(std::io::Error::new(std::io::ErrorKind::StorageFull, "no space left"))
        })
        .unwrap_err();
        assert!(message(&error, &path).contains("no space left"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(folder.names(), ["file"]);
    }
    // A panic of the writer removes the temporary file as well.
    let panicked = std::panic::catch_unwind(|| write_atomically(&path, |_| panic!("on purpose")));
    assert!(panicked.is_err());
    assert_eq!(folder.names(), ["file"]);
    write_atomically(&path, |file| file.write_all(b"new")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn atomic_write_to_odd_places() {
    let folder = Folder::new("odd");
    // A folder, a name without one, and a place that does not exist.
    assert!(message(&write_atomically(&folder.0, |_| Ok(())).unwrap_err(), &folder.0).contains("folder"));
    let missing = folder.at("no/such/place");
    assert!(
        matches!(write_atomically(&missing, |_| Ok(())).unwrap_err().kind(), ErrorKind::Io { path, .. } if *path == missing)
    );
    assert!(write_atomically("", |_| Ok(())).is_err());
    // A name of the greatest length.
    let long = folder.at(&"n".repeat(255));
    write_atomically(&long, |file| file.write_all(b"x")).unwrap();
    fs::remove_file(&long).unwrap();
    #[cfg(unix)]
    {
        // A link stays a link.
        let (link, target) = (folder.at("link"), folder.at("target"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink("target", &link).unwrap();
        write_atomically(&link, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        // A device with no space: the error comes through, and the device is still one.
        let full = Path::new("/dev/full");
        if full.exists() {
            let error = write_atomically(full, |file| file.write_all(b"x")).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
            use std::os::unix::fs::FileTypeExt;
            assert!(fs::metadata(full).unwrap().file_type().is_char_device());
        }
    }
}
