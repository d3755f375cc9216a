//! Products with packed weights, and rows of packed tables.

use crate::{
    DType, Device, Error, QuantType, Result, Tensor,
    autograd::{Backward, InputGrads, record},
    device::{Arg, Gpu, Grid, args, cpu, size32},
    error::ensure,
    ops::matmul,
    profile::{self, BackwardCost, Cost},
    quantised::{self, Activations, ROWS, decode},
    shape::Shape,
    tensor::same_device,
};

const OP: &str = "packed_linear";

/// Maximum number of inputs for which a GPU dequantises weights in registers; for more it does so once, for cuBLAS.
const FEW: usize = 8;

/// Matrix `[out, in]` of quantised weights, in the blocks in which GGUF files store them.
///
/// On the CPU a product rounds its inputs to 8 bits, with a scale for each 32 values, and multiplies integers; f64,
/// which serves references, and GPUs multiply with the dequantised weights. The matrix has no gradient; that of the
/// inputs is a product with the dequantised weights.
///
/// ```
/// use x_transformers::{Device, QuantType, Tensor, ops::PackedMatrix};
/// # fn main() -> x_transformers::Result<()> {
/// let weight = Tensor::generate([2, 32], x_transformers::DType::F32, &Device::Cpu, |i| (i % 7) as f64 - 3.0)?;
/// let matrix = PackedMatrix::quantize(&weight, QuantType::Q8_0)?;
/// assert_eq!((matrix.shape(), matrix.bytes()), ([2, 32], 2 * 34));
/// let x = Tensor::ones([1, 32], x_transformers::DType::F32, &Device::Cpu)?;
/// let (y, exact) = (matrix.linear(&x, None)?.to_vec::<f32>()?, x.linear(&weight, None)?.to_vec::<f32>()?);
/// assert!((y[0] - exact[0]).abs() < 0.2 && (y[1] - exact[1]).abs() < 0.2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "QTensor")]
#[doc(alias = "QMatMul")]
#[doc(alias = "Int8")]
pub struct PackedMatrix {
    kind: QuantType,
    rows: usize,
    columns: usize,
    /// `[out, bytes of a row]`, as bytes: on the CPU interleaved, with rows of zeros up to a whole panel.
    blocks: Tensor,
}

impl PackedMatrix {
    /// Creates a matrix `[out, in]` on the CPU from the blocks of its rows.
    ///
    /// Errors: a type without such products (see [`QuantType::is_packed`]); rows that are not whole blocks; another
    /// number of bytes; scales that are not finite.
    pub fn new(kind: QuantType, [rows, columns]: [usize; 2], blocks: &[u8]) -> Result<Self> {
        let (values, bytes) = kind.block();
        let row = columns / values * bytes;
        ensure!(
            rows.checked_mul(row) == Some(blocks.len()),
            Error::argument(
                OP,
                format_args!("expected {rows} rows of {row} bytes of {kind}, got {} bytes in all", blocks.len())
            )
        );
        let mut tensor = Tensor::uninit(Shape::new(&[rows, row])?, DType::Bool, &Device::Cpu)?;
        tensor.values_mut::<bool>()?.copy_from_slice(blocks);
        Self::of_blocks(kind, columns, tensor)
    }

    /// Creates a matrix from its blocks, `[out, bytes of a row]` as bytes on the CPU that no other tensor shares; like
    /// [`PackedMatrix::new`].
    pub(crate) fn of_blocks(kind: QuantType, columns: usize, blocks: Tensor) -> Result<Self> {
        let (values, bytes) = kind.block();
        ensure!(
            kind.is_packed(),
            Error::argument(OP, format_args!("weights of {kind} are not multiplied packed; dequantise them"))
        );
        ensure!(
            columns.is_multiple_of(values),
            Error::shape(OP, format_args!("expected rows of whole blocks of {values} values of {kind}, got {columns}"))
        );
        let finite = |block: &[u8]| kind.scales().iter().all(|&at| block[at + 1] & 0x7C != 0x7C);
        ensure!(
            blocks.values::<bool>()?.chunks_exact(bytes).all(finite),
            Error::argument(OP, "expected finite scales, got NaN or infinity")
        );
        Self { kind, rows: blocks.dim(0)?, columns, blocks }.interleaved()
    }

    /// Interleaves blocks that are not yet.
    fn interleaved(self) -> Result<Self> {
        let row = self.row_bytes();
        let Self { kind, rows, columns, mut blocks } = self;
        if !rows.is_multiple_of(ROWS) {
            let mut whole = Tensor::zeros([rows.next_multiple_of(ROWS), row], DType::Bool, &Device::Cpu)?;
            whole.values_mut::<bool>()?[..rows * row].copy_from_slice(blocks.values::<bool>()?);
            blocks = whole;
        }
        if row > 0 {
            quantised::interleave(kind, row, blocks.values_mut::<bool>()?);
        }
        Ok(Self { kind, rows, columns, blocks })
    }

