//! Groups of sequences: anchors with positives and negatives, pairs with scores, preferred and rejected answers.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Batch, BatchRequest, BatchSource, DataPrint, Sequence, shuffle::shuffled};
use crate::{
    DType, Device, Error, Result, Shape, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
};

/// Sequences that belong together, such as an anchor, a positive and a negative.
#[derive(Clone, PartialEq, Debug)]
pub struct Group {
    /// Sequences, the same number in each group of a source. If `loss_mask` is empty, all tokens are marked in the batch and
    /// the last token stays when the sequence is cut; else the marked ones count, and the beginning stays.
    pub sequences: Vec<Sequence>,
    /// Score of the group, such as the similarity of two sentences.
    pub score: Option<f64>,
}

/// Batch of groups, padded on the right.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GroupBatch {
    /// Tokens, `[batch, sequences, n]` I64.
    pub tokens: Tensor,
    /// Marked tokens, `[batch, sequences, n]` Bool: the real ones, or those that count.
    pub mask: Tensor,
    /// Scores, `[batch]` F32.
    pub scores: Option<Tensor>,
}

impl GroupBatch {
    /// Creates a batch.
    ///
    /// Errors: shapes or types other than those of the fields.
    pub fn new(tokens: Tensor, mask: Tensor, scores: Option<Tensor>) -> Result<Self> {
        let fits = tokens.rank() == 3 && tokens.shape() == mask.shape() && tokens.numel() > 0;
        let scored = scores.as_ref().is_none_or(|scores| {
            scores.rank() == 1 && scores.numel() == tokens.shape()[0] && scores.dtype() == DType::F32
        });
        ensure!(
            fits && scored && tokens.dtype() == DType::I64 && mask.dtype() == DType::Bool,
            Error::shape(
                "batch",
                format_args!(
                    "expected I64 tokens and a Bool mask [batch, sequences, n] and F32 scores [batch], got {:?} {}, {:?} {} \
                     and {:?}",
                    tokens.shape(),
                    tokens.dtype(),
                    mask.shape(),
                    mask.dtype(),
                    scores.as_ref().map(|scores| (scores.shape().to_vec(), scores.dtype()))
                )
            )
        );
        Ok(Self { tokens, mask, scores })
    }

    /// Creates a batch of groups, whose sequences are cut to `longest` tokens.
    ///
    /// Errors: no groups; groups of different sizes, or of which only some have a score; an empty sequence.
    pub fn of_groups(groups: &[&Group], longest: usize) -> Result<Self> {
        let most = longest.max(1);
        let count = groups.first().map_or(0, |group| group.sequences.len());
        let all = || groups.iter().flat_map(|group| &group.sequences);
        let width = all().map(|sequence| sequence.tokens.len().min(most)).max().unwrap_or(0);
        ensure!(
            width > 0
                && groups.iter().all(|group| group.sequences.len() == count)
                && all().all(|sequence| !sequence.tokens.is_empty()),
            Error::argument(
                "groups",
                "expected at least one group, all of one size, of sequences with at least one token"
            )
        );
        let shape = Shape::new(&[groups.len(), count, width])?;
        let (mut tokens, mut mask) = (vec![0; shape.numel()], vec![false; shape.numel()]);
        for (row, Sequence { tokens: own, loss_mask }) in all().enumerate() {
            let kept = own.len().min(width);
            let to = &mut tokens[row * width..][..kept];
            to.copy_from_slice(&own[..kept]);
            let marks = &mut mask[row * width..][..kept];
            if loss_mask.is_empty() {
                marks.fill(true);
                to[kept - 1] = own[own.len() - 1];
            } else {
                marks.iter_mut().zip(loss_mask).for_each(|(mark, &counts)| *mark = counts);
            }
        }
        let scores: Vec<f32> = groups.iter().filter_map(|group| Some(group.score? as f32)).collect_vec();
        ensure!(
            scores.is_empty() || scores.len() == groups.len(),
            Error::argument("groups", "expected a score for each group or for none")
        );
        let scores = match scores.is_empty() {
            true => None,
            false => Some(Tensor::from_vec(scores, [groups.len()], &Device::Cpu)?),
        };
        let tokens = Tensor::from_vec(tokens, shape, &Device::Cpu)?;
        Self::new(tokens, Tensor::from_vec(mask, shape, &Device::Cpu)?, scores)
    }
}

impl Batch for GroupBatch {
    fn to_device(&self, device: &Device) -> Result<Self> {
        let scores = self.scores.as_ref().map(|scores| scores.to_device(device)).transpose()?;
        Ok(Self { tokens: self.tokens.to_device(device)?, mask: self.mask.to_device(device)?, scores })
    }

    fn weight(&self) -> f64 {
        self.tokens.shape()[0] as f64
    }

