//! From the bytes of a model to text that a terminal can show.

/// Turns bytes that come one at a time into UTF-8.
///
/// An incomplete sequence is held back until it is whole; what is not UTF-8 becomes `U+FFFD`.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    /// The beginning of a character.
    pending: Vec<u8>,
}

impl Decoder {
    /// The text that is complete with this byte, often empty.
    pub fn push(&mut self, byte: u8) -> String {
        self.pending.push(byte);
        let mut text = String::new();
        loop {
            match str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => match error.error_len() {
                    None => return text,
                    Some(invalid) => {
                        // Whole characters never stay pending, so the error is at the start.
                        self.pending.drain(..invalid);
                        text.push(char::REPLACEMENT_CHARACTER);
                    }
                },
            }
        }
    }

    /// The text of a sequence that stays incomplete.
    pub fn finish(self) -> &'static str {
        if self.pending.is_empty() { "" } else { "\u{fffd}" }
    }
}

/// All of some bytes as text that a terminal can show.
pub fn decode(bytes: &[u8]) -> String {
    clean(&String::from_utf8_lossy(bytes))
}

/// Replaces control characters other than tab and line ends, so that a model cannot move the cursor of a terminal.
pub fn clean(text: &str) -> String {
    text.chars().map(shown).collect()
}

fn shown(character: char) -> char {
    match character {
        '\n' | '\r' | '\t' => character,
        _ if character.is_control() => char::REPLACEMENT_CHARACTER,
        _ => character,
    }
}

#[cfg(test)]
mod tests {
    use super::{Decoder, decode};

    #[test]
    fn whole_characters_come_out_when_they_are_complete() {
        let mut decoder = Decoder::default();
        let pieces: Vec<String> = "aé€😀".bytes().map(|byte| decoder.push(byte)).collect();
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn what_is_not_utf8_is_replaced_and_the_rest_is_kept() {
        for bytes in
            [&b"a\xffb"[..], b"\xc3", b"\xe2\x82a", b"\xf0\x9f\x98", b"\x80\x80ok", b"\xc3\xc3\xa9", b"\xed\xa0\x80"]
        {
            let mut decoder = Decoder::default();
            let text: String = bytes.iter().map(|&byte| decoder.push(byte)).collect();
            assert_eq!(text + decoder.finish(), String::from_utf8_lossy(bytes), "{bytes:?}");
        }
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(decode(b"\x1b[2J\tx\r\n\0"), "\u{fffd}[2J\tx\r\n\u{fffd}");
        assert_eq!(decode("\u{9b}".as_bytes()), "\u{fffd}");
    }
}
