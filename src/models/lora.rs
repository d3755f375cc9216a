//! Low-rank adapters of models.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::TransformerWrapper;
use crate::{
    Error, Init, LeafId, Param, ParamMap, ParamStore, Result,
    collect::CollectVec,
    error::ensure,
    nn::{Linear, Lora, LoraPart, lengths},
    sort::sort_by,
};

/// Options of a low-rank adapter, with PEFT's names and defaults.
///
/// ```
/// use x_transformers::models::LoraOptions;
/// let options = LoraOptions { r: 16, lora_alpha: 32.0, target_modules: vec!["q_proj".into()], ..Default::default() };
/// assert_eq!(options.scale(), 2.0);
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraOptions {
    /// Rank of the update of a weight. Default 8.
    pub r: usize,
    /// Numerator of the update's factor. Default 8.
    pub lora_alpha: f64,
    /// Dropout probability of the update's input.
    pub lora_dropout: f64,
    /// If `true`, the factor is `lora_alpha / √r` (rsLoRA, <https://arxiv.org/abs/2312.03732>) instead of
    /// `lora_alpha / r`.
    pub use_rslora: bool,
    /// If `true`, the length of each row of the updated weight is a parameter of its own (DoRA,
    /// <https://arxiv.org/abs/2402.09353>).
    pub use_dora: bool,
    /// Linear layers that get an update: by their name, or its last parts, such as `q_proj` or `mlp.up_proj`; or
    /// `all-linear` for all but the logits'. Default `all-linear`.
    pub target_modules: Vec<String>,
}

/// Name of all linear layers among [`LoraOptions::target_modules`].
const ALL: &str = "all-linear";

impl Default for LoraOptions {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            target_modules: vec![ALL.to_string()],
        }
    }
}

impl LoraOptions {
    /// Returns the factor of the update.
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Checks the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for one that is illegal.
    pub fn check(&self) -> Result<()> {
        let Self { r, lora_alpha, lora_dropout, target_modules, .. } = self;
        ensure!((1..=1 << 16).contains(r), Error::option("r", format_args!("expected 1 to 65536, got {r}")));
        ensure!(
            lora_alpha.is_finite() && *lora_alpha > 0.0,
            Error::option("lora_alpha", format_args!("expected a positive number, got {lora_alpha}"))
        );
        ensure!(
            (0.0..1.0).contains(lora_dropout),
            Error::option("lora_dropout", format_args!("expected at least 0 and below 1, got {lora_dropout}"))
        );
        ensure!(
            !target_modules.is_empty(),
            Error::option("target_modules", "expected at least one name of a linear layer, or all-linear")
        );
        Ok(())
    }

    /// Returns `true` if a layer of this name gets an update.
    fn names(&self, place: &str) -> bool {
        self.target_modules.iter().any(|target| {
            target == ALL
                || place == target
                || place.strip_suffix(target.as_str()).is_some_and(|before| before.ends_with('.'))
        })
    }
}

/// Linear layer that can get an update: rows of a weight, which a checkpoint has as a layer of its own.
#[derive(Clone, Debug)]
pub(crate) struct LoraTarget {
    /// Name of the layer in checkpoints.
    pub place: String,
    /// The weight.
    pub leaf: LeafId,
    /// `None`: all rows.
    pub rows: Option<Range<usize>>,
}

/// Low-rank adapter of a model: the parameters to train, while those of the model are frozen.
///
/// The parameters have PEFT's names, `base_model.model.NAME.lora_A.weight` and so on. The model computes with their
/// present values.
///
/// ```
/// use x_transformers::{models::LoraOptions, prelude::*, train::{AdamW, AdamWOptions, Optimizer}};
/// # fn main() -> x_transformers::Result<()> {
/// let layers = AttentionLayersConfig::decoder(32, 1);
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let mut model = TransformerWrapper::new(&TransformerWrapperConfig::new(256, 16, layers), &store)?;
/// let options = LoraOptions { target_modules: vec!["to_q".into(), "to_v".into()], ..Default::default() };
/// let adapter = model.add_lora(&store.params(), &options, 7)?;
/// assert_eq!(adapter.params().numel(), 2 * (8 * 32 + 512 * 8));
/// let mut optimizer = AdamW::new(AdamWOptions::default())?;
/// let tokens = Tensor::arange(16, &Device::Cpu)?.reshape([1, 16])?;
/// let mut tape = Tape::train(0);
/// let loss = model.forward(&tokens, &ForwardOptions::default())?.out.square()?.mean(&[])?;
/// let grads = tape.backward(&loss)?;
/// optimizer.step(adapter.params(), &grads, 1e-3, None)?;
/// model.merge_lora()?; // the weights with the update, and no adapter
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    options: LoraOptions,
    params: ParamMap,
    places: Vec<String>,
}

