//! Counter-based random numbers: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A value depends only on the seed, a stream and its position, never on the order or number of threads, so every
//! device draws the same numbers and a mask can be redrawn in the backward pass instead of being stored.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Computes ten rounds of Philox-4x32: four random words from a counter and a key.
#[inline(always)]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = MULTIPLIERS[0] as u64 * counter[0] as u64;
        let b = MULTIPLIERS[1] as u64 * counter[2] as u64;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Stream of random numbers with random access.
///
/// Word `i` is lane `i % 4` of the block with counter `[i / 4 (64 bits), stream (64 bits)]` under the seed as key.
///
/// ```
/// use x_transformers::Philox;
/// let random = Philox::new(42, 0); // seed, stream
/// assert_eq!(random.uniform(7), Philox::new(42, 0).uniform(7)); // a function of its position
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[doc(alias = "Generator")]
#[doc(alias = "manual_seed")]
#[doc(alias = "randn")]
pub struct Philox {
    seed: u64,
    stream: u64,
}

impl Philox {
    /// Number of words that [`Philox::group`] draws together.
    pub(crate) const GROUP: usize = 64;

    /// Creates the stream with this number under this seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream }
    }

    /// Returns the seed: the key of the generator.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Returns the number of the stream.
    pub(crate) fn stream(&self) -> u64 {
        self.stream
    }

    /// Returns the four words of block `block`.
    #[inline(always)]
    pub fn block(&self, block: u64) -> [u32; 4] {
        let counter = [block as u32, (block >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32];
        philox4x32(counter, [self.seed as u32, (self.seed >> 32) as u32])
    }

    /// Draws words `64 group .. 64 group + 64`: sixteen blocks, enough that loops over them fill vector registers.
    #[inline(always)]
    pub(crate) fn group(&self, group: u64, words: &mut [u32; Self::GROUP]) {
        let first = group * (Self::GROUP as u64 / 4);
        for (block, words) in (first..).zip(words.as_chunks_mut::<4>().0) {
            *words = self.block(block);
        }
    }

    /// Returns word `index` of the stream.
    #[inline(always)]
    pub fn word(&self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Draws uniformly from `[0, 1)` with 53 random bits. Draw `index` uses words `2 index` and `2 index + 1`.
    pub fn uniform(&self, index: u64) -> f64 {
        let block = self.block(index / 2);
        let lane = (index % 2) as usize * 2;
        let bits = (block[lane] as u64) << 32 | block[lane + 1] as u64;
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Draws from the standard normal distribution by Box and Muller. Draw `index` uses block `index / 2`, whose two
    /// uniforms give two normals.
    pub fn normal(&self, index: u64) -> f64 {
        // 1 − u lies in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * libm::log(1.0 - self.uniform(index & !1))).sqrt();
        let angle = std::f64::consts::TAU * self.uniform(index | 1);
        radius * if index.is_multiple_of(2) { libm::cos(angle) } else { libm::sin(angle) }
    }

    /// Draws uniformly from `0..limit`; `limit` must not be 0. The bias is below `limit / 2^64`.
    pub fn below(&self, index: u64, limit: u64) -> u64 {
        let block = self.block(index / 2);
        let lane = (index % 2) as usize * 2;
        let bits = (block[lane] as u64) << 32 | block[lane + 1] as u64;
        ((bits as u128 * limit as u128) >> 64) as u64
    }

    /// Returns the threshold for [`Philox::keeps`] that drops with probability `p` in `[0, 1]`.
    pub fn drop_threshold(p: f64) -> u64 {
        (p * (1u64 << 32) as f64) as u64
    }

    /// Returns `true` if a dropout mask with this threshold keeps element `index`.
    #[inline(always)]
    pub fn keeps(&self, index: u64, threshold: u64) -> bool {
        self.word(index) as u64 >= threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the known-answer vectors that the authors publish with their reference implementation.
    #[test]
    fn philox_published_vectors() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn philox_moments() {
        let (n, random) = (200_000, Philox::new(7, 3));
        let normals: Vec<f64> = (0..n).map(|i| random.normal(i)).collect();
        let mean = normals.iter().sum::<f64>() / n as f64;
        let variance = normals.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        let uniform = (0..n).map(|i| random.uniform(i)).sum::<f64>() / n as f64;
        assert!((uniform - 0.5).abs() < 0.005, "mean {uniform}");
        assert!((0..1000).all(|i| random.below(i, 7) < 7));
    }
}