    fn targets(&self) -> u64 {
        self.tokens.shape()[0] as u64
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        [&mut self.tokens, &mut self.mask].into_iter().chain(&mut self.scores).for_each(f);
        true
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        let width = parts.iter().map(|part| part.tokens.shape()[2]).max().unwrap_or(0);
        let joined = |of: &dyn Fn(&Self) -> &Tensor| {
            let padded = parts.iter().map(|part| {
                let tensor = of(part);
                let [rows, sequences, own] = [tensor.dim(0)?, tensor.dim(1)?, tensor.dim(2)?];
                let more = Tensor::full([rows, sequences, width - own], 0.0, tensor.dtype(), tensor.device())?;
                Tensor::cat(&[tensor, &more], 2)
            });
            let padded: Vec<Tensor> = padded.try_collect_vec()?;
            Tensor::cat(&padded.iter().collect_vec(), 0)
        };
        let scores = parts.iter().filter_map(|part| part.scores.as_ref()).collect_vec();
        let scores = if scores.is_empty() { None } else { Some(Tensor::cat(&scores, 0)?) };
        Self::new(joined(&|part| &part.tokens)?, joined(&|part| &part.mask)?, scores)
    }
}

/// Groups of sequences in memory: for [`Embedder`](crate::train::Embedder) texts that belong together, for
/// [`DpoModel`](crate::train::DpoModel) preferred and rejected answers. A batch has the sequences of its groups, each cut to
/// `seq_len` tokens; groups of which a sequence then has no token that counts are left out. Each epoch has an order of its own, in
/// whole batches. A single group at the end of the validation set is added to the batch before.
///
/// ```
/// use x_transformers::train::{BatchSource, Group, Groups, Sequence, TrainOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let text = |tokens: &[i64]| Sequence { tokens: tokens.to_vec(), loss_mask: vec![] };
/// let pair = |one: &[i64], other: &[i64]| Group { sequences: vec![text(one), text(other)], score: None };
/// let pairs = vec![pair(&[2, 7, 3], &[2, 8, 3]), pair(&[2, 9, 3], &[2, 10, 11, 3])];
/// let source = Groups::new(pairs.clone(), pairs)?; // to train, to validate
/// let options = TrainOptions { batch_size: 2, seq_len: 16, ..Default::default() };
/// assert_eq!(source.batch(&options.request(0, 0, 40))?.tokens.shape(), [2, 2, 4]);
/// # Ok(())
/// # }
/// ```
pub struct Groups {
    parts: [Vec<Group>; 2],
    chosen: Mutex<Option<Arc<Chosen>>>,
}

/// Groups whose sequences have a token that counts, by their numbers, in each part.
struct Chosen {
    seq_len: usize,
    parts: [Vec<usize>; 2],
}

impl fmt::Debug for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, validation] = self.parts.each_ref().map(Vec::len);
        f.debug_struct("Groups").field("train", &train).field("validation", &validation).finish()
    }
}

impl Groups {
    /// Creates a source of groups to train and to validate on.
    ///
    /// Errors, with the number of the group, from 1: groups of different sizes, or of fewer than 2 sequences; an empty
    /// sequence; a mask of another length; scores that are not finite, or that only some groups have.
    pub fn new(train: Vec<Group>, validation: Vec<Group>) -> Result<Self> {
        let parts = [train, validation];
        let first = parts.iter().flatten().next().map(|group| (group.sequences.len(), group.score.is_some()));
        for (part, name) in parts.iter().zip(["group", "validation group"]) {
            ensure!(!part.is_empty(), Error::option("groups", format_args!("expected at least one {name}, got none")));
            for (Group { sequences, score }, number) in part.iter().zip(1..) {
                let (size, scored) = first.unwrap_or_default();
                let wrong = match score {
                    _ if sequences.len() != size || size < 2 => {
                        format!("has {} sequences, expected {}", sequences.len(), size.max(2))
                    }
                    Some(score) if !(*score as f32).is_finite() => format!("has the score {score}"),
                    _ if score.is_some() != scored => "has a score and others have none, or the other way round".into(),
                    _ if sequences.iter().any(|sequence| sequence.tokens.is_empty()) => "has an empty sequence".into(),
                    _ if sequences.iter().any(|s| ![0, s.tokens.len()].contains(&s.loss_mask.len())) => {
                        "has a mask whose length is not that of its tokens".into()
                    }
                    _ => continue,
                };
                return Err(Error::option("groups", format_args!("{name} {number} {wrong}")));
            }
        }
        Ok(Self { parts, chosen: Mutex::default() })
    }

    /// Returns the groups to train on, and those to validate on.
    pub fn parts(&self) -> [&[Group]; 2] {
        self.parts.each_ref().map(Vec::as_slice)
    }

    /// Returns the number of groups of which sequences of `seq_len` tokens leave nothing that counts.
    pub fn left_out(&self, seq_len: usize) -> usize {
        self.parts.iter().flatten().filter(|group| !counts(group, seq_len)).count()
    }

