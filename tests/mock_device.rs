//! A GPU backend outside the library: host memory, three kernels and a matrix product. It shows that a backend only has
//! to implement `device::Gpu`, and the errors of ops whose kernel it lacks.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use x_transformers::{
    DType, Device, Error, ErrorKind, Result, Tape, Tensor,
    device::{Address, Arg, Gemm, Gpu, Grid, Kernel, Memory, MemoryStats, Operand, Transfers},
    ops::attention_rung,
};

/// Blocks of memory by their addresses, which lie far apart.
#[derive(Default, Debug)]
struct Blocks {
    by_address: BTreeMap<u64, Vec<u8>>,
    made: u64,
    peak: usize,
}

impl Blocks {
    /// Returns the `bytes` bytes from an address on.
    fn at(&mut self, address: Address, bytes: usize) -> Result<&mut [u8]> {
        if bytes == 0 {
            return Ok(&mut []);
        }
        let found = self.by_address.range_mut(..=address.get()).next_back();
        let found =
            found.and_then(|(&start, block)| block.get_mut((address.get() - start) as usize..)?.get_mut(..bytes));
        found.ok_or_else(|| broken(format!("no {bytes} bytes at {address:?}")))
    }

    fn floats(&mut self, address: Address, n: usize) -> Result<Vec<f32>> {
        Ok(self
            .at(address, 4 * n)?
            .chunks_exact(4)
            .map(|float| f32::from_le_bytes([float[0], float[1], float[2], float[3]]))
            .collect())
    }

    fn write(&mut self, address: Address, values: &[f32]) -> Result<()> {
        let to = self.at(address, 4 * values.len())?;
        to.chunks_exact_mut(4).zip(values).for_each(|(to, value)| to.copy_from_slice(&value.to_le_bytes()));
        Ok(())
    }
}

#[derive(Default, Debug)]
struct Mock {
    blocks: Mutex<Blocks>,
    launches: AtomicU64,
}

fn broken(message: String) -> Error {
    Error::new(ErrorKind::Device { op: "mock", message })
}

impl Mock {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device, and permission to use it: its memory is counted.
fn mock() -> (Device, &'static Mock, MutexGuard<'static, ()>) {
    static MOCK: OnceLock<Mock> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let mock = MOCK.get_or_init(Mock::default);
    (Device::Gpu(mock), mock, ALONE.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Block {
    address: u64,
    mock: &'static Mock,
}

impl Memory for Block {
    fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.mock.blocks().by_address.remove(&self.address);
    }
}

/// One of the kernels that the device has.
enum Has {
    Fill,
    Forward(fn(f32) -> f32),
    Backward(fn(f32) -> f32),
}

struct MockKernel<'a> {
    mock: &'a Mock,
    has: Has,
}

impl Kernel for MockKernel<'_> {
    fn launch(&self, _: Grid, args: &[Arg]) -> Result<()> {
        let mut blocks = self.mock.blocks();
        self.mock.launches.fetch_add(1, Ordering::Relaxed);
        match (&self.has, args) {
            (Has::Fill, &[Arg::Output(y), Arg::I64(n), Arg::F64(value)]) => {
                blocks.write(y, &vec![value as f32; n as usize])
            }
            (Has::Forward(f), &[Arg::Output(y), Arg::Input(x), Arg::I64(n)]) => {
                let x = blocks.floats(x, n as usize)?;
                blocks.write(y, &x.into_iter().map(f).collect::<Vec<_>>())
            }
            (Has::Backward(f), &[Arg::Output(dx), Arg::Input(kept), Arg::Input(g), Arg::I64(n)]) => {
                let (kept, g) = (blocks.floats(kept, n as usize)?, blocks.floats(g, n as usize)?);
                blocks.write(dx, &kept.into_iter().zip(g).map(|(kept, g)| g * f(kept)).collect::<Vec<_>>())
            }
            _ => Err(broken(format!("arguments {args:?}"))),
        }
    }
}

