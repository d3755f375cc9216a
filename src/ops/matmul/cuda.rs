//! Products on a GPU, with strides in the form that cuBLAS takes.

use super::strides::{Merged, Sizes, positions};
use crate::{
    DType, Error, Result, Shape, Tensor,
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
    if sizes.k == 0 {
        return match bias {
            Some(bias) => bias.detach().expand(shape)?.contiguous()?.into_owned(),
            None => Tensor::zeros(shape, a.dtype(), a.device()),
        };
    }
    let [a, b] = usable(sizes, [a, b])?;
    let merged = Merged::new(sizes, &a, &b)?;

    // One call covers the last dimension of the batch.
    let outer = merged.batch.rank().saturating_sub(1);
    let (outer, last) = merged.batch.split_at(outer);
    let (outer, items) = (Shape::unchecked(outer), last.first().copied().unwrap_or(1));
    let step = |operand: usize| if last.is_empty() { 0 } else { merged.strides[operand][outer.rank()] };
    let size = a.dtype().size();
    let at = |tensor: &Tensor, element: usize| Ok(tensor.storage_address()?.plus(element * size));
    let Merged { m, n, k, .. } = merged;
    let described = |item: usize, to: Address| {
        let (a_start, b_start) = positions(item, &outer, &merged.strides, merged.start);
        Ok::<_, Error>(Gemm {
            dtype: a.dtype(),
            sums: false,
            batch: items,
            m,
            n,
            k,
            a: operand(at(&a, a_start)?, merged.a, [m, k], step(0)),
            b: operand(at(&b, b_start)?, merged.b, [k, n], step(1)),
            c: to.plus(item * items * m * n * size),
            add: false,
            bias: None,
            row_sums: None,
        })
    };
    if let Some(bias) = bias.filter(|_| outer.numel() == 1) {
        let mut out = Tensor::uninit(shape, a.dtype(), a.device())?;
        let fused = Gemm { bias: Some(bias.address()?), ..described(0, out.address_mut()?)? };
        if gpu.fuses(&fused) {
            gpu.gemm(&fused)?;
            return Ok(out);
        }
    }
    let mut out = match bias {
        // The product is added to it in the accumulation type, so that the result is rounded once.
        Some(bias) => bias.detach().expand(shape)?.contiguous()?.into_owned()?,
        None => Tensor::uninit(shape, a.dtype(), a.device())?,
    };
    let to = out.address_mut()?;
    for item in 0..outer.numel() {
        gpu.gemm(&Gemm { add: bias.is_some(), ..described(item, to)? })?;
    }
    Ok(out)
}

/// Computes `sums (+)= a·b` for two matrices, in the accumulation type or in that of the operands; `sums` must not be
/// empty.
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
    gpu.gemm(&Gemm { add: accumulate, ..of_matrices(sizes, [&a, &b], sums)? })
}

/// Computes `sums = a·b + bias` for two matrices if the GPU can do that in one pass; returns `true` if it did.
pub(super) fn product_and_bias(
    gpu: &'static dyn Gpu,
    sizes: &Sizes,
    operands: [&Tensor; 2],
    bias: &Tensor,
    sums: &mut Tensor,
) -> Result<bool> {
    if sums.numel() == 0 || sizes.k == 0 {
        return Ok(false);
    }
    let ([a, b], bias) = (usable(sizes, operands)?, bias.contiguous()?);
    let fused = Gemm { bias: Some(bias.address()?), ..of_matrices(sizes, [&a, &b], sums)? };
    let fuses = gpu.fuses(&fused);
    if fuses {
        gpu.gemm(&fused)?;
    }
    Ok(fuses)
}

/// Computes `a·b` and the sums of the rows of `a` in this dtype, for two matrices that are not empty; `None` if the GPU
/// cannot do that in one pass.
pub(super) fn product_and_row_sums(
    gpu: &'static dyn Gpu,
    sizes: &Sizes,
    operands: [&Tensor; 2],
    dtype: DType,
) -> Result<Option<[Tensor; 2]>> {
    let [a, b] = usable(sizes, operands)?;
    let uninit = |shape: &[usize]| Tensor::uninit(Shape::new(shape)?, dtype, a.device());
    let (mut out, mut sums) = (uninit(&[sizes.m, sizes.n])?, uninit(&[sizes.m])?);
    let fused = Gemm { row_sums: Some(sums.address_mut()?), ..of_matrices(sizes, [&a, &b], &mut out)? };
    if !gpu.fuses(&fused) {
        return Ok(None);
    }
    gpu.gemm(&fused)?;
    Ok(Some([out, sums]))
}

/// Describes the product of two matrices that overwrites `out`.
fn of_matrices(sizes: &Sizes, [a, b]: [&Tensor; 2], out: &mut Tensor) -> Result<Gemm> {
    let merged = Merged::new(sizes, a, b)?;
    let Merged { m, n, k, start, .. } = merged;
    let at = |tensor: &Tensor, element: usize| {
        Ok::<_, Error>(tensor.storage_address()?.plus(element * tensor.dtype().size()))
    };
    Ok(Gemm {
        dtype: a.dtype(),
        sums: out.dtype() != a.dtype(),
        batch: 1,
        m,
        n,
        k,
        a: operand(at(a, start[0])?, merged.a, [m, k], 0),
        b: operand(at(b, start[1])?, merged.b, [k, n], 0),
        c: out.address_mut()?,
        add: false,
        bias: None,
        row_sums: None,
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
