//! Train a small captioner on drawn images, keep it in files, load it again and let it caption an image.
//!
//!     cargo run --release --example caption

use x_transformers::{
    DType, Device, ParamStore, Philox, Result, Tape, Tensor,
    config::{
        AttentionLayersConfig, AutoregressiveConfig, FilterLogits, SamplingConfig, TransformerWrapperConfig,
        ViTransformerWrapperConfig,
    },
    io::{read_safetensors, write_safetensors},
    models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions, ViTransformerWrapper},
    train::{AdamW, AdamWOptions, Optimizer},
};

const SIDE: usize = 16;
const COLOURS: [(&str, [f64; 3]); 3] =
    [("red", [1.0, 0.0, 0.0]), ("green", [0.0, 1.0, 0.0]), ("blue", [0.0, 0.0, 1.0])];
const PLACES: [&str; 4] = ["top left", "top right", "bottom left", "bottom right"];
/// Bytes of the longest caption with its start and end.
const LENGTH: usize = 32;
/// Byte before and after a caption.
const BORDER: i64 = 0;

/// A square of a colour at one of four places, with noise: `[1, 3, 16, 16]`.
fn image(colour: usize, place: usize, seed: u64, device: &Device) -> Result<Tensor> {
    let random = Philox::new(seed, 0);
    Tensor::generate([1, 3, SIDE, SIDE], DType::F32, device, |i| {
        let (channel, y, x) = (i / (SIDE * SIDE), i / SIDE % SIDE, i % SIDE);
        let inside = (y >= SIDE / 2) == (place >= 2) && (x >= SIDE / 2) == (place % 2 == 1);
        let ink = if inside { COLOURS[colour].1[channel] } else { 0.0 };
        ink + 0.2 * random.normal(i as u64)
    })
}

/// A caption as bytes between borders, `[1, 33]`.
fn caption(colour: usize, place: usize, device: &Device) -> Result<Tensor> {
    let text = format!("a {} square, {}", COLOURS[colour].0, PLACES[place]);
    let mut tokens = vec![BORDER; LENGTH + 1];
    tokens.iter_mut().skip(1).zip(text.bytes()).for_each(|(token, byte)| *token = byte.into());
    let end = text.len() + 2;
    // Bytes after the end do not count in the loss.
    tokens[end..].fill(-100);
    Tensor::from_slice(&tokens, [1, LENGTH + 1], device)
}

/// An encoder of images and a decoder that attends to it.
struct Captioner {
    encoder: ViTransformerWrapper,
    decoder: AutoregressiveWrapper,
    store: ParamStore,
}

impl Captioner {
    fn new(store: ParamStore) -> Result<Self> {
        let vision = ViTransformerWrapperConfig {
            image_size: SIDE,
            patch_size: 8,
            attn_layers: AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::encoder(32, 1) },
            ..Default::default()
        };
        let layers = AttentionLayersConfig { heads: 2, cross_attend: true, ..AttentionLayersConfig::decoder(32, 2) };
        let net = TransformerWrapperConfig::new(256, LENGTH, layers);
        let decoder = AutoregressiveConfig { net, ..Default::default() };
        Ok(Self {
            encoder: ViTransformerWrapper::new(&vision, &store.at("encoder"))?,
            decoder: AutoregressiveWrapper::new(&decoder, &store.at("decoder"))?,
            store,
        })
    }

    fn loss(&self, image: &Tensor, caption: &Tensor) -> Result<Tensor> {
        let context = Some(self.encoder.forward(image, true)?);
        // The model is given borders where the loss ignores its targets.
        let inputs = caption.lt(&Tensor::scalar(0i64, caption.device())?)?;
        let border = Tensor::scalar(BORDER, caption.device())?;
        let inputs = inputs.where_cond(&border, caption)?.narrow(1, 0, LENGTH)?;
        let options = ForwardOptions { context, ..Default::default() };
        let logits = self.decoder.net.forward(&inputs, &options)?.out;
        logits.cross_entropy(&caption.narrow(1, 1, LENGTH)?, -100)
    }

    fn caption(&self, image: &Tensor) -> Result<String> {
        let options = GenerateOptions {
            sampling: SamplingConfig { filter_logits_fn: FilterLogits::None, temperature: 0.0, ..Default::default() },
            forward: ForwardOptions { context: Some(self.encoder.forward(image, true)?), ..Default::default() },
            ..Default::default()
        };
        let mut text = String::new();
        let start = Tensor::from_slice(&[BORDER], [1, 1], image.device())?;
        let _ = self.decoder.generate(&start, LENGTH - 1, &options, &mut |tokens| {
            let byte = tokens.first().and_then(|&token| u8::try_from(token).ok()).filter(|&byte| byte > 0);
            text.extend(byte.map(char::from));
            byte.is_some()
        })?;
        Ok(text)
    }
}

fn main() -> Result<()> {
    let device = Device::best();
    let model = Captioner::new(ParamStore::new(0, DType::F32, &device))?;
    let params = model.store.params();
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let all: Vec<(usize, usize)> = (0..12).map(|i| (i / 4, i % 4)).collect();
    let captions = all.iter().map(|&(colour, place)| caption(colour, place, &device)).collect::<Result<Vec<_>>>()?;
    let captions = Tensor::cat(&captions.iter().collect::<Vec<_>>(), 0)?;
    for step in 0..150 {
        let image = |(i, &(colour, place)): (u64, &(usize, usize))| image(colour, place, 12 * step + i, &device);
        let images = (0..).zip(&all).map(image).collect::<Result<Vec<_>>>()?;
        let images = Tensor::cat(&images.iter().collect::<Vec<_>>(), 0)?;
        let mut tape = Tape::train(step);
        let loss = model.loss(&images, &captions)?;
        let grads = tape.backward(&loss)?;
        optimizer.step(&params, &grads, 3e-3, Some(1.0))?;
        if step % 50 == 49 {
            println!("step {:3}: loss {:.3}", step + 1, loss.item()?);
        }
    }

    let path = std::env::temp_dir().join(format!("captioner-{}.safetensors", std::process::id()));
    write_safetensors(&path, &params.state_dict(), &Default::default())?;
    let loaded = Captioner::new(ParamStore::zeros(DType::F32, &device))?;
    loaded.store.params().load(&read_safetensors(&path)?)?;
    let _ = std::fs::remove_file(&path);
    for (colour, place) in [(0, 1), (1, 2), (2, 3)] {
        let given = image(colour, place, 1000, &device)?;
        println!("a {} square, {}: {}", COLOURS[colour].0, PLACES[place], loaded.caption(&given)?);
    }
    Ok(())
}
