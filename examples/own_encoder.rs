//! The library's modules on their own: a custom encoder made of attention, feedforwards, norms and residuals.
//!
//!     cargo run --release --example own_encoder
//!
//! Each module is built from a plan and a place for its parameters, whose names are PyTorch's. The encoder here is a
//! post-norm layer as in BERT. The program loads the same weights into the library's own `AttentionLayers`, and checks
//! that both give the same numbers.

use x_transformers::{
    DType, Device, Error, ErrorKind, ParamStore, Philox, Result, Tensor,
    config::{AttentionLayersConfig, AttentionPlan, FeedForwardPlan, FinalNorm, LayersPlan, NormPlan, ResidualPlan},
    nn::{Attention, AttentionInput, AttentionLayers, FeedForward, ForwardOptions, Norm, Residual},
};

const DIM: usize = 32;

/// `x = norm(x + attention(x)); x = norm(x + feedforward(x))`
struct Encoder {
    attention: Attention,
    feedforward: FeedForward,
    residuals: [Residual; 2],
    norms: [Norm; 2],
}

impl Encoder {
    fn new(store: &ParamStore) -> Result<Self> {
        // The places that the library's layers have: index, then 0 for norms, 1 for the branch and 2 for the residual.
        let place = |layer: usize, part: usize| store.at("layers").at(layer).at(part);
        let attention = AttentionPlan::new(DIM, 4, DIM / 4);
        let feedforward = FeedForwardPlan { glu: true, ..FeedForwardPlan::new(DIM, 2 * DIM) };
        let residual = |layer| Residual::new(ResidualPlan::default(), DIM, &place(layer, 2));
        let norm = |layer| Norm::new(NormPlan::LAYER, DIM, &place(layer, 0).at(2));
        Ok(Self {
            attention: Attention::new(&attention, None, &place(0, 1))?,
            feedforward: FeedForward::new(&feedforward, &place(1, 1))?,
            residuals: [residual(0)?, residual(1)?],
            norms: [norm(0)?, norm(1)?],
        })
    }

    /// `[b, n, DIM]` with the padding mask `[b, n]` to `[b, n, DIM]`.
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let input = AttentionInput {
            query_mask: Some(mask.clone()),
            key_mask: Some(mask.clone()),
            ..AttentionInput::default()
        };
        let attended = self.attention.forward(x, &input)?.out;
        let x = self.norms[0].forward(&self.residuals[0].forward(&attended, x)?)?;
        self.norms[1].forward(&self.residuals[1].forward(&self.feedforward.forward(&x)?, &x)?)
    }
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let store = ParamStore::new(1, DType::F32, &device);
    let encoder = Encoder::new(&store)?;
    println!("{} parameters", store.params().numel());

    let random = Philox::new(2, 0);
    let x = Tensor::generate([2, 7, DIM], DType::F32, &device, |i| random.normal(i as u64))?;
    let mask = Tensor::from_vec((0..14).map(|i| i < 11).collect::<Vec<_>>(), [2, 7], &device)?;
    let out = encoder.forward(&x, &mask)?;
    println!("{out}");

    // The layers that the library builds from equivalent options.
    let mut options = AttentionLayersConfig { heads: 4, pre_norm: false, ..AttentionLayersConfig::encoder(DIM, 1) };
    (options.attn.dim_head, options.ff.mult, options.ff.glu) = (DIM / 4, 2.0, true);
    options.final_norm = FinalNorm::None;
    let same = ParamStore::zeros(DType::F32, &device);
    let layers = AttentionLayers::new(&LayersPlan::new(&options)?, &same)?;
    same.params().load(&store.params().state_dict())?;
    let expected = layers.forward(&x, &ForwardOptions { mask: Some(mask), ..Default::default() })?.out;
    if out.to_vec::<f32>()? != expected.to_vec::<f32>()? {
        return Err(Error::new(ErrorKind::Argument {
            op: "own_encoder",
            message: "the library has other numbers".into(),
        }));
    }
    println!("the same as AttentionLayers, to the bit");
    Ok(())
}
