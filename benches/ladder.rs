//! The rungs of a kernel from the naive one to the shipped one, each checked against the same reference before it is
//! timed by the GPU's events, with the second-level cache flushed.
//!
//! `cargo bench --bench ladder` prints a table, one line per rung, tab-separated: kernel, rung, dtype, shape,
//! microseconds, rate, unit, and for memory-bound kernels the share of the bandwidth of a copy from the same run.
//! `-- softmax` runs one ladder; `-- --test` runs each rung once at small sizes. Without a GPU it says so.
//! `kernels/README.md` describes what each rung adds.

use std::time::Duration;

use x_transformers::{
    DType, Device, Error, ErrorKind, KernelArg, Philox, RawKernel, Result, Tensor,
    device::{CudaDevice, Grid, kernels::KernelSource},
    ops::{AttentionSpec, attention},
};

/// Rounds that are not counted, and rounds that are.
const ROUNDS: (usize, usize) = (3, 15);

struct Ladder {
    gpu: &'static CudaDevice,
    device: Device,
    /// If `true`, small sizes, each once.
    test: bool,
    filter: String,
    /// Bytes per second of a copy.
    copy: f64,
}

/// Fields common to all lines of a ladder.
struct Step<'a> {
    kernel: &'a str,
    dtype: DType,
    shape: &'a [usize],
    work: Work,
    /// Expected output of every rung, computed on the CPU.
    expected: &'a [f64],
}

#[derive(Clone, Copy)]
enum Work {
    Bytes(usize),
    Flops(usize),
}

impl Ladder {
    /// Returns the median device time.
    fn time(&self, timed: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        let (warm, counted) = if self.test { (0, 1) } else { ROUNDS };
        // Larger than any second-level cache.
        let flush = if self.test { 1 } else { 64 << 20 };
        let mut times = Vec::new();
        for round in 0..warm + counted {
            // Flushes the cache, and keeps the device busy while the rest is enqueued.
            drop(Tensor::zeros([flush], DType::F32, &self.device)?);
            let (time, ()) = self.gpu.time(&mut *timed)?;
            if round >= warm {
                times.push(time);
            }
        }
        times.sort();
        Ok(times[times.len() / 2])
    }

