//! Images: what PIL makes of them, and steps of PyTorch x-transformers; see `tests/files/images/make.py` and
//! `tests/files/vision/make.py`.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use x_transformers::{
    DType, Result, Tape, Tensor,
    config::{
        AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, TransformerWrapperConfig,
        ViTransformerWrapperConfig, v2,
    },
    io::read_safetensors,
    train::{
        Batch, BatchSource, Image, ImageBatch, ImageClassifier, ImageClassifierConfig, ImageTransform, LabelledImages,
        TrainModel, TrainOptions, Trainer,
    },
};

use crate::{Folder, common::device, off, resumed_alike};

pub fn files(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

/// Options of the runs of PyTorch.
pub fn options(batch_size: usize, seq_len: usize) -> TrainOptions {
    TrainOptions {
        steps: 3,
        batch_size,
        seq_len,
        lr: 0.01,
        warmup: 0,
        final_lr_ratio: 1.0,
        decay_all: true,
        ..Default::default()
    }
}

/// Checks the gradients of the first step and the losses of all against those of PyTorch.
pub fn follows<M: TrainModel>(
    mut trainer: Trainer<M>,
    batch: &M::Batch,
    expected: &BTreeMap<String, Tensor>,
    name: &str,
) -> Result<()> {
    let mut tape = Tape::train(0);
    let grads = tape.backward(&trainer.model().loss(&batch.to_device(device())?)?)?;
    drop(tape);
    let start = format!("{name}.grad.");
    let mut seen = 0;
    for (key, value) in expected.iter().filter_map(|(key, value)| Some((key.strip_prefix(&start)?, value))) {
        let param = trainer.params().get(key).unwrap_or_else(|| panic!("no parameter {key}")).tensor();
        let found = off(grads.get(&param).unwrap_or_else(|| panic!("no gradient of {key}")), value)?;
        assert!(found < 1e-4, "{name} {key}: {found}");
        seen += 1;
    }
    assert!(seen > 10, "{name}: {seen}");
    for loss in expected[&format!("{name}.losses")].to_f64_vec()? {
        let report = trainer.step()?;
        assert!((report.loss - loss).abs() < 5e-4, "{name}: {} instead of {loss}", report.loss);
    }
    Ok(())
}

/// The weights before the first step.
pub fn initial(expected: &BTreeMap<String, Tensor>, name: &str) -> BTreeMap<String, Tensor> {
    let start = format!("{name}.initial.");
    expected.iter().filter_map(|(key, value)| Some((key.strip_prefix(&start)?.to_string(), value.clone()))).collect()
}

fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(tensor.to_f64_vec()?.into_iter().map(|value| value as u8).collect())
}

/// Resized and cropped pixels are PIL's, to the bit: enlarged, reduced, tall, wide and grey.
#[test]
fn images_are_resized_as_by_pil() -> Result<()> {
    let expected = read_safetensors(files("images/expected.safetensors"))?;
    let mut seen = 0;
    for (key, value) in &expected {
        let parts: Vec<&str> = key.split('.').collect();
        let (file, size) = (parts[..2].join("."), parts[2]);
        let Ok(size) = size.parse() else { continue };
        let pixels = &expected[&format!("{file}.pixels")];
        let image = Image::new(pixels.shape()[1], pixels.shape()[0], 3, bytes(pixels)?)?;
        let channels = if parts.len() > 3 { 1 } else { 3 };
        let transform = ImageTransform::new(size, channels);
        assert!(transform.crop(&image)? == bytes(value)?, "{key}");
        seen += 1;
    }
    assert_eq!(seen, 44);
    // A grey image has equal channels.
    let grey = Image::new(5, 4, 1, (0..20).map(|value| value * 12).collect())?;
    let (one, three) = (ImageTransform::new(3, 1).crop(&grey)?, ImageTransform::new(3, 3).crop(&grey)?);
    assert!(three.chunks(3).zip(one).all(|(all, one)| all == [one; 3]));
    // One far longer than wide takes no memory for what is cropped.
    let long = Image::new(1, 1 << 22, 1, vec![7; 1 << 22])?;
    assert_eq!(ImageTransform::new(32, 1).crop(&long)?, vec![7; 32 * 32]);
    // Mirrored and normalized.
    let transform = ImageTransform { size: 2, mean: vec![0.25], std: vec![0.5] };
    let values = transform.normalize(&[(&[0, 51, 102, 255], false), (&[0, 51, 102, 255], true)])?.to_f64_vec()?;
    for (value, expected) in values.iter().zip([-0.5, -0.1, 0.3, 1.5, -0.1, -0.5, 1.5, 0.3]) {
        assert!((value - expected).abs() < 1e-6, "{values:?}");
    }
    for wrong in [
        ImageTransform::new(0, 3),
        ImageTransform::new(4, 2),
        ImageTransform { size: 4, mean: vec![0.0], std: vec![0.0] },
        ImageTransform { size: 4, mean: vec![f64::NAN], std: vec![1.0] },
        ImageTransform { size: 4, mean: vec![0.0; 3], std: vec![1.0] },
    ] {
        assert!(wrong.crop(&grey).is_err(), "{wrong:?}");
    }
    assert!(Image::new(2, 2, 3, vec![0; 11]).is_err() && Image::new(0, 2, 1, vec![]).is_err());
    Ok(())
}

