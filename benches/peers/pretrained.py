#!/usr/bin/env python3
"""Pretrained shapes and generation by this library, PyTorch, onnxruntime and candle, in turns on the CPU.

    pip install torch transformers onnx onnxscript onnxruntime x-transformers
    benches/peers/pretrained.py setup                  builds this library and candle's peer
    benches/peers/pretrained.py run [--only MiniLM*]   every workload, appended to the raw file
    benches/peers/pretrained.py table > benches/results/pretrained.md

Weights are random, of the shapes of all-MiniLM-L6-v2 and SmolLM2-135M and of the decoder of benches/configs: speed does not
depend on them. Every contender is a process with its model ready and does one step for each line that it is sent. A turn is
some steps without a pause, of which the median counts; turns alternate, so that a round is measured within the same seconds.
"""

import argparse
import fnmatch
import io
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
from contenders import newest  # noqa: E402
from machine import commit, processor  # noqa: E402
from tables import time_text  # noqa: E402

RAW = HERE.parent / "results/pretrained-raw.jsonl"
XT = ROOT / "target/release/xt"
CANDLE = HERE / "candle/target/release/minilm"
THREADS = 2
# Numbers of a workload, the steps of a turn, the contenders, and the targets: our time divided by theirs.
ONE = {"PyTorch": 1.0, "onnxruntime": 1.0, "candle": 1.0}
WORKLOADS = {
    "MiniLM 1 x 12": (("minilm", 1, 12), 200, ONE),
    "MiniLM 32 x 128": (("minilm", 32, 128), 3, ONE),
    "SmolLM2 32 + 32": (("smollm", 32, 32), 1, {"PyTorch": 1.0}),
    "decoder 128 + 128, f32": (("decoder", "f32", 1), 1, {"x-transformers": 0.36}),
    "decoder 128 + 128, bf16": (("decoder", "bf16", 1), 1, {"x-transformers in f32": 0.20, "x-transformers": None}),
    "decoder 8 x (128 + 128), f32": (("decoder", "f32", 8), 1, {"x-transformers": None}),
    "decoder 8 x (128 + 128), bf16": (("decoder", "bf16", 8), 1, {"x-transformers": None}),
    "attention to 4096 keys, f32": (("attention", "f32", 4096), 100, {"PyTorch": None}),
    "attention to 4096 keys, bf16": (("attention", "bf16", 4096), 100, {"PyTorch": None}),
    "attention to 16384 keys, f32": (("attention", "f32", 16384), 50, {"PyTorch": None}),
    "attention to 16384 keys, bf16": (("attention", "bf16", 16384), 50, {"PyTorch": None}),
}


def bench(config, mode, batch, length, *more):
    command = [XT, "bench", "--config", ROOT / f"benches/configs/{config}.json", "--mode", mode, "--batch", batch]
    return [*command, "--seq-len", length, "--device", "cpu", "--threads", THREADS, "--interleaved", "--json", *more]


def command(peer, kind, first, second):
    if peer == "candle":
        return [CANDLE, first, second]
    if peer != "this":
        return [sys.executable, __file__, "contend", peer, kind, first, second]
    if kind == "minilm":
        return bench("minilm", "forward", first, second)
    if kind == "smollm":
        return bench("smollm2", "generate", 1, first, "--new-tokens", second)
    if kind == "decoder":
        return bench("decoder", "generate", second, 128, "--new-tokens", 128, "--dtype", first)
    return [newest("target/release/deps/decode-*"), "--interleaved", f"attention/{first} {second}"]


def minilm(peer, batch, length):
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(0, 30522, (batch, length))
    mask = torch.ones_like(tokens)
    if peer == "PyTorch":
        return lambda: model(input_ids=tokens, attention_mask=mask)
    import onnxruntime

    class Hidden(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens, mask):
            return self.model(input_ids=tokens, attention_mask=mask).last_hidden_state

    file = io.BytesIO()
    torch.onnx.export(Hidden(model), (tokens, mask), file, input_names=["tokens", "mask"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    given = {"tokens": tokens.numpy(), "mask": mask.numpy()}
    return lambda: session.run(None, given)


def smollm(_, prompt, new):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 49152, (1, prompt))
    return lambda: model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def decoder(peer, dtype, batch):
    """The newest x-transformers with its cache; in bf16 the weights are."""
    import torch
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=512, depth=6, heads=8, attn_flash=True)
    net = TransformerWrapper(num_tokens=20000, max_seq_len=1024, attn_layers=layers)
    model = AutoregressiveWrapper(net).eval()
    model = model.bfloat16() if dtype == "bf16" and not peer.endswith("in f32") else model
    prompt = torch.randint(0, 20000, (batch, 128))
    return lambda: model.generate(prompt, 128, temperature=0.0, cache_kv=True)


