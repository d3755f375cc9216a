//! Classifiers against BertForSequenceClassification of transformers; see `tests/files/classifier/make.py`.

use std::path::PathBuf;

use x_transformers::{
    DType, Result, Tape,
    config::{AttentionLayersConfig, TransformerWrapperConfig},
    io::read_safetensors,
    pretrained::Pretrained,
    train::{
        Batch, BatchSource, Classifier, ClassifierConfig, Label, LabelledBatch, LabelledText, LabelledTexts,
        TrainModel, TrainOptions, Trainer, accuracy, macro_f1, spearman,
    },
};

use crate::{Folder, common::device, off, resumed_alike};

fn files(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

/// Name of a parameter here by that in transformers.
fn ours(name: &str) -> &'static str {
    match name {
        "classifier.weight" => "classifier.weight",
        "classifier.bias" => "classifier.bias",
        "bert.pooler.dense.weight" => "net.pooler.weight",
        "bert.pooler.dense.bias" => "net.pooler.bias",
        "bert.embeddings.word_embeddings.weight" => "net.token_emb.weight",
        "bert.encoder.layer.0.attention.self.query.weight" => "net.attn_layers.layers.0.1.to_q.weight",
        "bert.encoder.layer.1.output.dense.weight" => "net.attn_layers.layers.3.1.net.3.weight",
        other => panic!("{other}"),
    }
}

/// Logits, gradients and three steps of AdamW, for classes and for values.
#[test]
fn classifiers_train_as_in_transformers() -> Result<()> {
    let expected = read_safetensors(files("classifier/expected.safetensors"))?;
    for name in ["classes", "values"] {
        let get = |key: &str| &expected[&format!("{name}.{key}")];
        let labels = get("labels");
        let names = if name == "classes" { vec!["a".into(), "b".into(), "c".into()] } else { Vec::new() };
        let texts = (0..4).map(|index| {
            let tokens = get(&format!("row.{index}")).to_vec::<i64>()?;
            let label = match name {
                "classes" => Label::Class(labels.to_vec::<i64>()?[index] as usize),
                _ => Label::Value(labels.to_f64_vec()?[index]),
            };
            Ok(LabelledText { tokens, label })
        });
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let pretrained = Pretrained::open(files("bert"))?;
        let (mut config, mut weights) = ClassifierConfig::of_pretrained(&pretrained, names.clone(), 0)?;
        config.dropout = 0.0;
        let start = format!("{name}.initial.");
        for (key, value) in expected.iter().filter_map(|(key, value)| Some((key.strip_prefix(&start)?, value))) {
            weights.insert(ours(key).to_string(), value.clone());
        }
        let options = TrainOptions {
            steps: 3,
            batch_size: 4,
            seq_len: 16,
            lr: 0.01,
            warmup: 0,
            final_lr_ratio: 1.0,
            decay_all: true,
            ..Default::default()
        };
        let source = LabelledTexts::new(texts.clone(), texts.clone(), names.len())?;
        let mut trainer = Trainer::<Classifier>::start_from(config, &weights, options, source, device())?;
        let batch = LabelledBatch::of_texts(&texts.iter().collect::<Vec<_>>(), 16)?.to_device(device())?;
        let logits = trainer.model().logits(&batch.tokens, &batch.mask)?;
        assert!(off(&logits, get("logits"))? < 1e-4, "{name}");
        let mut tape = Tape::train(0);
        let grads = tape.backward(&TrainModel::loss(trainer.model(), &batch)?)?;
        drop(tape);
        let start = format!("{name}.grad.");
        for (key, value) in expected.iter().filter_map(|(key, value)| Some((key.strip_prefix(&start)?, value))) {
            let param = trainer.params().get(ours(key)).expect("a parameter").tensor();
            let found = off(grads.get(&param).expect("a gradient"), value)?;
            assert!(found < 1e-4, "{name} {key}: {found}");
        }
        for loss in get("losses").to_f64_vec()? {
            let report = trainer.step()?;
            assert!((report.loss - loss).abs() < 2e-4, "{name}: {} instead of {loss}", report.loss);
        }
    }
    Ok(())
}

