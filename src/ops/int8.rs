//! 8-bit weights for decoding: one scale per row of the matrix, sums in f32.

#[cfg(target_arch = "x86_64")]
use crate::device::{Level, simd};
use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::discrete,
    collect::CollectVec,
    device::{Gpu, Grid, args, cpu, simd::vectorized, size32},
    dtype::{Float, Real, dispatch_float},
    error::ensure,
    ops::reduce::sum_slice,
    shape::Shape,
    tensor::same_device,
};

const OP: &str = "int8";

/// Maximum number of input rows for which weights are read as 8-bit integers; for more rows they are widened once.
const FEW: usize = 8;
/// Maximum number of input rows for which the CPU instead reads the weights once per [`FEW`] rows.
const GROUPED: usize = 32;

/// Matrix `[out, in]` of integers from −127 to 127 with one scale per row: a quarter of the size of f32.
///
/// ```
/// use x_transformers::{Device, Tensor, ops::Int8Matrix};
/// # fn main() -> x_transformers::Result<()> {
/// let weight = Tensor::from_slice(&[127.0f32, -64.0, 0.5, 0.25], [2, 2], &Device::Cpu)?;
/// let matrix = Int8Matrix::quantize(&weight)?;
/// let x = Tensor::from_slice(&[1.0f32, 2.0], [1, 2], &Device::Cpu)?;
/// let y = matrix.linear(&x, None)?.to_vec::<f32>()?;
/// assert!((y[0] + 1.0).abs() < 1e-5 && (y[1] - 1.0).abs() < 0.01);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Int8Matrix {
    /// `[out, in]`, as bytes.
    bytes: Tensor,
    /// `[out]` f32.
    scales: Tensor,
}

