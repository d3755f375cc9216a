//! Byte pair encoding (Sennrich et al., <https://arxiv.org/abs/1508.07909>) with the results of the crate `tokenizers`.

use std::{cmp::Reverse, collections::BinaryHeap, sync::OnceLock};

use ahash::{AHashMap, AHashSet};

use super::vocabulary::Vocabulary;

/// Pairs of tokens that merge into one, ordered by rank.
pub struct Bpe {
    /// Rank of a pair of tokens.
    ranks: AHashMap<(u32, u32), u32>,
    /// Merged token of each rank.
    merged: Vec<u32>,
    /// Last character of the first token and first character of the second, for each rank.
    seams: Vec<(char, char)>,
    /// Tokens of one character.
    characters: AHashMap<char, u32>,
    /// Tokens of bytes, `<0x00>` to `<0xFF>`, if characters without a token are split into them.
    bytes: Option<Box<[Option<u32>; 256]>>,
    unknown: Option<u32>,
    prefix: Option<String>,
    suffix: Option<String>,
    fuse_unknown: bool,
    /// If `true`, words that are tokens are not split.
    whole_words: bool,
    /// Characters between which a long word can be cut, computed at the first long word.
    cuts: OnceLock<Option<AHashSet<(char, char)>>>,
}

/// The options of the model `BPE` in `tokenizer.json`.
pub struct Options {
    pub unknown: Option<String>,
    pub prefix: Option<String>,
    pub suffix: Option<String>,
    pub fuse_unknown: bool,
    pub byte_fallback: bool,
    pub whole_words: bool,
}

/// Scratch memory reused between words.
#[derive(Default)]
pub struct Scratch {
    symbols: Vec<Symbol>,
    queue: Queue,
}

#[derive(Clone, Copy)]
struct Symbol {
    token: u32,
    previous: u32,
    next: u32,
}

/// Marks no symbol, or a token that has been merged into another.
const NONE: u32 = u32::MAX;

/// Minimum number of bytes of a word that is cut.
const LONG: usize = 512;

impl Bpe {
    pub fn new(vocabulary: &Vocabulary, merges: Vec<(String, String)>, options: Options) -> Result<Self, String> {
        let missing = |token: &str| format!("model.merges: `{token}` is not in the vocabulary");
        let id = |token: &str| vocabulary.id(token).ok_or_else(|| missing(token));
        let skipped = options.prefix.as_ref().map_or(0, String::len);
        let mut ranks = AHashMap::with_capacity(merges.len());
        let (mut merged, mut seams) = (Vec::with_capacity(merges.len()), Vec::with_capacity(merges.len()));
        let mut token = String::new();
        for (first, second) in &merges {
            let rest = second.get(skipped..).ok_or_else(|| {
                let prefix = options.prefix.as_deref().unwrap_or_default();
                format!("model.merges: `{second}` does not start with continuing_subword_prefix (`{prefix}`)")
            })?;
            token.clear();
            token.extend([first, rest]);
            ranks.insert((id(first)?, id(second)?), merged.len() as u32);
            merged.push(id(&token)?);
            seams.push((first.chars().next_back().unwrap_or('\0'), second.chars().next().unwrap_or('\0')));
        }
        let unknown = options.unknown.as_deref().and_then(|token| vocabulary.id(token));
        if let (Some(token), None) = (&options.unknown, unknown) {
            return Err(format!("model.unk_token: `{token}` is not in the vocabulary"));
        }
        let bytes = options.byte_fallback.then(|| {
            let mut bytes = Box::new([None; 256]);
            bytes.iter_mut().enumerate().for_each(|(byte, id)| *id = vocabulary.id(&format!("<0x{byte:02X}>")));
            bytes
        });
        let cuts = OnceLock::new();
        // Pieces that are not characters of the word would have to be tracked.
        let stands_for_others = |token: &String| {
            Some(token) == options.unknown.as_ref() || options.byte_fallback && token.starts_with("<0x")
        };
        let whole_bytes = bytes.as_ref().is_none_or(|bytes| bytes.iter().all(Option::is_some));
        if options.prefix.is_some()
            || options.suffix.is_some()
            || !whole_bytes
            || merges.iter().any(|(first, second)| stands_for_others(first) || stands_for_others(second))
        {
            let _ = cuts.set(None);
        }
        Ok(Self {
            ranks,
            merged,
            seams,
            characters: vocabulary.characters(),
            bytes,
            unknown,
            prefix: options.prefix,
            suffix: options.suffix,
            fuse_unknown: options.fuse_unknown,
            whole_words: options.whole_words,
            cuts,
        })
    }

