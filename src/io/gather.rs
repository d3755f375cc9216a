//! Strided views of a file: reads scattered values in file order, a bounded part at a time.

use super::{bytes::Reading, source::Source};
use crate::{Shape, collect::CollectVec, sort::sort_by};

/// Number of bytes of the file held at a time.
const WINDOW: usize = if cfg!(miri) { 1 << 12 } else { 1 << 20 };

/// Maximum gap in bytes between two runs of values that are read together: reading the gap costs less than another
/// system call.
const GAP: usize = 4 << 10;

/// A dimension of a view: its size, and its strides in the file and in the output, in values.
#[derive(Clone, Copy)]
struct Dim {
    size: usize,
    from: usize,
    to: usize,
}

/// Writes the values of a view, `N` bytes each, from byte `start` on, to `out` in row-major order.
pub(super) fn gather<S: Copy, const N: usize>(
    source: &Source,
    start: usize,
    shape: &Shape,
    strides: &[usize],
    out: &mut [S],
    value: impl Fn([u8; N]) -> S,
) -> Reading<()> {
    if out.is_empty() {
        return Ok(());
    }
    for_blocks(source, start, (shape, strides), N, &mut |dims, window, to| {
        copy(dims, window.as_chunks::<N>().0, &mut out[to..], &value);
    })
}

/// Calls `body` with the dimensions and bytes of each block, and the position of its first value in the output; values
/// have `bytes` bytes.
#[allow(clippy::type_complexity)]
fn for_blocks(
    source: &Source,
    start: usize,
    (shape, strides): (&Shape, &[usize]),
    bytes: usize,
    body: &mut dyn FnMut(&[Dim], &[u8], usize),
) -> Reading<()> {
    let mut to = shape.numel();
    let dims = shape.iter().zip(strides).map(|(&size, &from)| {
        to /= size;
        Dim { size, from, to }
    });
    let mut dims: Vec<Dim> = dims.filter(|dim| dim.size > 1).collect_vec();
    sort_by(&mut dims, |a, b| a.from.cmp(&b.from));
    // The innermost dimensions of the file that fit a window, and a part of the next one.
    let (mut inner, mut outer, mut span, mut rest) = (Vec::new(), Vec::new(), 1, None);
    for dim in dims {
        if !outer.is_empty() || dim.from * bytes > span * bytes + GAP {
            outer.push(dim);
            continue;
        }
        let fits = match dim.from {
            0 => dim.size,
            from => dim.size.min((WINDOW / bytes).saturating_sub(span) / from + 1),
        };
        if fits < dim.size {
            outer.push(Dim { size: dim.size.div_ceil(fits), from: fits * dim.from, to: fits * dim.to });
            // The last part may be smaller.
            let left = (dim.size - 1) % fits + 1;
            rest = Some(Block::new(&inner, Dim { size: left, ..dim }, span));
        }
        inner.push(Dim { size: fits, ..dim });
        span += (fits - 1) * dim.from;
    }
    let whole = Block::new(&inner, Dim { size: 1, from: 0, to: 0 }, span);
    let mut window = vec![0; span * bytes];
    let mut index = vec![0; outer.len()];
    loop {
        let place = |step: fn(&Dim) -> usize| index.iter().zip(&outer).map(|(index, dim)| index * step(dim)).sum();
        let (from, to): (usize, usize) = (place(|dim| dim.from), place(|dim| dim.to));
        let last = outer.first().is_some_and(|dim| index[0] == dim.size - 1);
        let block = rest.as_ref().filter(|_| last).unwrap_or(&whole);
        let window = &mut window[..block.span * bytes];
        source.read_at(start + from * bytes, window)?;
        body(&block.dims, window, to);
        // Advances to the next position; the first dimension varies fastest.
        let next = index.iter_mut().zip(&outer).find_map(|(index, dim)| {
            *index = (*index + 1) % dim.size;
            (*index > 0).then_some(())
        });
        if next.is_none() {
            return Ok(());
        }
    }
}

/// Values that are read together.
struct Block {
    /// In the order of the output, outermost first.
    dims: Vec<Dim>,
    /// Number of values in the file from the first to the last.
    span: usize,
}

impl Block {
    /// Adds one more dimension to `inner`, which spans `span` values.
    fn new(inner: &[Dim], dim: Dim, span: usize) -> Self {
        let mut dims: Vec<Dim> = inner.iter().copied().chain([dim]).filter(|dim| dim.size > 1).collect_vec();
        sort_by(&mut dims, |a, b| b.to.cmp(&a.to));
        Self { dims, span: span + (dim.size - 1) * dim.from }
    }
}

/// Copies a block, whose first value is at the start of `from`.
fn copy<S: Copy, const N: usize>(dims: &[Dim], from: &[[u8; N]], out: &mut [S], value: &impl Fn([u8; N]) -> S) {
    match dims {
        [] => out[0] = value(from[0]),
        &[dim] => (0..dim.size).for_each(|i| out[i * dim.to] = value(from[i * dim.from])),
        [dim, rest @ ..] => {
            (0..dim.size).for_each(|i| copy(rest, &from[i * dim.from..], &mut out[i * dim.to..], value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Philox;

    /// Compares with reading value by value, for transposed, sliced, repeated, overlapping and large views.
    #[test]
    fn gathered_views_equal_their_definition() {
        let length = if cfg!(miri) { 60_000u32 } else { 6_000_000 };
        let file: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let source = Source::memory(file.clone());
        let random = Philox::new(1, 0);
        let fixed: [(&[usize], &[usize]); 9] = [
            (&[], &[]),
            (&[3, 0, 2], &[1, 1, 1]),
            (&[1300, 1100], &[1, 1300]),
            (&[700, 3], &[2000, 1]),
            (&[3, 700], &[1, 2000]),
            (&[2, 600, 1100], &[0, 1, 600]),
            (&[50, 60], &[1, 1]),
            (&[1 << 19, 3], &[2, 1]),
            (&[7, 5, 3, 2, 2], &[100_003, 1, 40_000, 11, 9]),
        ];
        let drawn = (0..60).map(|round| {
            let number = |at: u64, most: u64| 1 + random.below(10 * round + at, most) as usize;
            let rank = number(0, 3);
            let shape: Vec<usize> = (0..rank).map(|dim| number(1 + dim as u64, 40)).collect();
            let strides = (0..rank).map(|dim| number(5 + dim as u64, [5, 300, 9000][dim]) - 1).collect();
            (shape, strides)
        });
        let fixed = fixed.into_iter().map(|(shape, strides)| (shape.to_vec(), strides.to_vec()));
        for (shape, strides) in fixed.chain(drawn.collect::<Vec<(_, Vec<usize>)>>()) {
            let dims = Shape::new(&shape).unwrap();
            let reach: usize = shape.iter().zip(&strides).map(|(&dim, &stride)| dim.saturating_sub(1) * stride).sum();
            let fits = 5 + 3 * (reach + 1) <= file.len();
            if cfg!(miri) && (!fits || dims.numel() > 4000) {
                continue;
            }
            assert!(fits, "{shape:?} {strides:?} lies outside of the file");
            let mut out = vec![[0u8; 3]; dims.numel()];
            gather(&source, 5, &dims, &strides, &mut out, |bytes: [u8; 3]| bytes).unwrap();
            for (mut rest, out) in out.into_iter().enumerate() {
                let mut at = 0;
                for (&dim, &stride) in shape.iter().zip(&strides).rev() {
                    at += rest % dim * stride;
                    rest /= dim;
                }
                assert_eq!(out, file[5 + 3 * at..][..3], "{shape:?} {strides:?}");
            }
        }
    }
}