/// A vision transformer of the version with these options.
pub fn vit(version: &str, depth: usize, num_classes: Option<usize>) -> Config {
    if version == "1" {
        let attn = AttentionConfig { dim_head: 8, ..Default::default() };
        let attn_layers = AttentionLayersConfig { heads: 2, attn, ..AttentionLayersConfig::encoder(16, depth) };
        return Config::ViTransformerWrapper(ViTransformerWrapperConfig {
            image_size: 12,
            patch_size: 4,
            attn_layers,
            num_classes,
            ..Default::default()
        });
    }
    let classes = num_classes.map_or("null".to_string(), |count| count.to_string());
    let registers = if num_classes.is_some() { 2 } else { 0 };
    let json = format!(
        r#"{{"version": "2", "model": "ViTransformerWrapper", "image_size": 12, "patch_size": 4, "num_classes": {classes},
            "num_register_tokens": {registers},
            "attn_layers": {{"kind": "Encoder", "dim": 16, "depth": {depth}, "heads": 2, "attn_dim_head": 8}}}}"#
    );
    Config::from_json(&json).expect("a config")
}

/// Pixels of the images in a fixture.
pub fn pixels(expected: &BTreeMap<String, Tensor>, name: &str) -> Result<Vec<Arc<[u8]>>> {
    let all = bytes(&expected[&format!("{name}.pixels")])?;
    Ok(all.chunks(12 * 12 * 3).map(Arc::from).collect())
}

/// Logits, gradients and three steps of AdamW.
#[test]
fn images_train_as_in_pytorch() -> Result<()> {
    for version in ["1", "2"] {
        let expected = read_safetensors(files(&format!("vision/{version}.safetensors")))?;
        let labels = expected["images.labels"].to_vec::<i64>()?;
        let images = pixels(&expected, "images")?;
        let names = ["a", "b", "c"].map(String::from).to_vec();
        let config = ImageClassifierConfig::new(vit(version, 2, Some(3)), names)?;
        let rows: Vec<_> = labels.iter().enumerate().map(|(at, class)| (at, *class as usize)).collect();
        let load = move |number: usize| Ok(images[number].clone());
        let source = LabelledImages::new("drawn", rows.clone(), rows, 3, config.transform.clone(), load)?;
        let batch = source.validation_batches(&options(4, 1).request(0, 0, 0))?.remove(0);
        assert!(off(&batch.images, &expected["images.given"])? < 1e-6);
        let weights = initial(&expected, "images");
        let trainer = Trainer::<ImageClassifier>::start_from(config, &weights, options(4, 1), source, device())?;
        let logits = trainer.model().logits(&batch.to_device(device())?.images)?;
        assert!(off(&logits, &expected["images.logits"])? < 1e-4);
        follows(trainer, &batch, &expected, "images")?;
    }
    Ok(())
}

