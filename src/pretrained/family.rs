//! Families of models, in one table.

use std::fmt;

use super::{Described, bert, llama, options::Options};
use crate::{
    Error, Result,
    collect::CollectVec,
    error::ensure,
    io::{Layout, TensorFile},
};

/// Description of a family.
struct Description {
    name: &'static str,
    /// `model_type` in `config.json`.
    model_type: &'static str,
    /// `general.architecture` in GGUF, if supported.
    architecture: Option<&'static str>,
    /// If `true`, its models generate text; the others embed it.
    causal: bool,
    /// Class of its tokenizers in `transformers`, if their files do not name it.
    tokenizer: &'static str,
    /// Names of its weights in `transformers`.
    layout: Layout,
    read: fn(&Options, Family, &TensorFile) -> Result<Described>,
}

/// Names of the weights of Llama and similar models.
const LLAMA: Layout = Layout {
    base: "model.",
    with_base: true,
    // The table is omitted if the head has its values.
    anchors: &["embed_tokens.weight", "layers.0.input_layernorm.weight"],
    heads: &["lm_head."],
    aliases: &[],
};

/// Defines the families from one table, one row each.
macro_rules! families {
    ($($(#[$doc:meta])* $family:ident: $description:expr;)+) => {
        /// Family of models.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[non_exhaustive]
        pub enum Family {
            $($(#[$doc])* $family,)+
        }

        impl Family {
            /// Every family.
            pub const ALL: &[Self] = &[$(Self::$family),+];

            fn description(self) -> &'static Description {
                match self {
                    $(Self::$family => {
                        static DESCRIPTION: Description = $description;
                        &DESCRIPTION
                    })+
                }
            }
        }
    };
}

families! {
    /// Devlin et al., <https://arxiv.org/abs/1810.04805>; MiniLM too.
    Bert: Description {
        name: "BERT",
        model_type: "bert",
        architecture: None,
        causal: false,
        tokenizer: "BertTokenizer",
        layout: Layout {
            base: "bert.",
            with_base: false,
            anchors: &["embeddings.word_embeddings.weight"],
            heads: &["cls."],
            aliases: &[("layer.", "encoder.layer.")],
        },
        read: |options, _, file| bert::bert(options, file),
    };
    /// Lan et al., <https://arxiv.org/abs/1909.11942>.
    Albert: Description {
        name: "ALBERT",
        model_type: "albert",
        architecture: None,
        causal: false,
        tokenizer: "AlbertTokenizer",
        layout: Layout {
            base: "albert.",
            with_base: false,
            anchors: &["embeddings.word_embeddings.weight"],
            heads: &["predictions.", "sop_classifier."],
            aliases: &[
                ("albert_layer_groups.", "encoder.albert_layer_groups."),
                ("embedding_hidden_mapping_in.", "encoder.embedding_hidden_mapping_in."),
            ],
        },
        read: |options, _, file| bert::albert(options, file),
    };
    /// Touvron et al., <https://arxiv.org/abs/2302.13971>; SmolLM and TinyLlama too. A folder, or GGUF of the
    /// architecture `llama`.
    Llama: Description {
        name: "Llama",
        model_type: "llama",
        architecture: Some("llama"),
        causal: true,
        tokenizer: "LlamaTokenizer",
        layout: LLAMA,
        read: llama::of_json,
    };
    /// Jiang et al., <https://arxiv.org/abs/2310.06825>. A folder, or GGUF, whose files name the architecture `llama`.
    Mistral: Description {
        name: "Mistral",
        model_type: "mistral",
        architecture: None,
        causal: true,
        tokenizer: "LlamaTokenizer",
        layout: LLAMA,
        read: llama::of_json,
    };
    /// Qwen 2 and 2.5, <https://arxiv.org/abs/2407.10671>. A folder, or GGUF of the architecture `qwen2`.
    Qwen2: Description {
        name: "Qwen2",
        model_type: "qwen2",
        architecture: Some("qwen2"),
        causal: true,
        tokenizer: "Qwen2Tokenizer",
        layout: LLAMA,
        read: llama::of_json,
    };
}

/// Joins names as in `a, b or c`.
fn joined(names: &[&str]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}

impl Family {
    /// Returns `true` if its models generate text; the others embed it.
    pub fn is_causal(self) -> bool {
        self.description().causal
    }

    /// Returns the class of its tokenizers in `transformers`, if their files do not name it.
    pub fn tokenizer_class(self) -> &'static str {
        self.description().tokenizer
    }

    /// Returns the family that a config names.
    pub(super) fn of(options: &Options) -> Result<Self> {
        let found = options.text("model_type", "")?;
        let of_name = |family: &&Self| family.description().model_type == found;
        let types: Vec<&str> = Self::ALL.iter().map(|family| family.description().model_type).collect_vec();
        let known = format!("expected {}", joined(&types));
        ensure!(
            !found.is_empty(),
            Error::file(&options.path, format_args!("has no `model_type`, so it is not a transformers model; {known}"))
        );
        let family = Self::ALL.iter().find(of_name);
        family.copied().ok_or_else(|| options.refuse("model_type", format!("is `{found}`, {known}")))
    }

    /// Returns the family whose GGUF files name this architecture.
    ///
    /// Errors: an unknown architecture, with a list of the known ones.
    pub(super) fn of_architecture(architecture: &str) -> std::result::Result<Self, String> {
        let of_name = |family: &&Self| family.description().architecture == Some(architecture);
        let known: Vec<&str> = Self::ALL.iter().filter_map(|family| family.description().architecture).collect_vec();
        Self::ALL.iter().find(of_name).copied().ok_or_else(|| joined(&known))
    }

    /// Names of its weights in `transformers`.
    pub(super) fn layout(self) -> &'static Layout {
        &self.description().layout
    }

    /// Reads the options and the source of each parameter.
    pub(super) fn read(self, options: &Options, file: &TensorFile) -> Result<Described> {
        (self.description().read)(options, self, file)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.description().name)
    }
}
