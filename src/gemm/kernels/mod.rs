//! Micro-kernels, each with the loops over the tiles of one block of C: [`fma`] by multiply-adds at every level, for
//! bf16 [`bf16_dot`] by products of pairs and [`amx`] on tile registers.
//!
//! They read panels: `mr` rows of A or `nr` columns of B over the depth of the block.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod bf16_dot;
pub(super) mod fma;

/// Dimension of A along which elements are contiguous.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The rows of a panel; `stride` leads to the next depth.
    Rows,
    /// The depth of a row; `stride` leads to the next row.
    Depth,
}

/// Rows of A in panels of `mr` that start `panel` elements apart.
#[derive(Clone, Copy)]
pub(super) struct PanelsA<'a, R> {
    pub data: &'a [R],
    pub panel: usize,
    pub order: Order,
    pub stride: usize,
}

impl<R> PanelsA<'_, R> {
    /// Panics if one of `m` rows of depth `kc`, at least one each, ends outside of the slice.
    // Inlined for `mr`, which is a constant of most kernels: the divisions would cost more than a small block.
    #[inline(always)]
    fn check(&self, m: usize, mr: usize, kc: usize) {
        let (row, p) = if self.order == Order::Rows { (1, self.stride) } else { (self.stride, 1) };
        // A full panel may reach further than the last one, which may be lower.
        let last_panel = (m - 1) / mr * self.panel + (m - 1) % mr * row;
        let full_panel = (m / mr).saturating_sub(1) * self.panel + (mr.min(m) - 1) * row;
        assert!(last_panel.max(full_panel) + (kc - 1) * p < self.data.len(), "A ends before its block");
    }
}

/// Columns of B in panels of `nr` that start `panel` elements apart; the columns of a panel are adjacent, and `row` is
/// the stride to the next depth. All columns of the last panel are readable, even past the edge of C.
#[derive(Clone, Copy)]
pub(super) struct PanelsB<'a, R> {
    pub data: &'a [R],
    pub panel: usize,
    pub row: usize,
}
