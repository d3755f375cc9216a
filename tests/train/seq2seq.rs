//! An encoder and a decoder on pairs: steps of PyTorch x-transformers; see `tests/files/vision/make.py`.

use x_transformers::{
    Result,
    config::{AttentionConfig, AttentionLayersConfig, Config, TransformerWrapperConfig, XTransformerConfig},
    io::read_safetensors,
    models::XTransformer,
    train::{Batch, BatchSource, Mixture, Pair, PairBatch, Pairs, TrainModel, TrainOptions, Trainer},
};

use crate::{
    Folder,
    common::device,
    resumed_alike,
    vision::{files, follows, initial, options},
};

fn config(version: &str) -> Config {
    if version == "1" {
        let attn = AttentionConfig { dim_head: 8, ..Default::default() };
        let layers = |layers| AttentionLayersConfig { heads: 2, attn: attn.clone(), ..layers };
        let dec = AttentionLayersConfig { cross_attend: true, ..layers(AttentionLayersConfig::decoder(16, 1)) };
        return Config::XTransformer(Box::new(XTransformerConfig {
            enc: TransformerWrapperConfig::new(24, 12, layers(AttentionLayersConfig::encoder(16, 1))),
            dec: TransformerWrapperConfig::new(24, 12, dec),
            tie_token_emb: true,
        }));
    }
    let json = r#"{"version": "2", "model": "XTransformer", "dim": 16, "tie_token_emb": true,
        "enc_num_tokens": 24, "enc_depth": 1, "enc_heads": 2, "enc_attn_dim_head": 8, "enc_max_seq_len": 12,
        "dec_num_tokens": 24, "dec_depth": 1, "dec_heads": 2, "dec_attn_dim_head": 8, "dec_max_seq_len": 12}"#;
    Config::from_json(json).expect("a config")
}

/// Gradients and three steps of AdamW.
#[test]
fn pairs_train_as_in_pytorch() -> Result<()> {
    for version in ["1", "2"] {
        let expected = read_safetensors(files(&format!("vision/{version}.safetensors")))?;
        let side = |name: &str, row: usize| expected[&format!("pairs.{name}.{row}")].to_vec::<i64>();
        let pairs = (0..4).map(|row| Ok(Pair { source: side("source", row)?, target: side("target", row)? }));
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        let source = Pairs::new(pairs.clone(), pairs, 0)?;
        let batch = source.validation_batches(&options(4, 11).request(0, 0, 24))?.remove(0);
        assert_eq!((batch.source.shape()[1], batch.target.tokens.shape()[1], batch.targets()), (9, 10, 26));
        let weights = initial(&expected, "pairs");
        let trainer = Trainer::<XTransformer>::start_from(config(version), &weights, options(4, 11), source, device())?;
        follows(trainer, &batch, &expected, "pairs")?;
    }
    Ok(())
}

fn pairs(count: i64) -> Vec<Pair> {
    let tokens = |from: i64, count: i64| (0..count).map(|at| 1 + (from + at * 5) % 22).collect();
    (0..count).map(|at| Pair { source: tokens(at, 1 + at % 9), target: tokens(at + 3, 1 + at % 7) }).collect()
}

/// Parts of a mixture are padded to the longest; the padding does not count.
#[test]
fn pairs_are_mixed() -> Result<()> {
    let source = |length: i64| {
        let pair = Pair { source: (1..=length).collect(), target: (1..=2 * length).collect() };
        let pairs = Pairs::new(vec![pair.clone()], vec![pair], 0)?;
        Ok::<_, x_transformers::Error>(Box::new(pairs) as Box<dyn BatchSource<Batch = PairBatch>>)
    };
    let mixture = Mixture::new(vec![(1.0, source(2)?), (1.0, source(5)?)])?;
    let batch = mixture.batch(&options(4, 11).request(0, 0, 24))?;
    assert_eq!(
        (batch.source.shape()[..].to_vec(), batch.target.tokens.shape()[..].to_vec()),
        (vec![4, 5], vec![4, 12])
    );
    // Targets and the token that ends them.
    assert_eq!((batch.targets(), batch.weight()), (2 * (5 + 11), 32.0 / 11.0));
    let real = batch.source_mask.to_vec::<bool>()?.into_iter().filter(|&real| real).count();
    assert_eq!(real, 2 * (2 + 5));
    Ok(())
}

/// A run that is killed and resumed ends with the same bits.
#[test]
fn runs_on_pairs() -> Result<()> {
    let folder = Folder::new("seq2seq");
    let run = folder.0.join("run");
    for recompute in [false, true] {
        let options =
            TrainOptions { steps: 6, batch_size: 4, accumulate: 2, seq_len: 6, recompute, ..Default::default() };
        let source = || Pairs::new(pairs(17), pairs(5), 0);
        let start = || Trainer::<XTransformer>::start(config("1"), options.clone(), source()?, device());
        let (whole, parts) = (start()?, start()?);
        let [whole, _] = resumed_alike([whole, parts], &run, None, || Trainer::resume_from(&run, source()?, device()))?;
        whole.validate()?;
    }
    // What is longer is cut; a target that is cut has no end.
    let source = Pairs::new(pairs(17), pairs(9), 0)?;
    assert_eq!((source.cut(6), source.cut(100), source.border()), (12, 0, 0));
    let request = TrainOptions { batch_size: 9, seq_len: 6, ..Default::default() }.request(0, 0, 24);
    let batch = source.validation_batches(&request)?.remove(0);
    assert_eq!((batch.source.shape()[..].to_vec(), batch.target.tokens.shape()[..].to_vec()), (vec![9, 6], vec![9, 7]));
    let rows: Vec<Vec<i64>> = batch.target.tokens.to_vec::<i64>()?.chunks(7).map(<[i64]>::to_vec).collect();
    assert!(rows.iter().all(|row| row[0] == 0) && rows[6][6] != 0 && rows[4][6] == 0);
    assert_eq!(PairBatch::concat(&[batch.clone(), batch])?.source.shape()[0], 18);
    // Other pairs, tokens that the model does not have, nothing to predict, another model.
    let resumed = Trainer::<XTransformer>::resume_from(&run, Pairs::new(pairs(16), pairs(5), 0)?, device());
    let message = resumed.map(drop).unwrap_err().to_string();
    assert!(message.contains("pairs, 21"), "{message}");
    let mut wrong = pairs(5);
    wrong[2].target[0] = 24;
    let started = Trainer::<XTransformer>::start(config("1"), options(2, 6), Pairs::new(wrong, pairs(5), 0)?, device());
    let message = started.map(drop).unwrap_err().to_string();
    assert!(message.contains("the target of pair 3 has the token 24, expected tokens in 0..24"), "{message}");
    let mut wrong = pairs(5);
    wrong[1].source.clear();
    let message = Pairs::new(wrong, pairs(5), 0).unwrap_err().to_string();
    assert!(message.contains("pair 2 has an empty source or target"), "{message}");
    assert_eq!(<XTransformer as TrainModel>::max_seq_len(&config("1")), 12);
    assert_eq!(<XTransformer as TrainModel>::max_seq_len(&config("2")), 11);
    assert!(<XTransformer as TrainModel>::config_from_json(crate::vision::vit("1", 1, None).to_value()).is_err());
    Ok(())
}
