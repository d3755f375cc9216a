#!/usr/bin/env python3
"""Writes files of `torch.save` as trainers leave them: weights with other objects beside them, for tests/readers.rs.

    pip install torch numpy safetensors

    beside-1.pt, -2, -4          weights beside objects of many kinds, in these protocols of pickle
    beside-legacy.pt             the same in the format before PyTorch 1.6
    trainer.ckpt                 a state dict as Lightning has it
    nano.pt                      a state dict as nanoGPT has it, compiled and below `model`
    unread.pt                    weights that no tensor here can be, under the names of what they are
    run.pt, run-nested.pt        the weights of a parity case, plain and as nanoGPT has them
    dtypes.pt, dtypes.safetensors, dtypes-expected.safetensors
                                 types without a tensor type of their own, and their values as f32 and i64
"""

import argparse
import collections
import datetime
import enum
import io
import pathlib
import random
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent


def weights():
    ramp = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 4 - 1
    return {"w": ramp, "b": torch.nn.Parameter(ramp[0].clone()), "t": ramp.t()}


def module(name, **members):
    """A module that is gone when the file is read."""
    made = types.ModuleType(name)
    for key, value in members.items():
        value.__module__ = name
        value.__qualname__ = key
        setattr(made, key, value)
    sys.modules[name] = made
    return made


class AttributeDict(dict):
    pass


class Color(enum.Enum):
    RED = 1


class Args:
    def __init__(self, **options):
        self.__dict__.update(options)


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1


class ListOf(list):
    pass


class Made:
    """An object with arguments of its constructor, in a tuple and by name."""

    def __new__(cls, *args, **named):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (1,), {"b": 2}


module("lightning_like", AttributeDict=AttributeDict, Args=Args, Color=Color, Slotted=Slotted, ListOf=ListOf, Made=Made)


def objects():
    found = {
        "namespace": argparse.Namespace(lr=0.1, names=["a"], path=pathlib.PurePosixPath("/data/x")),
        "defaultdict": collections.defaultdict(list, {"a": [1, 2]}),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], maxlen=5),
        "set": {1, 2}, "frozenset": frozenset({3}), "bytes": b"\xff\0", "bytearray": bytearray(b"ab"),
        "complex": 1 + 2j, "slice": slice(1, None, 2), "range": range(3), "ellipsis": ..., "big": 2**100, "negative": -(2**70),
        "device": torch.device("cuda:1"), "dtype": torch.bfloat16, "layout": torch.strided, "size": torch.Size([1, 2]),
        "generator": torch.Generator().get_state(), "python_random": random.Random(0).getstate(),
        "numpy_random": np.random.RandomState(0).get_state(),
        "scalar": np.float64(1.5), "int": np.int32(3), "array": np.arange(6).reshape(2, 3), "text": np.array(["a", "bc"]),
        "npdtype": np.dtype("float32"), "datetime64": np.datetime64("2024-01-01"),
        "date": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc), "delta": datetime.timedelta(3),
        "color": Color.RED, "attributes": AttributeDict(a=1, b={"c": torch.ones(1)}), "args": Args(x=1, y=[Args(z=2)]),
        "slots": Slotted(), "list_of": ListOf([1, Args()]), "class": Args, "function": print, "made": Made(),
        "ordered": collections.OrderedDict(a=1), "nested": [[({"a": (None, True, False, 1.5, "é\n'\\")},)]],
        "expanded": torch.ones(1).expand(4000), "half": torch.ones(2, dtype=torch.half),
    }
    return found


def unread():
    sparse = torch.eye(3).to_sparse()
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    tagged = torch.ones(3)
    tagged.tag = "an attribute"
    return {
        "complex64": torch.ones(2, dtype=torch.complex64), "complex128": torch.ones(2, dtype=torch.complex128),
        "sparse": sparse, "quantised": quantised, "csr": torch.eye(3).to_sparse_csr(), "rank7": torch.ones(1, 1, 1, 1, 1, 1, 2),
        "meta": torch.empty(3, device="meta"), "array": np.ones(3, dtype=np.float32), "expanded": torch.ones(1).expand(1 << 20),
        "tagged": tagged, "plain": torch.ones(2),
    }


FLOATS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


def dtypes():
    every = torch.arange(256, dtype=torch.uint8)
    tensors = {name: every.clone().view(getattr(torch, name)) for name in FLOATS}
    tensors["uint16"] = torch.tensor([0, 1, 65535], dtype=torch.uint16)
    tensors["uint32"] = torch.tensor([0, 1, 2**32 - 1], dtype=torch.uint32)
    tensors["uint64"] = torch.tensor([0, 1, 2**63 - 1], dtype=torch.uint64)
    tensors["part"] = every.view(torch.float8_e4m3fn)[16:48].reshape(4, 8).t()
    return tensors


def main():
    for protocol in [1, 2, 4]:
        # Protocol 1 has no way to write some objects.
        beside = {name: value for name, value in objects().items() if protocol > 1 or name != "slots"}
        torch.save(weights() | beside, FOLDER / f"beside-{protocol}.pt", pickle_protocol=protocol)
    torch.save(weights() | objects(), FOLDER / "beside-legacy.pt", _use_new_zipfile_serialization=False)
    state = {f"model.{name}": tensor for name, tensor in weights().items()}
    torch.save({
        "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.4.0", "state_dict": collections.OrderedDict(state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}}, "lr_schedulers": [{"last_epoch": 1}],
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5), "dirpath": pathlib.PurePosixPath("/out")}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3, 4)}}, "param_groups": [{"lr": 1e-3}]}],
        "hparams_name": "kwargs", "hyper_parameters": AttributeDict(lr=1e-3, args=argparse.Namespace(a=1)),
    }, FOLDER / "trainer.ckpt")
    state = {f"_orig_mod.{name}": tensor for name, tensor in weights().items()}
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({
        "model": state, "optimizer": optimizer.state_dict(), "model_args": {"n_layer": 1, "bias": False}, "iter_num": 5,
        "best_val_loss": torch.tensor(2.5), "config": {"device": "cuda", "dtype": "bfloat16"},
    }, FOLDER / "nano.pt")
    case = load_file(FOLDER.parent / "parity" / "length_none_longer" / "weights.safetensors")
    torch.save(case, FOLDER / "run.pt")
    nested = {f"_orig_mod.module.{name}": tensor for name, tensor in case.items()}
    torch.save({"model": nested, "optimizer": optimizer.state_dict(), "iter_num": 5}, FOLDER / "run-nested.pt")
    torch.save(unread(), FOLDER / "unread.pt")
    torch.save(dtypes(), FOLDER / "dtypes.pt")
    named = {name: tensor.contiguous() for name, tensor in dtypes().items()}
    save_file(named, FOLDER / "dtypes.safetensors")
    wide = {name: tensor.to(torch.int64 if name.startswith("uint") else torch.float32) for name, tensor in named.items()}
    save_file(wide, FOLDER / "dtypes-expected.safetensors")


if __name__ == "__main__":
    main()
