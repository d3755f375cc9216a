//! The tokenizer of a GGUF file as the files of a folder.

use serde_json::{Map, Value, json};
use x_transformers::{Result, pretrained::Pretrained};

use super::{Tokenizer, file_error, gguf::of_gguf};

impl Tokenizer {
    /// Returns names and contents of the files in which `transformers` has the tokenizer of a GGUF file: `tokenizer.json`,
    /// and `tokenizer_config.json` with the special tokens and the chat templates. For a model in a folder, which has files
    /// of its own, there are none.
    ///
    /// Errors: a GGUF file without a tokenizer, or with one that is not supported.
    pub fn folder_files(pretrained: &Pretrained) -> Result<Vec<(String, Vec<u8>)>> {
        if pretrained.folder().is_some() {
            return Ok(Vec::new());
        }
        let file = pretrained.file();
        let tokenizer = of_gguf(file.metadata()).map_err(|why| file_error(file.path(), why))?;
        let templates = Self::of(pretrained, None)?.templates;
        let mut config = Map::new();
        config.insert("tokenizer_class".to_string(), json!("PreTrainedTokenizerFast"));
        config.insert("clean_up_tokenization_spaces".to_string(), json!(false));
        config.insert("model_max_length".to_string(), json!(pretrained.config().max_seq_len));
        for (name, token) in &templates.special {
            config.insert(name.to_string(), json!(token));
        }
        // Only in GGUF files do tokenizers put the start in front of a chat.
        let source = |source: &str| match templates.start {
            Some(_) if !source.contains("bos_token") => format!("{{{{ bos_token }}}}{source}"),
            _ => source.to_string(),
        };
        let named: Vec<(&str, String)> =
            templates.named.iter().map(|template| (template.name.as_str(), source(&template.source))).collect();
        match &named[..] {
            [] => {}
            [("default", source)] => drop(config.insert("chat_template".to_string(), json!(source))),
            list => {
                let list = list.iter().map(|(name, source)| json!({"name": name, "template": source}));
                config.insert("chat_template".to_string(), list.collect::<Vec<Value>>().into());
            }
        }
        let config = format!("{:#}\n", Value::Object(config));
        Ok(vec![
            ("tokenizer.json".to_string(), tokenizer.into_bytes()),
            ("tokenizer_config.json".to_string(), config.into_bytes()),
        ])
    }
}