impl LoraAdapter {
    /// Returns the options.
    pub fn options(&self) -> &LoraOptions {
        &self.options
    }

    /// Returns the parameters to train.
    pub fn params(&self) -> &ParamMap {
        &self.params
    }

    /// Returns the names of the layers that have an update.
    pub fn places(&self) -> &[String] {
        &self.places
    }
}

impl TransformerWrapper {
    /// Adds a low-rank adapter, and freezes the model's parameters; `params` are those of the model, under whose names
    /// [`LoraOptions::target_modules`] are looked for. Updates begin at zero: outputs are those of the model.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for illegal options, and targets that no linear layer
    /// has; a model that has an adapter.
    #[doc(alias = "get_peft_model")]
    pub fn add_lora(&mut self, params: &ParamMap, options: &LoraOptions, seed: u64) -> Result<LoraAdapter> {
        let targets: Vec<LoraTarget> = params
            .unique()
            .filter_map(|(name, param)| {
                let place = name.strip_suffix(".weight")?.to_string();
                Some(LoraTarget { place, leaf: param.leaf(), rows: None })
            })
            .collect_vec();
        let adapter = self.attach_lora(&targets, options, seed)?;
        params.unique().for_each(|(_, param)| param.set_requires_grad(false));
        Ok(adapter)
    }

    /// Adds an adapter of those targets that the options name.
    pub(crate) fn attach_lora(
        &mut self,
        targets: &[LoraTarget],
        options: &LoraOptions,
        seed: u64,
    ) -> Result<LoraAdapter> {
        options.check()?;
        for module in options.target_modules.iter().filter(|module| *module != ALL) {
            let one = LoraOptions { target_modules: vec![module.clone()], ..options.clone() };
            let mut found = false;
            self.for_linears(&mut |linear| {
                found |= targets.iter().any(|target| target.leaf == linear.leaf() && one.names(&target.place));
                Ok(())
            })?;
            ensure!(found, Error::option("target_modules", format_args!("no linear layer has the name `{module}`")));
        }
        let mut store = None;
        let mut places = Vec::new();
        self.for_linears(&mut |linear| {
            let own: Vec<&LoraTarget> = targets
                .iter()
                .filter(|target| target.leaf == linear.leaf() && options.names(&target.place))
                .collect_vec();
            if own.is_empty() {
                return Ok(());
            }
            ensure!(!linear.has_lora(), Error::argument("lora", "the model has an adapter already; merge it first"));
            let weight = linear.weight()?;
            let store = store.get_or_insert_with(|| ParamStore::new(seed, weight.dtype(), weight.device()));
            let place = store.at("base_model.model");
            let [all, fan_in] = linear.sizes();
            let mut parts = Vec::new();
            for target in own {
                let rows = target.rows.clone().unwrap_or(0..all);
                let place = place.at(&target.place);
                let a = place.at("lora_A").param("weight", [options.r, fan_in], Init::linear(fan_in))?;
                let b = place.at("lora_B").param("weight", [rows.len(), options.r], Init::Constant(0.0))?;
                let magnitude = || -> Result<Param> {
                    let param = place.param("lora_magnitude_vector", [rows.len()], Init::Constant(1.0))?;
                    let own = linear.weight_or_deferred()?.detach().narrow(0, rows.start, rows.len())?;
                    let wide = own.to_dtype(own.dtype().accumulator())?;
                    param.set(lengths(&wide)?.to_dtype(own.dtype())?)?;
                    Ok(param)
                };
                let magnitude = options.use_dora.then(magnitude).transpose()?;
                parts.push(LoraPart { rows, a, b, magnitude, scale: options.scale() });
                places.push(target.place.clone());
            }
            sort_by(&mut parts, |a, b| a.rows.start.cmp(&b.rows.start));
            linear.set_lora(Some(Lora { parts, dropout: options.lora_dropout }));
            Ok(())
        })?;
        let store =
            store.ok_or_else(|| Error::option("target_modules", "the model has no linear layer of these names"))?;
        Ok(LoraAdapter { options: options.clone(), params: store.params(), places })
    }

    /// Removes the adapter of this clone; its parameters stay in others.
    pub(crate) fn without_lora(&mut self) -> Result<()> {
        self.for_linears(&mut |linear| {
            linear.set_lora(None);
            Ok(())
        })
    }

    /// Adds the updates of an adapter to the weights, and removes it. The weights stay frozen.
    ///
    /// Errors: weights that are quantised; out of memory.
    #[doc(alias = "merge_and_unload")]
    pub fn merge_lora(&mut self) -> Result<()> {
        self.for_linears(&mut Linear::merge_lora)
    }
}