/// A run that is killed and resumed ends with the same bits, also with images that are mirrored and activations that are
/// computed again.
#[test]
fn runs_on_images() -> Result<()> {
    let folder = Folder::new("vision");
    let names = ["x", "y"].map(String::from).to_vec();
    let mut config = ImageClassifierConfig::new(vit("1", 1, None), names)?;
    config.flip = true;
    let transform = config.transform.clone();
    let source = |count: usize| {
        let load = |number: usize| -> Result<Vec<u8>> {
            Ok((0..12 * 12 * 3).map(|at| (number * 31 + at * (number + 1)) as u8).collect())
        };
        let rows = |from: usize, to: usize| (from..to).map(|number| (number, number % 2)).collect();
        let source = LabelledImages::new("drawn", rows(0, count), rows(count, count + 5), 2, transform.clone(), load)?;
        Ok::<_, x_transformers::Error>(source.with_flip(true))
    };
    let run = folder.0.join("run");
    for recompute in [false, true] {
        let options = TrainOptions { steps: 6, batch_size: 4, accumulate: 2, recompute, ..Default::default() };
        let start = || Trainer::<ImageClassifier>::start(config.clone(), options.clone(), source(11)?, device());
        let (whole, parts) = (start()?, start()?);
        let [whole, parts] =
            resumed_alike([whole, parts], &run, Some(8), || Trainer::resume_from(&run, source(11)?, device()))?;
        whole.validate()?;
        parts.save(&run)?;
        assert_eq!(ImageClassifierConfig::read(&run)?, Some(config.clone()));
        let loaded = ImageClassifier::load(&run, DType::F32, device())?;
        let batch = source(11)?.validation_batches(&options.request(0, 0, 0))?.remove(0).to_device(device())?;
        assert!(off(&loaded.logits(&batch.images)?, &whole.model().logits(&batch.images)?)? == 0.0);
    }
    // A validation builds each image once, and no batch before the one before it was seen.
    let loads = Arc::new(AtomicUsize::new(0));
    let counted = {
        let (loads, transform) = (loads.clone(), config.transform.clone());
        let load = move |number: usize| {
            loads.fetch_add(1, Ordering::Relaxed);
            Ok::<_, x_transformers::Error>(vec![number as u8 * 9; 12 * 12 * 3])
        };
        let [train, validation] = [0..6, 6..17].map(|part| part.map(|number| (number, number % 2)).collect());
        LabelledImages::new("counted", train, validation, 2, transform, load)?
    };
    let options = TrainOptions { batch_size: 4, ..Default::default() };
    let trainer = Trainer::<ImageClassifier>::start(config.clone(), options, counted, device())?;
    let mut seen = Vec::new();
    let loss = trainer.validate_each(&mut |_, batch| {
        seen.push(batch.labels.numel());
        assert_eq!(loads.load(Ordering::Relaxed), seen.iter().sum::<usize>());
        Ok(())
    })?;
    assert_eq!(seen, [4, 4, 3]);
    assert_eq!(trainer.validate()?.to_bits(), loss.to_bits());
    // Images of training steps are mirrored now and then, others never.
    let request = TrainOptions { batch_size: 11, ..Default::default() }.request(0, 0, 0);
    let (flipped, plain) = (source(11)?.batch(&request)?, source(11)?.with_flip(false).batch(&request)?);
    let rows = |batch: &ImageBatch| -> Result<Vec<Vec<f64>>> {
        Ok(batch.images.to_f64_vec()?.chunks(12 * 12 * 3).map(<[f64]>::to_vec).collect())
    };
    let same = rows(&flipped)?.iter().zip(rows(&plain)?).filter(|(one, other)| *one == other).count();
    assert!((1..11).contains(&same), "{same}");
    assert_eq!(ImageBatch::concat(&[flipped, plain])?.images.shape()[0], 22);
    // Other images, other models.
    let message =
        Trainer::<ImageClassifier>::resume_from(&run, source(10)?, device()).map(drop).unwrap_err().to_string();
    assert!(message.contains("labelled images, 16"), "{message}");
    let message =
        ImageClassifierConfig::new(vit("2", 1, Some(3)), vec!["a".into(), "b".into()]).unwrap_err().to_string();
    assert!(message.contains("num_classes") && message.contains("is 3, but there are 2 labels"), "{message}");
    let net = TransformerWrapperConfig::new(8, 8, AttentionLayersConfig::decoder(8, 1));
    let text = AutoregressiveConfig { net, ..Default::default() };
    assert!(ImageClassifierConfig::new(text, vec!["a".into(), "b".into()]).is_err());
    let grey = v2::ViTransformerWrapperConfig { channels: 2, image_size: 4, patch_size: 2, ..Default::default() };
    let grey = Config::V2(Box::new(v2::Config::ViTransformerWrapper(grey)));
    if let Ok(two) = ImageClassifierConfig::new(grey, vec!["a".into(), "b".into()]) {
        let started = Trainer::<ImageClassifier>::start(two, TrainOptions::default(), source(3)?, device());
        assert!(started.map(drop).unwrap_err().to_string().contains("expected 1 or 3"), "two channels");
    }
    Ok(())
}
