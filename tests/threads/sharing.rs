//! A model that threads share: they infer, load and train with the bits of one.

use super::*;

// Whole models.

fn decoder(seed: u64) -> Result<(AutoregressiveWrapper, ParamMap, AutoregressiveConfig)> {
    let attn_layers = AttentionLayersConfig { rotary_pos_emb: true, ..AttentionLayersConfig::decoder(64, 2) };
    let net = TransformerWrapperConfig { num_tokens: 96, max_seq_len: 48, attn_layers, ..Default::default() };
    let config = AutoregressiveConfig { net, ..Default::default() };
    let store = ParamStore::new(seed, DType::F32, device());
    Ok((AutoregressiveWrapper::new(&config, &store)?, store.params(), config))
}

fn tokens(seed: u64, batch: usize) -> Tensor {
    let random = Philox::new(seed, 0);
    Tensor::generate([batch, 40], DType::I64, device(), |i| random.below(i as u64, 96) as f64).unwrap()
}

/// Losses of some steps, and the bits of the weights after them.
fn train(seed: u64, steps: u64, lr: f64, model: &AutoregressiveWrapper, params: &ParamMap) -> Result<Vec<f64>> {
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut seen = Vec::new();
    for step in 0..steps {
        let mut tape = Tape::train(seed + step);
        let loss = model.loss(&tokens(seed + step, 2), &ForwardOptions::default())?;
        let grads = tape.backward(&loss)?;
        optimizer.step(params, &grads, lr, Some(1.0))?;
        seen.push(loss.item()?);
    }
    for value in params.state_dict().into_values() {
        seen.push(value.to_f64_vec()?.into_iter().enumerate().map(|(i, x)| x * (1 + i % 7) as f64).sum());
    }
    Ok(seen)
}

/// The logits of a batch, a sampled continuation and a stream.
fn infer(round: u64, model: &AutoregressiveWrapper) -> Result<(Vec<f64>, Vec<i64>)> {
    let logits = model.net.forward(&tokens(round, 2), &ForwardOptions::default())?.out.to_f64_vec()?;
    let options = GenerateOptions { seed: round, ..Default::default() };
    let prompt = tokens(round, 1).narrow(1, 0, 4)?;
    let mut new = model.generate(&prompt, 6, &options, &mut |_| true)?.to_vec::<i64>()?;
    for step in model.stream(&prompt, 4, &options)? {
        new.extend(step?);
    }
    Ok((logits, new))
}

/// Threads answer with one model, and others load files, while two train: each gets the same bits as on its own.
#[test]
fn threads_infer_load_and_train_with_the_bits_of_one() -> Result<()> {
    const ROUNDS: u64 = 3;
    let expected: Vec<_> = (0..ROUNDS).map(|round| infer(round, &decoder(1)?.0)).collect::<Result<_>>()?;
    let alone = |seed, lr| decoder(seed).and_then(|(model, params, _)| train(seed, 4, lr, &model, &params));
    let (first, second) = (alone(2, 1e-2)?, alone(1, 0.0)?);
    let folder = std::env::temp_dir().join(format!("x-transformers-threads-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|error| Error::new(ErrorKind::Io { path: folder.clone(), source: error }))?;
    let path = folder.join("model.safetensors");
    let (model, params, config) = decoder(1)?;
    io::write_safetensors(&path, &params.state_dict(), &Default::default())?;
    let started = AtomicUsize::new(0);
    in_scope(|scope| {
        let (model, params, expected, started, path, config) = (&model, &params, &expected, &started, &path, &config);
        let answer = move |model: &AutoregressiveWrapper| {
            started.fetch_add(1, Ordering::Relaxed);
            for (round, expected) in (0..).zip(expected) {
                assert_eq!(infer(round, model).unwrap(), *expected, "round {round}");
            }
        };
        for _ in 0..3 {
            scope.spawn(move || answer(model));
        }
        scope.spawn(move || {
            let store = ParamStore::zeros(DType::F32, device());
            let loaded = AutoregressiveWrapper::new(config, &store).unwrap();
            store.params().load(&io::read_safetensors(path).unwrap()).unwrap();
            answer(&loaded);
        });
        scope.spawn(move || assert_eq!(alone(2, 1e-2).unwrap(), first));
        // The shared model itself: steps that write every weight, with a rate of 0.
        scope.spawn(move || assert_eq!(train(1, 4, 0.0, model, params).unwrap(), second));
    });
    assert_eq!(started.into_inner(), 4);
    fs::remove_dir_all(&folder).map_err(|error| Error::new(ErrorKind::Io { path: folder, source: error }))
}
