//! Weight files that change, shrink or were never files: an error that names the file, or the contents at the time it
//! was opened; never a signal, never a value that nobody wrote.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use x_transformers::{
    DType, Device, ErrorKind, Result, Tensor,
    io::{TensorFile, read_safetensors, write_safetensors},
    pretrained::Pretrained,
};

/// A folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xt-changing-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A safetensors file with a tensor `w` of `elements` equal values.
fn write(path: &Path, elements: usize, value: f64) -> Result<()> {
    let w = Tensor::full([elements], value, DType::F32, &Device::Cpu)?;
    write_safetensors(path, &BTreeMap::from([("w".to_string(), w)]), &BTreeMap::new())
}

/// One file of each format, in a folder.
fn formats(folder: &Folder) -> Vec<PathBuf> {
    let files = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    let names = ["archive.pt", "legacy.pt", "quantised.gguf", "quantised.safetensors"];
    let copy = |name: &str| {
        let path = folder.at(name);
        fs::copy(files.join(name), &path).unwrap();
        path
    };
    names.into_iter().map(copy).collect()
}

/// The message of an error about a file.
fn message<T: std::fmt::Debug>(result: Result<T>, path: &Path) -> String {
    let error = result.expect_err("the file has changed");
    assert!(
        matches!(error.kind(), ErrorKind::File { path: p, .. } | ErrorKind::Io { path: p, .. } if p == path),
        "{error:?}"
    );
    error.to_string()
}

#[test]
fn a_file_that_shrinks_is_an_error_that_names_it() -> Result<()> {
    let folder = Folder::new("shrinks");
    for path in formats(&folder) {
        let whole = fs::read(&path).unwrap();
        for length in [0, 16, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole).unwrap();
            let file = TensorFile::open(&path)?;
            OpenOptions::new().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
            for name in file.names() {
                let text = message(file.tensor(name), &path);
                assert!(text.contains("is shorter now"), "{text}");
            }
            message(file.tensors(), &path);
        }
    }
    // As much as `torch.save` over it does at first, of a tensor of many pages.
    let path = folder.at("large.safetensors");
    write(&path, 1 << 20, 1.0)?;
    let file = TensorFile::open(&path)?;
    OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    message(file.tensor("w"), &path);
    // An older handle keeps failing, even once the file has its bytes again; a new one reads them.
    write(&folder.at("again"), 1 << 20, 2.0)?;
    fs::write(&path, fs::read(folder.at("again")).unwrap()).unwrap();
    message(file.tensor("w"), &path);
    assert_eq!(TensorFile::open(&path)?.tensor("w")?.to_vec::<f32>()?[7], 2.0);
    Ok(())
}

#[test]
fn a_file_that_is_rewritten_is_an_error_that_names_it() -> Result<()> {
    let folder = Folder::new("rewritten");
    for path in formats(&folder) {
        // Trying every byte of the file would take long; the first ones hold the names and counts.
        for at in [0u64, 9, 40, 200] {
            let file = TensorFile::open(&path)?;
            let name = file.names().next().unwrap().to_string();
            let _ = file.tensor(&name)?;
            let mut writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let byte = fs::read(&path).unwrap()[at as usize];
            writer.seek(SeekFrom::Start(at)).unwrap();
            writer.write_all(&[byte]).unwrap();
            let text = message(file.tensor(&name), &path);
            assert!(text.contains("changed while it was open"), "{text}");
        }
        // Longer, as if somebody had appended to it.
        let file = TensorFile::open(&path)?;
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&[0; 8]).unwrap();
        message(file.tensors(), &path);
    }
    Ok(())
}

