//! The baseline of `xt train`: a Markov model that predicts a byte from the two before it.

/// Bytes of context.
const ORDER: usize = 2;

/// An order-2 byte model with interpolated Witten–Bell smoothing (Witten and Bell,
/// <https://doi.org/10.1109/18.87000>).
///
/// `p_k(c | h) = (n(h c) + t(h) p_{k-1}(c | h')) / (n(h) + t(h))`, where `n` counts occurrences, `t(h)` is the number
/// of different bytes seen after `h`, `h'` is `h` without its first byte, and `p_{-1}` is uniform over 256 bytes.
pub struct Markov {
    orders: Vec<Order>,
}

/// Counts of the bytes that follow contexts of one length.
struct Order {
    /// `[context, byte]`; a context is its bytes read as one big-endian number.
    counts: Vec<u32>,
    /// Occurrences of each context.
    totals: Vec<u32>,
    /// Different bytes seen after each context.
    distinct: Vec<u32>,
}

impl Markov {
    /// Counts the bytes of a text.
    pub fn new(text: &[u8]) -> Self {
        // The widest table has 64 MiB, of which only the pages of contexts that occur are ever touched.
        let mut orders: Vec<Order> = (0..=ORDER).map(Order::new).collect();
        for (length, order) in orders.iter_mut().enumerate() {
            for window in text.windows(length + 1) {
                order.count(context(&window[..length]), window[length]);
            }
        }
        Self { orders }
    }

    /// The mean of `-log2 p` over the bytes of a text; 0 for an empty one.
    pub fn bits_per_byte(&self, text: &[u8]) -> f64 {
        let bits = |end: usize| -self.probability(&text[end.saturating_sub(ORDER)..end], text[end]).log2();
        (0..text.len()).map(bits).sum::<f64>() / text.len().max(1) as f64
    }

    /// The probability of `byte` after at most [`ORDER`] bytes of history.
    fn probability(&self, history: &[u8], byte: u8) -> f64 {
        let usable = self.orders.iter().take(history.len() + 1).enumerate();
        usable.fold(1.0 / 256.0, |shorter, (length, order)| {
            order.probability(context(&history[history.len() - length..]), byte, shorter)
        })
    }
}

impl Order {
    fn new(length: usize) -> Self {
        let contexts = 256usize.pow(length as u32);
        Self { counts: vec![0; 256 * contexts], totals: vec![0; contexts], distinct: vec![0; contexts] }
    }

    fn count(&mut self, context: usize, byte: u8) {
        let count = &mut self.counts[256 * context + byte as usize];
        self.distinct[context] += u32::from(*count == 0);
        *count = count.saturating_add(1);
        self.totals[context] = self.totals[context].saturating_add(1);
    }

    fn probability(&self, context: usize, byte: u8, shorter: f64) -> f64 {
        let (total, distinct) = (self.totals[context] as f64, self.distinct[context] as f64);
        if total == 0.0 {
            return shorter;
        }
        (self.counts[256 * context + byte as usize] as f64 + distinct * shorter) / (total + distinct)
    }
}

fn context(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number, &byte| 256 * number + byte as usize)
}

#[cfg(test)]
mod tests {
    use super::Markov;

    #[test]
    fn probabilities_after_any_history_sum_to_one() {
        let model = Markov::new(b"the cat sat on the mat");
        for history in [&b""[..], b"t", b"th", b"at", b"zz", b"\xff"] {
            let sum: f64 = (0..=255).map(|byte| model.probability(history, byte)).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{history:?}: {sum}");
        }
    }

    #[test]
    fn probability_is_the_formula() {
        // After "ab": c once. After "b": c once. Alone: a, b, c, a, b: 2, 2, 1 of 5, three kinds.
        let model = Markov::new(b"abcab");
        let order0 = (1.0 + 3.0 / 256.0) / 8.0;
        let order1 = (1.0 + order0) / 2.0;
        let order2 = (1.0 + order1) / 2.0;
        assert!((model.probability(b"ab", b'c') - order2).abs() < 1e-15);
        // A context that never occurred leaves the shorter one's probability.
        assert_eq!(model.probability(b"zb", b'c'), order1);
    }

    #[test]
    fn nothing_learned_costs_eight_bits() {
        assert_eq!(Markov::new(b"").bits_per_byte(b"any text"), 8.0);
        assert_eq!(Markov::new(b"any text").bits_per_byte(b""), 0.0);
    }

    #[test]
    fn two_bytes_of_context_are_used() {
        // After two bytes the next one is certain; after one byte it is a coin toss.
        let text = b"aabb".repeat(1000);
        let bits = Markov::new(&text).bits_per_byte(&text);
        assert!(bits < 0.05, "{bits}");
        // Random bits stay random.
        let mut state = 1u32;
        let random: Vec<u8> = (0..40_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                b'0' + (state >> 31) as u8
            })
            .collect();
        let bits = Markov::new(&random[..30_000]).bits_per_byte(&random[30_000..]);
        assert!((bits - 1.0).abs() < 0.01, "{bits}");
    }
}
