//! Files that lie where weights or a config should be, told by how they begin.

/// Bytes that tell a file.
pub(super) const BEGINNING: usize = 512;

/// Returns what a file is and what to do about it if its first bytes show that it was opened by mistake.
pub(crate) fn mistaken(beginning: &[u8]) -> Option<&'static str> {
    /// Beginnings of files and of texts.
    const KNOWN: [(&[u8], &str); 10] = [
        (b"\x1f\x8b", "is compressed by gzip; unpack it, and give the file that was in it"),
        (b"BZh", "is compressed by bzip2; unpack it, and give the file that was in it"),
        (b"\xfd7zXZ\0", "is compressed by xz; unpack it, and give the file that was in it"),
        (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it, and give the file that was in it"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it, and give the file that was in it"),
        (b"Rar!\x1a\x07", "is a rar archive; unpack it, and give the file that was in it"),
        (b"\x89HDF\r\n", "is an HDF5 file, as Keras writes it; expected safetensors, PyTorch's or GGUF"),
        (b"\x93NUMPY", "is an array of NumPy; expected safetensors, PyTorch's or GGUF"),
        (b"ggjt", "is of llama.cpp's format before GGUF; convert it to GGUF"),
        (b"tjgg", "is of llama.cpp's format before GGUF; convert it to GGUF"),
    ];
    const TEXTS: [(&str, &str); 6] = [
        (
            "version https://git-lfs",
            "is a pointer of git-lfs, which stands for the file itself; fetch that with `git lfs pull`",
        ),
        ("<!doctype", "is an HTML page, which a download gave in place of the file; fetch it again"),
        ("<html", "is an HTML page, which a download gave in place of the file; fetch it again"),
        ("<?xml", "is XML, which a download gave in place of the file; fetch it again"),
        ("invalid username or password", "is an answer of a server that refused a download; fetch the file again"),
        ("entry not found", "is an answer of a server that has no such file; fetch it from elsewhere"),
    ];
    if let Some((_, what)) = KNOWN.iter().find(|(start, _)| beginning.starts_with(start)) {
        return Some(what);
    }
    if beginning.get(257..262) == Some(b"ustar") {
        return Some("is a tar archive; unpack it, and give the file that was in it");
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
        [b'{' | b'[', rest @ ..] if rest.iter().take(8).all(|&byte| byte >= b' ' || byte.is_ascii_whitespace()) => {
            Some("is text in JSON, not weights")
        }
        [0x80, 2..=5, ..] => Some("is a pickle that `torch.save` did not write; save `model.state_dict()` with it"),
        _ => None,
    })
}
