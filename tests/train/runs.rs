//! Helpers of the tests of all models: runs that are resumed, and distances of tensors.

use std::path::Path;

use x_transformers::{
    Result, Tensor,
    train::{TrainModel, Trainer},
};

/// Trains twice for six steps, the second time with a checkpoint after the third, from which `resume` goes on: reports and
/// weights have the same bits. Each step has this number of tokens, if one is given.
pub fn resumed_alike<M: TrainModel>(
    [mut whole, mut parts]: [Trainer<M>; 2],
    run: &Path,
    tokens: Option<u64>,
    resume: impl Fn() -> Result<Trainer<M>>,
) -> Result<[Trainer<M>; 2]> {
    for step in 0..6 {
        let report = whole.step()?;
        assert_eq!(parts.step()?, report);
        assert_eq!(report.tokens, tokens.unwrap_or(report.tokens));
        if step == 2 {
            parts.save(run)?;
            parts = resume()?;
        }
    }
    let bits = |trainer: &Trainer<M>| -> Result<Vec<(String, Vec<f64>)>> {
        trainer.params().iter().map(|(name, param)| Ok((name.to_string(), param.tensor().to_f64_vec()?))).collect()
    };
    assert!(bits(&whole)? == bits(&parts)?);
    Ok([whole, parts])
}

/// Returns the largest difference of two tensors of the same shape.
pub fn off(one: &Tensor, other: &Tensor) -> Result<f64> {
    assert_eq!(one.shape(), other.shape());
    Ok(one.to_f64_vec()?.iter().zip(other.to_f64_vec()?).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max))
}