/// While a thread rewrites the file repeatedly, readers get the values of one version, or an error.
#[test]
fn reads_during_writes_give_one_version_or_an_error() -> Result<()> {
    let folder = Folder::new("during");
    let path = folder.at("w.safetensors");
    let versions = [1.0, 2.0].map(|value| {
        write(&path, 1 << 18, value).unwrap();
        fs::read(&path).unwrap()
    });
    let done = AtomicBool::new(false);
    let (mut errors, mut values) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
            for round in 0.. {
                for part in versions[round % 2].chunks(1 << 16).enumerate() {
                    writer.seek(SeekFrom::Start((part.0 << 16) as u64)).unwrap();
                    writer.write_all(part.1).unwrap();
                    // On its way long enough to be met.
                    std::thread::sleep(std::time::Duration::from_micros(100));
                }
                if done.load(Ordering::Relaxed) {
                    break;
                }
                if round % 8 == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(60));
                }
            }
        });
        for _ in 0..40 {
            let read = TensorFile::open(&path).and_then(|file| file.tensor("w"));
            let again = read_safetensors(&path).map(|mut tensors| tensors.remove("w").unwrap());
            for read in [read, again] {
                match read {
                    Ok(tensor) => {
                        let all = tensor.to_vec::<f32>().unwrap();
                        // A file that was torn before it was opened is not detected: two values at most.
                        assert!(all.iter().all(|&value| value == 1.0 || value == 2.0));
                        values += 1;
                    }
                    Err(error) => {
                        assert!(error.to_string().contains("w.safetensors"), "{error}");
                        errors += 1;
                    }
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(errors + values, 80);
    assert!(errors > 0, "no read met a write");
    Ok(())
}

#[test]
fn a_file_that_is_replaced_is_read_as_it_was() -> Result<()> {
    let folder = Folder::new("replaced");
    let path = folder.at("w.safetensors");
    write(&path, 1000, 1.0)?;
    let file = TensorFile::open(&path)?;
    // `write_safetensors` writes another file and renames it.
    write(&path, 2000, 2.0)?;
    assert_eq!(file.tensor("w")?.to_vec::<f32>()?, [1.0; 1000]);
    fs::remove_file(&path).unwrap();
    assert_eq!(file.tensor("w")?.to_vec::<f32>()?, [1.0; 1000]);
    Ok(())
}

#[cfg(unix)]
#[test]
fn what_is_not_a_regular_file_is_refused() -> Result<()> {
    let folder = Folder::new("special");
    let pipe = folder.at("pipe.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    let device = folder.at("device.safetensors");
    std::os::unix::fs::symlink("/dev/zero", &device).unwrap();
    let index = folder.at("zero.safetensors.index.json");
    std::os::unix::fs::symlink("/dev/zero", &index).unwrap();
    for path in [&pipe, &device, &index, &PathBuf::from("/dev/null")] {
        let text = message(TensorFile::open(path), path);
        assert!(text.contains("is not a regular file"), "{text}");
        message(read_safetensors(path), path);
    }
    // A shard of an index that is one, and a configuration.
    fs::write(folder.at("pipe.index.json"), r#"{"weight_map":{"w":"pipe.safetensors"}}"#).unwrap();
    message(TensorFile::open(folder.at("pipe.index.json")), &pipe);
    write(&folder.at("model.safetensors"), 4, 1.0)?;
    std::os::unix::fs::symlink("/dev/zero", folder.at("config.json")).unwrap();
    message(Pretrained::open(&folder.0), &folder.at("config.json"));
    Ok(())
}

/// GGUF with one pair of metadata, a list of `count` texts.
fn gguf(count: usize) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend([0u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
    file.extend(text("tokens"));
    file.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
    file.extend((count as u64).to_le_bytes());
    (0..count).for_each(|index| file.extend(text(&format!("token {index}"))));
    file
}

/// Headers longer than the first read.
#[test]
fn long_headers_are_read() -> Result<()> {
    let folder = Folder::new("long");
    let path = folder.at("vocabulary.gguf");
    fs::write(&path, gguf(400_000)).unwrap();
    let file = TensorFile::open(&path)?;
    let tokens = file.metadata()["tokens"].as_list().unwrap();
    assert_eq!((tokens.len(), tokens[399_999].as_str()), (400_000, Some("token 399999")));
    // A legacy pickle of four megabytes in front of an empty state dict.
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    let dropped = [&b"X\xe8\x03\0\0"[..], &[b'x'; 1000], b"0"].concat().repeat(4000);
    let long = [&magic[..], &dropped, b"}.\x80\x02]."];
    fs::write(folder.at("long.pt"), long.concat()).unwrap();
    assert_eq!(TensorFile::open(folder.at("long.pt"))?.names().count(), 0);
    Ok(())
}

/// Headers that claim hundreds of megabytes are an error before any memory is allocated: the file is mostly a hole.
#[test]
fn huge_headers_are_refused() {
    let folder = Folder::new("huge");
    let sparse = |name: &str, parts: &[(u64, &[u8])], length: u64| {
        let path = folder.at(name);
        let mut file = File::create(&path).unwrap();
        for (at, bytes) in parts {
            file.seek(SeekFrom::Start(*at)).unwrap();
            file.write_all(bytes).unwrap();
        }
        file.set_len(length).unwrap();
        let text = message(TensorFile::open(&path), &path);
        assert!(text.contains("100000000"), "{text}");
    };
    let length = 400_000_000u32;
    let mut beginning = gguf(0)[..32].to_vec();
    beginning[24..32].copy_from_slice(&u64::from(length).to_le_bytes());
    sparse("name.gguf", &[(0, &beginning[..])], 500_000_000);
    let mut tensors = gguf(0);
    tensors[8..16].copy_from_slice(&10_000_000u64.to_le_bytes());
    let path = folder.at("tensors.gguf");
    fs::write(&path, &tensors).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(500_000_000).unwrap();
    assert!(message(TensorFile::open(&path), &path).contains("at most 100000"));
    sparse("header.safetensors", &[(0, &u64::from(length).to_le_bytes()[..])], 500_000_000);
    let text = [&b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.X"[..], &length.to_le_bytes()].concat();
    sparse("text.pt", &[(0, &text[..])], 500_000_000);
    // An archive with a pickle of this size.
    let name = b"archive/data.pkl";
    let fields = [&[0; 12][..], &length.to_le_bytes(), &length.to_le_bytes(), &[16, 0, 0, 0]].concat();
    let local = [&b"PK\x03\x04\x14\0"[..], &fields, name].concat();
    let entry = [&b"PK\x01\x02\x14\0\x14\0"[..], &fields, &[0; 14], name].concat();
    let end = [
        &b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..],
        &(entry.len() as u32).to_le_bytes(),
        &450_000_000u32.to_le_bytes(),
        &[0; 2],
    ];
    let directory = [entry, end.concat()].concat();
    sparse("pickle.pt", &[(0, &local[..]), (450_000_000, &directory[..])], 450_000_000 + directory.len() as u64);
}
