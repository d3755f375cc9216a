"""Writes a byte-level vocabulary and how its texts are split under each name of `tokenizer.ggml.pre`, and the pieces of
SentencePiece with what they make of texts under each setting of GGUF, which `tokenizers/src/gguf.rs` reads.

    pip install transformers==5.24.0 tokenizers sentencepiece==0.2.3 protobuf
    python tokenizers/tests/gguf/make.py

The merges were learnt without any splits, so that every other split of a text gives other tokens. What transformers makes
of a GGUF file counts where it knows the name; the others are put together here from the expressions of the models.
"""

import json
import pathlib

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

HERE = pathlib.Path(__file__).resolve().parent
VOCABULARY = 900

TEXTS = [
    "Hello World, it's we'll I'VE you'Re she'D THEY'RE o'clock 'tis 'S", "it\u2019s don\u2019t", "a'\u017fb 'T'M'LL",
    "1 12 123 1234 12345 123456 3.14159 1,000,000 x2y33z444", " 0123456789 and so on.", "\u0661\u0662\u0663 \u0967\u0968\u0969\u096a \u2167 \u00bd\u00b2 \U0001d7d8\U0001d7d9\U0001d7da\U0001d7db",
    "  two  spaces   and    more    ", "tab\tand\t\ttabs\t", "\n", "\n\n\n", "a\nb\r\nc\n\n\nd  \n  e \n", "line  \n\n   next\t\n", "\r\r\n x",
    "trailing spaces   ", "   ", "no-break\u00a0space\u2003em\u3000ideographic\u2028line\u0085next",
    "camelCase PascalCase HTTPServer iPhone XMLHttpRequest aB Ab AB ab", "\u00c9COLE \u00e9cole \u00c9cole \u01c5 \u01c4 \u00df \u02b0x",
    "na\u00efve nai\u0308ve cafe\u0301 e\u0301\u0301 \u0301x", "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u6771\u4eac2024\u5e74", "\u4e2d\u6587\uff0c\u6807\u70b9\uff01\uff08\u62ec\u53f7\uff09", "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea ok", "x = a+b*(c-d)/e; // note\n    return x_1 != y->z;",
    "$100 \u20ac5 <tag attr=\"v\"> #hash @user ^caret~ `tick`", "path/to/file.rs:12\n/usr/bin//\nhttp://e.org/?q=%20&r", "!!!???...\n\n---===", " ,leading . and ,\n",
    "a_b__c _x_", "(((nested)))[[[]]]{{}}", "word\u200bzero\u200dwidth\u00adsoft", "\u2014em\u2014dash \u2013 en\u2026", "'\n'\t' '", "x" * 30 + "1" * 10,
    "MixedCASE123abc456DEF'll", "\u00b5 \u03a9\u03c9 \u2126 K\u212a \ufb01", " \u3042\u30a2 a\u3042 1\u3042", "\x00\x7f",
]

# Names that transformers leaves to GPT-2's expression, or that it does not know.
QWEN2 = GGUF_PRE_TOKENIZER_SPLITS["qwen2"]
LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f"
    "\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57"
    "\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
OWN = {
    "deepseek-llm": [
        r"[\r\n]", rf"\s?[{LETTERS}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", CJK,
        r"\p{N}+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "bloom": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"],
    "viking": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"],
    "seed-coder": [QWEN2.replace(r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*", r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+")],
    "bailingmoe": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "minicpm5": [r"\p{N}{1,3}", QWEN2.replace(r"\p{N}|", r"\p{N}+|")],
    "glm4": [GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]],
    "stablelm2": [QWEN2],
}


def own(vocabulary, merges, splits):
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = splits
    return tokenizer


def main():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False, min_frequency=1,
    ))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) for merge in model["merges"]]
    described = {"tokenizer_type": "gpt2", "tokens": tokens, "merges": merges, "token_type": [1] * len(tokens)}
    found = {}
    for name in ["default", "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS]:
        found[name] = convert_gguf_tokenizer("llama", {**described, "pre_tokenizer_type": name})[0]
    pairs = [tuple(merge) for merge in model["merges"]]
    digits = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    for name in ["smollm", "refact", "minerva-7b"]:
        found[name] = own(model["vocab"], pairs, digits)
    for name, expressions in OWN.items():
        splits = [Split(Regex(expression), behavior="isolated") for expression in expressions]
        splits = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
        found[name] = own(model["vocab"], pairs, splits)
    ids = {name: [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS] for name, tokenizer in found.items()}
    # Names that split alike share a list.
    lists = []
    for one in ids.values():
        if one not in lists:
            lists.append(one)
    written = {
        "tokens": tokens, "merges": merges, "texts": TEXTS, "lists": lists,
        "names": {name: lists.index(one) for name, one in ids.items()},
    }
    (HERE / "pre.json").write_text(json.dumps(written, separators=(",", ":")) + "\n")
    print(f"{len(tokens)} tokens, {len(ids)} names, {len(lists)} ways")


def pieces():
    """The model of `../sentencepiece` with other settings, and rules that replace characters."""
    folder = HERE.parent / "sentencepiece"
    model, other = sentencepiece_model_pb2.ModelProto(), sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "bpe.model").read_bytes())
    other.ParseFromString((folder / "unigram.model").read_bytes())
    rules = other.normalizer_spec.precompiled_charsmap
    texts = ["the tensor of a tape", " a space in front", "two  spaces   and more    ", "a\tb\nc\n", "", "  ", "na\u00efve",
             "\u65e5\u672c", "\u2167 \ufb01n \u2460", "a\u00a0\u200bb", "\u2581 x", "1234 3.14"]
    cases = []
    for prefix, collapse, charsmap in [(True, False, b""), (False, False, b""), (True, True, b""), (False, True, rules), (True, False, rules)]:
        spec = model.normalizer_spec
        spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.precompiled_charsmap = prefix, collapse, charsmap
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        cases.append({
            "add_space_prefix": prefix, "remove_extra_whitespaces": collapse, "charsmap": list(charsmap),
            "ids": [processor.encode(text) for text in texts],
        })
    written = {
        "tokens": [piece.piece for piece in model.pieces], "scores": [piece.score for piece in model.pieces],
        "types": [piece.type for piece in model.pieces], "texts": texts, "cases": cases,
    }
    (HERE / "pieces.json").write_text(json.dumps(written, separators=(",", ":")) + "\n")


main()
pieces()
