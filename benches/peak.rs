//! Peak rates of this machine, measured in the same run as the benchmarks that are compared with them.

// Each benchmark uses a part of this module.
#![allow(dead_code)]

use std::{
    cell::Cell,
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use rayon::prelude::*;
use x_transformers::device::Level;

/// Peak rates per second.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Floating-point operations in f32, a fused multiply-add being two, on one thread.
    pub flops_of_thread: f64,
    /// The same on all threads of the `rayon` pool at once.
    pub flops: f64,
    /// Bytes read plus bytes written by a copy far larger than the caches, on all threads.
    pub bytes: f64,
}

/// Returns the peaks, which the first call measures (about a second) and prints.
pub fn peak() -> Peak {
    static PEAK: OnceLock<Peak> = OnceLock::new();
    *PEAK.get_or_init(|| {
        let peak = Peak { flops_of_thread: flops(false), flops: flops(true), bytes: copy_bytes() };
        println!(
            "peak: {:.0} GFLOP/s (f32, {}) on one thread, {:.0} on {} threads; copy {:.1} GB/s\n",
            peak.flops_of_thread / 1e9,
            multiply_add().1,
            peak.flops / 1e9,
            rayon::current_num_threads(),
            peak.bytes / 1e9,
        );
        peak
    })
}

/// Independent sums that a multiply-add loop keeps in flight: latency times ports of current processors.
const CHAINS: usize = 12;

/// Loop of `rounds` multiply-adds on each of [`CHAINS`] vectors, and its number of lanes per vector.
type Loop = (fn(usize) -> f32, &'static str, usize);

/// Returns the loop with the instructions of the level in use: the processor's, or the one that `XT_CPU` names.
fn multiply_add() -> Loop {
    let wanted = Level::wanted().ok().flatten();
    match wanted.map_or(Level::detected(), |wanted| wanted.min(Level::detected())) {
        Level::Portable => (portable, "portable", 8),
        // SAFETY: a level in use is one that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => (|rounds| unsafe { x86::avx2(rounds) }, "AVX2", 8),
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        _ => (|rounds| unsafe { x86::avx512(rounds) }, "AVX-512", 16),
        #[cfg(not(target_arch = "x86_64"))]
        _ => (portable, "portable", 8),
    }
}

/// Multiplies and adds in the vectors that every processor of the architecture has.
fn portable(rounds: usize) -> f32 {
    let (a, b) = (black_box(0.999f32), black_box(0.001f32));
    let mut sums = [[1.0f32; 8]; CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            for lane in sum {
                // Baseline x86-64 has no fused form; `mul_add` would call a function.
                *lane = if cfg!(target_arch = "x86_64") { *lane * a + b } else { lane.mul_add(a, b) };
            }
        }
    }
    sums.iter().flatten().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    use super::CHAINS;

    #[target_feature(enable = "avx512f")]
    pub fn avx512(rounds: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(rounds: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        sums.iter().map(|&sum| _mm_cvtss_f32(_mm256_castps256_ps128(sum))).sum()
    }
}

/// Returns the shortest time of several runs.
fn best(runs: usize, mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(time).fold(f64::INFINITY, f64::min)
}

/// Multiplies and adds in registers on all threads of the pool, `rounds` times on each.
pub fn multiply_adds(rounds: usize) {
    let (run, ..) = multiply_add();
    rayon::broadcast(|_| black_box(run(black_box(rounds))));
}

/// Returns the floating-point operations of [`multiply_adds`], a fused multiply-add being two.
pub fn flops_of(rounds: usize) -> usize {
    2 * rounds * CHAINS * multiply_add().2 * rayon::current_num_threads()
}

/// Floating-point operations per second in f32, a fused multiply-add being two, on one thread or on all of the pool.
pub fn flops(all_threads: bool) -> f64 {
    let (run, _, lanes) = multiply_add();
    let rounds = 2_000_000;
    let work = (2 * rounds * CHAINS * lanes) as f64;
    if all_threads {
        let seconds = best(5, || {
            rayon::broadcast(|_| black_box(run(black_box(rounds))));
        });
        work * rayon::current_num_threads() as f64 / seconds
    } else {
        let seconds = best(5, || {
            black_box(run(black_box(rounds)));
        });
        work / seconds
    }
}

fn copy_bytes() -> f64 {
    const BYTES: usize = 256 << 20;
    // Written once, so that the pages exist before they are timed.
    let (from, mut to) = (vec![1u8; BYTES], vec![2u8; BYTES]);
    let part = BYTES / (4 * rayon::current_num_threads());
    let seconds = best(4, || {
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut to);
    });
    2.0 * BYTES as f64 / seconds
}

