//! Masked language models against BertForMaskedLM of transformers; see `tests/files/masked/make.py`.

use std::path::PathBuf;

use x_transformers::{
    DType, Device, Result, Tape, Tensor,
    config::{AttentionLayersConfig, TransformerWrapperConfig},
    io::read_safetensors,
    pretrained::Pretrained,
    train::{
        Batch, BatchRequest, BatchSource, ByteText, DataPrint, EmbedderConfig, Examples, Masked, MaskedBatch, MaskedLm,
        MaskedLmConfig, Sequence, TokenBatch, TokenData, TrainModel, TrainOptions, Trainer,
    },
};

use crate::{Folder, common::device, off, resumed_alike};

fn files(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

/// Name of a parameter here by that in transformers.
fn ours(name: &str) -> &str {
    match name {
        "cls.predictions.bias" => "net.mlm_head.bias",
        "cls.predictions.transform.dense.weight" => "net.mlm_head.dense.weight",
        "cls.predictions.transform.dense.bias" => "net.mlm_head.dense.bias",
        "cls.predictions.transform.LayerNorm.weight" => "net.mlm_head.norm.weight",
        "cls.predictions.transform.LayerNorm.bias" => "net.mlm_head.norm.bias",
        "bert.embeddings.word_embeddings.weight" => "net.token_emb.weight",
        "bert.encoder.layer.0.attention.self.query.weight" => "net.attn_layers.layers.0.1.to_q.weight",
        "bert.encoder.layer.1.output.dense.weight" => "net.attn_layers.layers.3.1.net.3.weight",
        other => panic!("{other}"),
    }
}

/// A source of one batch.
struct Given(MaskedBatch);

impl BatchSource for Given {
    type Batch = MaskedBatch;

    fn batch(&self, _: &BatchRequest) -> Result<MaskedBatch> {
        Ok(self.0.clone())
    }

    fn validation_batches(&self, _: &BatchRequest) -> Result<Vec<MaskedBatch>> {
        Ok(vec![self.0.clone()])
    }

    fn check(&self, _: &BatchRequest) -> Result<()> {
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        Ok(DataPrint::new("given", 1, 1))
    }
}

/// Loss, gradients, predictions and three steps of AdamW with the same masks.
#[test]
fn masked_models_train_as_in_transformers() -> Result<()> {
    let expected = read_safetensors(files("masked/expected.safetensors"))?;
    let targets = expected["targets"].to_vec::<i64>()?;
    let positions: Vec<i64> = (0..).zip(&targets).filter(|(_, target)| **target >= 0).map(|(at, _)| at).collect();
    let labels: Vec<i64> = targets.iter().copied().filter(|target| *target >= 0).collect();
    let count = [labels.len()];
    let vector = |values: &[i64]| Tensor::from_vec(values.to_vec(), count, &Device::Cpu);
    let batch = MaskedBatch::new(expected["tokens"].clone(), vector(&positions)?, vector(&labels)?)?;
    let (config, weights) = MaskedLmConfig::of_pretrained(&Pretrained::open(files("masked"))?, 4)?;
    let options = TrainOptions {
        steps: 3,
        batch_size: 4,
        seq_len: 9,
        lr: 0.01,
        warmup: 0,
        final_lr_ratio: 1.0,
        decay_all: true,
        ..Default::default()
    };
    let mut trainer = Trainer::<MaskedLm>::start_from(config, &weights, options, Given(batch.clone()), device())?;
    let batch = batch.to_device(device())?;
    let mut tape = Tape::train(0);
    let grads = tape.backward(&TrainModel::loss(trainer.model(), &batch)?)?;
    drop(tape);
    let mut seen = 0;
    for (key, value) in expected.iter().filter_map(|(key, value)| Some((key.strip_prefix("grad.")?, value))) {
        let param = trainer.params().get(ours(key)).expect("a parameter").tensor();
        let found = off(grads.get(&param).expect("a gradient"), value)?;
        assert!(found < 2e-4, "{key}: {found}");
        seen += 1;
    }
    assert_eq!(seen, 8);
    let predicted = expected["predicted"].to_vec::<i64>()?;
    let predicted: Vec<i64> = positions.iter().map(|&at| predicted[at as usize]).collect();
    assert_eq!(trainer.model().predict(&batch)?.to_vec::<i64>()?, predicted);
    for loss in expected["losses"].to_f64_vec()? {
        let report = trainer.step()?;
        assert!((report.loss - loss).abs() < 5e-4, "{} instead of {loss}", report.loss);
        assert_eq!(report.tokens, count[0] as u64);
    }
    let query = trainer.params().get("net.attn_layers.layers.0.1.to_q.weight").expect("a parameter").tensor();
    assert!(off(&query, &expected["trained"])? < 3e-3, "{}", off(&query, &expected["trained"])?);
    Ok(())
}

/// Shares of what is masked, and by what.
#[test]
fn masks_are_those_of_bert() -> Result<()> {
    let num_tokens = 512;
    let tokens: Vec<u32> = (0..90_000u32).map(|at| 10 + (at * 7919 + at / 3) % 490).collect();
    // Every fifth token is special.
    let tokens: Vec<u32> =
        tokens.into_iter().enumerate().map(|(at, token)| if at % 5 == 0 { 2 } else { token }).collect();
    let source = || {
        let data = TokenData::from_tokens(&tokens[..80_000], &tokens[80_000..], num_tokens, None, None)?;
        Masked::new(data, 4, vec![2, 3])
    };
    let options = TrainOptions { batch_size: 64, seq_len: 64, shuffle: true, ..Default::default() };
    let (mut all, mut targets, mut masked, mut same, mut random) = (0, 0, 0, 0, 0);
    let mut seen = vec![0u32; num_tokens];
    let plain = TokenData::from_tokens(&tokens[..80_000], &tokens[80_000..], num_tokens, None, None)?;
    for step in 0..16 {
        let request = options.request(step, 0, num_tokens);
        let batch = source()?.batch(&request)?;
        let before = plain.batch(&BatchRequest { seq_len: 63, ..request })?.tokens.to_vec::<i64>()?;
        let after = batch.tokens.to_vec::<i64>()?;
        let (positions, labels) = (batch.positions.to_vec::<i64>()?, batch.labels.to_vec::<i64>()?);
        assert_eq!(batch.tokens.shape(), [64, 64]);
        let changed: Vec<i64> =
            (0..).zip(before.iter().zip(&after)).filter(|(_, (a, b))| a != b).map(|(at, _)| at).collect();
        assert!(changed.iter().all(|at| positions.contains(at)), "only targets change");
        all += before.iter().filter(|&&token| token != 2).count();
        targets += positions.len();
        for (&at, &label) in positions.iter().zip(&labels) {
            let (was, is) = (before[at as usize], after[at as usize]);
            assert!(was == label && label != 2, "the target is the token that was there, and not special");
            match is {
                4 => masked += 1,
                is if is == was => same += 1,
                is => {
                    random += 1;
                    seen[is as usize] += 1;
                }
            }
        }
    }
    let near = |count: usize, of: usize, share: f64| {
        let deviation = (of as f64 * share * (1.0 - share)).sqrt();
        let off = (count as f64 - of as f64 * share).abs();
        assert!(off < 4.5 * deviation, "{count} of {of}, expected {share}");
    };
    near(targets, all, 0.15);
    near(masked, targets, 0.8);
    near(same, targets, 0.1);
    near(random, targets, 0.1);
    // Random tokens come from the whole vocabulary.
    let halves = [&seen[..256], &seen[256..]].map(|half| half.iter().map(|&count| count as usize).sum::<usize>());
    near(halves[0], random, 0.5);
    // Batches follow from seed, step and micro-batch; the validation does not.
    let request = options.request(3, 0, num_tokens);
    let values = |batch: MaskedBatch| batch.tokens.to_vec::<i64>().unwrap();
    let own = values(source()?.batch(&request)?);
    assert_eq!(own, values(source()?.batch(&request)?));
    assert_ne!(own, values(source()?.batch(&options.request(4, 0, num_tokens))?));
    let validation = |request: &BatchRequest| {
        Ok::<_, x_transformers::Error>(values(source()?.validation_batches(request)?.remove(0)))
    };
    assert_eq!(validation(&request)?, validation(&BatchRequest { seed: 9, step: 77, ..request })?);
    Ok(())
}

/// A run that is killed and resumed ends with the same bits; its encoder can be used without the head.
#[test]
fn runs_of_masked_models() -> Result<()> {
    let folder = Folder::new("masked");
    let net = TransformerWrapperConfig::new(257, 16, AttentionLayersConfig::encoder(16, 1));
    let config = MaskedLmConfig::new(net, 256)?;
    let text = "to be or not to be, that is the question ".repeat(20);
    let source = || Masked::new(ByteText::from_bytes(text.clone())?, 256, vec![b' '.into()]);
    let options = TrainOptions { steps: 6, batch_size: 3, accumulate: 2, seq_len: 12, ..Default::default() };
    let start = || Trainer::<MaskedLm>::start(config.clone(), options.clone(), source()?, device());
    let (whole, parts) = (start()?, start()?);
    let run = folder.0.join("run");
    let [whole, parts] = resumed_alike([whole, parts], &run, None, || Trainer::resume_from(&run, source()?, device()))?;
    parts.save(&run)?;
    assert_eq!(MaskedLmConfig::read(&run)?, Some(config.clone()));
    let loaded = MaskedLm::load(&run, DType::F32, device())?;
    let batches = source()?.validation_batches(&options.request(0, 0, 257))?;
    let batch = batches[0].to_device(device())?;
    assert_eq!(loaded.predict(&batch)?.to_vec::<i64>()?, whole.model().predict(&batch)?.to_vec::<i64>()?);
    // Two batches as one.
    let joined = MaskedBatch::concat(&batches[..2])?;
    let [one, other] = [0, 1].map(|at| whole.model().predict(&batches[at].to_device(device()).unwrap()).unwrap());
    let both = [one.to_vec::<i64>()?, other.to_vec::<i64>()?].concat();
    assert_eq!(whole.model().predict(&joined.to_device(device())?)?.to_vec::<i64>()?, both);
    let (net, weights) = MaskedLmConfig::load_encoder(&run)?;
    let (embedder, weights) = EmbedderConfig::of_encoder(net, weights)?;
    assert!(weights.contains_key("net.token_emb.weight") && !weights.keys().any(|name| name.contains("to_logits")));
    assert_ne!(embedder.net, config.net);
    // Other masks are other data.
    let other = Masked::new(ByteText::from_bytes(text.clone())?, 256, vec![])?;
    let message = Trainer::<MaskedLm>::resume_from(&run, other, device()).map(drop).unwrap_err().to_string();
    assert!(message.contains("use the same data"), "{message}");
    Ok(())
}

#[test]
fn masked_models_that_are_refused() -> Result<()> {
    let encoder = TransformerWrapperConfig::new(32, 16, AttentionLayersConfig::encoder(16, 1));
    let decoder = TransformerWrapperConfig::new(32, 16, AttentionLayersConfig::decoder(16, 1));
    let refused = |net: TransformerWrapperConfig, mask| MaskedLmConfig::new(net, mask).unwrap_err().to_string();
    assert!(refused(decoder, 4).contains("must be an Encoder"));
    assert!(refused(encoder.clone(), 32).contains("expected 0 to 31, got 32"));
    assert!(
        refused(TransformerWrapperConfig { return_only_embed: true, ..encoder.clone() }, 4).contains("need logits")
    );
    let of =
        |name: &str| MaskedLmConfig::of_pretrained(&Pretrained::open(files(name)).unwrap(), 4).unwrap_err().to_string();
    assert!(of("bert").contains("has no masked-LM head"), "{}", of("bert"));
    assert!(of("llama").contains("use an encoder"));
    let text = || ByteText::from_bytes("to be or not to be, that is the question ".repeat(20));
    assert!(Masked::new(text()?, -1, vec![]).unwrap_err().to_string().contains("mask_token"));
    assert!(Masked::new(text()?, 4, vec![])?.with_probability(1.0).unwrap_err().to_string().contains("below 1"));
    let request = TrainOptions { batch_size: 2, seq_len: 4, ..Default::default() }.request(0, 0, 256);
    assert!(
        Masked::new(text()?, 256, vec![])?
            .check(&request)
            .unwrap_err()
            .to_string()
            .contains("vocabulary of 256, got 256")
    );
    let short = BatchRequest { seq_len: 1, ..request };
    assert!(Masked::new(text()?, 4, vec![])?.check(&short).unwrap_err().to_string().contains("at least 2"));
    // Rows of which a part is padding.
    let rows = vec![Sequence { tokens: vec![1, 2, 3], loss_mask: vec![false, true, true] }; 2];
    let source = Masked::new(Examples::new(rows.clone(), rows)?, 4, vec![])?;
    assert!(source.batch(&request).unwrap_err().to_string().contains("expected rows of tokens that all count"));
    // A batch without a target gets one, unless all tokens are special.
    let one = Masked::new(text()?, 255, vec![])?.with_probability(1e-9)?.batch(&request)?;
    assert_eq!(one.labels.numel(), 1);
    let bytes: Vec<i64> = (0..255).collect();
    assert_eq!(Masked::new(text()?, 255, bytes)?.batch(&request)?.weight(), 0.0);
    assert!(TokenBatch::new(Tensor::zeros([2, 1], DType::I64, &Device::Cpu)?).is_err());
    Ok(())
}
