//! The whole GPT in float64: every parameter's gradient against differences of the loss.

use x_transformers::{
    DType, Device, ParamStore, Result, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, FeedForwardConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, ForwardOptions},
};

/// Number of elements of a parameter that are perturbed, spread evenly.
const ELEMENTS: usize = 12;

fn check(attn_layers: AttentionLayersConfig, checkpoint_layers: bool) -> Result<()> {
    let net = TransformerWrapperConfig { num_tokens: 11, max_seq_len: 9, attn_layers, ..Default::default() };
    let store = ParamStore::new(5, DType::F64, &Device::Cpu);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    let params = store.params();
    let tokens = Tensor::from_slice(&(0..20).map(|i| i * i % 11).collect::<Vec<i64>>(), [2, 10], &Device::Cpu)?;
    let options = ForwardOptions { checkpoint_layers, ..Default::default() };
    let loss = || model.loss(&tokens, &options)?.item();

    let mut tape = Tape::grad();
    let grads = tape.backward(&model.loss(&tokens, &options)?)?;
    assert!(grads.unused(&params).is_empty(), "without a gradient: {:?}", grads.unused(&params));
    for (name, param) in params.iter() {
        let value = param.tensor().detach();
        let values = value.to_vec::<f64>()?;
        let Some(grad) = grads.param(param) else { panic!("{name} has no gradient") };
        let analytic = grad.to_vec::<f64>()?;
        let scale = analytic.iter().fold(1e-3f64, |largest, g| largest.max(g.abs()));
        for element in (0..values.len()).step_by(values.len().div_ceil(ELEMENTS)) {
            let step = 1e-3;
            let at = |offset: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[element] += offset * step;
                param.set(Tensor::from_slice(&moved, *value.shape(), &Device::Cpu)?)?;
                loss()
            };
            // Four points: the error is of the fourth order in the step.
            let numeric = (8.0 * (at(1.0)? - at(-1.0)?) - (at(2.0)? - at(-2.0)?)) / (12.0 * step);
            let error = (numeric - analytic[element]).abs() / scale;
            assert!(error < 1e-7, "{name}[{element}]: backward {}, differences {numeric}", analytic[element]);
        }
        param.set(value)?;
    }
    Ok(())
}

fn decoder() -> AttentionLayersConfig {
    let mut layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(12, 2) };
    layers.attn.dim_head = 6;
    layers
}

#[test]
fn gpt_gradients_agree_with_differences() -> Result<()> {
    check(decoder(), false)
}

#[test]
fn gpt_gradients_agree_with_differences_under_recomputation() -> Result<()> {
    check(decoder(), true)
}

#[test]
fn gpt_gradients_agree_with_differences_for_rotary_and_glu() -> Result<()> {
    let mut layers = AttentionLayersConfig { rotary_pos_emb: true, use_rmsnorm: true, ..decoder() };
    layers.attn.dim_head = 34;
    layers.ff = FeedForwardConfig { glu: true, ..layers.ff };
    check(layers, false)
}