    /// Appends the tokens of a word.
    pub fn split(&self, word: &str, vocabulary: &Vocabulary, scratch: &mut Scratch, tokens: &mut Vec<u32>) {
        if self.whole_words
            && let Some(id) = vocabulary.id(word)
        {
            tokens.push(id);
            return;
        }
        let mut rest = word;
        while rest.len() > LONG
            && let Some(cut) = self.cut(rest)
        {
            self.merge(&rest[..cut], vocabulary, scratch, tokens);
            rest = &rest[cut..];
        }
        self.merge(rest, vocabulary, scratch, tokens);
    }

    /// Returns a position, after a few hundred bytes of a long word, that no token spans: no merged pair has these
    /// characters at its seam. The two sides are merged independently.
    fn cut(&self, word: &str) -> Option<usize> {
        let seams = self.cuts.get_or_init(|| Some(self.seams.iter().copied().collect())).as_ref()?;
        let start = word.floor_char_boundary(LONG / 2);
        let mut before = word[..start].chars().next_back()?;
        for (at, character) in word[start..].char_indices() {
            let known = |character| self.characters.contains_key(&character);
            // Consecutive unknown characters may be one token, and characters without a token join their neighbours.
            let apart = match (&self.bytes, self.unknown) {
                (Some(_), _) => true,
                (None, Some(_)) => !self.fuse_unknown || known(before) || known(character),
                (None, None) => known(before) && known(character),
            };
            if apart && !seams.contains(&(before, character)) {
                return Some(start + at);
            }
            before = character;
        }
        None
    }

    fn merge(&self, word: &str, vocabulary: &Vocabulary, scratch: &mut Scratch, tokens: &mut Vec<u32>) {
        let symbols = &mut scratch.symbols;
        symbols.clear();
        let push = |symbols: &mut Vec<Symbol>, token: u32| {
            let at = symbols.len() as u32;
            symbols.push(Symbol { token, previous: at.wrapping_sub(1), next: at + 1 });
        };
        // Unknown characters are collected until a known one follows.
        let mut waiting = None;
        let mut affixed = String::new();
        let mut characters = word.char_indices().peekable();
        while let Some((at, character)) = characters.next() {
            let prefix = self.prefix.as_deref().filter(|_| at > 0);
            let suffix = self.suffix.as_deref().filter(|_| characters.peek().is_none());
            let found = if prefix.is_some() || suffix.is_some() {
                affixed.clear();
                affixed.push_str(prefix.unwrap_or_default());
                affixed.push(character);
                affixed.push_str(suffix.unwrap_or_default());
                vocabulary.id(&affixed)
            } else {
                self.characters.get(&character).copied()
            };
            if let Some(token) = found {
                if let Some(unknown) = waiting.take() {
                    push(symbols, unknown);
                }
                push(symbols, token);
                continue;
            }
            if let Some(bytes) = &self.bytes {
                let start = symbols.len();
                let mut buffer = [0; 4];
                let plain = character.encode_utf8(&mut buffer);
                let text = if prefix.is_some() || suffix.is_some() { affixed.as_str() } else { plain };
                if text.bytes().all(|byte| bytes[usize::from(byte)].is_some()) {
                    text.bytes().filter_map(|byte| bytes[usize::from(byte)]).for_each(|id| push(symbols, id));
                    debug_assert!(symbols.len() > start);
                    continue;
                }
            }
            if let Some(unknown) = self.unknown {
                if waiting.is_some() && !self.fuse_unknown {
                    push(symbols, unknown);
                }
                waiting = Some(unknown);
            }
        }
        if let Some(unknown) = waiting {
            push(symbols, unknown);
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
            self.merge_all(symbols, &mut scratch.queue);
            tokens.extend(symbols.iter().map(|symbol| symbol.token).filter(|&token| token != NONE));
        }
    }

