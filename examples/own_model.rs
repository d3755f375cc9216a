//! A model of your own that the library trains, saves, resumes and verifies.
//!
//!     cargo run --release --example own_model
//!
//! The model predicts a byte from the three before it (Bengio et al., 2003): embeddings side by side, a hidden layer,
//! logits. Since it implements `TrainModel`, a `Trainer` can run it with everything a run has: schedule, clipping,
//! checkpoints that survive a kill. The program checks that a resumed run ends with the same bits as one that was never
//! interrupted, and, like `xt verify` for the models of the library, that its loss and its gradients agree with another
//! implementation: here plain loops and finite differences.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use x_transformers::{
    DType, Device, Error, ErrorKind, Init, ParamStore, Result, Tensor,
    nn::{Embedding, Linear},
    train::{ByteText, TokenBatch, TrainModel, TrainOptions, Trainer},
};
use x_transformers_parity::{Bounds, Case};

/// Number of bytes that a prediction sees.
const CONTEXT: usize = 3;

#[derive(Debug)]
struct Config {
    dim: usize,
    hidden: usize,
}

struct ByteModel {
    embedding: Embedding,
    hidden: Linear,
    logits: Linear,
}

impl TrainModel for ByteModel {
    type Config = Config;
    type Batch = TokenBatch;

    fn build(&Config { dim, hidden }: &Config, store: &ParamStore) -> Result<Self> {
        Ok(Self {
            embedding: Embedding::new(&store.at("embedding"), 256, dim, Init::Normal(0.5))?,
            hidden: Linear::new(&store.at("hidden"), CONTEXT * dim, hidden)?,
            logits: Linear::new(&store.at("logits"), hidden, 256)?,
        })
    }

    fn loss(&self, TokenBatch { tokens, .. }: &TokenBatch) -> Result<Tensor> {
        // Each row has one prediction per byte after the first three.
        let predictions = tokens.dim(1)? - CONTEXT;
        let embedded = self.embedding.forward(tokens)?;
        let seen = (0..CONTEXT).map(|at| embedded.narrow(1, at, predictions)).collect::<Result<Vec<_>>>()?;
        let hidden = self.hidden.forward(&Tensor::cat(&seen.iter().collect::<Vec<_>>(), 2)?)?.tanh()?;
        self.logits.cross_entropy(&hidden, &tokens.narrow(1, CONTEXT, predictions)?, -100)
    }

    fn config_to_json(config: &Config) -> Value {
        json!({"model": "ByteModel", "dim": config.dim, "hidden": config.hidden})
    }

    fn config_from_json(json: Value) -> Result<Config> {
        let size = |key: &str| json[key].as_u64().and_then(|size| usize::try_from(size).ok());
        match (json["model"].as_str(), size("dim"), size("hidden")) {
            (Some("ByteModel"), Some(dim), Some(hidden)) => Ok(Config { dim, hidden }),
            _ => Err(Error::new(ErrorKind::Argument { op: "config", message: "is not of a ByteModel".into() })),
        }
    }
}

fn trainer() -> Result<Trainer<ByteModel>> {
    let options = TrainOptions { steps: 12, warmup: 2, seq_len: 16, batch_size: 4, lr: 1e-2, ..Default::default() };
    Trainer::start(Config { dim: 4, hidden: 8 }, options, text()?, &Device::Cpu)
}

fn text() -> Result<ByteText> {
    ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))
}

fn check(holds: bool, what: &str) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Argument { op: "own_model", message: what.into() })),
    }
}

/// All weights, as bits.
fn bits(trainer: &Trainer<ByteModel>) -> Result<Vec<Vec<u32>>> {
    let values = |tensor: &Tensor| Ok(tensor.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect());
    trainer.params().iter().map(|(_, param)| values(&param.tensor())).collect()
}

