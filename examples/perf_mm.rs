use std::time::Instant;
use x_transformers::{DType, Device, Philox, Result, Tensor};
#[target_feature(enable = "avx512f")]
fn peak(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let mut c = [_mm512_set1_ps(0.0); 24];
    let (a, b) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
    for _ in 0..rounds {
        for c in &mut c {
            *c = _mm512_fmadd_ps(*c, a, b);
        }
    }
    let mut s = c[0];
    for x in &c[1..] {
        s = _mm512_add_ps(s, *x);
    }
    _mm512_reduce_add_ps(s)
}
fn main() -> Result<()> {
    let dtype = if std::env::args().nth(1).as_deref() == Some("bf16") { DType::BF16 } else { DType::F32 };
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let t = Instant::now();
        rayon::broadcast(|_| std::hint::black_box(unsafe { peak(500_000) }));
        best = best.min(t.elapsed().as_secs_f64());
    }
    println!("peak {:.0} GFLOP/s", rayon::current_num_threads() as f64 * 500_000.0 * 24.0 * 32.0 / best / 1e9);
    let draw = |s: [usize; 3], stream| {
        let r = Philox::new(1, stream);
        Tensor::generate(s, dtype, &Device::Cpu, |i| 2.0 * r.uniform(i as u64) - 1.0)
    };
    for (name, [b, m, k, n]) in [
        ("proj", [1, 1024, 512, 512]),
        ("ff in", [1, 1024, 512, 2048]),
        ("ff out", [1, 1024, 2048, 512]),
        ("logits", [1, 1024, 512, 20_000]),
        ("scores", [8, 1024, 64, 1024]),
        ("values", [8, 1024, 1024, 64]),
    ] {
        for (form, ta, tb) in [("x.Wt", false, true), ("g.W", false, false), ("gt.x", true, false)] {
            // gt.x: dW [n,k] = g[m,n]^T x[m,k]
            let (m, k, n) = match form {
                "x.Wt" => (m, k, n),
                "g.W" => (m, n, k),
                _ => (n, m, k),
            };
            let a = draw(if ta { [b, k, m] } else { [b, m, k] }, 1)?;
            let w = draw(if tb { [b, n, k] } else { [b, k, n] }, 2)?;
            let a = if ta { a.transpose(1, 2)? } else { a };
            let w = if tb { w.transpose(1, 2)? } else { w };
            let mut best = f64::INFINITY;
            let mut all = vec![];
            let start = Instant::now();
            while start.elapsed().as_secs_f64() < 0.25 {
                let t = Instant::now();
                a.matmul(&w)?;
                let s = t.elapsed().as_secs_f64();
                best = best.min(s);
                all.push(s);
            }
            all.sort_by(f64::total_cmp);
            let f = 2.0 * (b * m * k * n) as f64 / 1e9;
            println!(
                "{name:8} {form:5} [{b} {m} {k} {n}] best {:.0} median {:.0} GFLOP/s",
                f / best,
                f / all[all.len() / 2]
            );
        }
    }
    Ok(())
}
