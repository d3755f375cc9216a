//! Single ops, one round for each line of standard input; benches/peers/cpu.py interleaves them with PyTorch's.
//!
//! `cargo bench --bench interleaved -- NAME` prints, for each line that it reads, a line of JSON with the median
//! seconds of a repetition and its work: the bytes of memory-bound ops, the operations of f32 products. Without a name
//! it lists the names. `copy` and `peak` time their references: a copy, and multiply-adds in registers. `gemm:NAME`
//! times the crate `gemm` on a product. Shapes are those of a decoder of width 512 on 1024 tokens, and larger ones that
//! do not fit the caches.

mod peak;

use std::{
    hint::black_box,
    io::BufRead,
    time::{Duration, Instant},
};

use rayon::prelude::*;
use x_transformers::{
    DType, Device, Init, Param, ParamStore, Philox, Result, Tape, Tensor,
    ops::{AttentionSpec, attention},
    train::{AdamW, AdamWOptions, Optimizer},
};

/// Minimum time of a round.
const ROUND: Duration = Duration::from_millis(60);

/// Timed pass of an op.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
    /// Both, timed as one.
    Both,
}

/// Random numbers around 0.
fn normal(shape: &[usize], dtype: DType) -> Result<Tensor> {
    let random = Philox::new(7, shape.len() as u64);
    Tensor::generate(shape, dtype, &Device::Cpu, |i| random.normal(i as u64))
}

fn tokens(shape: &[usize], limit: u64) -> Result<Tensor> {
    let random = Philox::new(8, 0);
    Tensor::generate(shape, DType::I64, &Device::Cpu, |i| random.below(i as u64, limit) as f64)
}

/// A repetition, which returns its own time.
type Run = Box<dyn FnMut() -> Result<Duration>>;

fn timed<R>(f: impl FnOnce() -> Result<R>) -> Result<Duration> {
    let clock = Instant::now();
    let result = f()?;
    let elapsed = clock.elapsed();
    drop(result);
    Ok(elapsed)
}

/// Benchmarks a differentiable function of these tensors.
fn op(inputs: Vec<Tensor>, pass: Pass, run: fn(&[Tensor]) -> Result<Tensor>) -> Result<Run> {
    if pass == Pass::Forward {
        return Ok(Box::new(move || timed(|| run(&inputs))));
    }
    let leaf = |x: &Tensor| if x.dtype().is_float() { x.requires_grad() } else { Ok(x.clone()) };
    let leaves = inputs.iter().map(leaf).collect::<Result<Vec<_>>>()?;
    let output = run(&inputs)?;
    let cotangent = Tensor::ones(*output.shape(), output.dtype(), &Device::Cpu)?;
    Ok(Box::new(move || {
        let clock = Instant::now();
        let mut tape = Tape::train(0);
        let output = run(&leaves)?;
        let clock = if pass == Pass::Both { clock } else { Instant::now() };
        let gradients = tape.backward_with(&output, &cotangent)?;
        let elapsed = clock.elapsed();
        drop(gradients);
        Ok(elapsed)
    }))
}

/// Causal attention of eight heads of 64 features.
fn attend(length: usize, dtype: DType, pass: Pass) -> Result<Run> {
    let operands = (0..3).map(|_| normal(&[1, length, 8, 64], dtype)).collect::<Result<Vec<_>>>()?;
    op(operands, pass, |x| {
        let spec = AttentionSpec { scale: 0.125, causal: true, ..AttentionSpec::default() };
        let [q, k, v] = [&x[0], &x[1], &x[2]].map(|x| x.transpose(1, 2));
        attention(&q?, &k?, &v?, &spec)?.transpose(1, 2)
    })
}

/// Elements of the weights that [`adamw`] updates.
const WEIGHTS: usize = 512 * (2 * 20_000 + 24 * 512 + 12 * 2048 + 1024);

