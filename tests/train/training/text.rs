//! Texts as bytes: where they come from, what is refused, and windows of them.

use super::*;

#[test]
fn text_from_files_and_folders() -> Result<()> {
    let folder = Folder::new("text");
    folder.write("tree/b.txt", b"B");
    folder.write("tree/a/z.txt", b"Z");
    folder.write("tree/a/y.md", "ÿ".as_bytes());
    folder.write("tree/c.bin", &[vec![b'C'; 200_000], vec![0]].concat());
    folder.write("tree/.hidden", b"H");
    folder.write("tree/.git/config", b"G");
    folder.write("tree/empty", b"");
    let last = folder.write("last.txt", b"\xFFnot utf-8");
    let tree = folder.0.join("tree");
    let text = ByteText::from_paths(&[&tree, &last])?;
    assert_eq!(text.bytes(), [&b"\xC3\xBFZB"[..], b"\xFFnot utf-8"].concat());
    // The order of the arguments is kept, and a hidden file that was named is meant.
    let hidden = tree.join(".hidden");
    assert_eq!(ByteText::from_paths(&[&last, &hidden])?.bytes(), b"\xFFnot utf-8H");
    #[cfg(unix)]
    {
        // Links to files are read, links to folders would lead in circles.
        std::os::unix::fs::symlink("../last.txt", tree.join("link")).unwrap();
        std::os::unix::fs::symlink("..", tree.join("up")).unwrap();
        assert_eq!(ByteText::from_paths(&[&tree])?.bytes(), b"\xC3\xBFZB\xFFnot utf-8");
        std::os::unix::fs::symlink("nowhere", tree.join("broken")).unwrap();
        let broken = tree.join("broken");
        let text = ByteText::from_paths(&[&tree])?;
        assert_eq!(text.bytes(), b"\xC3\xBFZB\xFFnot utf-8");
        assert!(matches!(text.skipped(), [(path, why)] if *path == broken && why.contains("No such file")));
        assert!(
            matches!(ByteText::from_paths(&[&broken]).map_err(Error::into_kind), Err(ErrorKind::Io { path, .. }) if path == broken)
        );
    }
    Ok(())
}

#[test]
fn invalid_texts_are_refused() {
    let folder = Folder::new("bad-text");
    let message = |path: &PathBuf| ByteText::from_paths(&[path]).map(drop).unwrap_err().to_string();
    for (name, bytes, expected) in [("binary", &b"abc\0def"[..], "binary"), ("empty", b"", "empty")] {
        let path = folder.write(name, bytes);
        let error = message(&path);
        assert!(error.contains(expected) && error.contains(name), "{error}");
    }
    // A folder with only those.
    assert!(message(&folder.0).contains("no readable text"));
    assert!(message(&folder.0.join("missing")).contains("missing"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert!(message(&"/dev/zero".into()).contains("neither a file nor a folder"));
        let locked = folder.write("locked", b"text");
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).unwrap();
        // The administrator may read it all the same.
        if fs::File::open(&locked).is_err() {
            for path in [&locked, &folder.0] {
                let error = message(path);
                assert!(error.contains("locked") && error.contains("denied"), "{error}");
            }
        }
    }
    assert!(matches!(
        ByteText::from_paths::<PathBuf>(&[]).map(drop).map_err(Error::into_kind),
        Err(ErrorKind::Option { .. })
    ));
    assert!(matches!(ByteText::from_bytes("").map(drop).map_err(Error::into_kind), Err(ErrorKind::Option { .. })));
}

#[test]
fn text_split_and_windows() -> Result<()> {
    for length in [1usize, 9, 10, 11, 19, 99, 100, 12345] {
        let text = ByteText::from_bytes(vec![b'x'; length])?;
        assert_eq!(text.train().len(), length * 9 / 10);
        assert_eq!(text.train().len() + text.validation().len(), length);
    }
    let bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
    let text = ByteText::from_bytes(bytes.clone())?;
    let request = |seed, step, micro, batch_size, seq_len| {
        TrainOptions { seed, batch_size, seq_len, accumulate: 5, ..Default::default() }.request(step, micro, 256)
    };
    let tokens = |text: &ByteText, request| text.batch(&request)?.tokens.to_vec::<i64>();
    let batch = text.batch(&request(1, 2, 3, 200, 20))?;
    assert_eq!((batch.tokens.shape().to_vec(), batch.tokens.dtype()), (vec![200, 21], DType::I64));
    assert_eq!((batch.weight(), batch.targets()), (200.0, 4000));
    assert!(batch.loss_mask.is_none() && batch.documents.is_none());
    let values = batch.tokens.to_vec::<i64>()?;
    for row in values.chunks(21) {
        let window: Vec<u8> = row.iter().map(|&token| token as u8).collect();
        assert!(text.train().windows(21).any(|part| part == window));
    }
    // The seed, the step and the micro-batch each matter, and nothing else does.
    assert_eq!(tokens(&text, request(1, 2, 3, 200, 20))?, values);
    for (seed, step, micro) in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)] {
        assert_ne!(tokens(&text, request(seed, step, micro, 200, 20))?, values);
    }
    // The offsets of runs that began with an earlier version.
    let random = Philox::new(1, 1 << 60 | 2 << 20 | 3);
    for (row, window) in values.chunks(21).enumerate() {
        assert_eq!(window[0], (random.below(row as u64, 4480) % 256) as i64, "row {row}");
    }
    // Every offset is drawn, both ends among them.
    let tiny = ByteText::from_bytes((0..200).map(|i| i as u8).collect::<Vec<_>>())?;
    let starts: std::collections::BTreeSet<i64> =
        tokens(&tiny, request(0, 0, 0, 4000, 19))?.chunks(20).map(|row| row[0]).collect();
    assert_eq!(starts.into_iter().collect::<Vec<_>>(), (0..=160).collect::<Vec<_>>());

    // Batches of at most as many rows as those of a step.
    let windows = text.validation_batches(&request(0, 0, 0, 25, 20))?;
    assert_eq!(windows.iter().map(|batch| batch.tokens.shape()[0]).collect::<Vec<_>>(), [25, 25, 14]);
    let rows = windows.iter().map(|batch| batch.tokens.to_vec::<i64>()).collect::<Result<Vec<_>>>()?.concat();
    for (index, row) in rows.chunks(21).enumerate() {
        let start = index * (500 - 21) / 63;
        let expected: Vec<i64> = text.validation()[start..start + 21].iter().map(|&byte| byte as i64).collect();
        assert_eq!(row, expected);
    }
    // As long as the validation part, and one longer.
    assert!(text.validation_batches(&request(0, 0, 0, 8, 499)).is_ok());
    for seq_len in [500, usize::MAX] {
        let error = text.validation_batches(&request(0, 0, 0, 8, seq_len)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Option { key, .. } if key == "text"), "{error}");
        assert!(text.batch(&request(0, 0, 0, 1, seq_len)).is_err());
    }
    // More windows than fit in memory.
    assert!(text.batch(&request(0, 0, 0, usize::MAX / 64, 20)).is_err());
    assert!(text.batch(&request(0, 0, 0, 1 << 44, 20)).is_err());
    let mut changed = bytes;
    changed[17] ^= 1;
    assert_ne!(ByteText::from_bytes(changed)?.fingerprint(), text.fingerprint());
    Ok(())
}
