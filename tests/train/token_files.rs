//! Token files of every format, as sources of windows.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use x_transformers::{
    Error, ErrorKind, Result,
    train::{
        BatchRequest, BatchSource, ByteText, TokenBatch, TokenData, TokenFile, TokenFormat, TokenWriter, TrainOptions,
    },
};

use super::{
    Folder,
    sources::{CHILD, END, VOCABULARY, options, request, rows, tokens, write},
};
use crate::common::name_of;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files/tokens").join(name)
}

fn read(file: &TokenFile, start: u64, count: usize, num_tokens: usize) -> Result<Vec<i64>> {
    let mut row = vec![-1; count];
    file.read(start, &mut row, num_tokens)?;
    Ok(row)
}

/// The files are those that numpy writes with the layouts of nanoGPT and llm.c; the lists are in tests/files/make_tokens.py.
#[test]
fn formats_of_other_programs() -> Result<()> {
    let gpt2 = [50256, 464, 3797, 3332, 319, 262, 2603, 13, 50256, 0, 65535];
    let llama3 = [128000, 791, 8415, 7731, 389, 279, 5634, 13, 0, 70000];
    for (name, format, expected) in [
        ("nano.bin", TokenFormat::NanoGpt, &gpt2[..]),
        ("gpt2.bin", TokenFormat::LlmC, &gpt2),
        ("llama3.bin", TokenFormat::LlmC, &llama3),
    ] {
        let file = TokenFile::open(file(name))?;
        assert_eq!((file.format(), file.len()), (format, expected.len() as u64), "{name}");
        assert_eq!((file.num_tokens(), file.end_of_text(), file.text_bytes()), (None, None, None));
        assert_eq!(read(&file, 0, expected.len(), 1 << 20)?, expected);
        assert_eq!(read(&file, 3, 4, 1 << 20)?, expected[3..7]);
        assert!(read(&file, 0, 0, 0)?.is_empty());
        // The byte of the token that is too large, and what lies past the end.
        let error = read(&file, 1, 8, 8000).map(drop);
        if name == "nano.bin" {
            let message = error.unwrap_err().to_string();
            assert!(message.contains("token 50256 at byte 16") && message.contains("8000 tokens"), "{message}");
        }
        for (start, count) in [(8, 10), (u64::MAX, 1), (1 << 40, 1)] {
            let message = read(&file, start, count, 1 << 20).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(&format!("token {start}")), "{message}");
        }
    }
    Ok(())
}

#[test]
fn written_files_are_read_back() -> Result<()> {
    let folder = Folder::new("written");
    for num_tokens in [2usize, 1 << 16, (1 << 16) + 1, 1 << 32] {
        let path = folder.0.join("file.tokens");
        let all = [0, 1, num_tokens as i64 - 1, num_tokens as i64 / 2, 0];
        write(&path, num_tokens, &all);
        let width = if num_tokens > 1 << 16 { 4 } else { 2 };
        assert_eq!(fs::metadata(&path).unwrap().len(), 64 + 5 * width);
        let file = TokenFile::open(&path)?;
        assert_eq!((file.format(), file.len()), (TokenFormat::Tokens, 5));
        assert_eq!(
            (file.num_tokens(), file.end_of_text(), file.text_bytes()),
            (Some(num_tokens as u64), Some(END), Some(15))
        );
        assert_eq!(read(&file, 0, 5, num_tokens)?, all);
        // The documented header.
        let bytes = fs::read(&path).unwrap();
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((&bytes[..8], number(8), number(16)), (&b"XTTOKENS"[..], 1 | width << 32, 5));
        assert_eq!((number(24), number(32), number(40)), (num_tokens as u64, 0, 15));
        let hash = bytes[64..]
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(number(48), hash);
        assert!(bytes[56..64].iter().all(|&byte| byte == 0));
    }
    // Nothing is there before the end, and nothing is left of a writer that is dropped or refuses a token.
    let path = folder.0.join("other.tokens");
    let mut writer = TokenWriter::create(&path, 10, None)?;
    for token in [10, -1, i64::MAX] {
        let message = writer.write(&[1, token]).unwrap_err().to_string();
        assert!(message.contains(&token.to_string()) && message.contains("other.tokens"), "{message}");
    }
    assert!(writer.is_empty() && !path.exists());
    drop(writer);
    let left: Vec<_> = fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["file.tokens"]);
    for (num_tokens, end) in [((1 << 32) + 1, None), (5, Some(5)), (5, Some(-1))] {
        assert!(matches!(
            TokenWriter::create(&path, num_tokens, end).map(drop).map_err(Error::into_kind),
            Err(ErrorKind::Option { .. })
        ));
    }
    assert!(TokenWriter::create(folder.0.join("none/file.tokens"), 5, None).is_err());
    Ok(())
}

