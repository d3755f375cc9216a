//! Chats, formatted with the model's own template.

use std::{sync::Arc, time::SystemTime};

use minijinja::{Value, value::ValueKind};
use x_transformers::Result;

use super::{
    Tokenizer, file_error,
    jinja::render,
    refused,
    template::{Template, Templates},
};

/// Surround the spelling of a control token in what people say; nobody has a use for these characters.
const MARKS: [char; 2] = ['\u{f0000}', '\u{f0001}'];

/// The form of chats of many models, for those with its tokens and without a template.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Turn of a chat.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// Role of the speaker; templates know `system`, `user` and `assistant`, some also others.
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

impl Message {
    /// Creates a turn of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// Creates a system turn: instructions before the first question.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// Creates a user turn.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// Creates an assistant turn: an earlier answer of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// Options of a chat: its end, its template, and its variables.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// If `true`, the text ends where an answer begins. Default `true`.
    pub add_generation_prompt: bool,
    /// Name of a template, for models with several, or the text of a custom template, recognised by `{{` or `{%`.
    /// Default `default`, or `tool_use` if there is a variable `tools`.
    pub template: Option<String>,
    /// Time that the function `strftime_now` of templates formats. Default: when the chat is written.
    pub now: Option<SystemTime>,
    /// Variables of the template, by name; [`ChatOptions::variable`] adds one. Default none.
    pub variables: Vec<(String, Variable)>,
}

/// JSON value for templates; objects keep the order of their keys.
#[derive(Clone, PartialEq, Debug)]
pub struct Variable(Value);

impl Variable {
    /// Reads JSON.
    ///
    /// Errors: a text that is not JSON.
    pub fn from_json(json: &str) -> Result<Self> {
        let value = serde_json::from_str(json);
        value.map(Self).map_err(|why| refused(format_args!("a chat variable is not JSON: {why}")))
    }
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, template: None, now: None, variables: Vec::new() }
    }
}

impl ChatOptions {
    /// Adds a variable of the template, as JSON, for instance `tools`, `documents` or `enable_thinking`.
    ///
    /// ```
    /// # use x_transformers_tokenizers::ChatOptions;
    /// # fn main() -> x_transformers::Result<()> {
    /// let options = ChatOptions::default().variable("enable_thinking", "false")?;
    /// assert!(ChatOptions::default().variable("tools", "[{]").is_err());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: a text that is not JSON.
    pub fn variable(mut self, name: &str, json: &str) -> Result<Self> {
        self.variables.push((name.to_string(), Variable::from_json(json)?));
        Ok(self)
    }
}

