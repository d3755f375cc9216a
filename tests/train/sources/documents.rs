//! Documents packed into one sequence, and targets that do not count.

use super::*;

/// With a document mask, a packed row has the losses of its documents by themselves.
#[test]
fn documents_do_not_see_each_other() -> Result<()> {
    // Relative positions, and absolute ones, which begin anew with each document.
    let mut absolute = config(0.0);
    absolute.net.attn_layers = AttentionLayersConfig::decoder(32, 1);
    packed_is_apart(&config(0.0))?;
    packed_is_apart(&absolute)
}

fn packed_is_apart(config: &AutoregressiveConfig) -> Result<()> {
    let store = ParamStore::new(3, DType::F64, device());
    let model = AutoregressiveWrapper::new(config, &store)?;
    let documents: [&[i64]; 3] = [&[0, 5, 6, 7, 8], &[0, 9, 10], &[0, 11, 12, 13, 14, 15, 16]];
    let row = documents.concat();
    let marks = documents.iter().zip(1i64..).flat_map(|(document, mark)| vec![mark; document.len()]).collect();
    let shape = [1, row.len()];
    let batch = TokenBatch::new(Tensor::from_vec(row.clone(), shape, device())?)?;
    let batch = batch.with_documents(Tensor::from_vec(marks, shape, device())?)?;
    let packed = TrainModel::loss(&model, &batch)?.item()?;
    let twice = TrainModel::loss(&model, &TokenBatch::concat(&[batch.clone(), batch.clone()])?)?.item()?;
    assert!((packed - twice).abs() < 1e-12, "{packed} {twice}");
    // The end of text that begins a document is predicted from the document before it.
    let mut sum = 0.0;
    for (document, next) in documents.iter().zip([Some(0i64), Some(0), None]) {
        let row: Vec<i64> = document.iter().copied().chain(next).collect();
        let count = row.len() - 1;
        let tokens = Tensor::from_vec(row, [1, count + 1], device())?;
        sum += model.loss(&tokens, &ForwardOptions::default())?.item()? * count as f64;
    }
    let expected = sum / (row.len() - 1) as f64;
    assert!((packed - expected).abs() < 1e-12, "{packed} {expected}");
    let plain = model.loss(&batch.tokens, &ForwardOptions::default())?.item()?;
    assert!((packed - plain).abs() > 1e-6, "without the mask it is another loss");

    // The source marks them.
    let folder = Folder::new("bordered");
    let path = folder.0.join("data.tokens");
    write(&path, VOCABULARY, &row.repeat(20));
    let options = TrainOptions { document_mask: true, batch_size: 50, ..options(1) };
    let batch = TokenData::open(&[&path])?.batch(&request(&options, 0, 0))?;
    let found = batch.documents.clone().expect("documents").to_vec::<i64>()?;
    for (tokens, documents) in rows(&batch).iter().zip(found.chunks(25)) {
        for (pair, tokens) in documents.windows(2).zip(tokens.windows(2)) {
            assert_eq!(pair[1] - pair[0], i64::from(tokens[1] == END));
        }
    }
    Ok(())
}

#[test]
fn models_that_cannot_mask_documents_say_so() {
    let check = |config: &AutoregressiveConfig| {
        let options = TrainOptions { document_mask: true, ..Default::default() };
        AutoregressiveWrapper::check(&config.clone().into(), &options).map_err(|error| error.to_string())
    };
    assert_eq!(check(&config(0.0)), Ok(()));
    let with = |change: &dyn Fn(&mut AutoregressiveConfig)| {
        let mut config = config(0.0);
        change(&mut config);
        check(&config).expect_err("a refusal")
    };
    for (part, message) in [
        ("rotary_qk_only", with(&|config| config.net.attn_layers.rotary_qk_only = false)),
        ("memory tokens", with(&|config| config.net.num_memory_tokens = 2)),
        ("memory keys", with(&|config| config.net.attn_layers.attn.num_mem_kv = 2)),
        ("shift_tokens", with(&|config| config.net.attn_layers.shift_tokens = ShiftTokens::All(1))),
    ] {
        assert!(message.contains("document_mask") && message.contains(part), "{message}");
    }
    for option in ["orthog_residual", "mv_split_residual"] {
        let json = format!(
            r#"{{"version": "2", "model": "AutoregressiveWrapper", "net": {{"num_tokens": 24, "max_seq_len": 12, "attn_layers":
            {{"kind": "Decoder", "dim": 16, "depth": 1, "heads": 2, "{option}": true}}}}}}"#
        );
        let options = TrainOptions { document_mask: true, ..Default::default() };
        let message = AutoregressiveWrapper::check(&Config::from_json(&json).expect("a config"), &options);
        let message = message.expect_err("a refusal").to_string();
        assert!(message.contains("document_mask") && message.contains(option), "{message}");
    }
}

