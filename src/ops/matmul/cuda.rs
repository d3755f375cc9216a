//! Products on a GPU, with strides in the form that cuBLAS takes.

use super::strides::{Merged, Sizes, positions};
use crate::{
    Result, Shape, Tensor,
    device::{Address, Gemm, Gpu, Operand},
};

/// Computes `a·b (+ bias)` as a constant of this shape, which must not be empty.
pub(super) fn product(
    gpu: &'static dyn Gpu,
    sizes: &Sizes,
    shape: Shape,
    [a, b]: [&Tensor; 2],
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let mut out = match bias {
        // The product is added to it in the accumulation type, so that the result is rounded once.
        Some(bias) => bias.detach().expand(shape)?.contiguous()?.into_owned()?,
        None => Tensor::uninit(shape, a.dtype(), a.device())?,
    };
    if sizes.k == 0 {
        let bytes = if bias.is_some() { 0 } else { out.numel() * out.dtype().size() };
        gpu.fill_zero(out.address_mut()?, bytes)?;
        return Ok(out);
    }
    let [a, b] = usable(sizes, [a, b])?;
    let merged = Merged::new(sizes, &a, &b)?;

    // One call covers the last dimension of the batch.
    let outer = merged.batch.rank().saturating_sub(1);
    let (outer, last) = merged.batch.split_at(outer);
    let (outer, items) = (Shape::unchecked(outer), last.first().copied().unwrap_or(1));
    let step = |operand: usize| if last.is_empty() { 0 } else { merged.strides[operand][outer.rank()] };
    let size = out.dtype().size();
    let at = |tensor: &Tensor, element: usize| Ok(tensor.storage_address()?.plus(element * size));
    let to = out.address_mut()?;
    let Merged { m, n, k, .. } = merged;
    for item in 0..outer.numel() {
        let (a_start, b_start) = positions(item, &outer, &merged.strides, merged.start);
        gpu.gemm(&Gemm {
            dtype: out.dtype(),
            sums: false,
            batch: items,
            m,
            n,
            k,
            a: operand(at(&a, a_start)?, merged.a, [m, k], step(0)),
            b: operand(at(&b, b_start)?, merged.b, [k, n], step(1)),
            c: to.plus(item * items * m * n * size),
            add: bias.is_some(),
        })?;
    }
    Ok(out)
}

/// Computes `sums (+)= a·b` for two matrices in the accumulation type; `sums` must not be empty.
pub(super) fn product_sums(
    gpu: &'static dyn Gpu,
    sizes: &Sizes,
    operands: [&Tensor; 2],
    accumulate: bool,
    sums: &mut Tensor,
) -> Result<()> {
    if sizes.k == 0 {
        let bytes = if accumulate { 0 } else { sums.numel() * sums.dtype().size() };
        return gpu.fill_zero(sums.address_mut()?, bytes);
    }
    let [a, b] = usable(sizes, operands)?;
    let merged = Merged::new(sizes, &a, &b)?;
    let Merged { m, n, k, start, .. } = merged;
    let at = |tensor: &Tensor, element: usize| Ok(tensor.storage_address()?.plus(element * tensor.dtype().size()));
    gpu.gemm(&Gemm {
        dtype: a.dtype(),
        sums: true,
        batch: 1,
        m,
        n,
        k,
        a: operand(at(&a, start[0])?, merged.a, [m, k], 0),
        b: operand(at(&b, start[1])?, merged.b, [k, n], 0),
        c: sums.address_mut()?,
        add: accumulate,
    })
}

/// Returns operands in the form that cuBLAS takes, with packed rows or packed columns; anything else is packed first.
fn usable(sizes: &Sizes, [a, b]: [&Tensor; 2]) -> Result<[Tensor; 2]> {
    let (mut a, mut b) = (a.detach(), b.detach());
    let usable = |merged: &Merged| [fits(merged.a, [merged.m, merged.k]), fits(merged.b, [merged.k, merged.n])];
    if !usable(&Merged::new(sizes, &a, &b)?)[1] {
        b = b.contiguous()?;
    }
    if !usable(&Merged::new(sizes, &a, &b)?)[0] {
        a = a.contiguous()?;
    }
    if !usable(&Merged::new(sizes, &a, &b)?)[0] {
        // Repeated items of the batch that became rows.
        a = a.expand(sizes.with([sizes.m, sizes.k])?)?.contiguous()?;
    }
    Ok([a, b])
}

/// Returns `true` if the rows of a matrix are packed and do not overlap. The stride of a dimension of size 1 is
/// ignored.
fn has_packed_rows([row, column]: [usize; 2], [rows, columns]: [usize; 2]) -> bool {
    (column == 1 || columns == 1) && (row >= columns || rows == 1)
}

fn fits(steps: [usize; 2], sizes: [usize; 2]) -> bool {
    let swapped = |[row, column]: [usize; 2]| [column, row];
    has_packed_rows(steps, sizes) || has_packed_rows(swapped(steps), swapped(sizes))
}

fn operand(address: Address, [row, column]: [usize; 2], [rows, columns]: [usize; 2], batch: usize) -> Operand {
    let transposed = !has_packed_rows([row, column], [rows, columns]);
    let (stride, packed) = if transposed { (column, rows) } else { (row, columns) };
    Operand { address, stride: stride.max(packed), transposed, batch }
}
