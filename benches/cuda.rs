//! Kernels on a GPU, timed by its events, with the second-level cache flushed: the share of the bandwidth of a copy for
//! memory-bound ones, the share of a large matrix product for compute-bound ones. Both peaks are from the same run.
//!
//! `cargo bench --bench cuda` prints a table, one line per kernel, tab-separated, which `scripts/gpu-check` compares
//! with PyTorch's (`benches/peers/torch_cuda.py` has the same names and shapes). `-- NAME` selects lines whose name
//! contains NAME, `-- --section kernels` or `models` one half. `-- --once` launches each kernel once and measures no
//! peaks, for a profiler; `-- --test` does the same at small sizes. Without a GPU it says so.

#[path = "cuda_models.rs"]
mod models;

use std::time::Duration;

use x_transformers::{
    DType, Device, Init, ParamStore, Result, Tape, Tensor,
    device::CudaDevice,
    ops::{Activation, AttentionSpec, DecodeSpec, SampleFilter, SampleSpec, attention, attention_decode},
    train::{AdamW, AdamWOptions, Optimizer},
};

/// Work of a launch, in the unit of the peak that limits it.
#[derive(Clone, Copy)]
enum Work {
    Bytes(usize),
    Flops(usize),
}

struct Bench {
    gpu: &'static CudaDevice,
    device: Device,
    /// Small sizes.
    test: bool,
    /// Rounds that are not counted, and rounds that are.
    rounds: (usize, usize),
    filter: String,
    /// Bytes per second of a copy.
    copy: f64,
    /// Operations per second of a large matrix product.
    products: Vec<(DType, f64)>,
}

/// Rounds that are not counted, and rounds that are.
const ROUNDS: (usize, usize) = (5, 25);

impl Bench {
    /// Returns the median device time of `timed`, which receives the result of `prepare`.
    fn time<S>(&self, prepare: impl Fn() -> Result<S>, timed: impl Fn(S) -> Result<()>) -> Result<Duration> {
        let (warm, counted) = self.rounds;
        // Larger than any second-level cache.
        let flush = if self.test { 1 } else { 64 << 20 };
        let mut times = Vec::new();
        for round in 0..warm + counted {
            let prepared = prepare()?;
            // Flushes the cache, reads the flushed buffer back, so that no write-back falls into the timed
            // part, and keeps the device busy while the rest is enqueued.
            let _ = Tensor::zeros([flush], DType::F32, &self.device)?.sum(&[])?;
            let (time, ()) = self.gpu.time(|| timed(prepared))?;
            if round >= warm {
                times.push(time);
            }
        }
        times.sort();
        Ok(times[times.len() / 2])
    }

    /// Times a kernel and prints its line: name, dtype, shape, microseconds, rate, unit, percent of the peak.
    fn run<S>(
        &self,
        (name, dtype, shape): (&str, DType, &[usize]),
        work: Work,
        prepare: impl Fn() -> Result<S>,
        timed: impl Fn(S) -> Result<()>,
    ) -> Result<f64> {
        if !name.contains(&self.filter) {
            return Ok(0.0);
        }
        let seconds = self.time(prepare, timed)?.as_secs_f64().max(1e-9);
        Ok(self.line((name, dtype, shape), work, seconds))
    }

    /// Prints a line and returns its rate.
    fn line(&self, (name, dtype, shape): (&str, DType, &[usize]), work: Work, seconds: f64) -> f64 {
        let (rate, unit, peak) = match work {
            Work::Bytes(bytes) => (bytes as f64 / seconds, "GB/s", self.copy),
            Work::Flops(flops) => {
                let peak = self.products.iter().find(|(of, _)| *of == dtype).map_or(f64::NAN, |(_, peak)| *peak);
                (flops as f64 / seconds, "GFLOP/s", peak)
            }
        };
        let (micros, share) = (seconds * 1e6, 100.0 * rate / peak);
        println!("{name}\t{dtype}\t{shape:?}\t{micros:.1}\t{:.0}\t{unit}\t{share:.0}", rate / 1e9);
        rate
    }

    /// Values around 0, made on the device.
    fn random(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let store = ParamStore::new(0, dtype, &self.device);
        Ok(store.param("x", shape, Init::Uniform(0.5))?.tensor().detach())
    }

