#!/usr/bin/env python3
"""Writes steps.safetensors: ten steps of each optimizer on drawn gradients, by PyTorch, and Lion by lion-pytorch.

    pip install torch safetensors lion-pytorch
    tests/train/optimizers/make.py

Start and gradients are rounded to bf16, so that every float type holds them. `CASE.f32.NAME` and `CASE.f64.NAME` have the
weights after each step, [steps, elements]. Muon's orthogonalization runs in the type of the weights, except in the case
`muon_bf16`, which is PyTorch's to the letter.
"""

import inspect
import pathlib

import torch
from lion_pytorch import Lion
from safetensors.torch import save_file
from torch.optim import SGD, Adafactor, AdamW, Muon, _muon

STEPS = 10
SHAPES = {
    "block.bias": [4],
    "block.kernel": [2, 3, 2],
    "block.tall.weight": [5, 3],
    "block.wide.weight": [3, 4],
    "emb.weight": [6, 3],
    "gain": [],
}
OWN = _muon._zeropower_via_newtonschulz
EXACT = {}
exec(inspect.getsource(OWN).replace("torch.bfloat16", "grad.dtype"), vars(_muon), EXACT)


def rounded(shape):
    return torch.randn(shape).bfloat16().float()


def matrices(params):
    return [name for name in params if len(SHAPES[name]) == 2 and name != "emb.weight"]


def muon(params, **options):
    hidden = matrices(params)
    rest = [p for name, p in params.items() if name not in hidden]
    return [Muon([params[name] for name in hidden], **options), AdamW(rest, weight_decay=0.1)]


def grouped(params):
    vectors = [p for name, p in params.items() if len(SHAPES[name]) < 2]
    others = [p for name, p in params.items() if len(SHAPES[name]) >= 2 and name != "emb.weight"]
    return [
        AdamW([
            {"params": [params["emb.weight"]], "factor": 0.1, "weight_decay": 0.5, "betas": (0.8, 0.95)},
            {"params": vectors, "weight_decay": 0.0},
            {"params": others},
        ], weight_decay=0.1)
    ]


# Learning rate of the first step, and the optimizers.
CASES = {
    "adamw": (0.02, lambda p: [AdamW(p.values(), weight_decay=0.1)]),
    "adamw_groups": (0.02, grouped),
    "sgd": (0.05, lambda p: [SGD(p.values())]),
    "sgd_momentum": (0.05, lambda p: [SGD(p.values(), momentum=0.9, dampening=0.25, weight_decay=0.1)]),
    "sgd_nesterov": (0.05, lambda p: [SGD(p.values(), momentum=0.8, nesterov=True, weight_decay=0.1)]),
    "lion": (0.01, lambda p: [Lion(p.values(), betas=(0.9, 0.99), weight_decay=0.5)]),
    "adafactor": (0.05, lambda p: [Adafactor(p.values(), lr=0.05)]),
    "adafactor_options": (
        0.2,
        lambda p: [Adafactor(p.values(), beta2_decay=-0.6, eps=(1e-4, 0.5), d=2.0, weight_decay=0.1)],
    ),
    "muon": (0.02, muon),
    "muon_rms": (0.02, lambda p: muon(p, adjust_lr_fn="match_rms_adamw", momentum=0.9, nesterov=False)),
    "muon_spectral": (0.02, lambda p: muon(p, adjust_lr_fn="spectral_unclamped", ns_steps=3, weight_decay=0.0)),
    "muon_bf16": (0.02, muon),
}


def main():
    torch.manual_seed(20)
    start = {name: rounded(shape) for name, shape in SHAPES.items()}
    grads = [{name: 2.0 ** (step % 3 - 2) * rounded(shape) for name, shape in SHAPES.items()} for step in range(STEPS)]
    tensors = {f"start.{name}": value.bfloat16() for name, value in start.items()}
    for name in SHAPES:
        tensors[f"grads.{name}"] = torch.stack([grad[name] for grad in grads]).bfloat16()
    for case, (lr, build) in CASES.items():
        _muon._zeropower_via_newtonschulz = OWN if case == "muon_bf16" else EXACT[OWN.__name__]
        for clip in [None, 0.7] if case in ("adamw", "sgd_momentum", "muon") else [None]:
            for dtype in [torch.float32, torch.float64]:
                params = {name: torch.nn.Parameter(value.to(dtype, copy=True)) for name, value in start.items()}
                optimizers, steps = build(params), {name: [] for name in SHAPES}
                for step in range(STEPS):
                    for name, param in params.items():
                        param.grad = grads[step][name].to(dtype, copy=True)
                    if clip is not None:
                        torch.nn.utils.clip_grad_norm_(params.values(), clip)
                    for optimizer in optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = lr * (1 - 0.05 * step) * group.get("factor", 1.0)
                        optimizer.step()
                    for name, param in params.items():
                        steps[name].append(param.detach().clone().flatten())
                suffix = "_clip" if clip is not None else ""
                kind = "f32" if dtype == torch.float32 else "f64"
                tensors |= {f"{case}{suffix}.{kind}.{name}": torch.stack(values) for name, values in steps.items()}
    save_file(tensors, pathlib.Path(__file__).with_name("steps.safetensors"))


if __name__ == "__main__":
    main()