impl Int8Matrix {
    /// Rounds a float matrix `[out, in]` to the nearest integers, scaling the largest magnitude of each row to 127.
    ///
    /// Errors: another rank or dtype, or numbers that are not finite.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let &[rows, columns] = &weight.shape()[..] else {
            return Err(Error::shape(OP, format_args!("expected a matrix [out, in], got {:?}", weight.shape())));
        };
        weight.dtype().expect_float(OP)?;
        let values = weight.to_f64_vec()?;
        ensure!(
            values.iter().all(|x| x.is_finite()),
            Error::argument(OP, "expected finite weights, got NaN or infinity")
        );
        let mut bytes = Tensor::uninit(Shape::new(&[rows, columns])?, DType::Bool, &Device::Cpu)?;
        let mut scales = Vec::with_capacity(rows);
        let to = bytes.values_mut::<bool>()?;
        for (row, to) in values.chunks(columns.max(1)).zip(to.chunks_mut(columns.max(1))) {
            let largest = row.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            let scale = if largest > 0.0 { (largest / 127.0) as f32 } else { 1.0 };
            for (to, x) in to.iter_mut().zip(row) {
                *to = (x / f64::from(scale)).round().clamp(-127.0, 127.0) as i8 as u8;
            }
            scales.push(scale);
        }
        scales.resize(rows, 1.0);
        let device = weight.device();
        Ok(Self { bytes: bytes.to_device(device)?, scales: Tensor::from_vec(scales, [rows], device)? })
    }

    /// Returns the number of bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.bytes.numel() + 4 * self.scales.numel()
    }

    /// Converts the weights back to floats.
    ///
    /// Errors: a dtype that is not float.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        dtype.expect_float(OP)?;
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        let mut wide = Tensor::uninit(*self.bytes.shape(), dtype, self.bytes.device())?;
        match *self.bytes.device() {
            Device::Cpu => dispatch_float!(OP, dtype, T, {
                let (bytes, scales) = (self.bytes.values::<bool>()?, self.scales.values::<f32>()?);
                cpu::for_rows(wide.values_mut::<T>()?, columns, columns, |first, wide| {
                    for (index, wide) in wide.chunks_exact_mut(columns).enumerate() {
                        widen::<T>(&bytes[(first + index) * columns..][..columns], scales[first + index], wide);
                    }
                });
                Ok(())
            })?,
            Device::Gpu(gpu) => gpu.kernel("int8_dequantize", &[("DTYPE", dtype.name())])?.launch(
                Grid::elements(rows * columns),
                args![&mut wide, &self.bytes, &self.scales, (rows * columns) as i64, size32(columns)?],
            )?,
        }
        Ok(wide)
    }

    /// Computes [`Tensor::linear`] with these weights: `[.., in] → [.., out]`.
    ///
    /// Errors: sizes, dtypes or devices that do not match, or a tensor that requires a gradient: integers have none.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        ensure!(
            x.rank() > 0 && x.shape()[x.rank() - 1] == columns && x.dtype().is_float(),
            Error::shape(OP, format_args!("expected floats [.., {columns}], got {:?} {}", x.shape(), x.dtype()))
        );
        same_device(OP, x, &self.bytes)?;
        discrete(OP, &[x])?;
        let count = x.numel().checked_div(columns).unwrap_or(0);
        if (FEW + 1..=GROUPED).contains(&count) && *x.device() == Device::Cpu && columns > 0 {
            let inputs = x.detach().reshape(Shape::new(&[count, columns])?)?;
            let group = |first: usize| self.linear(&inputs.narrow(0, first, FEW.min(count - first))?, bias);
            let groups = (0..count).step_by(FEW).map(group).try_collect_vec()?;
            let y = Tensor::cat(&groups.iter().collect_vec(), 0)?;
            return y.reshape(x.shape().with_dim(x.rank() - 1, rows));
        }
        if count > FEW || columns == 0 {
            return x.linear(&self.dequantize(x.dtype())?, bias.map(Tensor::detach).as_ref());
        }
        if let Some(bias) = bias {
            ensure!(
                **bias.shape() == [rows] && bias.dtype() == x.dtype() && bias.device() == x.device(),
                Error::shape(
                    OP,
                    format_args!("expected a bias [{rows}] {}, got {:?} {}", x.dtype(), bias.shape(), bias.dtype())
                )
            );
        }
        let (x, bias) = (x.detach().contiguous()?, bias.map(|bias| bias.detach().contiguous()).transpose()?);
        let shape = x.shape().with_dim(x.rank() - 1, rows);
        match *x.device() {
            Device::Gpu(gpu) => self.on_cuda(gpu, &x, bias.as_ref(), count, shape),
            Device::Cpu => self.on_cpu(&x, bias.as_ref(), count, shape),
        }
    }

    fn on_cuda(&self, gpu: &dyn Gpu, x: &Tensor, bias: Option<&Tensor>, count: usize, shape: Shape) -> Result<Tensor> {
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        let mut y = Tensor::uninit(shape, x.dtype(), x.device())?;
        let sizes = (count as i64, rows as i64, size32(columns)?);
        gpu.kernel("int8_linear", &[("DTYPE", x.dtype().name())])?.launch(
            Grid::rows(rows, 32),
            args![&mut y, x, &self.bytes, &self.scales, bias, sizes.0, sizes.1, sizes.2],
        )?;
        Ok(y)
    }

    /// Computes in f32 and rounds to the dtype of `x` once: a copy of this function per dtype would only add code.
    fn on_cpu(&self, x: &Tensor, bias: Option<&Tensor>, count: usize, shape: Shape) -> Result<Tensor> {
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        let wide = x.to_dtype(DType::F32)?;
        let (x_values, bytes, scales) =
            (wide.values::<f32>()?, self.bytes.values::<bool>()?, self.scales.values::<f32>()?);
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        let bias = bias.as_ref().map(Tensor::values::<f32>).transpose()?;
        // Outputs first, so that each task reads its rows of the weights once for all inputs.
        let mut products = Tensor::uninit(Shape::new(&[rows, count])?, DType::F32, x.device())?;
        cpu::for_rows(products.values_mut::<f32>()?, count, 2 * columns, |first, products| {
            let weights = &bytes[first * columns..][..products.len() / count * columns];
            products_of_rows(weights, x_values, columns, products);
            for (products, scale) in products.chunks_exact_mut(count).zip(&scales[first..]) {
                products.iter_mut().for_each(|product| *product *= scale);
            }
        });
        let products = products.values::<f32>()?;
        let mut y = Tensor::uninit(shape, DType::F32, x.device())?;
        for (input, y) in y.values_mut::<f32>()?.chunks_exact_mut(rows.max(1)).enumerate() {
            let products = products[input..].iter().step_by(count);
            match bias {
                Some(bias) => y.iter_mut().zip(products).zip(bias).for_each(|((y, product), bias)| *y = product + bias),
                None => y.iter_mut().zip(products).for_each(|(y, product)| *y = *product),
            }
        }
        y.to_dtype(x.dtype())
    }
}

/// Computes `products[row][input] = Σ bytes[row] x[input]` for rows and inputs of `columns` elements, at least one.
fn products_of_rows(bytes: &[u8], x: &[f32], columns: usize, products: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() >= Level::Avx512 {
        return avx512::products_of_rows(bytes, x, columns, products);
    }
    rows_in_loops(bytes, x, columns, products);
}

