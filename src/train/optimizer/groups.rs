//! Groups of parameters by name, with hyperparameters of their own.

use serde::{Deserialize, Serialize};

use super::{OptimizerKind, OptimizerOptions};
use crate::{
    Error, Param, ParamMap, Result,
    error::{ErrorContext, ensure},
    ordered::OrderedMap,
    tensor::LeafId,
};

/// Parameters with hyperparameters of their own, chosen by their names in the state dict.
///
/// Of each value, the first group counts that matches a parameter and sets it; if there is none, the optimizer's.
///
/// ```
/// use x_transformers::train::ParamGroup;
/// let head = ParamGroup { lr: Some(0.1), ..ParamGroup::new("*.to_logits.*|*.token_emb.*") };
/// assert!(head.matches("net.to_logits.weight") && !head.matches("net.attn_layers.layers.0.1.to_q.weight"));
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Pattern of whole names: `*` stands for any characters, `?` for one, and `|` separates alternatives. A tied
    /// parameter matches by any of its names.
    pub pattern: String,
    /// Largest number of dimensions of a parameter in the group. Default any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_dims: Option<usize>,
    /// Factor of the learning rate. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Weight decay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// β₁ of AdamW and Lion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// β₂ of AdamW and Lion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// Momentum of SGD and Muon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// `Some(false)`: Muon leaves these parameters to AdamW. Default `true` for matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<bool>,
}

impl ParamGroup {
    /// Creates a group that changes nothing yet.
    pub fn new(pattern: impl Into<String>) -> Self {
        Self {
            pattern: pattern.into(),
            max_dims: None,
            lr: None,
            weight_decay: None,
            beta1: None,
            beta2: None,
            momentum: None,
            muon: None,
        }
    }

    /// Creates the group of all parameters of fewer than two dimensions (biases, gains of norms), without weight decay,
    /// as in nanoGPT.
    pub fn vectors_without_decay() -> Self {
        Self { max_dims: Some(1), weight_decay: Some(0.0), ..Self::new("*") }
    }

    /// Creates the group of embeddings and logits, which Muon leaves to AdamW.
    pub fn embeddings_without_muon() -> Self {
        Self { muon: Some(false), ..Self::new("*emb*|*to_logits*") }
    }

    /// Returns `true` if the pattern matches this name.
    pub fn matches(&self, name: &str) -> bool {
        self.pattern.split('|').any(|pattern| matches(pattern.as_bytes(), name.as_bytes()))
    }

    /// Returns `true` if the pattern matches the name of any parameter.
    fn matches_any(&self, params: &ParamMap) -> bool {
        params.iter().any(|(name, _)| self.matches(name))
    }
}

/// Matches `*` and `?`. The last star takes as little as possible, and one character more after each failure.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&at) if at == b'?' || at == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&at| at == b'*')
}

/// Largest number of groups: one bit each.
const MAX_GROUPS: usize = 64;

/// Hyperparameters of one parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resolved {
    pub options: OptimizerOptions,
    /// Factor of the learning rate.
    pub lr: f64,
}

/// Checks groups against an optimizer and its parameters.
pub(super) fn check(options: &OptimizerOptions, groups: &[ParamGroup], params: &ParamMap) -> Result<()> {
    ensure!(
        groups.len() <= MAX_GROUPS,
        Error::option("groups", format_args!("expected at most {MAX_GROUPS}, got {}", groups.len()))
    );
    for group in groups {
        ensure!(
            group.matches_any(params),
            Error::option("groups", format_args!("the pattern `{}` matches no parameter", group.pattern))
        );
        check_values(options, group).context(format_args!("group `{}`", group.pattern))?;
    }
    Ok(())
}

