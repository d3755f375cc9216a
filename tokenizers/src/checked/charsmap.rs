//! SentencePiece's character replacement rules: a byte trie in a double array, and replacement texts.

use tokenizers::normalizers::Precompiled;

use super::file::Part;

/// Maximum number of bytes that replace a character; the longest replacement in Unicode has 33.
const MAX_TEXT: usize = 1024;

/// Rules of a normalizer `Precompiled`.
pub fn of_json(part: &Part) -> Result<Precompiled, String> {
    let text = part.text("precompiled_charsmap")?;
    let rules = of_base64(text).ok_or_else(|| part.broken("precompiled_charsmap", "is not base64"))?;
    check(&rules).map_err(|why| part.broken("precompiled_charsmap", why))?;
    Precompiled::from(&rules).map_err(|why| part.broken("precompiled_charsmap", why))
}

/// Checks the rules: any sequence of bytes stays within the nodes, and each final node has a replacement text.
pub fn check(rules: &[u8]) -> Result<(), String> {
    let (size, rest) = rules.split_first_chunk::<4>().ok_or("has no trie size")?;
    let size = u32::from_le_bytes(*size) as usize;
    let (trie, texts) = rest
        .split_at_checked(size)
        .ok_or_else(|| format!("is truncated: its trie has {size} bytes, but only {} follow", rest.len()))?;
    let texts = str::from_utf8(texts).map_err(|_| "contains replacements that are not UTF-8")?;
    let units = trie.chunks_exact(4).map(|unit| u32::from_le_bytes(unit.try_into().unwrap_or_default()));
    let units: Vec<u32> = units.collect();
    let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
    let root = *units.first().ok_or("has an empty trie")?;
    let mut seen = vec![false; units.len()];
    let mut open = vec![offset(root)];
    while let Some(node) = open.pop() {
        // Any byte may be looked up, at `node ^ byte`.
        if node | 255 >= units.len() {
            return Err(format!("refers to node {node}, but has {} nodes", units.len()));
        }
        if std::mem::replace(&mut seen[node], true) {
            continue;
        }
        for byte in 1..=255 {
            let unit = units[node ^ byte];
            // The label belongs to the child of another node.
            if unit & (1 << 31 | 255) != byte as u32 {
                continue;
            }
            let next = node ^ byte ^ offset(unit);
            if unit >> 8 & 1 == 1 {
                let leaf =
                    units.get(next).ok_or_else(|| format!("refers to node {next}, but has {} nodes", units.len()))?;
                let start = (leaf & !(1 << 31)) as usize;
                let text =
                    texts.get(start..).ok_or_else(|| format!("refers to a replacement at {start}, past its end"))?;
                if text.bytes().take(MAX_TEXT + 1).position(|byte| byte == 0).unwrap_or(text.len()) > MAX_TEXT {
                    return Err(format!("replaces a character with more than {MAX_TEXT} bytes"));
                }
            }
            open.push(next);
        }
    }
    Ok(())
}

/// Decodes base64 (RFC 4648).
fn of_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let mut number = 0;
        for at in 0..4 {
            let digit = match group.get(at) {
                None => 0,
                Some(digit @ b'A'..=b'Z') => digit - b'A',
                Some(digit @ b'a'..=b'z') => digit - b'a' + 26,
                Some(digit @ b'0'..=b'9') => digit - b'0' + 52,
                Some(b'+') => 62,
                Some(b'/') => 63,
                _ => return None,
            };
            number = number << 6 | u32::from(digit);
        }
        bytes.extend(&number.to_be_bytes()[1..][..group.len() - 1]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::{check, of_base64};

    #[test]
    fn bytes_of_base64() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYg==", "foob")] {
            assert_eq!(of_base64(text).unwrap(), bytes.as_bytes());
        }
        for text in ["Z", "Zg", "Z===", "Zm9v=", "Zm-v", "===="] {
            assert!(of_base64(text).is_none(), "{text}");
        }
    }

    #[test]
    fn damaged_rules_are_refused() {
        let far = [&4u32.to_le_bytes()[..], &[255, 255, 255, 127], b"\0"].concat();
        let cases: [(&[u8], &str); 6] = [
            (&[1, 2, 3], "has no trie size"),
            (&[255; 4], "its trie has 4294967295 bytes, but only 0 follow"),
            (&[0, 0, 0, 128, 0, 0, 0, 0], "its trie has 2147483648 bytes, but only 4 follow"),
            (&[0; 4], "an empty trie"),
            (&far, "refers to node"),
            (&[0, 0, 0, 0, 255], "not UTF-8"),
        ];
        for (rules, why) in cases {
            assert!(check(rules).unwrap_err().contains(why), "{rules:?}: {:?}", check(rules));
        }
    }
}
