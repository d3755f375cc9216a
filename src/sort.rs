//! One sort for lists that are short. The standard library's sort is compiled anew for every type and comparison, eight
//! kilobytes each time.

use std::cmp::Ordering;

/// Sorts by a comparison; equal elements keep their order.
pub(crate) fn sort_by<T>(items: &mut [T], compare: impl Fn(&T, &T) -> Ordering) {
    let mut from = order(items.len(), |a, b| compare(&items[a], &items[b]));
    // Along each cycle of the permutation, by swaps.
    for start in 0..items.len() {
        let mut to = start;
        while from[to] != start {
            let next = std::mem::replace(&mut from[to], to);
            items.swap(to, next);
            to = next;
        }
        from[to] = to;
    }
}

/// Sorts in ascending order; equal elements keep their order.
pub(crate) fn sort<T: Ord>(items: &mut [T]) {
    sort_by(items, T::cmp);
}

/// Indices of `count` elements in the order of a comparison; equal ones ascend.
pub(crate) fn order(count: usize, compare: impl Fn(usize, usize) -> Ordering) -> Vec<usize> {
    order_dyn(count, &compare)
}

/// A comparison behind a pointer: a table of one method, while that of `dyn Fn` compiles each closure twice.
trait Compare {
    fn call(&self, a: usize, b: usize) -> Ordering;
}

impl<F: Fn(usize, usize) -> Ordering> Compare for F {
    fn call(&self, a: usize, b: usize) -> Ordering {
        self(a, b)
    }
}

fn order_dyn(count: usize, compare: &dyn Compare) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| compare.call(a, b));
    order
}

#[cfg(test)]
mod tests {
    use super::sort_by;
    use crate::philox::Philox;

    #[test]
    fn sorts_as_the_standard_library() {
        for (seed, &count) in [0usize, 1, 2, 3, 17, 100].iter().enumerate() {
            for distinct in [1, 3, 1000] {
                let drawn = Philox::new(seed as u64, 7);
                let values: Vec<(u32, usize)> =
                    (0..count).map(|index| (drawn.word(index as u64) % distinct, index)).collect();
                let (mut ours, mut theirs) = (values.clone(), values);
                sort_by(&mut ours, |a, b| b.0.cmp(&a.0));
                theirs.sort_by_key(|pair| std::cmp::Reverse(pair.0));
                assert_eq!(ours, theirs);
            }
        }
    }
}
