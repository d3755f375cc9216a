//! Unigram language model (Kudo, <https://arxiv.org/abs/1804.10959>): the most likely pieces of a text, with the
//! results of the crate `tokenizers`.

use ahash::AHashMap;

use super::vocabulary::Vocabulary;

/// Pieces with their log-probabilities.
pub struct Unigram {
    /// Trie edges: from a node and the next byte to another node.
    children: AHashMap<(u32, u8), u32>,
    /// Pieces that end at a node.
    ends: Vec<Option<u32>>,
    scores: Vec<f64>,
    /// Score of a character without a piece.
    unknown_score: f64,
    unknown: Option<u32>,
    bytes: Option<Box<[Option<u32>; 256]>>,
}

/// Scratch memory reused between words.
#[derive(Default)]
pub struct Scratch {
    /// Best path to each byte after the last position on all paths.
    ways: Vec<Way>,
    path: Vec<(u32, usize)>,
}

#[derive(Clone, Copy)]
struct Way {
    score: f64,
    /// Number of bytes of the last piece; 0 if there is no path yet.
    length: u32,
    piece: u32,
}

/// Consecutive unknown characters that are not yet a token.
#[derive(Default)]
struct Fused {
    start: usize,
    end: usize,
}

impl Unigram {
    pub fn new(
        pieces: &[(String, f64)],
        vocabulary: &Vocabulary,
        unknown: Option<usize>,
        bytes: bool,
    ) -> Result<Self, String> {
        let mut trie = Self {
            children: AHashMap::new(),
            ends: vec![None],
            scores: Vec::new(),
            unknown_score: 0.0,
            unknown: None,
            bytes: None,
        };
        if let Some(unknown) = unknown {
            if unknown >= pieces.len() {
                return Err(format!(
                    "model.unk_id is {unknown}, expected less than {} (the number of pieces)",
                    pieces.len()
                ));
            }
            trie.unknown = Some(unknown as u32);
        }
        let mut least = f64::INFINITY;
        for (id, (piece, score)) in pieces.iter().enumerate() {
            let mut node = 0;
            for byte in piece.bytes() {
                let next = trie.ends.len() as u32;
                node = *trie.children.entry((node, byte)).or_insert(next);
                if node == next {
                    trie.ends.push(None);
                }
            }
            // The empty piece never matches.
            if node != 0 {
                trie.ends[node as usize] = Some(id as u32);
            }
            trie.scores.push(*score);
            if *score < least {
                least = *score;
            }
        }
        /// Difference between the score of an unknown character and that of the least likely piece.
        const PENALTY: f64 = 10.0;
        trie.unknown_score = least - PENALTY;
        trie.bytes = bytes.then(|| {
            let mut ids = Box::new([None; 256]);
            ids.iter_mut().enumerate().for_each(|(byte, id)| *id = vocabulary.id(&format!("<0x{byte:02X}>")));
            ids
        });
        Ok(trie)
    }

    /// Appends the tokens of a text.
    pub fn split(
        &self,
        text: &str,
        vocabulary: &Vocabulary,
        scratch: &mut Scratch,
        tokens: &mut Vec<u32>,
    ) -> Result<(), String> {
        const NO_WAY: Way = Way { score: 0.0, length: 0, piece: 0 };
        let Scratch { ways, path } = scratch;
        ways.clear();
        ways.push(NO_WAY);
        // `ways[0]` is the path to `base`, and all paths end at `reach` or before it.
        let (mut base, mut reach) = (0, 0);
        let mut fused = Fused::default();
        for (start, character) in text.char_indices() {
            if start == reach && start > base {
                self.take(text, base, reach, ways, path, vocabulary, &mut fused, tokens)?;
                // Sums continue as if nothing had been cut: rounding decides between equally likely pieces.
                ways[0] = Way { length: 0, ..ways[reach - base] };
                ways.truncate(1);
                base = reach;
            }
            let score = ways[start - base].score;
            let mut better = |end: usize, added: f64, piece: u32| {
                if ways.len() <= end - base {
                    ways.resize(end - base + 1, NO_WAY);
                }
                let way = &mut ways[end - base];
                let score = score + added;
                let better = way.length == 0 || score > way.score;
                if better {
                    *way = Way { score, length: (end - start) as u32, piece };
                }
                reach = reach.max(end);
                better
            };
            let size = character.len_utf8();
            let mut alone = false;
            let mut node = 0;
            for (at, &byte) in text.as_bytes()[start..].iter().enumerate() {
                let Some(&next) = self.children.get(&(node, byte)) else { break };
                node = next;
                if let Some(piece) = self.ends[node as usize] {
                    better(start + at + 1, self.scores[piece as usize], piece);
                    alone |= at + 1 == size;
                }
            }
            if !alone {
                let piece = self.unknown.unwrap_or(u32::MAX);
                if better(start + size, self.unknown_score, piece) && self.unknown.is_none() {
                    return Err(
                        "the text has a character that no piece covers, and the model has no `unk_id`".to_string()
                    );
                }
            }
        }
        self.take(text, base, text.len(), ways, path, vocabulary, &mut fused, tokens)?;
        self.take_unknown(text, &mut fused, vocabulary, tokens)
    }

    /// Appends the pieces of the best path from `base` to `end`.
    #[allow(clippy::too_many_arguments)]
    fn take(
        &self,
        text: &str,
        base: usize,
        end: usize,
        ways: &[Way],
        path: &mut Vec<(u32, usize)>,
        vocabulary: &Vocabulary,
        fused: &mut Fused,
        tokens: &mut Vec<u32>,
    ) -> Result<(), String> {
        path.clear();
        let mut at = end;
        while at > base {
            let way = ways[at - base];
            path.push((way.piece, at));
            at -= way.length as usize;
        }
        for &(piece, end) in path.iter().rev() {
            if Some(piece) == self.unknown {
                // Consecutive unknown characters are one token.
                fused.end = end;
            } else {
                self.take_unknown(text, fused, vocabulary, tokens)?;
                tokens.push(piece);
                *fused = Fused { start: end, end };
            }
        }
        Ok(())
    }

    fn take_unknown(
        &self,
        text: &str,
        fused: &mut Fused,
        vocabulary: &Vocabulary,
        tokens: &mut Vec<u32>,
    ) -> Result<(), String> {
        let unknown = &text[fused.start..fused.end];
        fused.start = fused.end;
        if unknown.is_empty() {
            return Ok(());
        }
        if let Some(id) = vocabulary.id(unknown) {
            tokens.push(id);
            return Ok(());
        }
        let id = |byte: u8| self.bytes.as_ref()?[usize::from(byte)];
        if unknown.bytes().all(|byte| id(byte).is_some()) {
            tokens.extend(unknown.bytes().filter_map(id));
        } else {
            tokens.extend(self.unknown);
        }
        Ok(())
    }
}