fn check_values(options: &OptimizerOptions, group: &ParamGroup) -> Result<()> {
    let lr = group.lr.unwrap_or(1.0);
    ensure!(
        lr >= 0.0 && lr.is_finite(),
        Error::option("lr", format_args!("expected a finite number of at least 0, got {lr}"))
    );
    let absent = |key: &str| Error::option(key, format_args!("{} does not have it", options.kind()));
    // Muon has the values of AdamW too.
    let mut rules = vec![*options];
    if let OptimizerOptions::Muon(muon) = options {
        rules.push(OptimizerOptions::AdamW(muon.adamw));
    } else {
        ensure!(group.muon.is_none(), absent("muon"));
    }
    let has_betas = rules.iter_mut().any(|rule| rule.betas().is_some());
    ensure!(has_betas || group.beta1.is_none(), absent("beta1"));
    ensure!(has_betas || group.beta2.is_none(), absent("beta2"));
    let has_momentum = rules.iter_mut().any(|rule| rule.momentum().is_some());
    ensure!(has_momentum || group.momentum.is_none(), absent("momentum"));
    rules.into_iter().try_for_each(|rule| overridden(rule, &[group]).check())
}

/// Returns a rule with the values of groups, of which the first counts that sets a value.
fn overridden(mut rule: OptimizerOptions, groups: &[&ParamGroup]) -> OptimizerOptions {
    let first = |value: fn(&ParamGroup) -> Option<f64>| groups.iter().find_map(|group| value(group));
    let set = |place: Option<&mut f64>, value: Option<f64>| {
        if let (Some(place), Some(value)) = (place, value) {
            *place = value;
        }
    };
    set(Some(rule.weight_decay()), first(|group| group.weight_decay));
    set(rule.momentum(), first(|group| group.momentum));
    if let Some([beta1, beta2]) = rule.betas() {
        set(Some(beta1), first(|group| group.beta1));
        set(Some(beta2), first(|group| group.beta2));
    }
    rule
}

/// Groups that match each parameter by any of its names, one bit each.
pub(super) struct Matched(OrderedMap<LeafId, u64>);

impl Matched {
    pub fn new(groups: &[ParamGroup], params: &ParamMap) -> Self {
        let mut matched = OrderedMap::default();
        if !groups.is_empty() {
            for (name, param) in params.iter() {
                let bits = (groups.iter().enumerate()).filter(|(_, group)| group.matches(name));
                *matched.or_insert(param.leaf(), 0) |= bits.fold(0, |bits, (index, _)| bits | 1 << index);
            }
        }
        Self(matched)
    }

    /// Returns the hyperparameters of a parameter.
    pub fn resolve(&self, options: OptimizerOptions, groups: &[ParamGroup], param: &Param) -> Resolved {
        let dims = param.tensor().rank();
        let bits = self.0.get(&param.leaf()).copied().unwrap_or(0);
        let of_param: Vec<&ParamGroup> = groups
            .iter()
            .enumerate()
            .filter(|(index, group)| bits >> index & 1 == 1 && group.max_dims.is_none_or(|most| dims <= most))
            .map(|(_, group)| group)
            .collect();
        let rule = match options {
            OptimizerOptions::Muon(muon)
                if dims != 2 || of_param.iter().find_map(|group| group.muon) == Some(false) =>
            {
                OptimizerOptions::AdamW(muon.adamw)
            }
            _ => options,
        };
        let lr = of_param.iter().find_map(|group| group.lr).unwrap_or(1.0);
        Resolved { options: overridden(rule, &of_param), lr }
    }
}

/// Returns the groups that an optimizer of this kind needs for what most users expect: no decay of vectors unless
/// `decay_all`, and no Muon for embeddings and logits.
pub(in crate::train) fn usual_groups(kind: OptimizerKind, decay_all: bool, params: &ParamMap) -> Vec<ParamGroup> {
    let muon = (kind == OptimizerKind::Muon).then(ParamGroup::embeddings_without_muon);
    let decay = (!decay_all).then(ParamGroup::vectors_without_decay);
    muon.into_iter().chain(decay).filter(|group| group.matches_any(params)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        let cases = [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*.weight", "a.b.weight", true),
            ("*.weight", "weight", false),
            ("a*b*c", "a-b-bc", true),
            ("a*b*c", "a-c-b", false),
            ("*aab*", "aaab", true),
            ("x|*.bias", "a.bias", true),
            ("x|*.bias", "y", false),
            ("**", "abc", true),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(ParamGroup::new(pattern).matches(name), expected, "{pattern} {name}");
        }
    }
}
