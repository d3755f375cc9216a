#!/usr/bin/env python3
"""MiniLM and SmolLM2 by this library, PyTorch (Hugging Face transformers) and onnxruntime, in turns on the CPU.

    pip install torch transformers onnx onnxscript onnxruntime
    cargo build --release && benches/peers/pretrained.py [--decode]

Weights are random, of the shapes of all-MiniLM-L6-v2 and SmolLM2-135M: speed does not depend on them. f32. Prints the
median seconds of each; `xt bench` measures this library.
"""

import argparse
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
XT = ROOT / "target/release/xt"


def timed(run, seconds=4.0, least=3):
    run()
    times = []
    start = time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return median(times)


def ours(config, mode, batch, length, *more):
    command = [XT, "bench", "--config", ROOT / f"benches/configs/{config}.json", "--mode", mode, "--batch", str(batch),
               "--seq-len", str(length), "--device", "cpu", "--json", *more]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def minilm(batch, length):
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(0, 30522, (batch, length))
    mask = torch.ones_like(tokens)
    result = {"PyTorch": timed(lambda: model(input_ids=tokens, attention_mask=mask))}
    try:
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
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        given = {"tokens": tokens.numpy(), "mask": mask.numpy()}
        result["onnxruntime"] = timed(lambda: session.run(None, given))
    except Exception as error:
        print(f"onnxruntime: not measured: {error}", file=sys.stderr)
    result["this library"] = ours("minilm", "forward", batch, length)
    return result


@torch.inference_mode()
def smollm(prompt, new):
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 49152, (1, prompt))
    run = lambda: model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return {
        "PyTorch": timed(run, seconds=1.0, least=2),
        "this library": ours("smollm2", "generate", 1, prompt, "--new-tokens", str(new)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decode", action="store_true", help="SmolLM2 in place of MiniLM")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.decode:
        print("SmolLM2, 32 tokens from 32:", json.dumps(smollm(32, 32), indent=1))
        return
    for batch, length in [(1, 12), (32, 128)]:
        print(f"MiniLM, {batch} x {length}:", json.dumps(minilm(batch, length), indent=1))


main()