    /// Rounds a float matrix `[out, in]` to a type.
    ///
    /// Errors: another rank or dtype; numbers that are not finite; rows that are not whole blocks; a type without such
    /// products.
    pub fn quantize(weight: &Tensor, kind: QuantType) -> Result<Self> {
        let &[rows, columns] = &weight.shape()[..] else {
            return Err(Error::shape(OP, format_args!("expected a matrix [out, in], got {:?}", weight.shape())));
        };
        weight.dtype().expect_float(OP)?;
        let wide = weight.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let matrix = Self::new(kind, [rows, columns], &kind.quantize(wide.values::<f32>()?)?)?;
        matrix.to_device(weight.device())
    }

    /// Returns the blocks as files store them, `[out, bytes of a row]` as bytes on the CPU.
    pub(crate) fn blocks(&self) -> Result<Tensor> {
        if *self.device() != Device::Cpu {
            return self.blocks.to_device(&Device::Cpu);
        }
        let row = self.row_bytes();
        let mut blocks = Tensor::uninit(Shape::new(&[self.rows, row])?, DType::Bool, &Device::Cpu)?;
        let panels = self.blocks.values::<bool>()?;
        cpu::for_rows(blocks.values_mut::<bool>()?, row, row, |first, blocks: &mut [u8]| {
            for (at, out) in blocks.chunks_exact_mut(row).enumerate() {
                self.copy_row(panels, first + at, out);
            }
        });
        Ok(blocks)
    }

    fn copy_row(&self, panels: &[u8], row: usize, out: &mut [u8]) {
        quantised::copy_row(self.kind, &panels[row / ROWS * ROWS * out.len()..], row % ROWS, out);
    }