/// Updates the weights of a decoder of width 512, depth 6 and 20,000 tokens. Computes the norm of the gradients even
/// without clipping: weights stay unchanged if it is not finite.
fn adamw(clip: Option<f64>) -> Result<Run> {
    let store = ParamStore::new(0, DType::F32, &Device::Cpu);
    let shapes = [([20_000, 512], 2), ([512, 512], 24), ([2048, 512], 12), ([1024, 512], 1)];
    let each = shapes.into_iter().flat_map(|(shape, count)| std::iter::repeat_n(shape, count)).enumerate();
    let param = |(i, shape)| store.at(i).param("weight", shape, Init::Normal(0.02));
    let params: Vec<Param> = each.map(param).collect::<Result<_>>()?;
    let mut tape = Tape::grad();
    let mut loss = Tensor::scalar(0.0f32, &Device::Cpu)?;
    for param in &params {
        loss = loss.add(&param.tensor().square()?.sum(&[])?)?;
    }
    let gradients = tape.backward(&loss)?;
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let params = store.params();
    Ok(Box::new(move || timed(|| optimizer.step(&params, &gradients, 1e-4, clip))))
}

/// Products of `[m, k]` and `[k, n]`: one, or eight of one attention head each.
struct Products<'a> {
    batch: usize,
    sizes: [usize; 3],
    /// A letter `t` marks an operand that is transposed in memory.
    form: &'a str,
    f32: bool,
}

impl<'a> Products<'a> {
    /// Returns `None` for the name of another op.
    fn of(name: &'a str) -> Option<Self> {
        let mut parts = name.split('-');
        let batch = match parts.next()? {
            "matmul" => 1,
            "batched" => 8,
            _ => return None,
        };
        let (form, sizes) = (parts.next()?, parts.next()?);
        let sizes: Vec<usize> = sizes.split('x').filter_map(|size| size.parse().ok()).collect();
        Some(Self { batch, sizes: sizes.try_into().ok()?, form, f32: parts.next()? == "f32" })
    }

    /// Returns `true` for each operand that is transposed in memory.
    fn turned(&self) -> (bool, bool) {
        (self.form.starts_with('t'), self.form.ends_with('t'))
    }

    fn run(&self) -> Result<Run> {
        let ([m, k, n], (left, right)) = (self.sizes, self.turned());
        let dtype = if self.f32 { DType::F32 } else { DType::BF16 };
        let operand = |rows: usize, columns: usize, turned: bool| {
            let sizes = if turned { [self.batch, columns, rows] } else { [self.batch, rows, columns] };
            let shape = if self.batch == 1 { &sizes[1..] } else { &sizes[..] };
            let x = normal(shape, dtype)?;
            if turned { x.transpose(-2, -1) } else { Ok(x) }
        };
        let (a, b) = (operand(m, k, left)?, operand(k, n, right)?);
        Ok(Box::new(move || timed(|| a.matmul(&b))))
    }

    /// Returns the products computed by the crate `gemm`, with the same layouts; it allocates its result too.
    fn by_gemm(&self) -> Result<Run> {
        let (batch, [m, k, n], (left, right)) = (self.batch, self.sizes, self.turned());
        let values = |rows: usize, columns: usize| normal(&[batch, rows, columns], DType::F32)?.to_vec::<f32>();
        let (a, b) = (values(m, k)?, values(k, n)?);
        // Column stride, then row stride.
        let strides = |turned: bool, rows: usize, columns: usize| {
            if turned { (rows as isize, 1) } else { (1, columns as isize) }
        };
        let ((a_column, a_row), (b_column, b_row)) = (strides(left, m, k), strides(right, k, n));
        let parallelism = match rayon::current_num_threads() {
            1 => gemm::Parallelism::None,
            threads => gemm::Parallelism::Rayon(threads),
        };
        Ok(Box::new(move || {
            let clock = Instant::now();
            let mut c = Vec::<f32>::with_capacity(batch * m * n);
            for item in 0..batch {
                let (a, b) = (&a[item * m * k..][..m * k], &b[item * k * n..][..k * n]);
                // SAFETY: sizes and strides are those of the slices and of the allocation, which is only written.
                unsafe {
                    let c = c.as_mut_ptr().add(item * m * n);
                    let (a, b, row) = (a.as_ptr(), b.as_ptr(), n as isize);
                    gemm::gemm(
                        m,
                        n,
                        k,
                        c,
                        1,
                        row,
                        false,
                        a,
                        a_column,
                        a_row,
                        b,
                        b_column,
                        b_row,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        parallelism,
                    );
                }
            }
            let elapsed = clock.elapsed();
            black_box(c.as_ptr());
            Ok(elapsed)
        }))
    }
}