    /// Times an op's forward pass, then only its backward pass with respect to its first input.
    fn op(
        &self,
        name: &str,
        inputs: &[Tensor],
        work: [Work; 2],
        f: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let what = |direction: &str| format!("{name} {direction}");
        if !what("forward").contains(&self.filter) && !what("backward").contains(&self.filter) {
            return Ok(());
        }
        let (dtype, shape) = (inputs[0].dtype(), inputs[0].shape().to_vec());
        self.run((&what("forward"), dtype, &shape), work[0], || Ok(()), |()| f(inputs).map(drop))?;
        let leaves = inputs.iter().map(|x| if x.dtype().is_float() { x.requires_grad() } else { Ok(x.clone()) });
        let leaves = leaves.collect::<Result<Vec<_>>>()?;
        let output = f(inputs)?;
        let cotangent = self.random(output.shape(), output.dtype())?;
        let forward = || {
            let tape = Tape::grad();
            f(&leaves).map(|y| (tape, y))
        };
        self.run((&what("backward"), dtype, &shape), work[1], forward, |(mut tape, y)| {
            tape.backward_with(&y, &cotangent).map(drop)
        })?;
        Ok(())
    }

    /// Measures the peaks that the other lines are relative to.
    fn peaks(&mut self) -> Result<()> {
        let n = if self.test { 1 << 10 } else { 64 << 20 };
        let x = self.random(&[n], DType::F32)?;
        let measured = |seconds: Duration| seconds.as_secs_f64().max(1e-9);
        let seconds = measured(self.time(|| Ok(()), |()| x.affine(1.0, 0.0).map(drop))?);
        self.copy = (8 * n) as f64 / seconds;
        self.line(("copy", DType::F32, &[n]), Work::Bytes(8 * n), seconds);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let n = if self.test { 32 } else { 4096 };
            let (a, b) = (self.random(&[n, n], dtype)?, self.random(&[n, n], dtype)?);
            let (flops, seconds) = (2 * n * n * n, measured(self.time(|| Ok(()), |()| a.matmul(&b).map(drop))?));
            self.products.push((dtype, flops as f64 / seconds));
            self.line(("matmul", dtype, &[n, n, n]), Work::Flops(flops), seconds);
        }
        Ok(())
    }

    /// Times memory-bound kernels. Counts only the bytes that the formula must read and write.
    fn memory_bound(&self) -> Result<()> {
        let (rows, dim) = if self.test { (8, 64) } else { (8192, 1024) };
        let vocabulary = if self.test { 100 } else { 32_000 };
        for dtype in [DType::F32, DType::BF16] {
            let x = self.random(&[rows, dim], dtype)?;
            let bytes = |tensors: usize| Work::Bytes(tensors * rows * dim * dtype.size());
            let [weight, bias] = [self.random(&[dim], dtype)?, self.random(&[dim], dtype)?];
            let one = std::slice::from_ref(&x);
            self.op("softmax", one, [bytes(2), bytes(3)], |x| x[0].softmax())?;
            let norm = [x.clone(), weight.clone(), bias];
            self.op("layer_norm", &norm, [bytes(2), bytes(3)], |x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5))?;
            let sum = [x.clone(), x.detach(), weight.clone(), norm[2].clone()];
            // The sum is written too; here its gradient comes only from the norm.
            self.op("add_layer_norm", &sum, [bytes(4), bytes(3)], |x| {
                Ok(x[0].add_layer_norm(&x[1], Some(&x[2]), Some(&x[3]), 1e-5)?.1)
            })?;
            self.op("rms_norm", &norm[..2], [bytes(2), bytes(3)], |x| x[0].rms_norm(&x[1], 1e-8))?;
            self.op("gelu", one, [bytes(2), bytes(3)], |x| x[0].gelu())?;
            let biased = [x.clone(), weight.clone()];
            let activation = Activation::Gelu;
            self.op("bias gelu", &biased, [bytes(2), bytes(3)], |x| x[0].add_activation(&x[1], activation))?;
            let half = |tensors: usize| Work::Bytes(tensors * rows * dim / 2 * dtype.size());
            self.op("glu gelu", one, [half(3), half(5)], |x| x[0].glu(Activation::Gelu))?;
            self.op("bias glu gelu", &biased, [half(3), half(5)], |x| x[0].add_glu(&x[1], activation))?;
            self.op("transpose", one, [bytes(2), bytes(2)], |x| x[0].transpose(0, 1)?.contiguous())?;
            let heads =
                x.reshape([rows / 8, 8, dim])?.reshape([8, rows / 8, dim / 64, 64])?.transpose(1, 2)?.contiguous()?;
            let inv_freq = Tensor::generate([32], DType::F32, &self.device, |k| 10000f64.powf(k as f64 / -32.0))?;
            self.op("rotary", &[heads], [bytes(2), bytes(2)], |x| x[0].rotary(&inv_freq, 0))?;
            let logits = self.random(&[rows / 4, vocabulary], dtype)?;
            let targets = Tensor::generate([rows / 4], DType::I64, &self.device, |i| (i * 7 % vocabulary) as f64)?;
            let bytes = |tensors: usize| Work::Bytes(tensors * rows / 4 * vocabulary * dtype.size());
            self.op("cross_entropy", &[logits], [bytes(1), bytes(2)], |x| x[0].cross_entropy(&targets, -100))?;
        }
        // The largest elementwise work of a training step of GPT-2 124M.
        let (rows, dim) = if self.test { (8, 64) } else { (65_536, 768) };
        let dtype = DType::BF16;
        let bytes = |tensors: usize, dim: usize| Work::Bytes(tensors * rows * dim * dtype.size());
        {
            let x = self.random(&[rows, dim], dtype)?;
            let norm = [x.clone(), self.random(&[dim], dtype)?, self.random(&[dim], dtype)?];
            let work = [bytes(2, dim), bytes(3, dim)];
            self.op("layer_norm", &norm, work, |x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5))?;
            let sum = [x.clone(), x.detach(), norm[1].clone(), norm[2].clone()];
            self.op("add_layer_norm", &sum, [bytes(4, dim), bytes(3, dim)], |x| {
                Ok(x[0].add_layer_norm(&x[1], Some(&x[2]), Some(&x[3]), 1e-5)?.1)
            })?;
        }
        {
            let x = self.random(&[rows, 4 * dim], dtype)?;
            let work = [bytes(2, 4 * dim), bytes(3, 4 * dim)];
            self.op("gelu", std::slice::from_ref(&x), work, |x| x[0].gelu())?;
            let biased = [x, self.random(&[4 * dim], dtype)?];
            self.op("bias gelu", &biased, work, |x| x[0].add_activation(&x[1], Activation::Gelu))?;
        }
        let (count, size) = if self.test { (2, 64) } else { (24, 1 << 20) };
        let store = ParamStore::new(0, DType::F32, &self.device);
        for index in 0..count {
            store.param(&format!("p{index}"), [size], Init::Normal(1.0))?;
        }
        let params = store.params();
        let mut tape = Tape::grad();
        let sums = params.unique().map(|(_, param)| param.tensor().sum(&[])).collect::<Result<Vec<_>>>()?;
        let total = Tensor::cat(
            &sums.iter().map(|sum| sum.unsqueeze(0)).collect::<Result<Vec<_>>>()?.iter().collect::<Vec<_>>(),
            0,
        )?;
        let grads = tape.backward(&total.sum(&[])?)?;
        let optimizer = std::cell::RefCell::new(AdamW::new(AdamWOptions::default())?);
        let work = Work::Bytes(7 * 4 * count * size);
        self.run(
            ("adamw without clipping", DType::F32, &[count, size]),
            work,
            || Ok(()),
            |()| optimizer.borrow_mut().step(&params, &grads, 1e-3, None).map(drop),
        )?;
        // Reads gradient, weight and both moments, writes all but the gradient; the norm reads the gradient once more,
        // and is read back.
        let work = Work::Bytes(8 * 4 * count * size);
        self.run(
            ("adamw", DType::F32, &[count, size]),
            work,
            || Ok(()),
            |()| optimizer.borrow_mut().step(&params, &grads, 1e-3, Some(1.0)).map(drop),
        )?;
        Ok(())
    }

    /// Attention: four operations per feature of each unmasked score, ten backward (scores are recomputed).
    fn attention(&self) -> Result<()> {
        let shapes: &[[usize; 4]] =
            if self.test { &[[1, 2, 16, 64]] } else { &[[4, 16, 2048, 64], [4, 16, 2048, 128], [1, 16, 8192, 64]] };
        for &[batch, heads, length, d] in shapes {
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                if dtype == DType::F32 && length > 4096 {
                    continue;
                }
                let qkv = [0; 3].map(|_| self.random(&[batch, heads, length, d], dtype));
                let qkv = qkv.into_iter().collect::<Result<Vec<_>>>()?;
                for causal in [false, true] {
                    let spec = AttentionSpec { scale: (d as f64).powf(-0.5), causal, ..AttentionSpec::default() };
                    let scores = batch * heads * length * length / if causal { 2 } else { 1 };
                    let name = if causal { "attention causal" } else { "attention" };
                    let work = [Work::Flops(4 * d * scores), Work::Flops(10 * d * scores)];
                    self.op(name, &qkv, work, |x| attention(&x[0], &x[1], &x[2], &spec))?;
                }
            }
        }
        Ok(())
    }

    /// Attention of one new token to a full cache, which is read once.
    fn decoding_attention(&self) -> Result<()> {
        let (heads, d) = (12, 64);
        let lengths: &[usize] = if self.test { &[70] } else { &[1024, 4096, 16_384] };
        for dtype in [DType::BF16, DType::F32] {
            for batch in [1, 16] {
                for &keys in lengths {
                    let q = self.random(&[batch, heads, 1, d], dtype)?;
                    let k = self.random(&[batch, heads, keys, d], dtype)?;
                    let v = self.random(&[batch, heads, keys, d], dtype)?;
                    let ends = Tensor::generate([batch], DType::I64, &self.device, |_| (keys - 1) as f64)?;
                    let spec = DecodeSpec { scale: (d as f64).powf(-0.5), ..DecodeSpec::default() };
                    let work = Work::Bytes(2 * batch * heads * keys * d * dtype.size());
                    let shape = [batch, heads, keys, d];
                    let step = |()| attention_decode(&q, &k, &v, &ends, &spec).map(drop);
                    self.run(("decode attention", dtype, &shape), work, || Ok(()), step)?;
                }
            }
        }
        Ok(())
    }

    /// Sampling of the next token for one row and for several, keeping a tenth of the vocabulary; reads each row once.
    fn sampling(&self) -> Result<()> {
        let vocabulary = if self.test { 100 } else { 32_000 };
        for (rows, dtype) in [(1, DType::F32), (1, DType::BF16), (64, DType::BF16)] {
            let logits = self.random(&[rows, vocabulary], dtype)?;
            let spec = SampleSpec { filter: SampleFilter::Best(vocabulary / 10), temperature: 0.8, seed: 0 };
            let step = Tensor::zeros([1], DType::I64, &self.device)?;
            let work = Work::Bytes(rows * vocabulary * dtype.size());
            let shape = [rows, vocabulary];
            self.run(("sample top_k", dtype, &shape), work, || Ok(()), |()| logits.sample(&spec, &step).map(drop))?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    let section = arguments.iter().position(|argument| argument == "--section").map(|at| at + 1);
    let wanted = |name: &str| section.is_none_or(|at| arguments.get(at).is_some_and(|section| section == name));
    let filter =
        arguments.iter().enumerate().find(|(at, argument)| !argument.starts_with("--") && Some(*at) != section);
    let filter = filter.map(|(_, filter)| filter.clone()).unwrap_or_default();
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let Some(gpu) = CudaDevice::of(&device) else { return Ok(()) };
    println!("# {gpu:?}\n# kernel\tdtype\tshape\tmicroseconds\trate\tunit\t% of the peak");
    let (test, once) = (has("--test"), has("--once"));
    let rounds = if test || once { (0, 1) } else { ROUNDS };
    let mut bench = Bench { gpu, device, test, rounds, filter, copy: f64::NAN, products: Vec::new() };
    if !once {
        bench.peaks()?;
    }
    if wanted("kernels") {
        bench.attention()?;
        bench.memory_bound()?;
        bench.decoding_attention()?;
        bench.sampling()?;
    }
    if wanted("models") {
        bench.models()?;
    }
    Ok(())
}
