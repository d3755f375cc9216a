//! Matrix products at transformer shapes, compared with the `gemm` crate, as shares of the multiply-add peak measured
//! in the same run. `cargo bench --bench matmul -- "decode"` runs a part.

use std::{cell::Cell, hint::black_box, time::Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use x_transformers::{DType, Device, Philox, Result, Tensor};

mod peak;

/// Layout of the operands, as `linear` and its gradients use them.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// `x·Wᵀ`, the forward pass.
    Forward,
    /// `g·W`, the gradient of the input.
    Input,
    /// `gᵀ·x`, the gradient of the weight.
    Weight,
}

const FORMS: [(Form, &str); 3] = [(Form::Forward, "x·Wᵀ"), (Form::Input, "g·W"), (Form::Weight, "gᵀ·x")];

/// A name, and batch, rows, products and columns.
const SHAPES: [(&str, [usize; 4]); 9] = [
    ("projection", [1, 1024, 512, 512]),
    ("feed-forward in", [1, 1024, 512, 2048]),
    ("feed-forward out", [1, 1024, 2048, 512]),
    ("logits", [1, 1024, 512, 20_000]),
    ("attention scores", [8, 1024, 64, 1024]),
    ("attention values", [8, 1024, 1024, 64]),
    ("attention tiles", [64, 64, 64, 128]),
    ("decode", [1, 1, 512, 2048]),
    ("decode logits", [1, 1, 512, 20_000]),
];

/// One product with operands in one form.
struct Problem {
    sizes: [usize; 4],
    form: Form,
    a: Tensor,
    b: Tensor,
}

impl Problem {
    fn new(sizes: [usize; 4], form: Form, dtype: DType) -> Result<Self> {
        let [batch, m, k, n] = sizes;
        let draw = |rows: usize, columns: usize, turned: bool, stream: u64| -> Result<Tensor> {
            let shape = if turned { [batch, columns, rows] } else { [batch, rows, columns] };
            let random = Philox::new(1, stream);
            let x = Tensor::generate(shape, dtype, &Device::Cpu, |i| 2.0 * random.uniform(i as u64) - 1.0)?;
            if turned { x.transpose(1, 2) } else { Ok(x) }
        };
        let a = draw(m, k, form == Form::Weight, 1)?;
        let b = draw(k, n, form == Form::Forward, 2)?;
        Ok(Self { sizes, form, a, b })
    }

    fn flops(&self) -> u64 {
        2 * self.sizes.iter().product::<usize>() as u64
    }

    /// The same product by the `gemm` crate.
    fn peer(&self, threads: usize) -> Result<impl FnMut()> {
        let [batch, m, k, n] = self.sizes;
        let packed =
            |x: &Tensor, turned: bool| if turned { x.transpose(1, 2)?.to_vec::<f32>() } else { x.to_vec::<f32>() };
        let (a_turned, b_turned) = (self.form == Form::Weight, self.form == Form::Forward);
        let (a, b) = (packed(&self.a, a_turned)?, packed(&self.b, b_turned)?);
        let mut c = vec![0f32; batch * m * n];
        let strides = |turned: bool, rows: usize, columns: usize| {
            if turned { (1, rows as isize) } else { (columns as isize, 1) }
        };
        let ((a_row, a_col), (b_row, b_col)) = (strides(a_turned, m, k), strides(b_turned, k, n));
        let parallel = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
        Ok(move || {
            for item in 0..batch {
                let (a, b) = (&a[item * m * k..], &b[item * k * n..]);
                let c = &mut c[item * m * n..][..m * n];
                // SAFETY: the sizes and strides are those of the slices.
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        k,
                        c.as_mut_ptr(),
                        1,
                        n as isize,
                        false,
                        a.as_ptr(),
                        a_col,
                        a_row,
                        b.as_ptr(),
                        b_col,
                        b_row,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        parallel,
                    );
                }
            }
            black_box(&c);
        })
    }
}

/// Times one function and prints its share of the peak.
fn time(group: &mut BenchmarkGroup<WallTime>, name: &str, flops: u64, peak: f64, mut f: impl FnMut()) {
    let best = Cell::new(f64::INFINITY);
    group.throughput(Throughput::Elements(flops));
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|rounds| {
            let start = Instant::now();
            for _ in 0..rounds {
                f();
            }
            let elapsed = start.elapsed();
            best.set(best.get().min(elapsed.as_secs_f64() / rounds as f64));
            elapsed
        });
    });
    if best.get().is_finite() {
        let rate = flops as f64 / best.get() / 1e9;
        println!("    best {rate:.1} GFLOP/s, {:.0} % of the measured peak of {peak:.0}", 100.0 * rate / peak);
    }
}

fn run(threads: usize) -> Result<()> {
    // Of this thread: the benchmark cannot move between threads.
    let mut criterion = Criterion::default().configure_from_args();
    for (name, sizes) in SHAPES {
        let mut group = criterion.benchmark_group(format!("matmul/{name} {sizes:?}/{threads} threads"));
        group.sample_size(10).warm_up_time(std::time::Duration::from_millis(200));
        group.measurement_time(std::time::Duration::from_secs(1));
        for (form, form_name) in FORMS {
            let problem = Problem::new(sizes, form, DType::F32)?;
            // Measured with each problem: this process's share of the machine changes with the load.
            let (flops, peak) = (problem.flops(), peak::flops(true) / 1e9);
            time(&mut group, &format!("{form_name} f32"), flops, peak, || {
                black_box(problem.a.matmul(&problem.b)).ok();
            });
            time(&mut group, &format!("{form_name} f32, gemm crate"), flops, peak, problem.peer(threads)?);
            let problem = Problem::new(sizes, form, DType::BF16)?;
            time(&mut group, &format!("{form_name} bf16"), flops, peak, || {
                black_box(problem.a.matmul(&problem.b)).ok();
            });
        }
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}

fn main() -> Result<()> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    for threads in if all > 1 { vec![1, all] } else { vec![1] } {
        match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
            Ok(pool) => pool.install(|| run(threads))?,
            Err(error) => eprintln!("no pool of {threads} threads: {error}"),
        }
    }
    Ok(())
}
