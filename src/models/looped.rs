//! Loss of a looped model.

use super::{TransformerWrapper, around::log_probabilities, autoregressive::mean_where};
use crate::{
    DType, Error, Result, Tensor,
    collect::CollectVec,
    config::LossPlan,
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, log_sigmoid},
};

/// Computes the loss of a model whose layers run several times: the cross-entropies of all passes, weighted by the
/// probabilities that the gate stops there, and the loss of the gate, whose target is to stop where another pass gains
/// little (Zhu et al., <https://arxiv.org/abs/2510.25741>). Returns the hidden states of the last pass, too.
///
/// Shapes: tokens `[b, n]`, targets `[b, n - 1]`.
pub(super) fn loss(
    net: &TransformerWrapper,
    tokens: &Tensor,
    targets: &Tensor,
    plan: &LossPlan,
    options: &ForwardOptions,
) -> Result<(Tensor, Tensor)> {
    let gate = net.exit_gate.as_ref().ok_or_else(|| Error::option("looped", "is off"))?;
    let n = targets.dim(1)?;
    let passes = net.passes(tokens, options).context("net")?;
    let passes: Vec<Tensor> = passes.iter().map(|hidden| hidden.narrow(1, 0, n)).try_collect_vec()?;
    let name = if options.looped_steps.is_some() { "looped_steps" } else { "max_looped_steps" };
    ensure!(passes.len() > 1, Error::option(name, "expected at least 2 for the loss of the gate, got 1"));
    let ignored = Tensor::full((), plan.ignore_index as f64, DType::I64, targets.device())?;
    let kept = targets.ne(&ignored)?;
    let none = Tensor::zeros((), DType::I64, targets.device())?;
    let known = kept.where_cond(targets, &none)?;
    // [b, n] each
    let error = |hidden: &Tensor| {
        let logits = net.logits(hidden).context("net")?;
        log_probabilities(&logits, &known)?.neg()?.masked_fill(&kept.logical_not()?, 0.0)
    };
    let errors = passes.iter().map(error).try_collect_vec()?;
    let gates = passes.iter().map(|hidden| gate.forward(hidden)?.squeeze(-1)).try_collect_vec();
    let gates: Vec<Tensor> = gates.context("exit_gate")?;
    let (mut of_tokens, mut of_gates, mut going_on) = (Vec::new(), Vec::new(), None::<Tensor>);
    for (at, (error, gate)) in errors.iter().zip(&gates).enumerate() {
        let frozen = gate.detach().to_dtype(error.dtype())?;
        let (stop, go_on) = (log_sigmoid(&frozen)?, log_sigmoid(&frozen.neg()?)?);
        let last = at + 1 == errors.len();
        let log_probability = match (&going_on, last) {
            (Some(going_on), true) => going_on.clone(),
            (Some(going_on), false) => going_on.add(&stop)?,
            (None, _) => stop,
        };
        of_tokens.push(error.mul(&log_probability.exp()?)?);
        going_on = Some(match going_on {
            Some(before) => before.add(&go_on)?,
            None => go_on,
        });
        if let Some(next) = errors.get(at + 1) {
            let change = next.detach().sub(&error.detach())?;
            let target = change.affine(plan.looped.slope, plan.looped.slope * plan.looped.threshold)?.sigmoid()?;
            let gate = gate.to_dtype(error.dtype())?;
            let stop = target.mul(&log_sigmoid(&gate)?)?;
            of_gates.push(target.affine(-1.0, 1.0)?.mul(&log_sigmoid(&gate.neg()?)?)?.add(&stop)?.neg()?);
        }
    }
    let mean = |parts: &[Tensor]| -> Result<Tensor> {
        let mut sum = mean_where(&parts[0], &kept)?;
        for part in &parts[1..] {
            sum = sum.add(&mean_where(part, &kept)?)?;
        }
        sum.affine(1.0 / parts.len() as f64, 0.0)
    };
    let loss = mean(&of_tokens)?.add(&mean(&of_gates)?.affine(plan.looped.weight, 0.0)?)?;
    let last = passes.last().cloned().ok_or_else(|| Error::option("looped", "has no pass"))?;
    Ok((loss, last))
}
