//! Mixtures of sources.

use std::fmt;

use super::{Batch, BatchRequest, BatchSource, DataPrint};
use crate::{Error, Result, collect::CollectVec, error::ensure, hash::fnv1a, philox::philox4x32};

/// Mixture of sources of one type of batches: each gives its share of the rows, as evenly as possible. Which row comes from
/// which source depends only on the row's number, so a resumed run continues each source where it was.
///
/// The validation has the batches of all sources.
pub struct Mixture<B> {
    parts: Vec<Part<B>>,
}

struct Part<B> {
    weight: f64,
    /// Share of the rows that the parts before this one leave, as a fraction of 2^32.
    share: u64,
    source: Box<dyn BatchSource<Batch = B>>,
}

impl<B> fmt::Debug for Mixture<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.parts.iter().map(|part| part.weight)).finish()
    }
}

impl<B: Batch> Mixture<B> {
    /// Mixes sources with these weights; only their ratios matter.
    ///
    /// Errors: an empty list; a weight that is not a finite number above 0.
    pub fn new(parts: Vec<(f64, Box<dyn BatchSource<Batch = B>>)>) -> Result<Self> {
        ensure!(!parts.is_empty(), Error::option("mixture", "expected at least one source"));
        if let Some((weight, _)) = parts.iter().find(|(weight, _)| !(*weight > 0.0 && weight.is_finite())) {
            return Err(Error::option("mixture", format_args!("expected weights above 0, got {weight}")));
        }
        let weights = parts.iter().map(|(weight, _)| *weight).collect_vec();
        let part = |(index, (weight, source)): (usize, (f64, _))| {
            let rest: f64 = weights[index..].iter().sum();
            Part { weight, share: (weight / rest * (1u64 << 32) as f64).round() as u64, source }
        };
        Ok(Self { parts: parts.into_iter().enumerate().map(part).collect_vec() })
    }

    /// Returns the part of a request that each source answers: a sequence of rows of its own.
    fn split(&self, request: &BatchRequest) -> impl Iterator<Item = (&Part<B>, BatchRequest)> {
        // Rows that are left, before and up to the end of the request.
        let (mut before, mut end) = (request.first, request.first + request.rows as u64);
        self.parts.iter().enumerate().map(move |(index, part)| {
            let taken = |rows: u64| ((rows as u128 * part.share as u128) >> 32) as u64;
            let last = index + 1 == self.parts.len();
            let (first, to) = if last { (before, end) } else { (taken(before), taken(end)) };
            (before, end) = (before - first, end - to);
            (part, BatchRequest { first, rows: (to - first) as usize, seed: seed(request.seed, index), ..*request })
        })
    }

    /// Calls `check` for each source with its requests, and says which source an error is about.
    fn each<R>(
        &self,
        request: &BatchRequest,
        mut call: impl FnMut(&dyn BatchSource<Batch = B>, &BatchRequest) -> Result<R>,
    ) -> Result<Vec<R>> {
        let parts = self.parts.iter().enumerate();
        parts
            .map(|(index, part)| {
                let request = BatchRequest { seed: seed(request.seed, index), ..*request };
                call(&*part.source, &request).map_err(|error| error.context(format_args!("source {}", index + 1)))
            })
            .try_collect_vec()
    }
}

/// Two sources that are alike draw different offsets.
fn seed(seed: u64, index: usize) -> u64 {
    let [low, high, ..] = philox4x32([index as u32, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    (high as u64) << 32 | low as u64
}

impl<B: Batch> BatchSource for Mixture<B> {
    type Batch = B;

    fn batch(&self, request: &BatchRequest) -> Result<B> {
        let asked = self.split(request).enumerate().filter(|(_, (_, request))| request.rows > 0);
        let parts = asked
            .map(|(index, (part, request))| {
                part.source.batch(&request).map_err(|error| error.context(format_args!("source {}", index + 1)))
            })
            .try_collect_vec()?;
        B::concat(&parts)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<B>> {
        Ok(self
            .each(request, |source, request| source.validation_batches(request))?
            .into_iter()
            .flatten()
            .collect_vec())
    }

    fn each_validation_batch(&self, request: &BatchRequest, each: &mut dyn FnMut(B) -> Result<()>) -> Result<()> {
        // An error of `each` is not one of the source.
        let mut failed = None;
        let done = self.each(request, |source, request| {
            source.each_validation_batch(request, &mut |batch| {
                each(batch).map_err(|why| {
                    let stop = Error::argument("data", "stopped");
                    failed = Some(why);
                    stop
                })
            })
        });
        failed.map_or(done.map(drop), Err)
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        self.each(request, |source, request| source.check(request)).map(drop)
    }

    fn print(&self) -> Result<DataPrint> {
        let (mut text, mut size) = (String::new(), 0);
        for part in &self.parts {
            let print = part.source.print()?;
            text += &format!("{:016x} {print}\n", part.weight.to_bits());
            size += print.size;
        }
        Ok(DataPrint::new(format!("a mixture of {}", self.parts.len()), size, fnv1a(text.as_bytes())))
    }

    fn bytes_per_token(&self) -> Option<f64> {
        // As many windows of each.
        let ratios = self.parts.iter().map(|part| part.source.bytes_per_token().ok_or(())).try_collect_vec().ok()?;
        Some(ratios.iter().sum::<f64>() / ratios.len() as f64)
    }

    fn in_order(&self) -> bool {
        self.parts.iter().any(|part| part.source.in_order())
    }
}
