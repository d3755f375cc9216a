//! Files that lie where weights or a config should be, told by how they begin.

/// Bytes that tell a file.
pub(super) const BEGINNING: usize = 512;

/// Returns what a file is and what to do about it if its first bytes show that it was opened by mistake.
pub(crate) fn mistaken(beginning: &[u8]) -> Option<&'static str> {
    /// Beginnings of files and of texts.
    const KNOWN: [(&[u8], &str); 10] = [
        (b"\x1f\x8b", "is compressed with gzip; unpack it and use the file inside"),
        (b"BZh", "is compressed with bzip2; unpack it and use the file inside"),
        (b"\xfd7zXZ\0", "is compressed with xz; unpack it and use the file inside"),
        (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it and use the file inside"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it and use the file inside"),
        (b"Rar!\x1a\x07", "is a rar archive; unpack it and use the file inside"),
        (b"\x89HDF\r\n", "is an HDF5 file, as Keras writes it; expected a safetensors, PyTorch or GGUF file"),
        (b"\x93NUMPY", "is a NumPy array; expected a safetensors, PyTorch or GGUF file"),
        (b"ggjt", "is in llama.cpp's format before GGUF; convert it to GGUF"),
        (b"tjgg", "is in llama.cpp's format before GGUF; convert it to GGUF"),
    ];
    const TEXTS: [(&str, &str); 6] = [
        ("version https://git-lfs", "is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"),
        ("<!doctype", "is an HTML page, not the file: the download failed; fetch it again"),
        ("<html", "is an HTML page, not the file: the download failed; fetch it again"),
        ("<?xml", "is XML, not the file: the download failed; fetch it again"),
        (
            "invalid username or password",
            "is the server's \"access denied\" reply, not the file; check your credentials and fetch it again",
        ),
        ("entry not found", "is the server's \"not found\" reply, not the file; fetch it from elsewhere"),
    ];
    if let Some((_, what)) = KNOWN.iter().find(|(start, _)| beginning.starts_with(start)) {
        return Some(what);
    }
    if beginning.get(257..262) == Some(b"ustar") {
        return Some("is a tar archive; unpack it and use the file inside");
    }
    let start = beginning.strip_prefix(b"\xef\xbb\xbf").unwrap_or(beginning).trim_ascii_start();
    let begins = |text: &str| start.get(..text.len()).is_some_and(|start| start.eq_ignore_ascii_case(text.as_bytes()));
    TEXTS.iter().find(|(text, _)| begins(text)).map(|&(_, what)| what)
}

/// The same for what should be weights.
pub(super) fn not_weights(beginning: &[u8]) -> Option<&'static str> {
    // Any two bytes may be the length of a header of safetensors, which begins after eight.
    if let [_, _, _, _, 0, 0, 0, 0, b'{', ..] = beginning {
        return None;
    }
    mistaken(beginning).or_else(|| match beginning {
        [0x80, 2..=5, ..] => {
            Some("is a pickle that `torch.save` did not write; save `model.state_dict()` with `torch.save`")
        }
        _ if !is_text(beginning) => None,
        _ if is_json(beginning) => Some("is JSON, not weights; expected a safetensors, PyTorch or GGUF file"),
        _ => Some("is text, not weights; expected a safetensors, PyTorch or GGUF file"),
    })
}

/// Returns `true` for the beginning of UTF-8 text, which may end inside a character; shorter ones tell nothing.
fn is_text(beginning: &[u8]) -> bool {
    let control = |&byte: &u8| byte < b' ' && !byte.is_ascii_whitespace();
    beginning.len() >= 8
        && !str::from_utf8(beginning).is_err_and(|why| why.error_len().is_some())
        && !beginning.iter().any(control)
}

/// Returns `true` if text begins like a JSON object, or an array of values.
fn is_json(beginning: &[u8]) -> bool {
    let begins = |byte: &u8| !byte.is_ascii_whitespace() && *byte != b'[';
    let (lists, rest) = beginning.split_at(beginning.iter().position(begins).unwrap_or(beginning.len()));
    match rest {
        [b'{', rest @ ..] => matches!(rest.trim_ascii_start(), [] | [b'"' | b'}', ..]),
        [first, ..] => lists.contains(&b'[') && matches!(first, b'"' | b']' | b'-' | b'0'..=b'9'),
        [] => false,
    }
}
