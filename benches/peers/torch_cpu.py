#!/usr/bin/env python3
"""PyTorch's side of cpu.py: one step, or one round of an op, for each line of standard input.

    torch_cpu.py model CONFIG.json forward|train BATCH LENGTH [--bf16] [--threads N]
    torch_cpu.py op NAME [--compile] [--threads N]

Prints a line of JSON with the seconds of each, and at the end of the input one with the peak of resident memory. Models are
x-transformers', whichever version is installed; versions that have flash attention use it.
"""

import argparse
import inspect
import json
import sys
import time

import torch
import torch.nn.functional as F

ROUND = 0.06


def tokens(shape, limit):
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(0))


def flash(wanted):
    """Keywords for flash attention, where this version of x-transformers knows it."""
    from x_transformers.x_transformers import Attention

    known = "flash" in inspect.signature(Attention.__init__).parameters
    return {f"{prefix}attn_flash": True for prefix in wanted} if known else {}


def layers(options):
    import x_transformers

    options = dict(options)
    kind = getattr(x_transformers, options.pop("kind"))
    return kind(**options, **flash([""]))


def wrapper(config):
    from x_transformers import TransformerWrapper

    names = ["num_tokens", "max_seq_len"]
    return TransformerWrapper(attn_layers=layers(config["attn_layers"]), **{name: config[name] for name in names})


def model_step(args):
    """A closure that does a step."""
    import x_transformers

    config = json.load(open(args.config))
    kind = config.pop("model")
    batch, length = args.batch, args.length
    if kind == "AutoregressiveWrapper":
        net = wrapper(config["net"])
        model = x_transformers.AutoregressiveWrapper(net)
        x = tokens((batch, length + 1), config["net"]["num_tokens"])
        try:
            model(x)
            y = x
        except AssertionError:
            # Newer versions feed the last token too.
            y = x[:, :-1]
        loss = lambda: model(y)
        forward = lambda: net(x[:, :-1])
    elif kind == "TransformerWrapper":
        model = wrapper(config)
        x, y = (tokens((batch, length), config["num_tokens"]) for _ in range(2))
        mask = torch.ones(batch, length).bool()
        forward = lambda: model(x, mask=mask)
        loss = lambda: F.cross_entropy(forward().flatten(0, 1), y.flatten())
    else:
        model = x_transformers.XTransformer(**config, **flash(["enc_", "dec_"]))
        src, tgt = tokens((batch, length), config["enc_num_tokens"]), tokens((batch, length + 1), config["dec_num_tokens"])
        known = inspect.signature(model.forward).parameters
        mask = {"mask" if "mask" in known else "src_mask": torch.ones(batch, length).bool()}
        try:
            model(src, tgt, **mask)
        except AssertionError:
            tgt = tgt[:, :-1]
        loss = lambda: model(src, tgt, **mask)
        forward = loss
    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16)
    if args.mode == "forward":
        model.eval()

        def step():
            with torch.no_grad(), autocast():
                forward()

        return step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        with autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def timed(f, *inputs):
    clock = time.perf_counter()
    result = f(*inputs)
    elapsed = time.perf_counter() - clock
    del result
    return elapsed


def differentiable(f, inputs, part, compiled):
    """A repetition of the forward pass, the backward pass, or both, that tells its own time."""
    if compiled:
        f = torch.compile(f)
    if part == "forward":

        def run():
            with torch.no_grad():
                return timed(f, *inputs)

        return run
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    cotangent = torch.ones_like(f(*leaves))
    floats = [x for x in leaves if x.is_floating_point()]

    def run():
        clock = time.perf_counter()
        output = f(*leaves)
        if part == "backward":
            clock = time.perf_counter()
        grads = torch.autograd.grad(output, floats, cotangent)
        elapsed = time.perf_counter() - clock
        del grads, output
        return elapsed

    return run


def adamw(compiled, clip):
    shapes = [(20_000, 512)] * 2 + [(512, 512)] * 24 + [(2048, 512)] * 12 + [(1024, 512)]
    params = [torch.nn.Parameter(0.02 * normal(*shape)) for shape in shapes]
    for param in params:
        param.grad = normal(*param.shape)
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=not compiled)

    def step():
        if clip:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    step = torch.compile(step) if compiled else step
    return lambda: timed(step)


def op(name, compiled):
    parts = name.split("-")
    kind, part = parts[0], parts[-1]
    dtype = torch.bfloat16 if "bf16" in parts else torch.float32
    number = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
    run = lambda f, *inputs: differentiable(f, inputs, part, compiled)
    if kind == "softmax":
        return run(lambda x: F.softmax(x, -1), normal(number, 1024))
    if kind == "layer_norm":
        return run(lambda x, w, b: F.layer_norm(x, (512,), w, b), normal(number, 512), normal(512), normal(512))
    if kind == "gelu":
        return run(F.gelu, normal(number, 2048))
    if kind == "dropout":
        return run(lambda x: F.dropout(x, 0.1, True), normal(number, 2048))
    if kind == "cross_entropy":
        targets = tokens((number,), 20_000)
        return run(lambda x: F.cross_entropy(x, targets), normal(number, 20_000))
    if kind == "embedding":
        which = tokens((number,), 20_000)
        return run(lambda table: F.embedding(which, table), normal(20_000, 512))
    if kind in ("adamw", "adamw_clip"):
        return adamw(compiled, kind == "adamw_clip")
    if kind == "attention":
        operands = [normal(1, number, 8, 64, dtype=dtype) for _ in range(3)]

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run(attend, *operands)
    m, k, n = (int(size) for size in parts[2].split("x"))
    batch = (8,) if kind == "batched" else ()
    operand = lambda rows, columns, flipped: (
        normal(*batch, columns, rows, dtype=dtype).transpose(-1, -2)
        if flipped
        else normal(*batch, rows, columns, dtype=dtype)
    )
    a, b = operand(m, k, parts[1][0] == "t"), operand(k, n, parts[1][1] == "t")
    product = torch.compile(torch.matmul) if compiled else torch.matmul

    def repetition():
        with torch.no_grad():
            return timed(product, a, b)

    return repetition


def op_round(repetition):
    clock, times = time.perf_counter(), []
    while not times or time.perf_counter() - clock < ROUND:
        times.append(repetition())
    return sorted(times)[len(times) // 2]


def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model")
    model.add_argument("config")
    model.add_argument("mode", choices=["forward", "train"])
    model.add_argument("batch", type=int)
    model.add_argument("length", type=int)
    model.add_argument("--bf16", action="store_true")
    single = commands.add_parser("op")
    single.add_argument("name")
    single.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "model":
        step = model_step(args)
        measure = lambda: timed(step)
    else:
        repetition = op(args.name, args.compile)
        measure = lambda: op_round(repetition)
    for _ in sys.stdin:
        print(json.dumps({"seconds": measure()}), flush=True)
    print(json.dumps({"peak_resident_bytes": peak()}), flush=True)


if __name__ == "__main__":
    main()