#[test]
fn damaged_files_are_refused() {
    let folder = Folder::new("damaged-tokens");
    let written = folder.0.join("written.tokens");
    write(&written, 100, &[1, 2, 3]);
    let tokens = fs::read(&written).unwrap();
    let llmc = fs::read(file("gpt2.bin")).unwrap();
    let with = |bytes: &[u8], at: usize, byte: u8| {
        let mut bytes = bytes.to_vec();
        bytes[at] = byte;
        bytes
    };
    let cases: [(&str, Vec<u8>, &[&str]); 17] = [
        ("empty.tokens", Vec::new(), &["XTTOKENS"]),
        ("magic.tokens", with(&tokens, 0, b'Y'), &["XTTOKENS"]),
        ("head.tokens", tokens[..40].to_vec(), &["truncated", "40 bytes"]),
        ("short.tokens", tokens[..69].to_vec(), &["truncated", "3 tokens", "70 bytes", "has 69 bytes"]),
        ("long.tokens", [&tokens[..], b"x"].concat(), &["too long", "70 bytes", "has 71 bytes"]),
        ("version.tokens", with(&tokens, 8, 2), &["version 2", "expected 1"]),
        ("width.tokens", with(&tokens, 12, 3), &["3 bytes", "2 or 4"]),
        ("count.tokens", with(&tokens, 23, 0xff), &["truncated"]),
        ("end.tokens", with(&tokens, 32, 100), &["end of text 100", "vocabulary of 100"]),
        // The content decides, not the name.
        ("named.bin", with(&tokens, 8, 2), &["version 2"]),
        ("short.bin", llmc[..llmc.len() - 1].to_vec(), &["truncated", "11 tokens", "1046 bytes", "has 1045 bytes"]),
        ("head.bin", llmc[..500].to_vec(), &["truncated"]),
        ("long.bin", [&llmc[..], b"ab"].concat(), &["too long"]),
        ("version.bin", with(&llmc, 4, 7), &["version 7", "expected 1"]),
        ("negative.bin", with(&llmc, 11, 0xff), &["truncated"]),
        ("odd.bin", vec![1, 2, 3], &["3 bytes", "16-bit"]),
        ("text.txt", b"some text".to_vec(), &[".tokens or .bin"]),
    ];
    for (name, bytes, expected) in cases {
        let path = folder.0.join(name);
        fs::write(&path, bytes).unwrap();
        match TokenFile::open(&path) {
            Err(error) => {
                let message = error.to_string();
                assert!(matches!(error.kind(), ErrorKind::File { .. }), "{message}");
                assert!(message.contains(name) && expected.iter().all(|part| message.contains(part)), "{message}");
            }
            Ok(file) => panic!("{file:?}"),
        }
    }
    assert!(TokenFile::open(&folder.0).is_err() && TokenFile::open(folder.0.join("none.bin")).is_err());
}