    /// Checks a rung, times it and prints its line.
    fn rung(&self, step: &Step, rung: &str, mut run: impl FnMut() -> Result<Tensor>) -> Result<()> {
        let Step { kernel, dtype, shape, work, expected } = step;
        let actual = run()?.to_f64_vec()?;
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut actual.iter().zip(*expected).map(|(a, e)| a - e)) / norm(&mut expected.iter().copied());
        let bound = if *dtype == DType::F32 { 1e-5 } else { 1e-2 };
        assert!(
            actual.len() == expected.len() && error <= bound,
            "{kernel} {rung} {dtype}: relative error {error:.1e}, allowed {bound:.0e}"
        );
        let seconds = self.time(&mut || run().map(drop))?.as_secs_f64().max(1e-9);
        let (rate, unit, share) = match *work {
            Work::Bytes(bytes) => {
                let rate = bytes as f64 / seconds / 1e9;
                (rate, "GB/s", format!("{:.0}", 100.0 * rate * 1e9 / self.copy))
            }
            Work::Flops(flops) => (flops as f64 / seconds / 1e12, "TFLOP/s", "-".to_string()),
        };
        println!("{kernel}\t{rung}\t{dtype}\t{shape:?}\t{:.1}\t{rate:.3}\t{unit}\t{share}", seconds * 1e6);
        Ok(())
    }

    /// Runs a rung of `kernels/lab`, which writes one tensor.
    fn lab(
        &self,
        step: &Step,
        name: &str,
        inputs: &[&Tensor],
        shape: &[usize],
        [blocks, threads]: [[u32; 3]; 2],
        numbers: &dyn Fn() -> Vec<KernelArg<'static>>,
    ) -> Result<()> {
        let rung = self.kernel(&format!("{}_rungs_{name}", step.kernel), &[("DTYPE", step.dtype.name())])?;
        // One output for all rounds: zeroing it would be timed too.
        let mut output = Some(Tensor::zeros(shape, step.dtype, &self.device)?);
        self.rung(step, name, || {
            let mut written = output.take().map_or_else(|| Tensor::zeros(shape, step.dtype, &self.device), Ok)?;
            // SAFETY: grid, sizes and dtypes are those of the rung's source, whose results `Ladder::rung` checks.
            unsafe { rung.launch(Grid::new(blocks, threads), arguments(&mut written, inputs, numbers())) }?;
            output = Some(written.detach());
            Ok(written)
        })
    }

    /// A kernel of `kernels/lab`.
    fn kernel(&self, kernel: &str, options: &[(&str, &str)]) -> Result<RawKernel> {
        let none = || {
            Error::new(ErrorKind::Argument {
                op: "ladder",
                message: format!("there is no kernel `{kernel}` in kernels/lab"),
            })
        };
        RawKernel::new(&self.device, KernelSource::of_lab(kernel).ok_or_else(none)?.source, kernel, options)
    }

    fn random(&self, shape: &[usize], dtype: DType, stream: u64) -> Result<Tensor> {
        let random = Philox::new(0, stream);
        Tensor::generate(shape, dtype, &self.device, |i| 2.0 * random.uniform(i as u64) - 1.0)
    }

    fn wants(&self, kernel: &str) -> bool {
        kernel.contains(&self.filter)
    }

    /// Computes the same op on the CPU, in f64.
    fn reference(&self, inputs: &[&Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<Vec<f64>> {
        let wide = inputs.iter().map(|x| x.to_device(&Device::Cpu)?.to_dtype(DType::F64));
        f(&wide.collect::<Result<Vec<_>>>()?)?.to_f64_vec()
    }

    /// Softmax and layer norm: one row per thread, per block, per warp.
    fn rows(&self, dtype: DType) -> Result<()> {
        let shape: &[usize] = if self.test { &[20, 70] } else { &[8192, 1024] };
        let (rows, columns) = (shape[0], shape[1] as u32);
        let x = self.random(shape, dtype, 1)?;
        let work = Work::Bytes(2 * x.numel() * dtype.size());
        let grids = [
            ("thread", [[rows.div_ceil(128) as u32, 1, 1], [128, 1, 1]]),
            ("block", [[rows as u32, 1, 1], [256, 1, 1]]),
            ("warp", [[rows.div_ceil(8) as u32, 1, 1], [32, 8, 1]]),
        ];
        let sizes = || vec![(rows as i64).into(), columns.into()];
        if self.wants("softmax") {
            let expected = self.reference(&[&x], |x| x[0].softmax())?;
            let step = Step { kernel: "softmax", dtype, shape, work, expected: &expected };
            for (name, grid) in grids {
                self.lab(&step, name, &[&x], shape, grid, &sizes)?;
            }
            self.rung(&step, "shipped", || x.softmax())?;
        }
        if self.wants("layer_norm") {
            let expected = self.reference(&[&x], |x| x[0].layer_norm(None, None, 1e-5))?;
            let step = Step { kernel: "layer_norm", dtype, shape, work, expected: &expected };
            for (name, grid) in grids {
                self.lab(&step, name, &[&x], shape, grid, &|| {
                    [sizes(), vec![1e-5.into()]].into_iter().flatten().collect()
                })?;
            }
            self.rung(&step, "shipped", || x.layer_norm(None, None, 1e-5))?;
        }
        Ok(())
    }

    fn transpose(&self, dtype: DType) -> Result<()> {
        if !self.wants("transpose") {
            return Ok(());
        }
        let shape: &[usize] = if self.test { &[40, 70] } else { &[4096, 4096] };
        let (rows, columns) = (shape[0], shape[1]);
        let x = self.random(shape, dtype, 2)?;
        let expected = self.reference(&[&x], |x| x[0].transpose(0, 1)?.contiguous())?;
        let work = Work::Bytes(2 * x.numel() * dtype.size());
        let step = Step { kernel: "transpose", dtype, shape, work, expected: &expected };
        let blocks = |across: usize, down: usize, height: usize| {
            [[across.div_ceil(32) as u32, down.div_ceil(height) as u32, 1], [32, 8, 1]]
        };
        let sizes = || vec![(rows as i64).into(), (columns as i64).into()];
        for (name, grid) in [
            ("read", blocks(columns, rows, 8)),
            ("write", blocks(rows, columns, 8)),
            ("tile", blocks(columns, rows, 32)),
            ("padded", blocks(columns, rows, 32)),
        ] {
            self.lab(&step, name, &[&x], &[columns, rows], grid, &sizes)?;
        }
        self.rung(&step, "shipped", || x.transpose(0, 1)?.contiguous())
    }

    fn attention(&self, dtype: DType) -> Result<()> {
        if !self.wants("attention") {
            return Ok(());
        }
        let [heads, length] = if self.test { [2, 70] } else { [64, 2048] };
        let shape = [1, heads, length, 64];
        let random = |stream: u64| self.random(&shape, dtype, stream);
        let (q, k, v) = (&random(3)?, &random(4)?, &random(5)?);
        for causal in [false, true] {
            let spec = AttentionSpec { scale: 0.125, causal, ..AttentionSpec::default() };
            // An f64 reference of a long sequence takes minutes: compares with the shipped rung, which the tests check.
            let expected = match self.test {
                true => self.reference(&[q, k, v], |x| attention(&x[0], &x[1], &x[2], &spec))?,
                false => attention(q, k, v, &spec)?.to_f64_vec()?,
            };
            let scores = heads * length * length / if causal { 2 } else { 1 };
            let work = Work::Flops(4 * 64 * scores);
            let step = Step { kernel: "attention", dtype, shape: &shape, work, expected: &expected };
            let grid = [[length.div_ceil(64) as u32, heads as u32, 1], [64, 1, 1]];
            let numbers = || vec![(length as u32).into(), u32::from(causal).into(), 0.125.into()];
            for name in ["thread", "shared"] {
                self.lab(&step, name, &[q, k, v], &shape, grid, &numbers)?;
            }
            let shipped = if dtype == DType::F32 { "shipped, plain tiles" } else { "shipped, tensor cores" };
            self.rung(&step, shipped, || attention(q, k, v, &spec))?;
        }
        Ok(())
    }
}

/// Tiles of `kernels/lab/attention_wgmma_rungs.cu`, one per variant: features, warpgroups and keys of a tile, blocks
/// per multiprocessor, and 1 if products with values overlap the next exponentials.
const TILES: [[u32; 5]; 9] = [
    [64, 2, 64, 1, 1],
    [64, 2, 128, 1, 1],
    [64, 3, 64, 1, 1],
    [64, 2, 64, 2, 0],
    [64, 2, 64, 2, 1],
    [64, 4, 64, 1, 0],
    [64, 4, 64, 1, 1],
    [128, 2, 64, 1, 1],
    [128, 2, 128, 1, 1],
];

impl Ladder {
    /// Times the tile sizes of warpgroup attention, on cards that have warpgroup products.
    fn warpgroups(&self) -> Result<()> {
        let kernel = "attention_wgmma";
        if !self.wants(kernel) || self.gpu.target().to_string() != "sm_90a" {
            return Ok(());
        }
        let dtype = DType::BF16;
        for (head, causal) in [(64, false), (64, true), (128, false), (128, true)] {
            let [heads, length] = if self.test { [2, 300] } else { [64, 2048] };
            let shape = [1, heads, length, head];
            let [q, k, v] = [3, 4, 5].map(|stream| self.random(&shape, dtype, stream));
            let (q, k, v) = (&q?, &k?, &v?);
            let scale = (head as f64).powf(-0.5);
            let spec = AttentionSpec { scale, causal, ..AttentionSpec::default() };
            let expected = match self.test {
                true => self.reference(&[q, k, v], |x| attention(&x[0], &x[1], &x[2], &spec))?,
                false => attention(q, k, v, &spec)?.to_f64_vec()?,
            };
            let scores = heads * length * length / if causal { 2 } else { 1 };
            let step = Step { kernel, dtype, shape: &shape, work: Work::Flops(4 * head * scores), expected: &expected };
            for tile in TILES.into_iter().filter(|tile| tile[0] as usize == head) {
                let text = tile.map(|number| number.to_string());
                let names = ["HEAD", "TILE_WARPGROUPS", "TILE_KEYS", "TILE_BLOCKS", "TILE_OVERLAP"];
                let mut options = vec![("DTYPE", dtype.name())];
                options.extend(names.into_iter().zip(text.iter().map(String::as_str)));
                let rung = self.kernel("attention_wgmma_rungs_tiles", &options)?;
                let [_, warpgroups, keys, blocks, overlap] = tile;
                let count = (length as u32).div_ceil(64 * warpgroups) * heads as u32;
                let grid = Grid::new([count, 1, 1], [128 * warpgroups, 1, 1])
                    .shared((64 * warpgroups + 4 * keys) as usize * head * 2 + 1024);
                let numbers =
                    || vec![(heads as u32).into(), (length as u32).into(), u32::from(causal).into(), scale.into()];
                let name = format!("{warpgroups} × 64 queries, {keys} keys, {blocks} blocks, overlap {overlap}");
                let name = if causal { format!("causal, {name}") } else { name };
                let mut output = Some(Tensor::zeros(shape, dtype, &self.device)?);
                self.rung(&step, &name, || {
                    let mut written = output.take().map_or_else(|| Tensor::zeros(shape, dtype, &self.device), Ok)?;
                    // SAFETY: grid, memory, sizes and dtypes are those of the source, whose results `Ladder::rung` checks.
                    unsafe { rung.launch(grid, arguments(&mut written, &[q, k, v], numbers())) }?;
                    output = Some(written.detach());
                    Ok(written)
                })?;
            }
            self.rung(&step, if causal { "causal, shipped" } else { "shipped" }, || attention(q, k, v, &spec))?;
        }
        Ok(())
    }
}

/// Arguments of a rung: its output, its inputs and its scalars.
fn arguments<'a>(output: &'a mut Tensor, inputs: &[&'a Tensor], numbers: Vec<KernelArg<'a>>) -> Vec<KernelArg<'a>> {
    let inputs = inputs.iter().map(|&input| KernelArg::Input(input));
    [KernelArg::Output(output)].into_iter().chain(inputs).chain(numbers).collect()
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let test = arguments.iter().any(|argument| argument == "--test");
    let filter = arguments.into_iter().find(|argument| !argument.starts_with("--")).unwrap_or_default();
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let Some(gpu) = CudaDevice::of(&device) else { return Ok(()) };
    let mut ladder = Ladder { gpu, device, test, filter, copy: f64::NAN };
    let n = if test { 1 << 10 } else { 64 << 20 };
    let x = ladder.random(&[n], DType::F32, 0)?;
    ladder.copy = (8 * n) as f64 / ladder.time(&mut || x.affine(1.0, 0.0).map(drop))?.as_secs_f64().max(1e-9);
    println!("# {gpu:?}, a copy moves {:.0} GB/s", ladder.copy / 1e9);
    println!("# kernel\trung\tdtype\tshape\tmicroseconds\trate\tunit\t% of a copy");
    for dtype in [DType::F32, DType::BF16] {
        ladder.rows(dtype)?;
        ladder.transpose(dtype)?;
        ladder.attention(dtype)?;
    }
    ladder.warpgroups()
}
