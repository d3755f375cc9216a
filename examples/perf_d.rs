use std::time::Instant;
use x_transformers::{
    DType, Device, Philox, Result, Store, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{AdamW, AdamWOptions},
};
fn main() -> Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let (mode, dtype) = (a[1].as_str(), if a[2] == "bf16" { DType::BF16 } else { DType::F32 });
    let p = |i: usize| a[i].parse::<usize>().unwrap();
    let (b, n, v, rep) = (p(3), p(4), p(5), p(6));
    let net = TransformerWrapperConfig {
        num_tokens: v,
        max_seq_len: n,
        attn_layers: AttentionLayersConfig { heads: 8, ..AttentionLayersConfig::decoder(512, 6) },
        ..Default::default()
    };
    let store = Store::new(0, dtype, &Device::Cpu);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    let params = store.params();
    let options = ForwardOptions::default();
    let random = Philox::new(0, 0);
    let tokens = Tensor::generate([b, n + 1], DType::I64, &Device::Cpu, |i| random.below(i as u64, v as u64) as f64)?;
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let parts = std::env::var("PARTS").is_ok();
    let mut step = || -> Result<()> {
        if mode == "forward" {
            model.net.forward(&tokens.narrow(1, 0, n)?.contiguous()?, &options)?;
            return Ok(());
        }
        let t0 = Instant::now();
        let mut tape = Tape::train(optimizer.steps());
        let loss = model.loss(&tokens, &options)?;
        let t1 = Instant::now();
        let gradients = tape.backward(&loss)?;
        let t2 = Instant::now();
        optimizer.step(&params, &gradients, 1e-4, Some(1.0))?;
        let t3 = Instant::now();
        if parts {
            println!("fwd {:?} bwd {:?} opt {:?}", t1 - t0, t2 - t1, t3 - t2);
        }
        Ok(())
    };
    step()?;
    let mut ts = vec![];
    for _ in 0..rep {
        let t = Instant::now();
        step()?;
        ts.push(t.elapsed().as_secs_f64());
    }
    ts.sort_by(f64::total_cmp);
    let hwm = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let hwm = hwm.lines().find(|l| l.starts_with("VmHWM")).unwrap_or("").to_string();
    println!(
        "ours {mode} {dtype} {b}x{n} v{v}: median {:.3} min {:.3} max {:.3} {hwm}",
        ts[ts.len() / 2],
        ts[0],
        ts[ts.len() - 1]
    );
    Ok(())
}