impl Tokenizer {
    /// Returns `true` if the model's files have a chat template.
    ///
    /// A vocabulary with `<|im_start|>` but without a template uses ChatML; chats of other models without one are
    /// errors.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.named.is_empty()
    }

    /// Returns the same tokenizer with this chat template, in place of all that it has.
    ///
    /// ```no_run
    /// # use x_transformers::pretrained::Pretrained;
    /// # use x_transformers_tokenizers::{ChatOptions, Message, Tokenizer};
    /// # fn main() -> x_transformers::Result<()> {
    /// let tokenizer = Tokenizer::of(&Pretrained::open("TinyLlama-1.1B")?, None)?;
    /// let tokenizer = tokenizer.with_chat_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}");
    /// assert_eq!(tokenizer.chat_text(&[Message::user("hi")], &ChatOptions::default())?, "[user] hi\n");
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_chat_template(&self, source: impl Into<String>) -> Self {
        let template = Template { name: "default".to_string(), source: source.into(), path: Default::default() };
        let Templates { special, start, .. } = &*self.templates;
        let templates = Templates { named: vec![template], special: special.clone(), start: *start };
        Self { shared: Arc::clone(&self.shared), templates: Arc::new(templates) }
    }

    /// Returns the names of the model's chat templates and their sources; that of ordinary chats is `default`.
    pub fn chat_templates(&self) -> impl Iterator<Item = (&str, &str)> {
        self.templates.named.iter().map(|template| (template.name.as_str(), template.source.as_str()))
    }

    /// Returns the token that ends a turn by the tokenizer's own files, for instance `eos_token` of
    /// `tokenizer_config.json`.
    ///
    /// Chats end with it besides `Pretrained::end_tokens`.
    pub fn end_token(&self) -> Option<i64> {
        let special = &self.templates.special;
        special.iter().find(|(name, _)| *name == "eos_token").and_then(|(_, spelling)| self.token(spelling))
    }

    /// Returns the tokens of a chat, formatted with the model's own template, up to the beginning of the answer.
    ///
    /// The template is run as `apply_chat_template` of `transformers` runs it, default system turns and refusals
    /// (`raise_exception`) included. Special tokens come from the template alone: no other start of a text is put in
    /// front, except in GGUF files whose `add_bos_token` asks for one that the template does not write. Text of the
    /// messages that is spelled like a special token, or like an added token that the template writes, stays text: what
    /// a person types cannot end their turn.
    ///
    /// ```no_run
    /// use x_transformers::pretrained::Pretrained;
    /// use x_transformers_tokenizers::{ChatOptions, Message, Tokenizer};
    /// # fn main() -> x_transformers::Result<()> {
    /// let tokenizer = Tokenizer::of(&Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?, None)?;
    /// let chat = [Message::system("Answer in one word."), Message::user("What is the capital of France?")];
    /// let tokens = tokenizer.chat(&chat, &ChatOptions::default())?;
    /// println!("{}", tokenizer.chat_text(&chat, &ChatOptions::default())?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: no messages, a model without a template, a name that none of its templates has, and what a template
    /// refuses or does wrong, with its file.
    pub fn chat(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<i64>> {
        let chat = self.rendered(messages, options, true)?;
        self.check_messages(messages)?;
        self.of_rendered(&chat)
    }

    /// Returns the text of a chat, formatted with the model's own template. It does not distinguish special tokens from
    /// text of a message with the same spelling; [`Tokenizer::chat`] does.
    ///
    /// Errors: those of [`Tokenizer::chat`].
    pub fn chat_text(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        self.rendered(messages, options, false)
    }

    /// Returns the template for a chat.
    pub(crate) fn chat_template(&self, options: &ChatOptions) -> Result<Template> {
        let templates = &self.templates.named;
        let find = |name: &str| templates.iter().find(|template| template.name == name);
        let tools = options.variables.iter().any(|(name, value)| name == "tools" && !value.0.is_none());
        let found = match &options.template {
            Some(name) => find(name),
            None if tools => find("tool_use").or_else(|| find("default")),
            None => find("default"),
        };
        let names = || templates.iter().map(|template| format!("`{}`", template.name)).collect::<Vec<_>>().join(", ");
        match (found, &options.template) {
            (Some(Template { name, source, path }), _) => {
                Ok(Template { name: name.clone(), source: source.clone(), path: path.clone() })
            }
            (None, Some(text)) if text.contains("{{") || text.contains("{%") => {
                Ok(Template { name: "given".to_string(), source: text.clone(), path: Default::default() })
            }
            (None, Some(name)) if !templates.is_empty() => {
                Err(refused(format_args!("the model has no chat template `{name}`, expected one of {}", names())))
            }
            (None, None) if !templates.is_empty() => {
                Err(refused(format_args!("the model has no default chat template; choose one of {}", names())))
            }
            (None, None) if self.token("<|im_start|>").is_some() && self.token("<|im_end|>").is_some() => {
                Ok(Template { name: "ChatML".to_string(), source: CHATML.to_string(), path: Default::default() })
            }
            _ => Err(refused(
                "the model has no chat template (`chat_template` in tokenizer_config.json, chat_template.jinja, or \
                 `tokenizer.chat_template` in a GGUF file), so its chat format is unknown",
            )),
        }
    }

    /// Text that the template writes, with spellings of control tokens in messages between [`MARKS`] if `marks`.
    pub(crate) fn rendered(&self, messages: &[Message], options: &ChatOptions, marks: bool) -> Result<String> {
        if messages.is_empty() {
            return Err(refused("expected at least one message, got none"));
        }
        let template = self.chat_template(options)?;
        let control = if marks { self.control_tokens(&template.source) } else { Vec::new() };
        let text = |text: &str| if marks { Value::from(marked(text, &control)) } else { Value::from(text) };
        let turns = messages.iter().map(|message| {
            let entries = [("role", text(&message.role)), ("content", text(&message.content))];
            Value::from_pairs(entries)
        });
        let special = self.templates.special.iter().map(|(name, token)| (name.to_string(), Value::from(&**token)));
        let own = [
            ("messages".to_string(), turns.collect::<Vec<Value>>().into()),
            ("tools".to_string(), Value::from(())),
            ("documents".to_string(), Value::from(())),
            ("add_generation_prompt".to_string(), options.add_generation_prompt.into()),
        ];
        let given = options
            .variables
            .iter()
            .map(|(name, value)| (name.clone(), if marks { marked_in(&value.0, &control) } else { value.0.clone() }));
        let variables = Value::from_pairs(special.chain(own).chain(given));
        let bytes = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        render(&template.source, variables, bytes, options.now).map_err(|why| {
            let why = format!("chat template `{}`: {why}", template.name);
            if template.path.as_os_str().is_empty() { refused(why) } else { file_error(&template.path, why) }
        })
    }

    /// Refuses messages that the tokenizer's normalizer turns into special tokens: their spelling differs, so that they
    /// are not marked.
    pub(crate) fn check_messages(&self, messages: &[Message]) -> Result<()> {
        let added = self.shared.inner.raw().get_added_vocabulary().get_added_tokens_decoder();
        if !self.shared.inner.normalizes() || !added.values().any(|token| token.special && token.normalized) {
            return Ok(());
        }
        let control = self.control_tokens("");
        for text in messages.iter().flat_map(|message| [&message.role, &message.content]) {
            let tokens = self.of_marked(&marked(text, &control))?;
            let special = |token: &i64| self.piece(*token).is_none();
            if let Some(token) = tokens.into_iter().find(special).and_then(|token| u32::try_from(token).ok()) {
                let spelling = self.shared.inner.raw().id_to_token(token).unwrap_or_default();
                let why = format!("a message contains text that the tokenizer reads as the special token `{spelling}`");
                return Err(refused(why));
            }
        }
        Ok(())
    }

    /// Spellings of the tokens that only a template may write, the longest first: special ones, and added ones in its
    /// text.
    fn control_tokens(&self, template: &str) -> Vec<String> {
        let added = self.shared.inner.raw().get_added_vocabulary().get_added_tokens_decoder();
        let control = added.values().filter(|token| {
            let written = || template.contains(&token.content) && !token.content.trim().is_empty();
            !token.content.is_empty() && (token.special || written())
        });
        let mut control: Vec<String> = control.map(|token| token.content.clone()).collect();
        control.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        control
    }

    /// Tokens of a chat in which spellings of control tokens that are text are marked.
    pub(crate) fn of_marked(&self, chat: &str) -> Result<Vec<i64>> {
        if !chat.contains(MARKS) {
            return self.encoded(chat, false);
        }
        let mut tokens = Vec::new();
        let mut first = true;
        let mut marked = false;
        let mut rest = chat;
        loop {
            let at = rest.find(MARKS);
            let piece = &rest[..at.unwrap_or(rest.len())];
            // A template may have cut a text between its marks: both halves then are like any other text.
            let as_text =
                marked && at.is_some_and(|at| rest[at..].starts_with(MARKS[1])) && self.token(piece).is_some();
            if !piece.is_empty() {
                let more = if first { self.encoded(piece, false)? } else { self.inside(piece, as_text)? };
                if as_text && self.token(piece).is_some_and(|control| more.contains(&control)) {
                    let why = format!("a message contains `{piece}`, which the tokenizer reads as a special token");
                    return Err(refused(why));
                }
                tokens.extend(more);
            }
            let Some(at) = at else { return Ok(tokens) };
            first = false;
            marked = rest[at..].starts_with(MARKS[0]);
            rest = &rest[at + MARKS[0].len_utf8()..];
        }
    }

    /// Tokens of a piece that is not the beginning of a text: as text alone, or with added tokens in it.
    fn inside(&self, piece: &str, as_text: bool) -> Result<Vec<i64>> {
        let encode = |text: &str| if as_text { self.plain(text) } else { self.encoded(text, false) };
        // Tokenizers put a space in front of a text; behind a line end there is none.
        let (line, both) = (encode("\n")?, encode(&format!("\n{piece}"))?);
        both.strip_prefix(&*line).map_or_else(|| encode(piece), |tokens| Ok(tokens.to_vec()))
    }

    /// Tokens of a text in which no added token is looked for.
    fn plain(&self, text: &str) -> Result<Vec<i64>> {
        Ok(self.shared.inner.encode_plain(text)?.into_iter().map(i64::from).collect())
    }
}