    /// Merges pairs, lowest rank first, and left to right within a rank.
    fn merge_all(&self, symbols: &mut [Symbol], queue: &mut Queue) {
        queue.clear();
        for at in 1..symbols.len() {
            if let Some(&rank) = self.ranks.get(&(symbols[at - 1].token, symbols[at].token)) {
                queue.push(rank, at as u32 - 1, symbols.len());
            }
        }
        while let Some((rank, at)) = queue.pop() {
            let first = symbols[at as usize];
            if first.token == NONE || first.next == NONE {
                continue;
            }
            let second = symbols[first.next as usize];
            let merged = self.merged[rank as usize];
            // The pair may have changed since it was queued.
            let current = self.ranks.get(&(first.token, second.token));
            if current.is_none_or(|&rank| self.merged[rank as usize] != merged) {
                continue;
            }
            symbols[first.next as usize].token = NONE;
            symbols[at as usize] = Symbol { token: merged, previous: first.previous, next: second.next };
            if let Some(after) = symbols.get_mut(second.next as usize) {
                after.previous = at;
                if let Some(&rank) = self.ranks.get(&(merged, after.token)) {
                    queue.push(rank, at, symbols.len());
                }
            }
            if let Some(before) = symbols.get(first.previous as usize)
                && let Some(&rank) = self.ranks.get(&(before.token, merged))
            {
                queue.push(rank, first.previous, symbols.len());
            }
        }
    }
}

/// Queue of pair positions, lowest rank first, and left to right within a rank.
///
/// In a long word, the positions of each rank are in a separate list, so that memory is read in order; one heap for all
/// of them would access memory at random, and a word twice as long would take three times as long.
#[derive(Default)]
struct Queue {
    /// Rank and position of all pairs of a short word; of a long word, pairs found after their rank was reached.
    heap: BinaryHeap<Reverse<u64>>,
    lists: AHashMap<u32, Vec<u32>>,
    /// Ranks that have a list.
    ranks: BinaryHeap<Reverse<u32>>,
    /// Current list, in reverse order, and its rank.
    current: Vec<u32>,
    rank: Option<u32>,
}

impl Queue {
    fn clear(&mut self) {
        self.heap.clear();
        self.lists.clear();
        self.ranks.clear();
        self.current.clear();
        self.rank = None;
    }

    /// Queues a pair at a position of a word of `symbols` symbols.
    fn push(&mut self, rank: u32, at: u32, symbols: usize) {
        const SHORT: usize = 1024;
        if symbols <= SHORT || self.rank.is_some_and(|current| rank <= current) {
            self.heap.push(Reverse(u64::from(rank) << 32 | u64::from(at)));
        } else {
            let list = self.lists.entry(rank).or_default();
            if list.is_empty() {
                self.ranks.push(Reverse(rank));
            }
            list.push(at);
        }
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        if self.current.is_empty() && self.heap.is_empty() {
            let Reverse(rank) = self.ranks.pop()?;
            self.rank = Some(rank);
            self.current = self.lists.remove(&rank).unwrap_or_default();
            self.current.sort_unstable();
            self.current.reverse();
        }
        let entry = |rank: Option<u32>, at: &u32| rank.map(|rank| u64::from(rank) << 32 | u64::from(*at));
        let waiting = self.current.last().and_then(|at| entry(self.rank, at));
        let entry = match (self.heap.peek(), waiting) {
            (Some(&Reverse(top)), waiting) if waiting.is_none_or(|waiting| top < waiting) => {
                self.heap.pop();
                top
            }
            (_, waiting) => {
                self.current.pop();
                waiting?
            }
        };
        Some(((entry >> 32) as u32, entry as u32))
    }
}