def attention(_, dtype, keys):
    """One query of 8 heads of 64 features to a cache."""
    import torch
    import torch.nn.functional as F

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    q, k, v = (torch.randn(1, 8, n, 64).to(kind) for n in [1, keys, keys])
    return lambda: F.scaled_dot_product_attention(q, k, v)


def contend(peer, kind, first, second):
    import torch

    number = lambda text: int(text) if text.isdigit() else text
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        run = {"minilm": minilm, "smollm": smollm, "decoder": decoder, "attention": attention}[kind](
            peer, number(first), number(second)
        )
        for _ in sys.stdin:
            before = time.perf_counter()
            run()
            print(json.dumps({"seconds": time.perf_counter() - before}), flush=True)


class Contender:
    def __init__(self, parts):
        self.process = subprocess.Popen(
            [str(part) for part in parts], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def turn(self, steps):
        """The median seconds of some steps without a pause between them."""
        try:
            self.process.stdin.write("\n" * steps)
            self.process.stdin.flush()
            return median(json.loads(self.process.stdout.readline())["seconds"] for _ in range(steps))
        except (BrokenPipeError, ValueError, KeyError):
            raise SystemExit(f"{self.process.args}: {self.process.communicate()[1].strip()[-2000:]}") from None


def run(args):
    for name, (workload, steps, targets) in WORKLOADS.items():
        if not fnmatch.fnmatch(name, args.only):
            continue
        peers = ["this", *(peer for peer in targets if peer != "candle" or CANDLE.exists())]
        contenders = {peer: Contender(command(peer, *workload)) for peer in peers}
        for contender in contenders.values():
            contender.turn(max(2, steps // 10))
        seconds = {peer: [] for peer in peers}
        begun = time.monotonic()
        for round in range(args.rounds):
            for peer, contender in contenders.items():
                seconds[peer].append(contender.turn(steps))
            if round >= 2 and time.monotonic() - begun > args.limit:
                break
        for contender in contenders.values():
            contender.process.communicate()
        record = {"case": name, "date": str(date.today()), "processor": processor(), "commit": commit(), "seconds": seconds}
        with open(args.raw, "a") as file:
            file.write(json.dumps(record) + "\n")
        print("\n".join(rows(record)), flush=True)


def rows(record):
    targets, ours = WORKLOADS[record["case"]][2], record["seconds"]["this"]
    lines = [f"| {record['case']} | this | {time_text(ours)} | | |"]
    for peer, theirs in record["seconds"].items():
        if peer != "this":
            ratio = median(mine / other for mine, other in zip(ours, theirs))
            target = targets.get(peer)
            verdict = "" if target is None else f"{'<' if target == 1.0 else '≤'} {target:.2f}{' ✓' if ratio <= target else ''}"
            lines.append(f"| | {peer} | {time_text(theirs)} | {ratio:.2f} | {verdict} |")
    return lines


def table(args):
    records = {record["case"]: record for record in map(json.loads, open(args.raw)) if record["case"] in WORKLOADS}
    dates = sorted({record["date"] for record in records.values()})
    machines = sorted({record["processor"] for record in records.values()})
    print("# Pretrained shapes and generation, this library and its peers on the CPU\n")
    print(f"{dates[-1]}, {'; '.join(machines)}. Median (smallest–largest) of interleaved turns;")
    print("`benches/peers/pretrained.py run` measures, `pretrained.py table` prints this.\n")
    print("MiniLM is a forward pass in f32, SmolLM2 tokens of a prompt + new ones in f32, drawn here and the best ones there. The")
    print("decoder is that of `benches/configs/decoder.json` (dim 512, depth 6, heads 8, 20,000 tokens) against the newest")
    print("x-transformers with its cache, attention one query of 8 heads of 64 features against `scaled_dot_product_attention`.\n")
    print("| workload | | seconds | ours / theirs | target |\n|---|---|---|---|---|")
    for case in WORKLOADS:
        if case in records:
            print("\n".join(rows(records[case])))


def setup(_):
    subprocess.run(["cargo", "build", "--release", "--bin", "minilm"], cwd=HERE / "candle", check=True)
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    subprocess.run(["cargo", "bench", "-p", "x-transformers", "--bench", "decode", "--no-run"], cwd=ROOT, check=True)


def main():
    if sys.argv[1:2] == ["contend"]:
        return contend(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["setup", "run", "table"])
    parser.add_argument("--only", default="*", help="workloads, with wildcards")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender at most")
    parser.add_argument("--limit", type=float, default=40, help="seconds of a workload, after three rounds")
    parser.add_argument("--raw", type=Path, default=RAW, help="file of measurements, one JSON object a line")
    args = parser.parse_args()
    {"setup": setup, "run": run, "table": table}[args.command](args)


main()
