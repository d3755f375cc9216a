//! A block of your own inside a transformer: a gated causal convolution in place of each feedforward.
//!
//!     cargo run --release --example own_block
//!
//! A `Branch` gets the normed input of its sublayer and returns the term that the residual adds; norms, residuals,
//! attention and logits are those of the library. Its one `forward` serves training, layers that are recomputed in the
//! backward pass, and generation with a cache: `Past` has the positions before those of a call. The program checks that
//! generation with and without the cache gives the same tokens, and that recomputed layers give the same gradients.

use std::sync::Arc;

use x_transformers::{
    DType, Device, Error, ErrorKind, Gradients, Init, Param, ParamStore, Result, Tape, Tensor,
    config::{AttentionLayersConfig, BranchPlan, SamplingConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions, TransformerWrapper},
    nn::{Branch, Linear, Past},
    train::{AdamW, AdamWOptions, Optimizer},
};

/// Positions that the convolution sees, its own among them.
const WIDTH: usize = 4;

/// `W (conv(x) ⊙ silu(V x))`, the convolution being one of each feature.
#[derive(Debug)]
struct GatedConvolution {
    /// `[WIDTH, dim]`, the last row for the position itself.
    taps: Param,
    gate: Linear,
    out: Linear,
}

impl GatedConvolution {
    fn new(dim: usize, store: &ParamStore) -> Result<Self> {
        Ok(Self {
            taps: store.param("taps", [WIDTH, dim], Init::Normal(0.5))?,
            gate: Linear::new(&store.at("gate"), dim, dim)?,
            out: Linear::new(&store.at("out"), dim, dim)?,
        })
    }
}

impl Branch for GatedConvolution {
    fn forward(&self, x: &Tensor, past: &mut Past<'_>) -> Result<Tensor> {
        let n = x.dim(1)?;
        let window = past.window(0, x, WIDTH - 1)?;
        let taps = self.taps.tensor();
        let tap = |k: usize| window.narrow(1, k, n)?.mul(&taps.narrow(0, k, 1)?);
        let mut sum = tap(0)?;
        for k in 1..WIDTH {
            sum = sum.add(&tap(k)?)?;
        }
        self.out.forward(&sum.mul(&self.gate.forward(x)?.silu()?)?)
    }
}

fn gradients(model: &AutoregressiveWrapper, tokens: &Tensor, checkpoint_layers: bool) -> Result<(f64, Gradients)> {
    let mut tape = Tape::train(0);
    let loss = model.loss(tokens, &ForwardOptions { checkpoint_layers, ..Default::default() })?;
    let grads = tape.backward(&loss)?;
    Ok((loss.item()?, grads))
}

fn check(holds: bool, what: &str) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Argument { op: "own_block", message: format!("{what} differ") })),
    }
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let layers = AttentionLayersConfig { heads: 2, rotary_pos_emb: true, ..AttentionLayersConfig::decoder(32, 2) };
    let dim = layers.dim;
    let config = TransformerWrapperConfig::new(256, 64, layers);
    let store = ParamStore::new(0, DType::F32, &device);
    let net = TransformerWrapper::with_branches(&config, &store, |_, layer, store| match layer.branch {
        BranchPlan::FeedForward(_) => Ok(Some(Arc::new(GatedConvolution::new(dim, store)?))),
        _ => Ok(None),
    })?;
    print!("{}", net.plan().layers);
    let model = AutoregressiveWrapper::around(net)?;
    let params = store.params();

    let text = b"a block of one's own, a block of one's own, a block of one's own";
    let tokens: Vec<i64> = text.iter().map(|&byte| byte.into()).collect();
    let tokens = Tensor::from_slice(&tokens, [1, tokens.len()], &device)?;
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut losses = Vec::new();
    for _ in 0..30 {
        let (loss, grads) = gradients(&model, &tokens, false)?;
        optimizer.step(&params, &grads, 1e-2, Some(1.0))?;
        losses.push(loss);
    }
    println!("loss {:.3} -> {:.3}", losses[0], losses[29]);
    check(losses[29] < 0.5 * losses[0], "the losses hardly")?;

    let (kept, recomputed) = (gradients(&model, &tokens, false)?.1, gradients(&model, &tokens, true)?.1);
    for (name, param) in params.iter() {
        let bits = |grads: &Gradients| grads.param(param).map(Tensor::to_f64_vec).transpose();
        check(bits(&kept)? == bits(&recomputed)?, &format!("gradients of {name}"))?;
    }

    let generate = |recompute: bool| {
        let sampling = SamplingConfig { temperature: 0.0, ..Default::default() };
        let options = GenerateOptions { sampling, recompute, ..Default::default() };
        model.generate(&tokens.narrow(1, 0, 6)?, 40, &options, &mut |_| true)?.to_vec::<i64>()
    };
    let (cached, uncached) = (generate(false)?, generate(true)?);
    check(cached == uncached, "tokens with and without the cache")?;
    model
        .net
        .supports_kv_cache(&ForwardOptions::default())
        .map_err(|why| Error::new(ErrorKind::Argument { op: "own_block", message: why.to_string() }))?;
    let written: String = cached.iter().filter_map(|&byte| char::from_u32(byte as u32)).collect();
    println!("a bloc{written}");
    Ok(())
}