// SAFETY: there is no other device to pass an address to, and every access is checked.
unsafe impl Gpu for Mock {
    fn backend(&self) -> &'static str {
        "mock"
    }

    fn ordinal(&self) -> usize {
        0
    }

    fn allocate(&'static self, bytes: usize) -> Result<Arc<dyn Memory>> {
        let mut blocks = self.blocks();
        blocks.made += 1;
        let address = blocks.made << 32;
        blocks.by_address.insert(address, vec![0xFF; bytes]);
        blocks.peak = blocks.peak.max(blocks.by_address.values().map(Vec::len).sum());
        Ok(Arc::new(Block { address, mock: self }))
    }

    fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        self.blocks().at(to, from.len())?.copy_from_slice(from);
        Ok(())
    }

    fn read_back(&self, from: Address, to: &mut [u8]) -> Result<()> {
        let bytes = to.len();
        to.copy_from_slice(self.blocks().at(from, bytes)?);
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        let values = self.blocks().at(from, bytes)?.to_vec();
        self.upload(to, &values)
    }

    fn fill_zero(&self, to: Address, bytes: usize) -> Result<()> {
        self.blocks().at(to, bytes)?.fill(0);
        Ok(())
    }

    fn kernel(&self, name: &'static str, options: &[(&str, &str)]) -> Result<Box<dyn Kernel + '_>> {
        let option = |wanted: &str| options.iter().find(|(option, _)| *option == wanted).map(|(_, value)| *value);
        let has = match (name, option("DTYPE"), option("FUNCTION")) {
            ("fill_value", Some("f32"), None) => Has::Fill,
            ("unary_fwd", Some("f32"), Some("tanh")) => Has::Forward(f32::tanh),
            ("unary_bwd", Some("f32"), Some("tanh")) => Has::Backward(|x| 1.0 - x.tanh().powi(2)),
            _ => return Err(self.lacks(&format!("there is no kernel `{name}` {options:?}"))),
        };
        Ok(Box::new(MockKernel { mock: self, has }))
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        if gemm.dtype != DType::F32 {
            return Err(self.lacks(&format!("there is no product of {}", gemm.dtype)));
        }
        let mut blocks = self.blocks();
        let mut element = |operand: Operand, item: usize, row: usize, column: usize| {
            let [row, column] = if operand.transposed { [column, row] } else { [row, column] };
            let skipped = item * operand.batch + row * operand.stride + column;
            blocks.floats(operand.address, skipped + 1).map(|values| values[skipped])
        };
        let Gemm { batch, m, n, k, a, b, c, add, .. } = *gemm;
        let mut sums = Vec::new();
        for (item, row, column) in (0..batch * m * n).map(|at| (at / (m * n), at / n % m, at % n)) {
            let mut sum = 0.0;
            for inner in 0..k {
                sum += element(a, item, row, inner)? * element(b, item, inner, column)?;
            }
            sums.push(sum);
        }
        if add {
            let before = blocks.floats(c, sums.len())?;
            sums.iter_mut().zip(before).for_each(|(sum, before)| *sum += before);
        }
        blocks.write(c, &sums)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> MemoryStats {
        let blocks = self.blocks();
        let mut stats = MemoryStats::default();
        (stats.live, stats.peak) = (blocks.by_address.values().map(Vec::len).sum(), blocks.peak);
        stats
    }

    fn transfers(&self) -> Transfers {
        let mut transfers = Transfers::default();
        transfers.launches = self.launches.load(Ordering::Relaxed);
        transfers
    }
}

/// `tanh(tanh(x)·w)` and its gradients, with ones as the gradient of the output.
fn forward_and_backward(device: &Device) -> Result<[Vec<f32>; 3]> {
    let x = [0.5f32, -1.25, 2.0, 0.125, -0.75, 1.5];
    let w = [0.25f32, -0.5, 1.0, 0.75, -0.25, 0.5, -1.0, 0.125, 0.625, -0.375, 0.875, 0.0625];
    let x = Tensor::from_slice(&x, [2, 3], device)?.requires_grad()?;
    let w = Tensor::from_slice(&w, [3, 4], device)?.requires_grad()?;
    let mut tape = Tape::grad();
    let y = x.tanh()?.matmul(&w)?.tanh()?;
    let grads = tape.backward_with(&y, &Tensor::ones([2, 4], DType::F32, device)?)?;
    let gradient = |of: &Tensor| grads.get(of).expect("a gradient").to_vec::<f32>();
    Ok([y.to_vec()?, gradient(&x)?, gradient(&w)?])
}

#[test]
fn a_backend_of_three_kernels_computes_gradients() -> Result<()> {
    let (device, mock, _alone) = mock();
    assert_eq!((device.to_string(), device != Device::Cpu), ("mock:0".to_string(), true));
    let before = device.transfers().launches;
    let (here, cpu) = (forward_and_backward(&device)?, forward_and_backward(&Device::Cpu)?);
    for (here, cpu) in here.iter().zip(&cpu) {
        assert_eq!(here.len(), cpu.len());
        assert!(here.iter().zip(cpu).all(|(a, b)| (a - b).abs() <= 1e-6), "{here:?} instead of {cpu:?}");
    }
    // Twice tanh forward and backward, and the ones.
    assert_eq!(device.transfers().launches - before, 5);
    assert!(device.memory().peak > 0 && device.memory().live == 0, "{:?}", mock.memory());
    Ok(())
}

#[test]
fn memory_comes_and_goes() -> Result<()> {
    let (device, _, _alone) = mock();
    let x = Tensor::from_slice(&[1i64, 2, 3], [3], &device)?;
    assert_eq!(device.memory().live, 24);
    assert_eq!(x.clone().to_device(&Device::Cpu)?.to_vec::<i64>()?, [1, 2, 3]);
    assert_eq!(Tensor::zeros([2], DType::BF16, &device)?.to_f64_vec()?, [0.0; 2]);
    assert_eq!(Tensor::zeros([0], DType::F32, &device)?.to_f64_vec()?, [0.0; 0]);
    drop(x);
    assert_eq!(device.memory().live, 0);
    device.synchronize()
}

/// An op whose kernel is missing says which, and so does everything else that a small backend lacks.
#[test]
fn missing_features_are_named() -> Result<()> {
    let (device, _, _alone) = mock();
    let x = Tensor::ones([2, 3], DType::F32, &device)?;
    let refused = |result: Result<Tensor>, part: &str| {
        let error = result.expect_err(part);
        assert!(matches!(error.kind(), ErrorKind::Device { op: "mock", .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("mock:0") && text.contains(part), "{part}: {text}");
    };
    refused(x.softmax(), "there is no kernel `softmax");
    refused(x.exp(), "there is no kernel `unary_fwd` [(\"DTYPE\", \"f32\"), (\"FUNCTION\", \"exp\")]");
    refused(x.add(&x), "there is no kernel `binary_fwd`");
    refused(Tensor::ones([2], DType::F64, &device), "there is no kernel `fill_value`");
    let half = Tensor::zeros([2, 2], DType::BF16, &device)?;
    refused(half.matmul(&half), "there is no product of bf16");
    // A failed op leaks nothing.
    drop((x, half));
    assert_eq!(device.memory().live, 0);

    let text = "extern \"C\" __global__ void own(float* y) {}";
    let error = x_transformers::RawKernel::new(&device, text, "own", &[]).expect_err("no compiler");
    assert!(error.to_string().contains("mock:0: kernel `own`: this backend cannot compile kernel sources"), "{error}");
    assert!(attention_rung(&device, DType::BF16, 64, 64).is_some_and(|rung| rung.contains("NVIDIA")));
    #[cfg(feature = "cuda")]
    {
        let inputs = [Tensor::zeros([2], DType::F32, &device)?];
        let graph = x_transformers::Graph::capture(&inputs, &x_transformers::ParamMap::default(), |x| x[0].tanh());
        assert!(graph.expect_err("no graphs").to_string().contains("mock:0: this backend does not support graphs"));
        assert!(x_transformers::device::CudaDevice::of(&device).is_none());
    }
    Ok(())
}