fn texts(count: i64) -> Vec<LabelledText> {
    (0..count)
        .map(|index| LabelledText {
            tokens: [vec![2], (0..1 + index % 7).map(|at| 5 + (index + at) % 20).collect(), vec![3]].concat(),
            label: Label::Class(index as usize % 3),
        })
        .collect()
}

/// A run that is killed and resumed ends with the same bits, and is read with its labels.
#[test]
fn runs_of_classifiers() -> Result<()> {
    let folder = Folder::new("classifier");
    let net = TransformerWrapperConfig::new(32, 16, AttentionLayersConfig::encoder(16, 1));
    let config = ClassifierConfig::new(net, vec!["x".into(), "y".into(), "z".into()])?;
    let source = || LabelledTexts::new(texts(23), texts(5), 3);
    let options = TrainOptions { steps: 6, batch_size: 4, accumulate: 2, seq_len: 6, ..Default::default() };
    let start = || Trainer::<Classifier>::start(config.clone(), options.clone(), source()?, device());
    let (whole, parts) = (start()?, start()?);
    let run = folder.0.join("run");
    let [whole, parts] =
        resumed_alike([whole, parts], &run, Some(8), || Trainer::resume_from(&run, source()?, device()))?;
    parts.save(&run)?;
    assert_eq!(ClassifierConfig::read(&run)?.map(|config| config.labels), Some(config.labels.clone()));
    let loaded = Classifier::load(&run, DType::F32, device())?;
    let batch = source()?.validation_batches(&options.request(0, 0, 32))?.remove(1).to_device(device())?;
    // A cut text keeps the token that ends it.
    assert_eq!((batch.tokens.shape()[1], batch.tokens.to_vec::<i64>()?.last()), (6, Some(&3)));
    assert!(
        off(&loaded.logits(&batch.tokens, &batch.mask)?, &whole.model().logits(&batch.tokens, &batch.mask)?)? == 0.0
    );
    // Other data, another model, labels out of range.
    let other = LabelledTexts::new(texts(22), texts(5), 3)?;
    let message = Trainer::<Classifier>::resume_from(&run, other, device()).map(drop).unwrap_err().to_string();
    assert!(message.contains("labelled texts, 28"), "{message}");
    let message = LabelledTexts::new(texts(5), texts(5), 2).map(drop).unwrap_err().to_string();
    assert!(message.contains("text 3 has the class 2, expected 0 to 1"), "{message}");
    let message =
        ClassifierConfig::of_pretrained(&Pretrained::open(files("llama"))?, vec![], 0).unwrap_err().to_string();
    assert!(message.contains("generates text; use an encoder"), "{message}");
    assert!(ClassifierConfig::new(TransformerWrapperConfig::default(), vec!["one".into()]).is_err());
    Ok(())
}

/// scikit-learn's and SciPy's numbers.
#[test]
fn scores() {
    let (predicted, labels) = ([0, 2, 1, 0, 0, 1, 3, 2, 2, 1], [0, 1, 2, 0, 1, 1, 3, 2, 0, 1]);
    assert!((accuracy(&predicted, &labels) - 0.6).abs() < 1e-12);
    assert!((macro_f1(&predicted, &labels) - 0.659_523_809_523_8).abs() < 1e-9, "{}", macro_f1(&predicted, &labels));
    let (one, other) = ([1.0, 2.5, 2.5, 4.0, -1.0, 3.0], [0.1, 0.4, 0.2, 0.9, 0.4, 0.3]);
    assert!((spearman(&one, &other) - 0.397_058_823_529_4).abs() < 1e-9, "{}", spearman(&one, &other));
    assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
}
