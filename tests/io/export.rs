//! Models in the layout of transformers: the folders that they came from, written again.

use std::fs;

use crate::reference::files;
use x_transformers::{
    Error, ErrorKind, Result,
    config::TransformerWrapperConfig,
    io::TensorFile,
    pretrained::{Family, Pretrained, write_folder},
};

/// Options, weights and end tokens of every family come back as they were.
#[test]
fn families_are_written_as_they_were_read() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("xt-export-{}", std::process::id()));
    for (name, family) in [
        ("llama", Family::Llama),
        ("llama3", Family::Llama),
        ("mistral", Family::Mistral),
        ("qwen2", Family::Qwen2),
        ("llama.gguf", Family::Llama),
    ] {
        let pretrained = Pretrained::open(files(name))?;
        let (config, weights) = pretrained.state_dict()?;
        let parameter = |name: &str| {
            let missing = || ErrorKind::Weights { missing: vec![name.into()], unused: vec![], mismatched: vec![] };
            weights.get(&format!("net.{name}")).cloned().ok_or_else(|| Error::new(missing()))
        };
        let written = write_folder(&folder, &config.net, pretrained.end_tokens(), parameter);
        if config.net.attn_layers.rotary_freq_factors.is_some() {
            assert!(written.unwrap_err().to_string().contains("rotary_freq_factors"), "{name}");
            continue;
        }
        assert_eq!(written?, family, "{name}");
        let again = Pretrained::open(&folder)?;
        assert_eq!((again.family(), again.config()), (family, pretrained.config()), "{name}");
        assert_eq!(again.end_tokens(), pretrained.end_tokens(), "{name}");
        assert!(again.unused().is_empty(), "{name}");
        let (_, read) = again.state_dict()?;
        assert!(read.keys().eq(weights.keys()), "{name}");
        for (key, value) in &read {
            assert_eq!(value.to_f64_vec()?, weights[key].to_f64_vec()?, "{name} {key}");
        }
        if name == "qwen2" {
            let (own, before) = (TensorFile::open(&folder)?.tensors()?, TensorFile::open(files(name))?.tensors()?);
            let tied = |key: &&String| *key != "lm_head.weight";
            assert!(own.keys().eq(before.keys().filter(tied)), "names are those of transformers");
        }
    }
    let _ = fs::remove_dir_all(&folder);
    // No limit of positions, and another architecture.
    let (config, _) = Pretrained::open(files("llama"))?.state_dict()?;
    let refused = |net: TransformerWrapperConfig| {
        let read =
            |_: &str| Err(Error::new(ErrorKind::Weights { missing: vec![], unused: vec![], mismatched: vec![] }));
        write_folder(&folder, &net, &[], read).unwrap_err().to_string()
    };
    assert!(refused(TransformerWrapperConfig { max_seq_len: 0, ..config.net.clone() }).contains("max_seq_len"));
    let mut other = config.net.clone();
    other.attn_layers.ff.glu = false;
    assert!(refused(other).contains("expected that of Llama"));
    assert!(!folder.exists());
    Ok(())
}
