use std::time::Instant;
use x_transformers::{DType, Device, Philox, Result, Tape, Tensor, ops::{AttentionSpec, attention}};
fn main() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] { for n in [1024usize, 4096] {
        let draw = |stream| -> Result<Tensor> { let r = Philox::new(1, stream); Tensor::generate([1, n, 8, 64], dtype, &Device::Cpu, |i| 2.0 * r.uniform(i as u64) - 1.0)?.transpose(1, 2) };
        let (q, k, v) = (draw(1)?, draw(2)?, draw(3)?);
        let spec = AttentionSpec { causal: true, scale: 0.125, ..Default::default() };
        let (mut f, mut fb) = (vec![], vec![]);
        for _ in 0..(if n > 2000 { 4 } else { 15 }) {
            let t = Instant::now(); attention(&q, &k, &v, &spec)?; f.push(t.elapsed().as_secs_f64());
            let (q, k, v) = (q.requires_grad()?, k.requires_grad()?, v.requires_grad()?);
            let t = Instant::now();
            let mut tape = Tape::grad(); let y = attention(&q, &k, &v, &spec)?; let g = Tensor::ones(*y.shape(), dtype, &Device::Cpu)?; tape.backward_with(&y, &g)?;
            fb.push(t.elapsed().as_secs_f64());
        }
        f.sort_by(f64::total_cmp); fb.sort_by(f64::total_cmp);
        println!("ours attention {dtype} {n}: fwd {:.2} ms, fwd+bwd {:.2} ms", f[f.len() / 2] * 1e3, fb[fb.len() / 2] * 1e3);
    } }
    Ok(())
}
