#!/usr/bin/env python3
"""Writes the small files that tests/readers.rs reads, with PyTorch, safetensors and gguf (pip install torch gguf).

Each holds the tensors of `tensors()`, or as many as its format has; `quantised.safetensors` has what gguf's own code
makes of the blocks in `quantised.gguf`.
"""

import json
from collections import OrderedDict
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent


def tensors():
    ramp = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 4 - 3
    named = OrderedDict()
    named["layers.0.weight"] = ramp
    named["layers.0.transposed"] = ramp.t()
    named["layers.0.rows"] = ramp[1:3]
    named["layers.1.weight"] = torch.nn.Parameter(ramp.double() * 3)
    named["half"] = ramp[0].half()
    named["bfloat"] = ramp[0].bfloat16()
    named["long"] = torch.tensor([-(2**62), 0, 7])
    named["int"] = torch.tensor([-5, 2**31 - 1], dtype=torch.int32)
    named["short"] = torch.tensor([-5, 2**15 - 1], dtype=torch.int16)
    named["char"] = torch.tensor([-128, 127], dtype=torch.int8)
    named["byte"] = torch.tensor([0, 255], dtype=torch.uint8)
    named["bool"] = torch.tensor([True, False, True])
    named["scalar"] = torch.tensor(2.5)
    named["empty"] = torch.zeros(0, 3)
    return named


def pytorch():
    named = tensors()
    named._metadata = OrderedDict([("", {"version": 1})])
    torch.save(named, FOLDER / "archive.pt")
    torch.save(named, FOLDER / "legacy.pt", _use_new_zipfile_serialization=False)
    nested = {"epoch": 3, "lr": 1e-3, "state_dict": {"weight": named["layers.0.weight"]}, "notes": [None, True, "x"]}
    torch.save(nested, FOLDER / "nested.pt")


def safetensors():
    named = {name: tensor.detach().contiguous().clone() for name, tensor in tensors().items()}
    first = {name: named.pop(name) for name in ["layers.0.weight", "bool"]}
    save_file(first, FOLDER / "part-1.safetensors", metadata={"format": "pt"})
    save_file(named, FOLDER / "part-2.safetensors", metadata={"format": "pt"})
    places = {name: "part-1.safetensors" for name in first} | {name: "part-2.safetensors" for name in named}
    (FOLDER / "parts.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=1) + "\n"
    )


def quantised():
    writer = gguf.GGUFWriter(FOLDER / "quantised.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_int64("negative", -7)
    writer.add_array("tokens", ["a", "b", "Ġc"])
    writer.add_array("scores", [0.5, -1.5])
    values = np.sin(np.arange(2 * 64, dtype=np.float32)).reshape(2, 64) * 3
    expected = {}
    kinds = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
    for kind in kinds:
        quantisation = gguf.GGMLQuantizationType[kind]
        blocks = gguf.quants.quantize(values, quantisation)
        writer.add_tensor(kind, blocks, raw_dtype=quantisation)
        expected[kind] = torch.from_numpy(gguf.quants.dequantize(blocks, quantisation).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, FOLDER / "quantised.safetensors")


pytorch()
safetensors()
quantised()