#[test]
fn token_data_splits_and_joins_files() -> Result<()> {
    let folder = Folder::new("joined");
    let all = tokens(1, 1003);
    let paths = ["a.tokens", "b.tokens", "c.tokens"].map(|name| folder.0.join(name));
    for (path, part) in paths.iter().zip([&all[..10], &all[10..950], &all[950..]]) {
        write(path, VOCABULARY, part);
    }
    let data = TokenData::open(&paths)?;
    assert_eq!((data.train_len(), data.validation_len()), (902, 101));
    assert_eq!((data.num_tokens(), data.end_of_text()), (Some(128), Some(END)));
    assert_eq!(data.bytes_per_token(), Some(3.0));
    let options = TrainOptions { batch_size: 500, ..options(1) };
    let batch = data.batch(&request(&options, 0, 0))?;
    assert!(batch.documents.is_none());
    let parts: BTreeSet<&[i64]> = all[..902].windows(25).collect();
    assert!(rows(&batch).iter().all(|row| parts.contains(&row[..])));
    // Both ends of the training part are among the windows.
    let found: BTreeSet<Vec<i64>> = (0..40)
        .map(|step| Ok(rows(&data.batch(&request(&options, step, 0))?)))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect();
    assert!(found.contains(&all[..25]) && found.contains(&all[877..902]));
    let validation: Vec<Vec<i64>> = data.validation_batches(&request(&options, 0, 0))?.iter().flat_map(rows).collect();
    assert_eq!(validation.len(), 64);
    assert!(validation[0] == all[902..927] && validation[63] == all[978..]);

    // The same tokens in other files train alike; a validation of its own is used.
    let one = folder.0.join("all.tokens");
    write(&one, VOCABULARY, &all);
    assert_eq!(
        rows(&TokenData::open(&[&one])?.batch(&request(&options, 3, 1))?),
        rows(&data.batch(&request(&options, 3, 1))?)
    );
    let apart = TokenData::with_validation(&paths[1..2], &paths[2..])?;
    assert_eq!((apart.train_len(), apart.validation_len()), (940, 53));
    assert_ne!(apart.print()?, data.print()?);
    Ok(())
}

#[test]
fn token_data_refuses_what_does_not_fit() -> Result<()> {
    let folder = Folder::new("unfit-tokens");
    let [path, other, raw] = ["a.tokens", "b.tokens", "c.bin"].map(|name| folder.0.join(name));
    write(&path, VOCABULARY, &tokens(1, 1000));
    write(&other, VOCABULARY + 1, &tokens(1, 1000));
    let numbers = |tokens: Vec<i64>| tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect::<Vec<u8>>();
    fs::write(&raw, numbers((0..1000).map(|at| if at == 150 { 128 } else { at % 128 }).collect())).unwrap();
    let refused = |source: &dyn BatchSource<Batch = TokenBatch>, request: &BatchRequest| {
        source.check(request).unwrap_err().to_string()
    };
    let fine = options(1);
    let message = TokenData::open(&[&path, &other]).unwrap_err().to_string();
    assert!(message.contains("b.tokens") && message.contains("129") && message.contains("128"), "{message}");
    let message = refused(&TokenData::open(&[&other])?, &request(&fine, 0, 0));
    assert!(message.contains("b.tokens") && message.contains("129") && message.contains("num_tokens"), "{message}");
    let long = TrainOptions { seq_len: 100, ..fine.clone() };
    let message = refused(&TokenData::open(&[&path])?, &request(&long, 0, 0));
    assert!(message.contains("1000 tokens are too few for windows of 101"), "{message}");
    // A vocabulary that is larger than that of the file is fine: tables are often padded.
    TokenData::open(&[&path])?.check(&fine.request(0, 0, 256))?;
    // Without a header the tokens are checked as they are read.
    let data = TokenData::open(&[&raw])?;
    let all = TrainOptions { batch_size: 200, ..fine.clone() };
    let message = data.batch(&request(&all, 0, 0)).unwrap_err().to_string();
    assert!(message.contains("c.bin") && message.contains("token 128 at byte 300"), "{message}");
    let bordered = TrainOptions { document_mask: true, ..fine.clone() };
    let message = refused(&data, &request(&bordered, 0, 0));
    assert!(message.contains("document_mask"), "{message}");
    assert!(data.with_end_of_text(END).check(&request(&bordered, 0, 0)).is_ok());
    assert!(TokenData::open::<PathBuf>(&[]).is_err());

    // A file that is written to while it is open.
    let data = TokenData::open(&[&path])?;
    data.batch(&request(&fine, 0, 0))?;
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 2]).unwrap();
    let message = data.batch(&request(&fine, 0, 0)).unwrap_err().to_string();
    assert!(message.contains("a.tokens") && message.contains("shorter"), "{message}");
    Ok(())
}

