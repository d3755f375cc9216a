//! A random order of any number of rows that takes no memory.

use super::super::random::{Purpose, stream};
use crate::Philox;

/// Number of rounds; four suffice for a permutation that looks random if the round function does (Luby and Rackoff, 1988).
const ROUNDS: u32 = 4;

/// Returns the row at a place in the order of an epoch: a permutation of `0..count`.
///
/// A Feistel network with Philox as its round function permutes the next power of four; places outside of `0..count` are
/// permuted again until they lie inside (cycle walking: Black and Rogaway, <https://doi.org/10.1007/3-540-45760-7_9>).
pub(super) fn shuffled(seed: u64, epoch: u64, place: u64, count: u64) -> u64 {
    debug_assert!(place < count);
    let bits = u64::BITS - (count - 1).leading_zeros();
    let half = bits.div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let random = Philox::new(seed, stream(Purpose::Shuffle, epoch, 0));
    let mut value = place;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..ROUNDS {
            let word = random.block((round as u64) << 32 | right)[0] as u64;
            (left, right) = (right, left ^ word & mask);
        }
        value = left << half | right;
        if value < count {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::shuffled;
    use crate::collect::CollectVec;

    #[test]
    fn every_row_comes_once() {
        for count in [1u64, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097] {
            for (seed, epoch) in [(0, 0), (0, 1), (7, 0)] {
                let mut rows = (0..count).map(|place| shuffled(seed, epoch, place, count)).collect_vec();
                rows.sort_unstable();
                assert!(rows.into_iter().eq(0..count), "{count} rows, seed {seed}, epoch {epoch}");
            }
        }
    }

    /// Epochs and seeds have orders of their own, in which neighbours are as far apart as random rows: a third of the
    /// count in the mean.
    #[test]
    fn orders_differ_and_scatter() {
        let count = 10_000u64;
        let order = |seed, epoch| (0..count).map(|place| shuffled(seed, epoch, place, count)).collect_vec();
        let first = order(0, 0);
        for other in [order(0, 1), order(1, 0)] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} rows have the same place");
        }
        let apart: u64 = first.windows(2).map(|pair| pair[0].abs_diff(pair[1])).sum();
        let mean = apart as f64 / (count - 1) as f64;
        assert!((mean - count as f64 / 3.0).abs() < 0.03 * count as f64, "{mean}");
    }

    /// More rows than any file has.
    #[test]
    fn large_counts() {
        let count = u32::MAX as u64 * 3;
        let mut rows = (0..1000).map(|place| shuffled(3, 0, place, count)).collect_vec();
        assert!(rows.iter().all(|&row| row < count));
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), 1000);
    }
}
