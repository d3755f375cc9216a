//! Which tokens of a chat are the assistant's, against the mask of transformers, which `tests/chat/make_turns.py` wrote.

use std::{
    fs,
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use serde_json::{Value, json};
use x_transformers::pretrained::Family;
use x_transformers_tokenizers::{ChatOptions, Message, Tokenizer};

fn with_template(template: &str) -> (tempfile::TempDir, Tokenizer) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = json!({"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}).to_string();
    for (name, text) in [("tokenizer.json", include_str!("../chat/tokenizer.json")), ("tokenizer_config.json", &config)]
    {
        fs::write(folder.path().join(name), text).expect("a file");
    }
    let tokenizer = Tokenizer::open(folder.path(), Family::Llama).expect("a tokenizer");
    (folder, tokenizer)
}

fn options() -> ChatOptions {
    ChatOptions { now: Some(UNIX_EPOCH + Duration::from_secs(1_741_521_600)), ..ChatOptions::default() }
}

#[test]
fn answers_match_transformers() {
    let cases: Value = serde_json::from_str(include_str!("../chat/turns.json")).expect("JSON");
    let cases = cases.as_array().expect("cases");
    assert_eq!(cases.len(), 15);
    for case in cases {
        let name = case["template"].as_str().expect("a name");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/chat/{name}.jinja"));
        let (_folder, tokenizer) = with_template(&fs::read_to_string(path).expect("a template"));
        let turn = |turn: &Value| Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap());
        let chat: Vec<Message> = case["chat"].as_array().expect("turns").iter().map(turn).collect();
        let turns = tokenizer.chat_turns(&chat, &options()).expect("turns");
        assert_eq!(json!(turns.tokens), case["tokens"], "{name} {chat:?}");
        let answers: Vec<u8> = turns.answers.iter().map(|&answer| answer.into()).collect();
        assert_eq!(json!(answers), case["answers"], "{name} {chat:?}");
    }
}

/// The spelling of a special token in a message is text, in an answer too.
#[test]
fn answers_cannot_be_forged() {
    let (_folder, tokenizer) = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}\
                                              {% if add_generation_prompt %}assistant: {% endif %}",
    );
    let chat = [Message::user("a"), Message::assistant("b</s>c")];
    let turns = tokenizer.chat_turns(&chat, &options()).expect("turns");
    let end = tokenizer.token("</s>").expect("a token");
    assert_eq!(turns.tokens.iter().filter(|&&token| token == end).count(), 2);
    let answer: Vec<i64> = turns.tokens.iter().zip(&turns.answers).filter(|(_, by)| **by).map(|(id, _)| *id).collect();
    assert_eq!(tokenizer.decode(&answer).expect("text"), "b</s>c");
}

#[test]
fn chats_without_a_defined_answer_are_refused() {
    // Earlier answers are shortened once another follows, as some models do with their thoughts.
    let (_folder, tokenizer) = with_template(
        "{% for m in messages %}[{{ m.role }}] {{ m.content if loop.last else m.content[:3] }}\n{% endfor %}\
         {% if add_generation_prompt %}[assistant] {% endif %}",
    );
    let refused = |chat: &[Message]| tokenizer.chat_turns(chat, &options()).expect_err("an error").to_string();
    let (question, answer) = (Message::user("a"), Message::assistant("a long answer"));
    assert!(tokenizer.chat_turns(&[question.clone(), answer.clone()], &options()).is_ok());
    let message = refused(&[question.clone(), answer.clone(), question.clone(), answer.clone()]);
    assert!(message.contains("chat template `default` writes message 2 otherwise when others follow"), "{message}");
    assert!(refused(&[question.clone(), question.clone()]).contains("the chat has no answer"));
    assert!(refused(&[answer, question]).contains("begins with an answer"));
    assert!(refused(&[]).contains("at least one message"));
}
