"""What the Python package `tokenizers` learns from a text: python make.py (tokenizers 0.23)

A byte-level BPE vocabulary of plays and of lines in other scripts, and how it encodes some texts.
"""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
LINES = ["Zoë's naïve café — déjà vu!", "日本語のテキスト、日本語", "  indented\n\n\tcode(x) = 12345", "🙂🙂 emoji 🙂", "Zoë's café"]
SAMPLES = ["To be, or not to be", "Zoë's 日本 🙂 x\u00a0y", "  two  spaces\r\n", "", "Hamlet<|endoftext|>HAMLET"]


def main():
    plays = (HERE / "../../../cli/corpus.txt").read_bytes()[:60000].decode()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([plays, *LINES], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    samples = [[text, tokenizer.encode(text).ids] for text in SAMPLES]
    expected = {"lines": LINES, "tokens": tokens, "merges": merges, "samples": samples}
    (HERE / "expected.json").write_text(json.dumps(expected, ensure_ascii=True, indent=0) + "\n")


main()