/// Targets that are masked do not count; each of the others counts alike, in whichever micro-batch it is.
#[test]
fn masked_targets_do_not_count() -> Result<()> {
    let store = ParamStore::new(3, DType::F64, device());
    let model = AutoregressiveWrapper::new(&config(0.0), &store)?;
    let tokens = Tensor::from_vec((0..24i64).collect(), [2, 12], device())?;
    let keep: Vec<bool> = (0..24).map(|at| at % 5 == 1 || at > 20).collect();
    let masked =
        TokenBatch::new(tokens.clone())?.with_loss_mask(Tensor::from_vec(keep.clone(), [2, 12], &Device::Cpu)?)?;
    let masked = masked.to_device(device())?;
    let count = (0..24).filter(|at| at % 12 > 0 && keep[*at]).count();
    assert_eq!(masked.targets(), count as u64);
    // The losses one by one.
    let logits =
        model.net.forward(&tokens.narrow(1, 0, 11)?, &ForwardOptions::default())?.out.reshape([22, VOCABULARY])?;
    let targets = tokens.narrow(1, 1, 11)?.reshape([22])?;
    let mut sum = 0.0;
    for at in 0..22 {
        if keep[at / 11 * 12 + at % 11 + 1] {
            sum += logits.narrow(0, at, 1)?.cross_entropy(&targets.narrow(0, at, 1)?, -100)?.item()?;
        }
    }
    let loss = TrainModel::loss(&model, &masked)?.item()?;
    assert!((loss - sum / count as f64).abs() < 1e-12);

    // Two micro-batches of one row are one batch of two rows.
    struct Rows(Vec<Sequence>);
    impl BatchSource for Rows {
        type Batch = TokenBatch;
        fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
            let chosen = (request.first..).take(request.rows).map(|row| &self.0[row as usize % self.0.len()]);
            let (tokens, mask): (Vec<_>, Vec<_>) =
                chosen.map(|row| (row.tokens.clone(), row.loss_mask.clone())).unzip();
            let shape = [request.rows, tokens[0].len()];
            TokenBatch::new(Tensor::from_vec(tokens.concat(), shape, &Device::Cpu)?)?.with_loss_mask(Tensor::from_vec(
                mask.concat(),
                shape,
                &Device::Cpu,
            )?)
        }
        fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
            Ok(vec![self.batch(request)?])
        }
        fn check(&self, _: &BatchRequest) -> Result<()> {
            Ok(())
        }
        fn print(&self) -> Result<DataPrint> {
            Ok(DataPrint::new("rows", 0, 0))
        }
    }
    let row = |from: i64, kept: usize| Sequence {
        tokens: (from..from + 25).collect(),
        loss_mask: (0..25).map(|at| at < kept + 1).collect(),
    };
    let data = || Rows(vec![row(0, 24), row(20, 3), row(40, 0), row(60, 11)]);
    let run = |batch_size, accumulate| -> Result<(f64, BTreeMap<String, Vec<f64>>)> {
        let options = TrainOptions { batch_size, accumulate, dtype: DType::F64, ..options(3) };
        let mut trainer = Trainer::new(config(0.0), options, data(), device())?;
        let report = trainer.step()?;
        assert_eq!(report.tokens, 38);
        let values = trainer.params().iter().map(|(name, param)| Ok((name.to_string(), param.tensor().to_f64_vec()?)));
        Ok((report.loss, values.collect::<Result<_>>()?))
    };
    let (one, four) = (run(4, 1)?, run(1, 4)?);
    assert!((one.0 - four.0).abs() < 1e-12);
    for (name, values) in &one.1 {
        let worst = values.iter().zip(&four.1[name]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-8, "{name}: {worst:e}");
    }
    // Nothing counts.
    let mut nothing = Trainer::new(config(0.0), options(3), Rows(vec![row(0, 0)]), device())?;
    assert!(nothing.step().unwrap_err().to_string().contains("no target of step 0 counts"));
    assert!(nothing.validate().unwrap_err().to_string().contains("validation"));
    Ok(())
}