/// Numbers of rows of elementwise ops that fit the caches, and of ones that do not.
const ROWS: [usize; 2] = [1024, 16384];

fn names() -> Vec<String> {
    let mut names = Vec::new();
    for pass in ["forward", "backward"] {
        for rows in ROWS {
            for name in ["softmax", "layer_norm", "gelu", "dropout"] {
                names.push(format!("{name}-{rows}-{pass}"));
            }
        }
        for name in ["cross_entropy", "embedding"] {
            names.push(format!("{name}-1024-{pass}"));
        }
    }
    names.extend(["adamw".into(), "adamw_clip".into()]);
    for (length, dtype) in [1024, 4096].into_iter().flat_map(|n| [(n, "f32"), (n, "bf16")]) {
        for pass in ["forward", "both"] {
            names.push(format!("attention-{length}-{dtype}-{pass}"));
        }
    }
    for dtype in ["f32", "bf16"] {
        for form in ["nn", "nt", "tn", "tt"] {
            for sizes in ["1024x512x512", "1024x512x2048", "1024x2048x512", "1024x512x20000"] {
                names.push(format!("matmul-{form}-{sizes}-{dtype}"));
            }
        }
        for (form, sizes) in ["nn", "nt", "tn", "tt"].into_iter().flat_map(|form| [(form, 0), (form, 1)]) {
            let sizes = ["1024x64x1024", "1024x1024x64"][sizes];
            names.push(format!("batched-{form}-{sizes}-{dtype}"));
        }
    }
    names
}

/// Resource that limits the speed of an op.
#[derive(Clone, Copy, PartialEq)]
enum Limit {
    Memory,
    Compute,
}

/// Returns what limits an op, and its work: the bytes that the formula of a memory-bound op must read and write, or the
/// floating-point operations of an f32 product; `None` for other ops.
fn work(name: &str) -> Option<(Limit, usize)> {
    if name == "peak" {
        return Some((Limit::Compute, peak::flops_of(PEAK_ROUNDS)));
    }
    if let Some(products) = Products::of(name) {
        let flops = 2 * products.batch * products.sizes.iter().product::<usize>();
        return products.f32.then_some((Limit::Compute, flops));
    }
    traffic(name).map(|bytes| (Limit::Memory, bytes))
}

/// Rounds of the multiply-add loop in a repetition of `peak`: some milliseconds.
const PEAK_ROUNDS: usize = 200_000;

/// Returns the bytes of a memory-bound op.
fn traffic(name: &str) -> Option<usize> {
    let mut parts = name.split('-');
    let (kind, rows) = (parts.next()?, parts.next().and_then(|rows| rows.parse::<usize>().ok()).unwrap_or(1));
    let forward = parts.next() == Some("forward");
    let table = 20_000 * 512;
    let elements = match kind {
        "copy" => 2 * COPIED,
        "softmax" => rows * 1024 * if forward { 2 } else { 3 },
        "layer_norm" => rows * 512 * if forward { 2 } else { 3 },
        "gelu" => rows * 2048 * if forward { 2 } else { 3 },
        "dropout" => rows * 2048 * 2,
        "cross_entropy" => rows * 20_000 * if forward { 1 } else { 2 },
        "embedding" => rows * 512 + if forward { rows * 512 } else { table },
        // Weights and both moments are read and written, gradients read: twice if they are clipped.
        "adamw" => 7 * WEIGHTS,
        "adamw_clip" => 8 * WEIGHTS,
        _ => return None,
    };
    Some(elements * size_of::<f32>())
}

/// Elements of a copy far larger than the caches.
const COPIED: usize = 32 << 20;

/// Copies with all threads.
fn copy() -> Run {
    let (from, mut to) = (vec![1.0f32; COPIED], vec![0.0f32; COPIED]);
    Box::new(move || {
        timed(|| {
            to.par_chunks_mut(1 << 18).zip(from.par_chunks(1 << 18)).for_each(|(to, from)| to.copy_from_slice(from));
            Ok(())
        })
    })
}

