//! Options of a model on the command line, in place of those in its config.

use clap::Args;
use serde_json::{Map, Value};
use x_transformers::{Error, ErrorKind, config::Config};

use crate::failure::{Failure, Result};

#[derive(Args)]
pub struct KeywordArgs {
    /// Set an option of the model, by its x-transformers name, to a JSON value, such as ff_glu=true; null restores the
    /// default; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = keyword)]
    set: Vec<(String, Value)>,
}

/// The parts of a config that have options, innermost first: attention layers, their wrapper, and the outer wrapper.
const PLACES: [&[&str]; 4] = [&["net", "attn_layers"], &["attn_layers"], &["net"], &[]];

impl KeywordArgs {
    /// Returns the config with these options, each set in the innermost part that has it.
    pub fn apply(&self, mut config: Config) -> Result<Config> {
        for (key, value) in &self.set {
            config = with(&config, key, value)
                .map_err(|error| Failure::new(format_args!("--set {key}={value}: {}", Failure::from(error))))?;
        }
        Ok(config)
    }

    /// Returns `true` if this option is set.
    pub fn sets(&self, key: &str) -> bool {
        self.set.iter().any(|(name, _)| name == key)
    }

    /// Returns `true` if there is nothing to change.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty()
    }
}

fn with(config: &Config, key: &str, value: &Value) -> x_transformers::Result<Config> {
    let mut unknown: Option<Error> = None;
    for place in PLACES {
        let mut whole = config.to_value();
        let Some(part) = part(&mut whole, place) else { continue };
        if value.is_null() {
            part.remove(key);
        } else {
            part.insert(key.to_string(), value.clone());
        }
        match Config::from_value(whole) {
            // Nothing was removed here; the option may be set in another part.
            Ok(same) if value.is_null() && same == *config => {}
            Ok(changed) => return Ok(changed),
            Err(error) => match error.kind() {
                ErrorKind::UnknownOption { key: other, nearest, .. } if other == key => {
                    // The part that has an option of a similar name is probably the intended one.
                    if unknown.is_none() || nearest.is_some() && !is_near(&unknown) {
                        unknown = Some(error);
                    }
                }
                _ => return Err(error),
            },
        }
    }
    unknown.map_or_else(|| Ok(config.clone()), Err)
}

fn is_near(error: &Option<Error>) -> bool {
    error.as_ref().is_some_and(|error| matches!(error.kind(), ErrorKind::UnknownOption { nearest: Some(_), .. }))
}

fn part<'v>(whole: &'v mut Value, place: &[&str]) -> Option<&'v mut Map<String, Value>> {
    place.iter().try_fold(whole, |value, key| value.get_mut(key))?.as_object_mut()
}

/// Parses `KEY=VALUE`; a value that is not JSON is a string: `--set final_norm=same`.
fn keyword(text: &str) -> std::result::Result<(String, Value), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => {
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_string()));
            Ok((key.to_string(), value))
        }
        _ => Err("expected KEY=VALUE, for instance ff_glu=true".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use x_transformers::config::Config;

    use super::{KeywordArgs, keyword};

    fn set(config: &Config, keywords: &[&str]) -> Result<Config, String> {
        let set = keywords.iter().map(|text| keyword(text).unwrap()).collect();
        KeywordArgs { set }.apply(config.clone()).map_err(|failure| failure.to_string())
    }

    #[test]
    fn keywords_find_their_place() {
        let layers = json!({"kind": "Decoder", "dim": 16, "depth": 2});
        let net = json!({"model": "TransformerWrapper", "num_tokens": 9, "max_seq_len": 8, "attn_layers": layers});
        let whole = json!({"model": "AutoregressiveWrapper", "net": net});
        let config = Config::from_value(whole.clone()).unwrap();
        let keywords =
            ["ff_glu=true", "attn_dim_head=8", "emb_dropout=0.5", "pad_value=3", "final_norm=same", "depth=3"];
        let changed = set(&config, &keywords).unwrap();
        let mut expected = whole;
        expected["pad_value"] = json!(3);
        expected["net"]["emb_dropout"] = json!(0.5);
        for (key, value) in
            [("ff_glu", json!(true)), ("attn_dim_head", json!(8)), ("final_norm", json!("same")), ("depth", json!(3))]
        {
            expected["net"]["attn_layers"][key] = value;
        }
        assert_eq!(changed.to_value(), expected);
        // Back to the defaults.
        let keywords = ["ff_glu=null", "attn_dim_head=null", "emb_dropout=null", "pad_value=null", "final_norm=null"];
        assert_eq!(set(&changed, &[&keywords[..], &["depth=2"]].concat()).unwrap(), config);
        // A wrapper without another around it, layers alone, and both sides of an encoder and decoder.
        for (config, keyword, place) in [
            (expected["net"].clone(), "rotary_pos_emb=true", "/attn_layers/rotary_pos_emb"),
            (expected["net"].clone(), "tie_embedding=true", "/tie_embedding"),
            (json!({"model": "Encoder", "dim": 8, "depth": 1}), "macaron=true", "/macaron"),
            (
                json!({"model": "XTransformer", "dim": 8, "enc_num_tokens": 4, "enc_max_seq_len": 4, "enc_depth": 1,
                    "dec_num_tokens": 4, "dec_max_seq_len": 4, "dec_depth": 1}),
                "dec_ff_glu=true",
                "/dec_ff_glu",
            ),
        ] {
            let config = Config::from_value(config).unwrap();
            assert_eq!(set(&config, &[keyword]).unwrap().to_value().pointer(place), Some(&json!(true)), "{keyword}");
        }
    }

    #[test]
    fn wrong_keywords_are_named() {
        let layers = json!({"kind": "Decoder", "dim": 16, "depth": 2});
        let net = json!({"model": "TransformerWrapper", "num_tokens": 9, "max_seq_len": 8, "attn_layers": layers});
        let config = Config::from_value(net).unwrap();
        for (keyword, expected) in [
            ("ff_gluu=true", "did you mean `ff_glu`?"),
            ("tie_embeddings=true", "did you mean `tie_embedding`?"),
            ("zzzzzzzz=1", "unknown option `zzzzzzzz`"),
            ("ff_glu=7", "ff_glu"),
            ("depth=null", "depth"),
            ("depth=-1", "depth"),
        ] {
            let message = set(&config, &[keyword]).unwrap_err();
            assert!(message.starts_with("--set ") && message.contains(expected), "{keyword}: {message}");
        }
        for text in ["ff_glu", "=1", ""] {
            assert!(keyword(text).unwrap_err().contains("KEY=VALUE"));
        }
    }
}
