//! Training and decoding of the decoder D and of GPT-2 124M (`benches/configs`), as single steps.

use std::{cell::RefCell, time::Instant};

use x_transformers::{
    DType, Error, ParamStore, Result, Tape, Tensor,
    config::{AutoregressiveConfig, Config, SamplingConfig},
    models::{AutoregressiveWrapper, ForwardOptions, RecordedDecode, sample_tokens},
    train::{AdamW, AdamWOptions, Optimizer, RecordedStep},
};

use super::{Bench, Work};

/// Warm-up rounds and counted rounds of whole steps.
const ROUNDS: (usize, usize) = (3, 9);

/// A model, its training dtypes and its number of sequences per batch.
struct Case {
    name: &'static str,
    json: &'static str,
    dtypes: &'static [DType],
    batch: usize,
}

const CASES: [Case; 2] = [
    Case { name: "D", json: include_str!("configs/decoder.json"), dtypes: &[DType::F32, DType::BF16], batch: 1 },
    Case { name: "GPT-2", json: include_str!("configs/gpt2.json"), dtypes: &[DType::BF16], batch: 64 },
];

impl Case {
    fn config(&self, test: bool) -> Result<AutoregressiveConfig> {
        let Config::AutoregressiveWrapper(mut config) = Config::from_json(self.json)? else {
            panic!("the configuration of {} is not an AutoregressiveWrapper", self.name);
        };
        if test {
            let net = &mut config.net;
            (net.num_tokens, net.max_seq_len) = (50, 16);
            (net.attn_layers.dim, net.attn_layers.depth, net.attn_layers.heads) = (32, 1, 2);
        }
        Ok(config)
    }
}

impl Bench {
    pub fn models(&mut self) -> Result<()> {
        if self.rounds == super::ROUNDS {
            self.rounds = ROUNDS;
        }
        for case in &CASES {
            let config = case.config(self.test)?;
            for &dtype in case.dtypes {
                self.training(case, &config, dtype)?;
            }
            for &dtype in case.dtypes {
                self.decoding(case, &config, dtype)?;
            }
        }
        Ok(())
    }

    /// A step of training: loss, gradients, clipping and AdamW; then the same from one graph.
    fn training(&self, case: &Case, config: &AutoregressiveConfig, dtype: DType) -> Result<()> {
        let [eager, recorded] =
            ["training step", "training step, recorded"].map(|what| format!("{} {what}", case.name));
        if !eager.contains(&self.filter) && !recorded.contains(&self.filter) {
            return Ok(());
        }
        let batch = if self.test { 2 } else { case.batch };
        let (length, vocabulary) = (config.net.max_seq_len, config.net.num_tokens);
        let store = ParamStore::new(0, dtype, &self.device);
        let model = AutoregressiveWrapper::new(config, &store)?;
        let params = store.params();
        let shape = [batch, length + 1];
        let tokens = Tensor::generate(shape, DType::I64, &self.device, |i| (i * 7919 % vocabulary) as f64)?;
        let optimizer = RefCell::new(AdamW::new(AdamWOptions::default())?);
        let work = Work::Flops(6 * params.numel() * batch * length);
        self.run(
            (&eager, dtype, &shape),
            work,
            || Ok(()),
            |()| {
                let mut tape = Tape::train(optimizer.borrow().steps());
                let loss = model.loss(&tokens, &ForwardOptions::default())?;
                let grads = tape.backward(&loss)?;
                optimizer.borrow_mut().step(&params, &grads, 1e-4, Some(1.0)).map(drop)
            },
        )?;
        let optimizer = optimizer.into_inner();
        let inputs = std::slice::from_ref(&tokens);
        let step = RecordedStep::new(optimizer, &params, inputs, Some(1.0), |inputs| {
            model.loss(&inputs[0], &ForwardOptions::default())
        })?;
        let step = RefCell::new(step);
        let timed = |()| step.borrow_mut().step(inputs, 1e-4, 1.0).map(drop);
        self.run((&recorded, dtype, &shape), work, || Ok(()), timed)?;
        Ok(())
    }

    /// Times a token of greedy decoding after a prompt of half the length, by the host's clock: launch overhead counts.
    fn decoding(&self, case: &Case, config: &AutoregressiveConfig, dtype: DType) -> Result<()> {
        let [eager, recorded] = ["decode step", "decode step, recorded"].map(|what| format!("{} {what}", case.name));
        if !eager.contains(&self.filter) && !recorded.contains(&self.filter) {
            return Ok(());
        }
        let store = ParamStore::new(0, dtype, &self.device);
        let (model, params) = (AutoregressiveWrapper::new(config, &store)?.net, store.params());
        let capacity = config.net.max_seq_len;
        let prompt = capacity / 2;
        let tokens = Tensor::generate([1, prompt], DType::I64, &self.device, |i| (i * 37 % 41) as f64)?;
        let filled = || {
            let mut cache = model.cache(1, capacity, &ForwardOptions::default())?;
            let _ = model.extend(&tokens, &[prompt], None, &mut cache)?;
            Ok::<_, Error>(cache)
        };
        let sampling = SamplingConfig { temperature: 0.0, ..SamplingConfig::default() };
        let steps = (if self.test { 2 } else { 64 }).min(capacity - prompt - 1) as u64;
        // Each step reads the weights once, whatever part of them embeddings are.
        let work = Work::Bytes(params.numel() * dtype.size());
        let first = Tensor::zeros([1], DType::I64, &self.device)?;
        let clock = |name: &str, step: &mut dyn FnMut(u64, &Tensor) -> Result<Tensor>| -> Result<()> {
            let mut next = step(0, &first)?;
            self.device.synchronize()?;
            let start = Instant::now();
            for number in 1..=steps {
                next = step(number, &next)?;
            }
            self.device.synchronize()?;
            let seconds = start.elapsed().as_secs_f64() / steps as f64;
            self.line((name, dtype, &[1, prompt]), work, seconds);
            Ok(())
        };
        let mut cache = filled()?;
        clock(&eager, &mut |number, token| {
            let hidden = model.extend(&token.reshape([1, 1])?, &[1], None, &mut cache)?;
            let logits = model.logits(&hidden.select(1, 0)?)?.detach();
            sample_tokens(&logits, &sampling, 0, &Tensor::scalar(number as i64, &self.device)?)
        })?;
        let mut decode = RecordedDecode::new(&model, &params, filled()?, &sampling, 0)?;
        clock(&recorded, &mut |number, token| decode.step(token, number))
    }
}
