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
    cpu::for_rows(rows, ROWS * row_bytes, ROWS * row_bytes, &|_, rows: &mut [u8]| {
        lend(User::Products, |[area, _, _]| {
            let from = aligned::<u8>(area, ROWS * row_bytes);
            for panel in rows.chunks_exact_mut(ROWS * row_bytes) {
                from.copy_from_slice(panel);
                for_units(kind, row_bytes, &mut |at, size| {
                    let to = &mut panel[ROWS * at..][..ROWS * size];
                    match size {
                        2 => gather::<2>(&from[at..], row_bytes, to),
                        _ => gather::<4>(&from[at..], row_bytes, to),
                    }
                });
            }
        });
    });
}

fn gather<const SIZE: usize>(from: &[u8], row_bytes: usize, to: &mut [u8]) {
    for (unit, row) in to.as_chunks_mut::<SIZE>().0.iter_mut().zip(from.chunks(row_bytes)) {
        unit.copy_from_slice(&row[..SIZE]);
    }
}

/// Copies a row of a panel to `out`, its blocks one after another.
pub(crate) fn copy_row(kind: QuantType, panel: &[u8], row: usize, out: &mut [u8]) {
    for_units(kind, out.len(), &mut |at, size| {
        out[at..at + size].copy_from_slice(&panel[ROWS * at + row * size..][..size]);
    });
}

/// Calls `unit` with the first byte of each unit of a row, and its size.
fn for_units(kind: QuantType, row_bytes: usize, unit: &mut dyn FnMut(usize, usize)) {
    let (_, bytes) = kind.block();
    for block in (0..row_bytes).step_by(bytes) {
        let mut at = 0;
        while at < bytes {
            let size = if kind.scales().contains(&at) { 2 } else { 4 };
            unit(block + at, size);
            at += size;
        }
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
