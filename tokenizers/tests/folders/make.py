#!/usr/bin/env python3
"""Writes folders with tokenizers of models that continue texts, and the tokens that transformers gives, for tests/tokenizers/folders.rs.

    pip install transformers tokenizers sentencepiece

    vocab.json, merges.txt   a byte-level vocabulary
    cases.json               folders by their files, texts, and the tokens of those texts
"""

import json
import shutil
import tempfile
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()
FOLDER = Path(__file__).parent
PIECES = FOLDER.parent / "sentencepiece/bpe.model"
TEXTS = ["the tensor of a tape", "Zoë's 東京 12345\n\n  two  spaces", "a<|im_start|>the <|im_end|> tape", "<s>the</s>", "x <mask> y"]
# That of spaces in a row is told in tests/sentencepiece.
ONE_SPACE = [" ".join(text.split(" ")) for text in TEXTS if "  " not in text]


def byte_level():
    corpus = ["the tensor of a tape and the cat sat on a mat, Zoë's", "12345 678 two spaces the tape tensor's"] * 50
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(corpus, vocab_size=320, show_progress=False, special_tokens=["<s>", "</s>", "<unk>", "<pad>", "<mask>", "<|endoftext|>"])
    tokenizer.save_model(str(FOLDER))


def main():
    byte_level()
    cases = []

    def add(name, family, options, copies, texts=TEXTS, **files):
        files = {key.replace("_json", ".json"): json.dumps(value) for key, value in files.items()} | {"tokenizer_config.json": json.dumps(options)}
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "config.json").write_text(json.dumps({"model_type": family}))
            for path, content in files.items():
                (folder / path).write_text(content)
            for path, source in copies.items():
                shutil.copy(FOLDER / source, folder / path)
            loaded = AutoTokenizer.from_pretrained(folder)
            tokens = [loaded(text).input_ids for text in texts]
        cases.append({"name": name, "family": family, "files": files, "copies": copies, "texts": texts, "tokens": tokens})

    two = {"vocab.json": "vocab.json", "merges.txt": "merges.txt"}
    first = len(json.loads((FOLDER / "vocab.json").read_text()))
    token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    chat = {str(id): token | {"content": content} for id, content in enumerate(["<|im_start|>", "<|im_end|>"], first)}
    for name, family, options in [
        ("GPT-2", "llama", {"tokenizer_class": "GPT2Tokenizer"}),
        ("GPT-2 with a space in front", "llama", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
        ("GPT-2 between its ends", "llama", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True}),
        ("GPT-2 after a start of its own", "llama", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "<s>"}),
        ("GPT-2 with the tokens of a chat", "llama", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": chat}),
        ("Qwen2", "qwen2", {}),
        ("Qwen2 with the tokens of a chat", "qwen2", {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": chat, "eos_token": "<|im_end|>"}),
        ("RoBERTa", "bert", {"tokenizer_class": "RobertaTokenizer"}),
        ("RoBERTa with a space in front", "bert", {"tokenizer_class": "RobertaTokenizerFast", "add_prefix_space": True}),
    ]:
        add(name, family, options, two)
    add("GPT-2 with added tokens of old files", "llama", {"tokenizer_class": "GPT2Tokenizer"}, two,
        added_tokens_json={"<|im_start|>": first, "<|im_end|>": first + 1}, special_tokens_map_json={"eos_token": "<|im_end|>"})

    model = {"tokenizer.model": "../sentencepiece/bpe.model"}
    chat = {str(id): token | {"content": content} for id, content in enumerate(["<|im_start|>", "<|im_end|>"], 600)}
    for name, options in [
        ("pieces", {}),
        ("pieces of today's class", {"tokenizer_class": "LlamaTokenizer"}),
        ("pieces of an old class", {"legacy": True, "tokenizer_class": "LlamaTokenizer"}),
        ("pieces without a space in front", {"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer"}),
        ("pieces with their end", {"add_eos_token": True}),
        ("pieces with the tokens of a chat", {"added_tokens_decoder": chat, "legacy": False, "tokenizer_class": "LlamaTokenizerFast"}),
        ("pieces between the tokens of a chat", {"added_tokens_decoder": chat, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_eos_token": True}),
    ]:
        add(name, "llama", {"add_bos_token": True} | options, model, texts=ONE_SPACE)
    add("pieces with added tokens of old files", "llama", {"add_bos_token": True}, model, texts=ONE_SPACE, added_tokens_json={"<|im_end|>": 601, "<|im_start|>": 600})
    lines = [json.dumps(case, ensure_ascii=False) for case in cases]
    (FOLDER / "cases.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(len(cases), "cases")


main()
