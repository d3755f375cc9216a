"""Writes the models of SentencePiece and what it makes of texts, which `tokenizers/src/sentencepiece.rs` reads.

    pip install sentencepiece==0.2.3
    python tokenizers/tests/sentencepiece/make.py
"""

import json
import os
import pathlib
import random

import sentencepiece

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent

# What models meet: spaces of all kinds, no words at all, runs, unknown characters and bytes, characters to replace.
TEXTS = [
    "the tensor of a tape", " a space in front", "two  spaces   and more    ", "a\tb\nc\n", "  ", "a", "", "==== ===== =",
    "aaaaaaa", "naïve café", "日本語 text", "😀", "Ⅷ ﬁn ①", "fn main() { let x = 1_000; }", "https://example.org/?a=b&c=%20",
    "don't ``quote'' this", "ÀÉÎ", "x" * 40, "1234567890 3.14159", "▁ is a piece of its own", "\u200bzero\u00a0width",
]


def options(name):
    rules = HERE / "rules.tsv"
    shared = {
        "input": ["README.md", "build.rs"], "model_prefix": str(HERE.relative_to(ROOT) / name),
        "vocab_size": 600, "minloglevel": 2, "character_coverage": 1.0, "num_threads": 1,
    }
    # As Llama's.
    if name == "bpe":
        return shared | {
            "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
            "remove_extra_whitespaces": False, "user_defined_symbols": ["<tool>"], "allow_whitespace_only_pieces": True,
        }
    # As ALBERT's, with a few rules in place of 200 kB of them.
    lines = [("2167", "56 49 49 49"), ("FB01", "66 69"), ("2460", "31"), ("00A0", "20"), ("0009", "20"), ("000A", "20"), ("200B", "")]
    rules.write_text("".join(f"{source}\t{target}\n" for source, target in lines))
    return shared | {
        "model_type": "unigram", "normalization_rule_tsv": str(rules.relative_to(ROOT)), "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1,
        "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
    }


def main():
    random.seed(0)
    # Models keep the names of the files that they were trained with.
    os.chdir(ROOT)
    source = (ROOT / "src/lib.rs").read_text()
    starts = [random.randrange(len(source) - 100) for _ in range(40)]
    texts = TEXTS + [source[start : start + random.randrange(100)] for start in starts]
    # None of the words of a language, which are mostly unknown.
    texts += ["".join(random.choices("ab =éΩ▁語\n", k=random.randrange(30))) for _ in range(40)]
    for name in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(**options(name))
        for extra in (f"{name}.vocab", "rules.tsv"):
            (HERE / extra).unlink(missing_ok=True)
        model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / f"{name}.model"))
        cases = [{"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))} for text in texts]
        write(name, cases)
        if name == "bpe":
            write("bytes", [{"ids": ids, "decoded": model.decode(ids)} for ids in runs(model)])


def write(name, cases):
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / f"{name}.json").write_text(f"[\n{lines}\n]\n")


def runs(model):
    """Tokens with bytes of characters among them, whole ones and parts, and bytes of none."""
    characters = [list(text.encode()) for text in ("é", "я", "日", "\U0001f600", "a")]
    for _ in range(160):
        tokens = []
        for _ in range(random.randrange(1, 8)):
            part = random.choice(characters)
            kind = random.randrange(6)
            if kind == 0:
                tokens.append(random.randrange(300, model.vocab_size()))
            elif kind == 1:
                part = part[: random.randrange(len(part) + 1)]
            elif kind == 2:
                part = [random.randrange(256)]
            tokens += [model.piece_to_id(f"<0x{byte:02X}>") for byte in part]
        yield tokens


main()
