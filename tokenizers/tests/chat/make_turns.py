"""Writes the tokens of whole chats and which of them an assistant wrote, which `tokenizers/tests/tokenizers/turns.rs` compares with.

    pip install transformers==5.24.0 jinja2
    python tokenizers/tests/chat/make_turns.py

The reference is `return_assistant_tokens_mask` of transformers, for the same templates with `{% generation %}` around what the
assistant writes. `Tokenizer::chat_turns` finds it without such marks.
"""

import datetime
import json
import pathlib

import transformers.utils.chat_template_utils as utils
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent


def turn(role, content):
    return {"role": role, "content": content}


CHATS = [
    [turn("user", "What is ice?"), turn("assistant", "Frozen water.")],
    [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", "the end?"), turn("assistant", "Yes, the end.")],
    [turn("user", "a"), turn("assistant", "\n\nb\n"), turn("user", "c")],
    [turn("user", "Wie heißt 水?"), turn("assistant", " Eau.</s> <|im_end|>"), turn("user", "é"), turn("assistant", "")],
]

# What the template writes for a turn, and the same with marks.
MARKED = {
    "chatml": (
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
        "{{- '<|im_start|>' + message.role + '\\n' }}",
        "message.content + '<|im_end|>' + '\\n'",
    ),
    "llama3": (
        "{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ message['content'] | trim ~ '<|eot_id|>' -}}",
        "{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}",
        "message['content'] | trim ~ '<|eot_id|>'",
    ),
    "mistral": ("{{- ' ' + message['content'] + eos_token}}", "", "' ' + message['content'] + eos_token"),
    "gemma": (
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}",
        "{{ '<start_of_turn>' + role + '\\n' }}",
        "message['content'] | trim + '<end_of_turn>\\n'",
    ),
}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2025, 3, 9, 12, 0, 0)


def main():
    utils.datetime = Clock
    of = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(HERE / "tokenizer.json")), bos_token="<s>", eos_token="</s>"
    )
    cases = []
    for name, (plain, before, answer) in MARKED.items():
        text = (HERE / f"{name}.jinja").read_text()
        assert text.count(plain) == 1, name
        marked = (
            f"{before}{{%- if message['role'] == 'assistant' -%}}{{%- generation -%}}{{{{- {answer} -}}}}{{%- endgeneration -%}}"
            f"{{%- else -%}}{{{{- {answer} -}}}}{{%- endif -%}}"
        )
        of.chat_template = text.replace(plain, marked)
        for index, chat in enumerate(CHATS):
            if (name, index) == ("gemma", 1):
                continue
            # Text that is spelled like a control token stays text here, which transformers does not do for the mask.
            if index == 3:
                chat = [turn(t["role"], t["content"].replace("</s> <|im_end|>", "")) for t in chat]
            found = of.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            of_plain = of.apply_chat_template(chat, tokenize=True, return_dict=False, chat_template=text)
            assert found["input_ids"] == of_plain, (name, index)
            cases.append({"template": name, "chat": chat, "tokens": of_plain, "answers": found["assistant_masks"]})
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / "turns.json").write_text(f"[\n{lines}\n]\n")


main()
