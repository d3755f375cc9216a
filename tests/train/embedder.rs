//! Embedders against sentence-transformers; see `tests/files/embedder/make.py`.

use std::{collections::BTreeMap, path::PathBuf};

use x_transformers::{
    DType, Result, Tape, Tensor,
    config::{AttentionLayersConfig, TransformerWrapperConfig},
    io::read_safetensors,
    models::Pooling,
    pretrained::Pretrained,
    train::{
        Batch, BatchSource, Embedder, EmbedderConfig, Group, GroupBatch, Groups, Sequence, TrainModel, TrainOptions,
        Trainer,
    },
};

use crate::{Folder, common::device, off, resumed_alike};

fn files(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

/// Name of a parameter here by that in the script.
fn ours(name: &str) -> &str {
    match name {
        "tail.1.linear.weight" => "modules.1.linear.weight",
        "tail.1.linear.bias" => "modules.1.linear.bias",
        "tail.2.norm.weight" => "modules.2.norm.weight",
        "tail.2.norm.bias" => "modules.2.norm.bias",
        "bert.embeddings.word_embeddings.weight" => "net.token_emb.weight",
        "bert.encoder.layer.0.attention.self.query.weight" => "net.attn_layers.layers.0.1.to_q.weight",
        "bert.encoder.layer.1.output.dense.weight" => "net.attn_layers.layers.3.1.net.3.weight",
        other => panic!("{other}"),
    }
}

/// A folder of sentence-transformers with the drawn BERT and these modules after it.
fn sentence_folder(folder: &Folder, name: &str, weights: &BTreeMap<String, Tensor>) -> PathBuf {
    for entry in std::fs::read_dir(files("bert")).unwrap() {
        let path = entry.unwrap().path();
        folder
            .write(&format!("{name}/{}", path.file_name().unwrap().to_str().unwrap()), &std::fs::read(&path).unwrap());
    }
    let mut modules = vec![("Transformer", "")];
    let mode = if name == "triplets" { "cls" } else { "mean" };
    let pooling = format!("{{\"word_embedding_dimension\": 16, \"pooling_mode\": \"{mode}\"}}");
    folder.write(&format!("{name}/1_Pooling/config.json"), pooling.as_bytes());
    modules.push(("Pooling", "1_Pooling"));
    match name {
        "pairs" => modules.push(("Normalize", "2_Normalize")),
        "triplets" => {
            let dense = br#"{"in_features": 16, "out_features": 12, "bias": true, "activation_function": "torch.nn.modules.activation.Tanh"}"#;
            folder.write("triplets/2_Dense/config.json", dense);
            folder.write("triplets/3_LayerNorm/config.json", br#"{"dimension": 12}"#);
            for (place, start) in [("2_Dense", "tail.1."), ("3_LayerNorm", "tail.2.")] {
                let own = weights.iter().filter_map(|(name, value)| {
                    Some((name.strip_prefix("triplets.initial.")?.strip_prefix(start)?.to_string(), value.clone()))
                });
                let path = folder.0.join("triplets").join(place).join("model.safetensors");
                x_transformers::io::write_safetensors(path, &own.collect(), &Default::default()).unwrap();
            }
            modules.extend([("Dense", "2_Dense"), ("LayerNorm", "3_LayerNorm")]);
        }
        _ => {}
    }
    let list = modules
        .iter()
        .map(|(kind, path)| format!("{{\"type\": \"sentence_transformers.models.{kind}\", \"path\": \"{path}\"}}"));
    folder.write(&format!("{name}/modules.json"), format!("[{}]", list.collect::<Vec<_>>().join(", ")).as_bytes());
    folder.0.join(name)
}

/// Vectors, gradients and three steps of AdamW: pairs, hard negatives with more modules, and scores.
#[test]
fn embedders_train_as_in_sentence_transformers() -> Result<()> {
    let expected = read_safetensors(files("embedder/expected.safetensors"))?;
    let folder = Folder::new("embedder-modules");
    for (name, columns) in [("pairs", 2), ("triplets", 3), ("scores", 2)] {
        let get = |key: &str| &expected[&format!("{name}.{key}")];
        let groups = (0..4).map(|index| {
            let text = |column: usize| Ok(get(&format!("row.{column}.{index}")).to_vec::<i64>()?.into());
            let sequences = (0..columns).map(text).collect::<Result<Vec<Sequence>>>()?;
            let score = if name == "scores" { Some(get("labels").to_f64_vec()?[index]) } else { None };
            Ok(Group { sequences, score })
        });
        let groups: Vec<Group> = groups.collect::<Result<_>>()?;
        let pretrained = Pretrained::open(sentence_folder(&folder, name, &expected))?;
        let (config, weights) = EmbedderConfig::of_pretrained(&pretrained)?;
        // Dropout is off, as in the script.
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
        let source = Groups::new(groups.clone(), groups.clone())?;
        let mut trainer = Trainer::<Embedder>::start_from(config, &weights, options, source, device())?;
        let batch = GroupBatch::of_groups(&groups.iter().collect::<Vec<_>>(), 16)?.to_device(device())?;
        let [first, mask] = [batch.tokens.select(1, 0)?, batch.mask.select(1, 0)?];
        let vectors = trainer.model().embed(&first, &mask)?;
        assert!(off(&vectors, get("vectors"))? < 1e-4, "{name}");
        let encoder = trainer.model().sentence_encoder()?;
        assert!(off(&encoder.embed(&first, Some(&mask))?, get("vectors"))? < 1e-4, "{name}");
        let mut tape = Tape::train(0);
        let grads = tape.backward(&TrainModel::loss(trainer.model(), &batch)?)?;
        drop(tape);
        let start = format!("{name}.grad.");
        let mut seen = 0;
        for (key, value) in expected.iter().filter_map(|(key, value)| Some((key.strip_prefix(&start)?, value))) {
            let param = trainer.params().get(ours(key)).expect("a parameter").tensor();
            let found = off(grads.get(&param).expect("a gradient"), value)?;
            assert!(found < 2e-4, "{name} {key}: {found}");
            seen += 1;
        }
        assert_eq!(seen, if name == "triplets" { 7 } else { 3 });
        let mut tape = Tape::train(0);
        let again = tape.backward(&trainer.model().loss_recomputed(&batch)?)?;
        drop(tape);
        for (name, param) in trainer.params().iter() {
            let tensor = param.tensor();
            let [one, other] = [&grads, &again].map(|grads| grads.get(&tensor).map(|grad| grad.to_f64_vec().unwrap()));
            assert!(one == other, "{name}");
        }
        for loss in get("losses").to_f64_vec()? {
            let report = trainer.step()?;
            assert!((report.loss - loss).abs() < 5e-4, "{name}: {} instead of {loss}", report.loss);
        }
        let query = trainer.params().get("net.attn_layers.layers.0.1.to_q.weight").expect("a parameter").tensor();
        assert!(off(&query, get("trained"))? < 3e-3, "{name}: {}", off(&query, get("trained"))?);
    }
    Ok(())
}

fn text(at: i64, length: i64) -> Sequence {
    [vec![2], (0..length).map(|next| 5 + (at + next) % 25).collect(), vec![3]].concat().into()
}

fn groups(count: i64, score: bool) -> Vec<Group> {
    let group = |index: i64| Group {
        sequences: vec![text(index, 1 + index % 7), text(index + 1, 3), text(index * 3, 1 + index % 5)],
        score: None,
    };
    let scored = |index: i64| Group {
        sequences: vec![text(index, 2), text(index * 2, 4)],
        score: Some((index % 5) as f64 / 4.0),
    };
    (0..count).map(|index| if score { scored(index) } else { group(index) }).collect()
}

/// A run that is killed and resumed ends with the same bits, and is read with its pooling.
#[test]
fn runs_of_embedders() -> Result<()> {
    let folder = Folder::new("embedder");
    let net = TransformerWrapperConfig::new(32, 16, AttentionLayersConfig::encoder(16, 1));
    for score in [false, true] {
        let config = EmbedderConfig::new(net.clone(), Pooling::MeanSqrtLen, true)?;
        let source = || Groups::new(groups(23, score), groups(6, score));
        let options = TrainOptions { steps: 6, batch_size: 4, accumulate: 2, seq_len: 6, ..Default::default() };
        let start = || Trainer::<Embedder>::start(config.clone(), options.clone(), source()?, device());
        let (whole, parts) = (start()?, start()?);
        let run = folder.0.join(format!("run-{score}"));
        let [whole, parts] =
            resumed_alike([whole, parts], &run, Some(8), || Trainer::resume_from(&run, source()?, device()))?;
        parts.save(&run)?;
        assert_eq!(EmbedderConfig::read(&run)?.as_ref(), Some(&config));
        let loaded = Embedder::load(&run, DType::F32, device())?;
        let batches = source()?.validation_batches(&options.request(0, 0, 32))?;
        let rows = |batches: &[GroupBatch]| batches.iter().map(|batch| batch.tokens.shape()[0]).collect::<Vec<_>>();
        assert_eq!(rows(&batches), [4, 2]);
        // One by itself would have no others to be told from.
        let five = Groups::new(groups(23, score), groups(5, score))?;
        assert_eq!(rows(&five.validation_batches(&options.request(0, 0, 32))?), [5]);
        let batch = batches[0].to_device(device())?;
        assert!(off(&loaded.cosines(&batch)?, &whole.model().cosines(&batch)?)? == 0.0);
        let shape = loaded.cosines(&batch)?.shape().to_vec();
        assert_eq!(shape, if score { vec![4] } else { vec![4, 8] });
        // A cut text keeps the token that ends it; batches join to one.
        let tokens = batch.tokens.to_vec::<i64>()?;
        let width = batch.tokens.shape()[2];
        assert!(tokens.chunks(width).all(|row| row.contains(&3)) && width <= 6);
        let joined = GroupBatch::concat(&batches)?;
        assert_eq!(joined.tokens.shape()[0], 6);
        let other = Groups::new(groups(22, score), groups(6, score))?;
        let message = Trainer::<Embedder>::resume_from(&run, other, device()).map(drop).unwrap_err().to_string();
        assert!(message.contains("groups, 29"), "{message}");
    }
    Ok(())
}

/// Naive f64 losses of batches with one group, equal scores, and no differences.
#[test]
fn losses_at_the_edges() -> Result<()> {
    let net = TransformerWrapperConfig::new(32, 16, AttentionLayersConfig::encoder(16, 1));
    let mut config = EmbedderConfig::new(net, Pooling::Mean, false)?;
    config.scale = 7.0;
    let all = groups(4, false);
    let scored: Vec<Group> = groups(4, true).into_iter().map(|group| Group { score: Some(0.5), ..group }).collect();
    let options = TrainOptions { seq_len: 16, ..Default::default() };
    let trainer = Trainer::<Embedder>::start(config, options, Groups::new(all.clone(), all.clone())?, device())?;
    for groups in [&all[..], &all[..1], &scored, &scored[..1], &groups(4, true)] {
        let batch = GroupBatch::of_groups(&groups.iter().collect::<Vec<_>>(), 16)?.to_device(device())?;
        let loss = TrainModel::loss(trainer.model(), &batch)?.item()?;
        let cosines = trainer.model().cosines(&batch)?.to_f64_vec()?;
        let b = groups.len();
        let expected = match groups[0].score {
            None => {
                let rows = cosines.chunks(cosines.len() / b).enumerate();
                let row = |(own, row): (usize, &[f64])| {
                    row.iter().map(|cos| (7.0 * (cos - row[own])).exp()).sum::<f64>().ln()
                };
                rows.map(row).sum::<f64>() / b as f64
            }
            Some(_) => {
                let score = |index: usize| groups[index].score.unwrap();
                let pairs = (0..b).flat_map(|one| (0..b).map(move |other| (one, other)));
                let lower = pairs.filter(|&(one, other)| score(one) < score(other));
                (1.0 + lower.map(|(one, other)| (7.0 * (cosines[one] - cosines[other])).exp()).sum::<f64>()).ln()
            }
        };
        assert!((loss - expected).abs() < 1e-4, "{loss} instead of {expected}");
    }
    Ok(())
}

#[test]
fn groups_that_are_refused() -> Result<()> {
    let one = || vec![Group { sequences: vec![text(1, 2), text(2, 3)], score: None }];
    let message = |bad: Group| Groups::new(one(), vec![one().remove(0), bad]).map(drop).unwrap_err().to_string();
    let pair = one().remove(0);
    let with = |sequences: Vec<Sequence>| Group { sequences, score: None };
    for (bad, expected) in [
        (with(vec![text(1, 2)]), "validation group 2 has 1 sequences, expected 2"),
        (with(vec![text(1, 2), Sequence::default()]), "validation group 2 has an empty sequence"),
        (Group { score: Some(1.0), ..pair.clone() }, "validation group 2 has a score and others have none"),
        (Group { score: Some(f64::NAN), ..pair.clone() }, "validation group 2 has the score NaN"),
        (
            with(vec![Sequence { tokens: vec![1, 2], loss_mask: vec![true] }, text(1, 2)]),
            "has a mask whose length is not that of its tokens",
        ),
    ] {
        assert!(message(bad).contains(expected), "{expected}");
    }
    assert!(Groups::new(one(), vec![]).unwrap_err().to_string().contains("at least one validation group"));
    let single = vec![with(vec![text(1, 2)])];
    assert!(Groups::new(single.clone(), single).unwrap_err().to_string().contains("has 1 sequences, expected 2"));
    let net = TransformerWrapperConfig::new(8, 16, AttentionLayersConfig::encoder(16, 1));
    let config = EmbedderConfig::new(net, Pooling::Mean, true)?;
    let options = TrainOptions { seq_len: 8, ..Default::default() };
    let trainer = Trainer::<Embedder>::start(config, options, Groups::new(one(), one())?, device());
    let message = trainer.map(drop).unwrap_err().to_string();
    assert!(message.contains("group 1 has the token") && message.contains("expected tokens in 0..8"), "{message}");
    // A group that is left over joins the batch before.
    let options = TrainOptions { batch_size: 2, seq_len: 8, ..Default::default() };
    let batches =
        Groups::new(groups(2, false), groups(5, false))?.validation_batches(&options.request(0, 0, 1 << 20))?;
    assert_eq!(batches.iter().map(|batch| batch.tokens.shape()[0]).collect::<Vec<_>>(), [2, 3]);
    let message = EmbedderConfig::of_pretrained(&Pretrained::open(files("llama"))?).unwrap_err().to_string();
    assert!(message.contains("does not embed sentences"), "{message}");
    Ok(())
}