    fn chosen(&self, seq_len: usize) -> Arc<Chosen> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        match &*chosen {
            Some(chosen) if chosen.seq_len == seq_len => Arc::clone(chosen),
            _ => {
                let of = |part: &Vec<Group>| (0..part.len()).filter(|&at| counts(&part[at], seq_len)).collect_vec();
                let new = Arc::new(Chosen { seq_len, parts: self.parts.each_ref().map(of) });
                *chosen = Some(Arc::clone(&new));
                new
            }
        }
    }

    /// Checks that both parts have a group with a token that counts.
    fn check_counts(&self, request: &BatchRequest) -> Result<()> {
        for (part, purpose) in self.chosen(request.seq_len).parts.iter().zip(["train", "validate"]) {
            ensure!(
                !part.is_empty(),
                Error::option(
                    "groups",
                    format_args!(
                        "none to {purpose} on has a token that counts in its first {} tokens; use more data or a larger \
                         `seq_len`",
                        request.seq_len
                    )
                )
            );
        }
        Ok(())
    }

    fn of(&self, part: usize, numbers: &[usize], request: &BatchRequest) -> Result<GroupBatch> {
        let groups = numbers.iter().map(|&number| &self.parts[part][number]).collect_vec();
        GroupBatch::of_groups(&groups, request.seq_len)
    }
}

impl Group {
    /// Returns a token that a vocabulary of this size does not have.
    fn foreign(&self, num_tokens: usize) -> Option<i64> {
        let mut tokens = self.sequences.iter().flat_map(|sequence| &sequence.tokens).copied();
        tokens.find(|token| !(0..num_tokens as i64).contains(token))
    }
}

/// Returns `true` if each sequence has a token that counts after its first, or all tokens count.
fn counts(group: &Group, seq_len: usize) -> bool {
    let of = |Sequence { loss_mask, .. }: &Sequence| {
        loss_mask.is_empty() || loss_mask.iter().take(seq_len).skip(1).any(|&counts| counts)
    };
    group.sequences.iter().all(of)
}

impl BatchSource for Groups {
    type Batch = GroupBatch;

    fn batch(&self, request: &BatchRequest) -> Result<GroupBatch> {
        self.check_counts(request)?;
        let chosen = self.chosen(request.seq_len);
        let train = &chosen.parts[0];
        let (count, rows) = (train.len() as u64, request.rows.max(1) as u64);
        let number = |row: u64| {
            // Where all batches have the same number of rows, and there are as many groups, none is in a batch twice: what is
            // left over at the end of an epoch waits for the order of the next.
            let (epoch, place) = match count / rows {
                0 => (row / count, row % count),
                batches => (row / rows / batches, row / rows % batches * rows + row % rows),
            };
            train[shuffled(request.seed, epoch, place, count) as usize]
        };
        let numbers = (0..request.rows as u64).map(|row| number(request.first.wrapping_add(row))).collect_vec();
        self.of(0, &numbers, request)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<GroupBatch>> {
        self.check_counts(request)?;
        let chosen = self.chosen(request.seq_len);
        let (all, rows) = (&chosen.parts[1][..], request.rows.max(1));
        // A group by itself has no others to be told from: it is added to the batch before.
        let mut starts = (0..all.len()).step_by(rows).collect_vec();
        if rows > 1 && starts.len() > 1 && all.len() % rows == 1 {
            starts.pop();
        }
        let ends = starts.iter().skip(1).chain([&all.len()]).copied().collect_vec();
        starts.iter().zip(ends).map(|(&from, end)| self.of(1, &all[from..end], request)).try_collect_vec()
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        self.check_counts(request)?;
        for (part, name) in self.parts.iter().zip(["group", "validation group"]) {
            for (group, number) in part.iter().zip(1..) {
                if let Some(token) = group.foreign(request.num_tokens) {
                    let why = format_args!(
                        "{name} {number} has the token {token}, expected tokens in 0..{} (the model's vocabulary)",
                        request.num_tokens
                    );
                    return Err(Error::option("groups", why));
                }
            }
        }
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        let mut hash = FNV1A_START;
        let mut add = |word: u64| hash = fnv1a_from(hash, &word.to_le_bytes());
        for (part, groups) in self.parts.iter().enumerate() {
            for Group { sequences, score } in groups {
                add(part as u64);
                add(score.map_or(u64::MAX, f64::to_bits));
                for Sequence { tokens, loss_mask } in sequences {
                    add(tokens.len() as u64);
                    for (at, token) in tokens.iter().enumerate() {
                        add((token << 1) as u64 | u64::from(loss_mask.get(at).copied().unwrap_or(true)));
                    }
                }
            }
        }
        let size = self.parts.iter().map(Vec::len).sum::<usize>() as u64;
        Ok(DataPrint::new("groups", size, hash))
    }
}
