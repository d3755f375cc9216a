//! Load weights that PyTorch x-transformers has saved, run the model, and compare with what PyTorch computed.
//!
//!     cargo run --release --example load_pytorch
//!
//! In Python, `safetensors.torch.save_file(model.state_dict(), "weights.safetensors")` writes such a file. Parameters
//! have the same names here, so loading is one call: missing, unused and mismatched tensors are errors.

use std::path::Path;

use x_transformers::{
    DType, Device, Error, ErrorKind, ParamStore, Result,
    config::Config,
    io::read_safetensors,
    models::{ForwardOptions, TransformerWrapper},
};

fn main() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/use_pos_emb_false");
    let path = folder.join("config.json");
    let json = std::fs::read_to_string(&path).map_err(|source| Error::new(ErrorKind::Io { path, source }))?;

    // The keyword arguments of the Python model, as JSON.
    let Config::TransformerWrapper(config) = Config::from_json(&json)? else {
        return Err(Error::new(ErrorKind::Argument {
            op: "load_pytorch",
            message: "expected a TransformerWrapper".into(),
        }));
    };
    let store = ParamStore::zeros(DType::F32, &Device::Cpu);
    let model = TransformerWrapper::new(&config, &store)?;
    store.params().load(&read_safetensors(folder.join("weights.safetensors"))?)?;
    println!("{} parameters", store.params().numel());

    let inputs = read_safetensors(folder.join("inputs.safetensors"))?;
    let logits = model.forward(&inputs["x"], &ForwardOptions::default())?.out;
    println!("logits: {logits}");

    let expected = read_safetensors(folder.join("expected.safetensors"))?["out"].to_f64_vec()?;
    let actual = logits.to_f64_vec()?;
    let error: f64 = actual.iter().zip(&expected).map(|(a, e)| (a - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    println!("relative error against PyTorch: {:.1e}", (error / norm).sqrt());
    Ok(())
}