    /// Returns a copy on a device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        match (self.device(), device) {
            (Device::Cpu, Device::Gpu(_)) => Ok(Self { blocks: self.blocks()?.to_device(device)?, ..*self }),
            (Device::Gpu(_), Device::Cpu) => Self { blocks: self.blocks()?, ..*self }.interleaved(),
            _ => Ok(Self { blocks: self.blocks.to_device(device)?, ..*self }),
        }
    }

    /// Returns the type.
    pub fn kind(&self) -> QuantType {
        self.kind
    }

    /// Returns the sizes `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Returns the number of bytes.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }

    fn row_bytes(&self) -> usize {
        let (values, bytes) = self.kind.block();
        self.columns / values * bytes
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        self.blocks.device()
    }

    /// Converts the weights to floats: `[out, in]`.
    ///
    /// Errors: a dtype that is not float.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        let [rows, columns] = self.shape();
        self.rows(None, rows, dtype)?.reshape([rows, columns])
    }

    /// Looks up rows by index as floats: `[..] → [.., in]`.
    ///
    /// Errors: indices of another dtype or device, or out of range ([`ErrorKind::Index`](crate::ErrorKind::Index); on a
    /// GPU when values are next read back); a dtype that is not float.
    pub fn embedding(&self, indices: &Tensor, dtype: DType) -> Result<Tensor> {
        const OP: &str = "packed_embedding";
        ensure!(
            indices.dtype() == DType::I64,
            Error::dtype(OP, format_args!("expected indices of i64, got {}", indices.dtype()))
        );
        same_device(OP, indices, &self.blocks)?;
        let shape = Shape::new(&[&**indices.shape(), &[self.columns]].concat())?;
        let indices = indices.contiguous()?;
        self.rows(Some(&indices), indices.numel(), dtype)?.reshape(shape)
    }

    /// Returns the rows of these indices, or all, as floats: `[count, in]`.
    fn rows(&self, indices: Option<&Tensor>, count: usize, dtype: DType) -> Result<Tensor> {
        const OP: &str = "packed_rows";
        dtype.expect_float(OP)?;
        let [rows, columns] = self.shape();
        let shape = Shape::new(&[count, columns])?;
        if let Device::Gpu(gpu) = self.device() {
            let mut y = Tensor::uninit(shape, dtype, self.device())?;
            let grid = Grid::rows(count, 32);
            gpu.kernel(OP, &[("DTYPE", dtype.name())])?.launch(
                grid,
                args![
                    &mut y,
                    Arg::Output(gpu.faults()),
                    &self.blocks,
                    indices,
                    count as i64,
                    rows as i64,
                    size32(columns)?,
                    self.kind.number()
                ],
            )?;
            return Ok(y);
        }
        let at = indices.map(Tensor::values::<i64>).transpose()?;
        // A negative index becomes a large number.
        if let Some(&index) = at.and_then(|at| at.iter().find(|&&index| index as u64 >= rows as u64)) {
            return Err(Error::index("packed_embedding", "token", index, rows));
        }
        let (panels, width) = (self.blocks.values::<bool>()?, self.row_bytes());
        let mut y = Tensor::uninit(shape, DType::F32, &Device::Cpu)?;
        cpu::for_rows(y.values_mut::<f32>()?, columns, 4 * columns, |first, y| {
            let mut blocks = vec![0; width];
            for (row, y) in y.chunks_exact_mut(columns).enumerate() {
                self.copy_row(panels, at.map_or(first + row, |at| at[first + row] as usize), &mut blocks);
                decode(self.kind, &blocks, y);
            }
        });
        y.to_dtype(dtype)
    }

    /// Computes [`Tensor::linear`] with these weights: `[.., in] → [.., out]`.
    ///
    /// Errors: sizes, dtypes or devices that do not match.
    #[doc(alias = "matmul")]
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let [rows, columns] = self.shape();
        ensure!(
            x.rank() > 0 && x.shape()[x.rank() - 1] == columns && x.dtype().is_float(),
            Error::shape(OP, format_args!("expected floats [.., {columns}], got {:?} {}", x.shape(), x.dtype()))
        );
        same_device(OP, x, &self.blocks)?;
        if let Some(bias) = bias {
            ensure!(
                **bias.shape() == [rows] && bias.dtype() == x.dtype() && bias.device() == x.device(),
                Error::shape(
                    OP,
                    format_args!("expected a bias [{rows}] {}, got {:?} {}", x.dtype(), bias.shape(), bias.dtype())
                )
            );
        }
        let (input, added) = (x.detach().contiguous()?, bias.map(|bias| bias.detach().contiguous()).transpose()?);
        let count = x.shape().without(x.rank() - 1).numel();
        let few = count <= FEW && count > 0 && rows > 0 && columns > 0;
        let y = match *x.device() {
            Device::Gpu(gpu) if few => self.on_gpu(gpu, &input, added.as_ref(), count)?,
            Device::Cpu if x.dtype() != DType::F64 && columns > 0 => self.on_cpu(&input, added.as_ref(), count)?,
            _ => input.linear(&self.dequantize(x.dtype())?, added.as_ref())?,
        };
        let y = y.reshape(x.shape().with_dim(x.rank() - 1, rows))?;
        profile::cost(|| {
            let operations = 2.0 * y.numel() as f64 * columns as f64;
            Cost { operations, backward: BackwardCost::Products }
        });
        let backward = |_: &Tensor| PackedBackward { matrix: self.clone(), shape: *x.shape() };
        match bias {
            Some(bias) => record(OP, y, &[x, bias], backward),
            None => record(OP, y, &[x], backward),
        }
    }

    fn on_gpu(&self, gpu: &dyn Gpu, x: &Tensor, bias: Option<&Tensor>, count: usize) -> Result<Tensor> {
        let [rows, columns] = self.shape();
        let mut y = Tensor::uninit(Shape::new(&[count, rows])?, x.dtype(), x.device())?;
        gpu.kernel(OP, &[("DTYPE", x.dtype().name())])?.launch(
            Grid::rows(rows, 32),
            args![&mut y, x, &self.blocks, bias, count as i64, rows as i64, size32(columns)?, self.kind.number()],
        )?;
        Ok(y)
    }

    /// Computes in f32 and rounds to the dtype of `x` once.
    fn on_cpu(&self, x: &Tensor, bias: Option<&Tensor>, count: usize) -> Result<Tensor> {
        let [rows, columns] = self.shape();
        let wide = x.to_dtype(DType::F32)?;
        let rounded = Activations::new(wide.values::<f32>()?, columns, self.kind);
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        let bias = bias.as_ref().map(Tensor::values::<f32>).transpose()?;
        let panels = rows.div_ceil(ROWS);
        let mut products = Tensor::uninit(Shape::new(&[panels * count * ROWS])?, DType::F32, x.device())?;
        quantised::multiply(self.kind, self.blocks.values::<bool>()?, &rounded, products.values_mut::<f32>()?);
        let products = products.values::<f32>()?;
        let mut y = Tensor::uninit(Shape::new(&[count, rows])?, DType::F32, x.device())?;
        cpu::for_rows(y.values_mut::<f32>()?, rows, rows, |first, y| {
            for (input, y) in y.chunks_exact_mut(rows).enumerate() {
                for (panel, y) in y.chunks_mut(ROWS).enumerate() {
                    let products = &products[(panel * count + first + input) * ROWS..];
                    match bias.map(|bias| &bias[panel * ROWS..]) {
                        Some(bias) => {
                            y.iter_mut().zip(products).zip(bias).for_each(|((y, product), bias)| *y = product + bias);
                        }
                        None => y.iter_mut().zip(products).for_each(|(y, product)| *y = *product),
                    }
                }
            }
        });
        y.to_dtype(x.dtype())
    }
}

struct PackedBackward {
    matrix: PackedMatrix,
    /// Shape of the input.
    shape: Shape,
}

impl Backward for PackedBackward {
    fn name(&self) -> &'static str {
        OP
    }

    /// Computes `dx = g·W` with the dequantised weights, `db = Σ_rows g`.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [rows, columns] = self.matrix.shape();
        let count = self.shape.without(self.shape.rank() - 1).numel();
        let grad = grad.reshape([count, rows])?;
        let dx = match need[0] {
            true => {
                let weight = self.matrix.dequantize(grad.dtype())?;
                Some(matmul::product(&grad, &weight, None)?.reshape([count, columns])?.reshape(self.shape)?)
            }
            false => None,
        };
        let mut grads = vec![dx];
        if let Some(&need_bias) = need.get(1) {
            grads.push(if need_bias { Some(grad.sum(&[0])?) } else { None });
        }
        Ok(InputGrads::whole(grads))
    }
}