#[test]
fn shuffled_windows_come_once_an_epoch() -> Result<()> {
    let folder = Folder::new("shuffled");
    let path = folder.0.join("all.tokens");
    write(&path, 2000, &(0..1200).collect::<Vec<_>>());
    let data = TokenData::open(&[&path])?;
    // 1080 tokens to train on: 44 windows of 24, the last token of which is the first of the next.
    let options = TrainOptions { shuffle: true, ..options(1) };
    let ask = |step, micro| options.request(step, micro, 2000);
    let starts: Vec<i64> = (0..22 * 4)
        .map(|index| Ok(rows(&data.batch(&ask(index / 2, index % 2))?)))
        .collect::<Result<Vec<_>>>()?
        .concat()
        .iter()
        .map(|row| row[0])
        .collect();
    assert_eq!(starts.len(), 8 * 44);
    let mut orders = BTreeSet::new();
    for epoch in starts.chunks(44) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..44).map(|window| 24 * window).collect::<Vec<_>>());
        orders.insert(epoch);
    }
    assert_eq!(orders.len(), 8, "each epoch has an order of its own");
    let other = TrainOptions { seed: 1, ..options.clone() };
    assert_ne!(rows(&data.batch(&other.request(0, 0, 2000))?), rows(&data.batch(&ask(0, 0))?));
    // Texts are shuffled alike.
    let text = ByteText::from_bytes((0..200).collect::<Vec<u8>>())?;
    let short = TrainOptions { seq_len: 8, ..options };
    let mut starts: Vec<i64> = (0..11)
        .map(|index| Ok(rows(&text.batch(&short.request(index / 2, index % 2, 256))?)))
        .collect::<Result<Vec<_>>>()?
        .concat()
        .iter()
        .map(|row| row[0])
        .collect();
    starts.truncate(22);
    starts.sort_unstable();
    assert_eq!(starts, (0..22).map(|window| 8 * window).collect::<Vec<_>>());
    Ok(())
}

/// Not a separate test: opens a file that is larger than memory, and says how much memory that took.
#[test]
fn large_file_child() -> Result<()> {
    let Some(folder) = env::var_os(CHILD).map(PathBuf::from) else { return Ok(()) };
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").expect("a status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    let before = peak();
    let start = std::time::Instant::now();
    let data = TokenData::open(&[folder.join("large.bin")])?;
    let took = start.elapsed();
    let options = TrainOptions { shuffle: true, seq_len: 1024, ..Default::default() };
    let ask = options.request(1_000_000, 0, 1 << 16);
    assert_eq!(data.batch(&ask)?.tokens.shape(), [8, 1025]);
    assert_eq!(data.validation_batches(&ask)?.len(), 8);
    data.print()?;
    println!("grew {} kB, opened in {took:?}", peak() - before);
    Ok(())
}

#[test]
#[cfg(target_os = "linux")]
fn a_file_larger_than_memory() {
    let folder = Folder::new("large");
    let file = fs::File::create(folder.0.join("large.bin")).expect("a file");
    file.set_len(20_000_000_000).expect("a sparse file");
    let output = Command::new(env::current_exe().expect("this program"))
        .args([&*name_of(module_path!(), "large_file_child"), "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, &folder.0)
        .output()
        .expect("the child runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let grew = text.split("grew ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_else(|| panic!("{text}"));
    assert!(grew.parse::<u64>().expect("a number") < 20_000, "{text}");
}
