//! Pretrained models compared with transformers.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use x_transformers::{DType, Device, Result, Tensor, models::ForwardOptions, pretrained::Pretrained};

pub type Tensors = BTreeMap<String, Tensor>;

pub fn device() -> Device {
    Device::parse(&std::env::var("XT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_string())).unwrap()
}

pub fn files(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

/// The largest difference where the mask keeps tokens.
pub fn difference(actual: &Tensor, expected: &Tensor, mask: Option<&Tensor>) -> Result<f64> {
    assert_eq!(actual.shape(), expected.shape());
    let (a, e) = (actual.to_f64_vec()?, expected.to_f64_vec()?);
    let kept = mask.map(|mask| mask.to_vec::<bool>()).transpose()?;
    let width = kept.as_ref().map_or(1, |kept| a.len() / kept.len());
    let off = |i: usize| if kept.as_ref().is_none_or(|kept| kept[i / width]) { (a[i] - e[i]).abs() } else { 0.0 };
    Ok((0..a.len()).map(off).fold(0.0, |worst, off| if off <= worst { worst } else { off }))
}

pub fn options(expected: &Tensors) -> Result<ForwardOptions> {
    let on_device = |name: &str| expected.get(name).map(|tensor| tensor.to_device(&device())).transpose();
    let (mask, token_types) = (on_device("mask")?, on_device("token_types")?);
    Ok(ForwardOptions { mask, token_types, return_embeddings: true, ..ForwardOptions::default() })
}

/// Hidden states within 1e-4, and logits of the first tokens.
pub fn check(place: &str, (folder, expected): (PathBuf, Tensors)) -> Result<Pretrained> {
    let pretrained = Pretrained::open(&folder)?.dequantized();
    let model = pretrained.model(DType::F32, &device())?;
    let hidden = model.forward(&expected["tokens"].to_device(&device())?, &options(&expected)?)?.out;
    let off = difference(&hidden, &expected["hidden"], Some(&expected["mask"]))?;
    println!("{place}: hidden states of {:?} are off by {off:.1e}", expected["hidden"].shape());
    assert!(off < 1e-4, "{place}: {off}");
    if let Some(logits) = expected.get("logits") {
        let n = logits.dim(1)?;
        let first = if pretrained.family().is_causal() { hidden.dim(1)? - n } else { 0 };
        let off = difference(&model.logits(&hidden.narrow(1, first, n)?)?, logits, None)?;
        println!("{place}: logits are off by {off:.1e}");
        assert!(off < 5e-4, "{place}: {off}");
    }
    Ok(pretrained)
}