/// Puts spellings of control tokens between marks, and takes away marks that are there.
fn marked(text: &str, control: &[String]) -> String {
    let text = text.replace(MARKS, "");
    let mut result = String::with_capacity(text.len());
    let mut rest = &*text;
    // Most characters begin none of them.
    let begins: Vec<char> = control.iter().filter_map(|token| token.chars().next()).collect();
    while let Some(at) = rest.find(&begins[..]) {
        let (before, from) = rest.split_at(at);
        result.push_str(before);
        match control.iter().find(|token| from.starts_with(token.as_str())) {
            Some(token) => {
                result.push(MARKS[0]);
                result.push_str(token);
                result.push(MARKS[1]);
                rest = &from[token.len()..];
            }
            None => {
                let length = from.chars().next().map_or(0, char::len_utf8);
                result.push_str(&from[..length]);
                rest = &from[length..];
            }
        }
    }
    result + rest
}

/// The same for every text in a value.
fn marked_in(value: &Value, control: &[String]) -> Value {
    match value.kind() {
        ValueKind::String => Value::from(marked(value.as_str().unwrap_or_default(), control)),
        ValueKind::Seq => value.try_iter().map_or_else(
            |_| value.clone(),
            |items| items.map(|item| marked_in(&item, control)).collect::<Vec<Value>>().into(),
        ),
        ValueKind::Map => value.try_iter().map_or_else(
            |_| value.clone(),
            |keys| {
                let marked = |key: Value| (key.clone(), marked_in(&value.get_item(&key).unwrap_or_default(), control));
                Value::from_pairs(keys.map(marked))
            },
        ),
        _ => value.clone(),
    }
}
