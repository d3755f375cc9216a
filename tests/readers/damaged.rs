//! Files with damaged bytes: an answer or an error, within bounds of memory and time.

use super::*;

/// Damages a file in one to eight places.
struct Damage {
    random: Philox,
    drawn: u64,
}

impl Damage {
    fn below(&mut self, limit: usize) -> usize {
        self.drawn += 1;
        (self.random.uniform(self.drawn) * limit.max(1) as f64) as usize
    }

    fn apply(&mut self, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len());
            match self.below(8) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = [0, 1, 0x7F, 0x80, 0xFF, b'.', b'}', b'('][self.below(8)],
                2 => {
                    // A count, length or offset of 8 or 4 bytes.
                    let length = bytes.len() as u64;
                    let lies =
                        [0, 1, length, length + 1, 1 << 31, u64::from(u32::MAX), 1 << 40, i64::MAX as u64, u64::MAX];
                    let lie = lies[self.below(lies.len())].to_le_bytes();
                    let width = [4, 8][self.below(2)].min(bytes.len() - at.min(bytes.len()));
                    bytes[at..at + width].copy_from_slice(&lie[..width]);
                }
                3 => bytes.truncate(at.max(bytes.len() / 2)),
                4 => {
                    let end = (at + self.below(16)).min(bytes.len());
                    bytes.drain(at..end);
                }
                5 => {
                    let end = (at + self.below(64)).min(bytes.len());
                    let again = bytes[at..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, again);
                }
                6 => {
                    let other = &others[self.below(others.len())];
                    let from = self.below(other.len());
                    let end = (from + self.below(64)).min(other.len());
                    bytes.splice(at..at, other[from..end].iter().copied());
                }
                _ => {
                    let digit = b"0123456789-e.\"[]{},:h\x85tRQbsu"[self.below(28)];
                    let from = self.below(bytes.len());
                    if let Some(byte) = bytes.get_mut(from) {
                        *byte = digit;
                    }
                }
            }
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Reading any damaged file returns tensors or an error with a message, within bounds.
fn mutate(names: &[&str]) {
    /// Maximum number of live bytes while reading files of a few thousand bytes.
    const MOST: isize = 4 << 20;
    let files: Vec<Vec<u8>> = names.iter().map(|name| bytes(name)).collect();
    let length = Duration::from_secs(setting("XT_MUTATION_SECONDS", 3));
    let start = Instant::now();
    let first = setting("XT_MUTATION_SEED", 0);
    let (mut seed, mut whole) = (first, 0);
    while start.elapsed() < length {
        let mut damage = Damage { random: Philox::new(seed, 17), drawn: 0 };
        let mut bytes = files[damage.below(files.len())].clone();
        damage.apply(&mut bytes, &files);
        let before = LIVE.get();
        PEAK.set(before);
        let began = Instant::now();
        let result = std::panic::catch_unwind(|| read(&bytes));
        let (took, peak) = (began.elapsed(), PEAK.get() - before);
        let result = result.unwrap_or_else(|_| panic!("{names:?}: seed {seed} panicked"));
        assert!(peak < MOST, "{names:?}: seed {seed} took {peak} bytes of memory");
        assert!(took < Duration::from_secs(60), "{names:?}: seed {seed} took {took:?}");
        match result {
            Ok(elements) => {
                assert!(elements <= 4 * bytes.len(), "{names:?}: seed {seed}: {elements} values");
                whole += 1;
            }
            Err(error) => assert!(error.len() > 10 && error.len() < 100_000, "{names:?}: seed {seed}: {error}"),
        }
        seed += 1;
    }
    println!("{names:?}: {} damaged files, {whole} of them readable", seed - first);
    assert!(seed > first, "no file was read");
}

#[test]
fn damaged_archives_are_answered() {
    mutate(&["archive.pt", "nested.pt"]);
}

#[test]
fn damaged_legacy_files_are_answered() {
    mutate(&["legacy.pt"]);
}

#[test]
fn damaged_safetensors_are_answered() {
    mutate(&["part-1.safetensors", "part-2.safetensors"]);
}

#[test]
fn damaged_gguf_files_are_answered() {
    mutate(&["quantised.gguf"]);
}