vectorized! {
    /// Computes [`products_of_rows`] in loops that the compiler vectorises.
    fn rows_in_loops(bytes: &[u8], x: &[f32], columns: usize, products: &mut [f32]) {
        const LANES: usize = 32;
        let count = x.len() / columns;
        for (bytes, products) in bytes.chunks_exact(columns).zip(products.chunks_exact_mut(count)) {
            for (x, product) in x.chunks_exact(columns).zip(products) {
                let mut sums = [0.0f32; LANES];
                let (blocks, rest) = bytes.as_chunks::<LANES>();
                let (x_blocks, x_rest) = x.as_chunks::<LANES>();
                for (block, x) in blocks.iter().zip(x_blocks) {
                    for ((sum, byte), x) in sums.iter_mut().zip(block).zip(x) {
                        *sum = (*byte as i8 as f32).fma::<FUSED>(*x, *sum);
                    }
                }
                for ((sum, byte), x) in sums.iter_mut().zip(rest).zip(x_rest) {
                    *sum = (*byte as i8 as f32).fma::<FUSED>(*x, *sum);
                }
                *product = sum_slice(&sums);
            }
        }
    }
}

/// The same with AVX-512: every weight is read and widened once for all inputs.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::FEW;
    use crate::device::{Level, simd};

    pub fn products_of_rows(bytes: &[u8], x: &[f32], columns: usize, products: &mut [f32]) {
        assert!(simd::level() >= Level::Avx512, "the processor has no AVX-512");
        let (count, rows) = (x.len() / columns, bytes.len() / columns);
        assert!((1..=FEW).contains(&count) && count * rows <= products.len(), "the products exceed their memory");
        let (bytes, x, products) = (bytes.as_ptr(), x.as_ptr(), products.as_mut_ptr());
        // SAFETY: the level has the instructions; rows, inputs and products lie inside of their slices.
        unsafe {
            match count {
                1 => of_rows::<1, 4>(bytes, x, rows, columns, products),
                2 => of_rows::<2, 4>(bytes, x, rows, columns, products),
                3 => of_rows::<3, 2>(bytes, x, rows, columns, products),
                4 => of_rows::<4, 2>(bytes, x, rows, columns, products),
                5 => of_rows::<5, 2>(bytes, x, rows, columns, products),
                6 => of_rows::<6, 2>(bytes, x, rows, columns, products),
                7 => of_rows::<7, 2>(bytes, x, rows, columns, products),
                _ => of_rows::<FEW, 2>(bytes, x, rows, columns, products),
            }
        }
    }

    /// Computes the products of `COUNT` inputs with `SUMS` vectors of sums each, so that no addition waits for another.
    ///
    /// # Safety
    ///
    /// AVX-512 is there; the pointers reach as far as the sizes say.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn of_rows<const COUNT: usize, const SUMS: usize>(
        bytes: *const u8,
        x: *const f32,
        rows: usize,
        columns: usize,
        products: *mut f32,
    ) {
        const LANES: usize = 16;
        // SAFETY: see above; the masks end with the columns.
        unsafe {
            for row in 0..rows {
                let bytes = bytes.add(row * columns);
                let mut sums = [[_mm512_setzero_ps(); SUMS]; COUNT];
                let mut done = 0;
                while done + SUMS * LANES <= columns {
                    for place in 0..SUMS {
                        let at = done + place * LANES;
                        let weights = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.add(at).cast())));
                        for (input, sums) in sums.iter_mut().enumerate() {
                            let x = _mm512_loadu_ps(x.add(input * columns + at));
                            sums[place] = _mm512_fmadd_ps(weights, x, sums[place]);
                        }
                    }
                    done += SUMS * LANES;
                }
                while done < columns {
                    let mask = if columns - done < LANES { (1 << (columns - done)) - 1 } else { u16::MAX };
                    let weights = _mm_maskz_loadu_epi8(mask, bytes.add(done).cast());
                    let weights = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(weights));
                    for (input, sums) in sums.iter_mut().enumerate() {
                        let x = _mm512_maskz_loadu_ps(mask, x.add(input * columns + done));
                        sums[0] = _mm512_fmadd_ps(weights, x, sums[0]);
                    }
                    done += LANES;
                }
                for (input, sums) in sums.into_iter().enumerate() {
                    let sum = sums.into_iter().reduce(|a, b| _mm512_add_ps(a, b)).unwrap_or(_mm512_setzero_ps());
                    *products.add(row * COUNT + input) = _mm512_reduce_add_ps(sum);
                }
            }
        }
    }
}

vectorized! {
    fn widen<T: Float>(bytes: &[u8], scale: f32, wide: &mut [T]) {
        for (wide, byte) in wide.iter_mut().zip(bytes) {
            *wide = <T as Float>::from_f64(f64::from(*byte as i8) * f64::from(scale));
        }
    }
}