/// Returns the benchmark with this name, or `None` if there is none.
fn find(name: &str) -> Result<Option<Run>> {
    let parts: Vec<&str> = name.split('-').collect();
    let pass = match parts.last() {
        Some(&"forward") => Pass::Forward,
        Some(&"backward") => Pass::Backward,
        _ => Pass::Both,
    };
    let dtype = if parts.contains(&"bf16") { DType::BF16 } else { DType::F32 };
    let size = |index: usize| parts.get(index).and_then(|size| size.parse::<usize>().ok()).unwrap_or(1);
    let rows = size(1);
    let f32 = DType::F32;
    Ok(Some(match parts[0] {
        "softmax" => op(vec![normal(&[rows, 1024], f32)?], pass, |x| x[0].softmax())?,
        "layer_norm" => {
            let inputs = vec![normal(&[rows, 512], f32)?, normal(&[512], f32)?, normal(&[512], f32)?];
            op(inputs, pass, |x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5))?
        }
        "gelu" => op(vec![normal(&[rows, 2048], f32)?], pass, |x| x[0].gelu())?,
        "dropout" => {
            let x = vec![normal(&[rows, 2048], f32)?];
            match pass {
                // It acts under a tape alone, which is timed with it.
                Pass::Forward => Box::new(move || {
                    let _tape = Tape::train(0);
                    timed(|| x[0].dropout(0.1))
                }),
                _ => op(x, pass, |x| x[0].dropout(0.1))?,
            }
        }
        "cross_entropy" => {
            let inputs = vec![normal(&[rows, 20_000], f32)?, tokens(&[rows], 20_000)?];
            op(inputs, pass, |x| x[0].cross_entropy(&x[1], -100))?
        }
        "embedding" => {
            let inputs = vec![normal(&[20_000, 512], f32)?, tokens(&[rows], 20_000)?];
            op(inputs, pass, |x| x[0].embedding(&x[1]))?
        }
        "copy" => copy(),
        "adamw" => adamw(None)?,
        "adamw_clip" => adamw(Some(1.0))?,
        "attention" => attend(rows, dtype, pass)?,
        "peak" => Box::new(|| {
            timed(|| {
                peak::multiply_adds(PEAK_ROUNDS);
                Ok(())
            })
        }),
        _ => {
            let (products, by_gemm) = match name.strip_prefix("gemm:") {
                Some(name) => (Products::of(name).filter(|products| products.f32), true),
                None => (Products::of(name), false),
            };
            let Some(products) = products else { return Ok(None) };
            if by_gemm { products.by_gemm()? } else { products.run()? }
        }
    }))
}

/// Returns the median seconds of a repetition, so that one that waited for the processor does not weigh more.
fn round(run: &mut Run) -> Result<f64> {
    let (clock, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || clock.elapsed() < ROUND {
        times.push(run()?.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = arguments.iter().find(|argument| !argument.starts_with("--"));
    if arguments.iter().any(|argument| argument == "--test") {
        let more = ["copy", "peak", "gemm:matmul-tn-1024x512x512-f32", "gemm:batched-nt-1024x64x1024-f32"];
        for name in names().into_iter().chain(more.map(String::from)) {
            let mut run = find(&name)?.unwrap_or_else(|| panic!("{name} is listed and not known"));
            run()?;
        }
        return Ok(());
    }
    let known = given.filter(|name| {
        ["copy", "peak"].contains(&name.as_str())
            || names().iter().any(|known| name.trim_start_matches("gemm:") == known)
    });
    let Some(mut run) = known.map(|name| find(name)).transpose()?.flatten() else {
        for name in names() {
            let limit = match work(&name) {
                Some((Limit::Memory, _)) => " memory",
                Some((Limit::Compute, _)) => " compute",
                None => "",
            };
            println!("{name}{limit}");
        }
        return Ok(());
    };
    let work = given.and_then(|name| work(name)).map_or(String::new(), |(_, work)| format!(", \"work\": {work}"));
    for _ in std::io::stdin().lock().lines() {
        println!("{{\"seconds\": {:e}{work}}}", round(&mut run)?);
    }
    Ok(())
}