/// Returns the bytes per second that all threads together read from memory far larger than the caches.
pub fn read_bytes() -> f64 {
    let values = vec![1.0f32; 64 << 20];
    let part = values.len() / rayon::current_num_threads();
    let seconds = best(5, || {
        black_box(values.par_chunks(part).map(sum).sum::<f32>());
    });
    (4 * values.len()) as f64 / seconds
}

/// Sums the values as fast as memory allows.
fn sum(values: &[f32]) -> f32 {
    #[inline(always)]
    fn body(values: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 128];
        for values in values.chunks_exact(lanes.len()) {
            lanes.iter_mut().zip(values).for_each(|(lane, value)| *lane += value);
        }
        lanes.iter().sum()
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512(values: &[f32]) -> f32 {
            body(values)
        }
        #[target_feature(enable = "avx2")]
        fn avx2(values: &[f32]) -> f32 {
            body(values)
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was detected.
            return unsafe { avx512(values) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was detected.
            return unsafe { avx2(values) };
        }
    }
    body(values)
}

/// Work of one run of a benchmark, in the unit of the peak that it is compared with.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Bytes that must be read and written.
    Bytes(usize),
    /// Floating-point operations.
    Flops(usize),
}

/// Criterion group that, at its end, prints the share of the peak that each benchmark reached.
pub struct Group<'a> {
    group: BenchmarkGroup<'a, WallTime>,
    name: String,
    lines: Vec<(String, Work, f64)>,
}

impl<'a> Group<'a> {
    /// Creates a group of short benchmarks.
    pub fn new(criterion: &'a mut Criterion, name: &str) -> Self {
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        Self { group, name: name.into(), lines: Vec::new() }
    }

    /// Times `run`.
    pub fn bench(&mut self, id: &str, work: Work, mut run: impl FnMut()) {
        self.bench_part(id, work, || {
            let start = Instant::now();
            run();
            start.elapsed()
        });
    }

    /// Times the part of `run` that it measures itself.
    pub fn bench_part(&mut self, id: &str, work: Work, mut run: impl FnMut() -> Duration) {
        let seconds = Cell::new(f64::INFINITY);
        self.group.throughput(match work {
            Work::Bytes(bytes) => Throughput::BytesDecimal(bytes as u64),
            Work::Flops(flops) => Throughput::Elements(flops as u64),
        });
        self.group.bench_function(id, |bencher| {
            bencher.iter_custom(|runs| {
                let total: Duration = (0..runs).map(|_| run()).sum();
                seconds.set(seconds.get().min(total.as_secs_f64() / runs as f64));
                total
            });
        });
        // Infinite if a filter on the command line skipped it.
        if seconds.get().is_finite() {
            self.lines.push((id.into(), work, seconds.get()));
        }
    }

    /// Ends the group and prints each benchmark's share of the peak, by its fastest sample.
    pub fn finish(self) {
        self.group.finish();
        // A run that only tests the benchmarks has no meaningful times.
        if std::env::args().any(|argument| argument == "--test") {
            return;
        }
        for (id, work, seconds) in &self.lines {
            let (amount, unit, limit) = match *work {
                Work::Bytes(bytes) => (bytes, "GB/s", peak().bytes),
                Work::Flops(flops) => (flops, "GFLOP/s", peak().flops),
            };
            let rate = amount as f64 / seconds;
            println!("{}/{id}: {:.1} {unit}, {:.0} % of the peak", self.name, rate / 1e9, 100.0 * rate / limit);
        }
        println!();
    }
}
