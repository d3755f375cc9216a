//! Captions of images: steps of PyTorch x-transformers; see `tests/files/vision/make.py`.

use std::sync::Arc;

use x_transformers::{
    DType, Result, Tensor,
    config::{AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, TransformerWrapperConfig},
    io::read_safetensors,
    train::{Batch, BatchSource, CaptionBatch, CaptionedImages, Captioner, CaptionerConfig, TrainOptions, Trainer},
};

use crate::{
    Folder,
    common::device,
    resumed_alike,
    vision::{files, follows, initial, options, pixels, vit},
};

fn decoder(version: &str) -> Config {
    if version == "1" {
        let attn = AttentionConfig { dim_head: 8, ..Default::default() };
        let layers =
            AttentionLayersConfig { heads: 2, cross_attend: true, attn, ..AttentionLayersConfig::decoder(16, 1) };
        let net = TransformerWrapperConfig::new(24, 12, layers);
        return AutoregressiveConfig { net, ..Default::default() }.into();
    }
    let json = r#"{"version": "2", "model": "AutoregressiveWrapper", "net": {"num_tokens": 24, "max_seq_len": 12, "attn_layers":
        {"kind": "Decoder", "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8, "cross_attend": true}}}"#;
    Config::from_json(json).expect("a config")
}

/// Gradients and three steps of AdamW.
#[test]
fn captions_train_as_in_pytorch() -> Result<()> {
    for version in ["1", "2"] {
        let expected = read_safetensors(files(&format!("vision/{version}.safetensors")))?;
        let images = pixels(&expected, "captions")?;
        let captions = (0..3).map(|row| Ok((row, expected[&format!("captions.target.{row}")].to_vec::<i64>()?)));
        let captions = captions.collect::<Result<Vec<_>>>()?;
        let config = CaptionerConfig::new(vit(version, 1, None), decoder(version), 12)?;
        let load = move |number: usize| Ok(images[number].clone());
        let transform = config.transform.clone();
        let source = CaptionedImages::new("drawn", captions.clone(), captions, 0, transform, load)?;
        let batch = source.validation_batches(&options(3, 11).request(0, 0, 24))?.remove(0);
        assert_eq!((batch.captions.tokens.shape()[1], batch.targets()), (9, 16));
        let weights = initial(&expected, "captions");
        let trainer = Trainer::<Captioner>::start_from(config, &weights, options(3, 11), source, device())?;
        follows(trainer, &batch, &expected, "captions")?;
    }
    Ok(())
}

/// A run that is killed and resumed ends with the same bits.
#[test]
fn runs_on_captions() -> Result<()> {
    let folder = Folder::new("captions");
    let run = folder.0.join("run");
    let mut config = CaptionerConfig::new(vit("1", 1, None), decoder("1"), 12)?;
    config.flip = true;
    let captions = |count: usize| -> Vec<(usize, Vec<i64>)> {
        (0..count).map(|at| (at / 2, (0..1 + at % 6).map(|place| 1 + ((at + place) % 20) as i64).collect())).collect()
    };
    let source = |count: usize| {
        let load = |number: usize| -> Result<Arc<[u8]>> { Ok((0..432).map(|at| (number * 31 + at) as u8).collect()) };
        let (train, validation) = (captions(count), captions(5));
        Ok::<_, x_transformers::Error>(
            CaptionedImages::new("drawn", train, validation, 0, config.transform.clone(), load)?.with_flip(true),
        )
    };
    for recompute in [false, true] {
        let options =
            TrainOptions { steps: 6, batch_size: 4, accumulate: 2, seq_len: 5, recompute, ..Default::default() };
        let start = || Trainer::<Captioner>::start(config.clone(), options.clone(), source(13)?, device());
        let (whole, parts) = (start()?, start()?);
        let [whole, parts] =
            resumed_alike([whole, parts], &run, None, || Trainer::resume_from(&run, source(13)?, device()))?;
        whole.validate()?;
        parts.save(&run)?;
        assert_eq!(CaptionerConfig::read(&run)?, Some(config.clone()));
        // What is read again writes the same.
        let batch = source(13)?.validation_batches(&options.request(0, 0, 24))?.remove(0).to_device(device())?;
        let start = Tensor::from_slice(&[0i64; 4], [4, 1], device())?;
        let write = |model: &Captioner| -> Result<Vec<i64>> {
            model.generate(&batch.images, &start, 5, &Default::default(), &mut |_| true)?.to_vec()
        };
        assert_eq!(write(&Captioner::load(&run, DType::F32, device())?)?, write(whole.model())?);
    }
    let request = TrainOptions { batch_size: 5, seq_len: 5, ..Default::default() }.request(0, 0, 24);
    let batch = source(13)?.validation_batches(&request)?.remove(0);
    assert_eq!(CaptionBatch::concat(&[batch.clone(), batch])?.images.shape()[0], 10);
    assert_eq!(source(13)?.cut(5), 5);
    let resumed = Trainer::<Captioner>::resume_from(&run, source(12)?, device());
    let message = resumed.map(drop).unwrap_err().to_string();
    assert!(message.contains("captions, 17"), "{message}");
    let load = |_| -> Result<Arc<[u8]>> { Ok(Arc::from([0; 432])) };
    let empty = CaptionedImages::new("x", captions(3), vec![(2, vec![])], 0, config.transform.clone(), load);
    assert!(empty.unwrap_err().to_string().contains("the validation caption of image 2 is empty"));
    // A decoder without cross-attention, or of another width; a model in the place of another.
    let net = TransformerWrapperConfig::new(24, 12, AttentionLayersConfig::decoder(16, 1));
    let plain = AutoregressiveConfig { net, ..Default::default() };
    let message = CaptionerConfig::new(vit("1", 1, None), plain, 12).unwrap_err().to_string();
    assert!(message.contains("cross_attend"), "{message}");
    assert!(CaptionerConfig::new(decoder("1"), decoder("1"), 12).is_err());
    Ok(())
}