/// Computes the loss of a row of tokens with plain loops, in f64.
fn loss_by_loops(weights: &BTreeMap<String, Vec<f64>>, tokens: &[i64]) -> f64 {
    let [embedding, w1, b1, w2, b2] =
        ["embedding.weight", "hidden.weight", "hidden.bias", "logits.weight", "logits.bias"].map(|name| &weights[name]);
    let dim = embedding.len() / 256;
    let linear = |x: &[f64], w: &[f64], b: &[f64]| -> Vec<f64> {
        let row = |(w, b): (&[f64], &f64)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + b;
        w.chunks(x.len()).zip(b).map(row).collect()
    };
    let losses = tokens.windows(CONTEXT + 1).map(|window| {
        let seen = window[..CONTEXT].iter().flat_map(|&byte| &embedding[byte as usize * dim..][..dim]);
        let hidden: Vec<f64> = linear(&seen.copied().collect::<Vec<_>>(), w1, b1).into_iter().map(f64::tanh).collect();
        let logits = linear(&hidden, w2, b2);
        logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[window[CONTEXT] as usize]
    });
    losses.sum::<f64>() / (tokens.len() - CONTEXT) as f64
}

/// Returns a case, as a folder of files would hold it: the trained weights, a row of tokens, and the loops' results.
fn case(trainer: &Trainer<ByteModel>) -> Result<Case> {
    let tokens: Vec<i64> = b"the best of times".iter().map(|&byte| byte.into()).collect();
    let weights: BTreeMap<String, Tensor> = trainer.params().state_dict();
    let mut values = weights
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), tensor.to_f64_vec()?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    let loss = loss_by_loops(&values, &tokens);
    let mut expected = BTreeMap::from([("loss".to_string(), Tensor::from_slice(&[loss], [1], &Device::Cpu)?)]);
    for (name, tensor) in &weights {
        let mut gradient = Vec::new();
        for at in 0..tensor.numel() {
            let value = values[name][at];
            let mut moved = |by: f64| {
                if let Some(values) = values.get_mut(name) {
                    values[at] = value + by;
                }
                loss_by_loops(&values, &tokens)
            };
            let difference = moved(1e-5) - moved(-1e-5);
            moved(0.0);
            gradient.push(difference / 2e-5);
        }
        let gradient = Tensor::from_vec(gradient, *tensor.shape(), &Device::Cpu)?;
        expected.insert(format!("grad.{name}"), gradient);
    }
    let tokens = Tensor::from_slice(&tokens, [1, tokens.len()], &Device::Cpu)?;
    let inputs = BTreeMap::from([("tokens".to_string(), tokens)]);
    Ok(Case { config: ByteModel::config_to_json(trainer.config()), weights, inputs, expected })
}

fn main() -> Result<()> {
    let mut whole = trainer()?;
    let before = whole.validate()?;
    let folder = std::env::temp_dir().join(format!("own-model-{}", std::process::id()));
    let mut resumed = None;
    while whole.steps_done() < whole.options().steps {
        if whole.steps_done() == 5 {
            whole.save(&folder)?;
            resumed = Some(Trainer::<ByteModel>::resume_from(&folder, text()?, &Device::Cpu)?);
        }
        whole.step()?;
    }
    let _ = std::fs::remove_dir_all(&folder);
    let after = whole.validate()?;
    println!("validation {before:.3} -> {after:.3} after {} steps", whole.steps_done());
    check(after < before, "the loss has not become lower")?;

    if let Some(mut resumed) = resumed {
        while resumed.steps_done() < resumed.options().steps {
            resumed.step()?;
        }
        check(bits(&resumed)? == bits(&whole)?, "the resumed run has other weights")?;
        println!("resumed at step 5: the same weights, to the bit");
    }

    let case = case(&whole)?;
    let build =
        |config: &Value, store: &ParamStore| ByteModel::build(&ByteModel::config_from_json(config.clone())?, store);
    let actual = case.run_with(DType::F64, &Device::Cpu, build, |model, inputs| {
        model.loss(&TokenBatch::new(inputs["tokens"].clone())?)
    })?;
    let comparison = case.compare(&actual, &Bounds::of(DType::F32))?;
    println!("verified: {:.1e} off at most, in {}", comparison.error, comparison.tensor);
    check(comparison.passed(), &comparison.wrong.join(", "))
}
