//! Order of packed rows in the memory of the CPU: sixteen rows together, a block of each side by side.
//!
//! A block is made of units: the f16 scales, and four bytes at a time of everything else. Of sixteen blocks, the unit from
//! byte `at` on of block `i` lies at byte `16 · at + i · (bytes of the unit)`. So a register loads the same unit of many rows,
//! and a product reads the matrix from its first byte to its last.

use super::{QuantType, panels::ROWS};
use crate::device::{
    cpu,
    scratch::{User, aligned, lend},
};

/// Interleaves whole panels of rows of `row_bytes` bytes in place.
pub(crate) fn interleave(kind: QuantType, row_bytes: usize, rows: &mut [u8]) {
    cpu::for_rows(rows, ROWS * row_bytes, ROWS * row_bytes, |_, rows: &mut [u8]| {
        lend(User::Products, |[area, _, _]| {
            let from = aligned::<u8>(area, ROWS * row_bytes);
            for panel in rows.chunks_exact_mut(ROWS * row_bytes) {
                from.copy_from_slice(panel);
                for block in (0..row_bytes).step_by(kind.block().1) {
                    for_runs(kind, |at, bytes, size| {
                        let rows = std::array::from_fn(|row| &from[row * row_bytes + block + at..][..bytes]);
                        let to = &mut panel[ROWS * (block + at)..][..ROWS * bytes];
                        if size == 2 { side_by_side::<2>(rows, to) } else { side_by_side::<4>(rows, to) }
                    });
                }
            }
        });
    });
}

fn side_by_side<const SIZE: usize>(rows: [&[u8]; ROWS], to: &mut [u8]) {
    for (at, to) in to.chunks_exact_mut(ROWS * SIZE).enumerate() {
        for (to, row) in to.as_chunks_mut::<SIZE>().0.iter_mut().zip(rows) {
            *to = row.as_chunks().0[at];
        }
    }
}

/// Copies a row of a panel to `out`, its blocks one after another.
pub(crate) fn copy_row(kind: QuantType, panel: &[u8], row: usize, out: &mut [u8]) {
    let blocks = panel.chunks_exact(ROWS * kind.block().1);
    for (out, blocks) in out.chunks_exact_mut(kind.block().1).zip(blocks) {
        for_runs(kind, |at, bytes, size| {
            let units = blocks[ROWS * at..][..ROWS * bytes].chunks_exact(ROWS * size);
            for (out, units) in out[at..at + bytes].chunks_exact_mut(size).zip(units) {
                out.copy_from_slice(&units[row * size..][..size]);
            }
        });
    }
}

/// Calls `run` with the first byte, the bytes and the size of a unit of each run of equal units of a block.
fn for_runs(kind: QuantType, mut run: impl FnMut(usize, usize, usize)) {
    let (_, bytes) = kind.block();
    let mut at = 0;
    for &scale in kind.scales() {
        if scale > at {
            run(at, scale - at, 4);
        }
        run(scale, 2, 2);
        at = scale + 2;
    }
    if bytes > at {
        run(at, bytes - at, 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_from_panels() {
        for kind in QuantType::ALL.into_iter().filter(|kind| kind.is_packed()) {
            let row_bytes = 3 * kind.block().1;
            let rows: Vec<u8> = (0..2 * ROWS * row_bytes).map(|i| (i * i / 7) as u8).collect();
            let mut panels = rows.clone();
            interleave(kind, row_bytes, &mut panels);
            assert_ne!(panels, rows);
            let mut row = vec![0; row_bytes];
            for (i, expected) in rows.chunks_exact(row_bytes).enumerate() {
                copy_row(kind, &panels[i / ROWS * ROWS * row_bytes..], i % ROWS, &mut row);
                assert_eq!(row, expected, "{kind} row {i}");
            }
        }
    }
}
