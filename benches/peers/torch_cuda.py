#!/usr/bin/env python3
"""PyTorch's times for the lines of `cargo bench --bench cuda`.

Prints the same table, tab-separated, with the same names and shapes: kernel,
dtype, shape, microseconds. Times are medians of CUDA events with the
second-level cache flushed, the device being busy while a round is enqueued, as
there; those of decoding are by the clock of the host, as there.

Ops are PyTorch's eager kernels; attention is scaled_dot_product_attention. The
models of benches/configs are written in plain PyTorch below, eager and by
torch.compile. Lines of x-transformers 0.22.0 are printed if it is installed;
torch alone is enough for all others. A line that fails is a comment that says
why, and the next one follows.

    torch_cuda.py                       # everything; --section kernels or models a half
    torch_cuda.py --tiny --device cpu   # small sizes, once: does the program work?
"""

import argparse
import json
import time as clock
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Names, files of benches/configs, dtypes and sequences of a training batch.
MODELS = (("D", "decoder.json", ("f32", "bf16"), 1), ("GPT-2", "gpt2.json", ("bf16",), 64))
# Rounds that are not counted, and rounds that are.
OPS, STEPS = (5, 25), (3, 9)

ARGS = None
FLUSH = None


def timed(rounds, prepare, run):
    """Median microseconds of `run(prepare())`."""
    warm, counted = (0, 1) if ARGS.tiny else rounds
    times = []
    for round in range(warm + counted):
        prepared = prepare()
        if ARGS.device == "cpu":
            start = clock.perf_counter()
            run(prepared)
            times.append((clock.perf_counter() - start) * 1e6)
            continue
        # Read too, so that the cache need not write it while the device is timed.
        FLUSH.zero_()
        FLUSH.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(prepared)
        end.record()
        end.synchronize()
        if round >= warm:
            times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def line(name, dtype, shape, measure):
    """Prints a line of what `measure` returns, or why there is none."""
    try:
        print(f"{name}\t{dtype}\t{list(shape)}\t{measure():.1f}", flush=True)
    except Exception as error:  # Whatever it is, the lines after it count.
        print(f"# {name} {dtype} {list(shape)}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)


def op(name, dtype, inputs, f):
    """Forward pass, and backward pass alone."""
    shape = inputs[0].shape

    def forward():
        with torch.no_grad():
            return timed(OPS, lambda: None, lambda _: f(*inputs))

    def backward():
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
        cotangent = torch.rand_like(f(*leaves))

        def prepare():
            for leaf in leaves:
                leaf.grad = None
            return f(*leaves)

        return timed(OPS, prepare, lambda y: y.backward(cotangent))

    line(f"{name} forward", dtype, shape, forward)
    line(f"{name} backward", dtype, shape, backward)


def rand(shape, dtype):
    return torch.rand(shape, device=ARGS.device, dtype=DTYPES[dtype]) - 0.5


def rotary(x, angles):
    half = x.shape[-1] // 2
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def glu(x):
    a, b = x.chunk(2, -1)
    return a * F.gelu(b)


def peaks():
    n = 1 << 10 if ARGS.tiny else 64 << 20
    x = rand((n,), "f32")
    line("copy", "f32", x.shape, lambda: timed(OPS, lambda: None, lambda _: x.clone()))
    n = 32 if ARGS.tiny else 4096
    for dtype in DTYPES:
        a, b = rand((n, n), dtype), rand((n, n), dtype)
        line("matmul", dtype, (n, n, n), lambda: timed(OPS, lambda: None, lambda _: a @ b))


def attention():
    shapes = ((1, 2, 16, 64),) if ARGS.tiny else ((4, 16, 2048, 64), (4, 16, 2048, 128), (1, 16, 8192, 64))
    sdpa = F.scaled_dot_product_attention
    for shape in shapes:
        for dtype in ("bf16", "f16", "f32"):
            if dtype == "f32" and shape[2] > 4096:
                continue
            qkv = [rand(shape, dtype) for _ in range(3)]
            op("attention", dtype, qkv, sdpa)
            op("attention causal", dtype, qkv, lambda q, k, v: sdpa(q, k, v, is_causal=True))


def memory_bound():
    rows, dim, vocabulary = (8, 64, 100) if ARGS.tiny else (8192, 1024, 32000)
    for dtype in ("f32", "bf16"):
        x, weight, bias = rand((rows, dim), dtype), rand((dim,), dtype), rand((dim,), dtype)
        op("softmax", dtype, [x], lambda x: x.softmax(-1))
        op("layer_norm", dtype, [x, weight, bias], lambda x, w, b: F.layer_norm(x, (dim,), w, b))
        op("add_layer_norm", dtype, [x, x.clone(), weight, bias], lambda x, r, w, b: F.layer_norm(x + r, (dim,), w, b))
        op("rms_norm", dtype, [x, weight], lambda x, w: F.rms_norm(x, (dim,), w))
        op("gelu", dtype, [x], F.gelu)
        op("bias gelu", dtype, [x, bias], lambda x, b: F.gelu(x + b))
        op("glu gelu", dtype, [x], glu)
        op("bias glu gelu", dtype, [x, bias], lambda x, b: glu(x + b))
        op("transpose", dtype, [x], lambda x: x.t().contiguous())
        inv_freq = 10000 ** (-torch.arange(32, device=ARGS.device) / 32)
        angles = torch.outer(torch.arange(rows // 8, device=ARGS.device), inv_freq)
        heads = rand((8, dim // 64, rows // 8, 64), dtype)
        op("rotary", dtype, [heads], lambda x: rotary(x, angles))
        logits = rand((rows // 4, vocabulary), dtype)
        targets = torch.arange(rows // 4, device=ARGS.device) * 7 % vocabulary
        op("cross_entropy", dtype, [logits], lambda x: F.cross_entropy(x, targets))

    # The largest elementwise work of a training step of GPT-2 124M.
    rows, dim, dtype = (8, 64, "bf16") if ARGS.tiny else (65536, 768, "bf16")
    x, weight, bias = rand((rows, dim), dtype), rand((dim,), dtype), rand((dim,), dtype)
    op("layer_norm", dtype, [x, weight, bias], lambda x, w, b: F.layer_norm(x, (dim,), w, b))
    op("add_layer_norm", dtype, [x, x.clone(), weight, bias], lambda x, r, w, b: F.layer_norm(x + r, (dim,), w, b))
    x, bias = rand((rows, 4 * dim), dtype), rand((4 * dim,), dtype)
    op("gelu", dtype, [x], F.gelu)
    op("bias gelu", dtype, [x, bias], lambda x, b: F.gelu(x + b))
    del x, weight, bias

    count, size = (2, 64) if ARGS.tiny else (24, 1 << 20)
    params = [rand((size,), "f32").requires_grad_() for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    adamw = torch.optim.AdamW(params, fused=True)

    def step(_):
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adamw.step()

    line("adamw without clipping", "f32", (count, size), lambda: timed(OPS, lambda: None, lambda _: adamw.step()))
    line("adamw", "f32", (count, size), lambda: timed(OPS, lambda: None, step))


def decoding_attention():
    """Attention of one new token to a cache that is full."""
    heads, d = 12, 64
    for dtype in ("bf16", "f32"):
        for batch in (1, 16):
            for keys in (70,) if ARGS.tiny else (1024, 4096, 16384):
                q, k, v = rand((batch, heads, 1, d), dtype), *(rand((batch, heads, keys, d), dtype) for _ in range(2))

                @torch.no_grad()
                def measure():
                    return timed(OPS, lambda: None, lambda _: F.scaled_dot_product_attention(q, k, v))

                line("decode attention", dtype, k.shape, measure)


class Layer(nn.Module):
    """Attention and feedforward, each behind a LayerNorm, as the defaults of x-transformers have them."""

    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads, inner = heads, 64 * heads
        self.norm_attn, self.norm_ff = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.out = nn.Linear(inner, dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, cache=None, position=None, mask=None):
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm_attn(x)).view(batch, length, 3, self.heads, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v = (part.index_copy_(2, position, new) for part, new in zip(cache, (k, v)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, 64 * self.heads))
        return x + self.ff(self.norm_ff(x))


class Model(nn.Module):
    """A decoder of benches/configs."""

    def __init__(self, net):
        super().__init__()
        layers = net["attn_layers"]
        dim, self.length = layers["dim"], net["max_seq_len"]
        self.heads = layers["heads"]
        self.tokens = nn.Embedding(net["num_tokens"], dim)
        self.positions = nn.Embedding(self.length, dim)
        bias = layers.get("attn_qkv_bias", False)
        self.layers = nn.ModuleList(Layer(dim, self.heads, bias) for _ in range(layers["depth"]))
        self.norm = nn.LayerNorm(dim)
        self.logits = nn.Linear(dim, net["num_tokens"], bias=False)
        if net.get("tie_embedding"):
            self.logits.weight = self.tokens.weight

    def forward(self, tokens):
        """The loss of each next token."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.logits(self.norm(x)).flatten(0, 1), targets.flatten())

    def decode(self, token, position, caches):
        """The next token after one more, of the caches of all layers."""
        x = self.tokens(token) + self.positions(position)
        mask = (torch.arange(self.length, device=x.device) <= position)[None, None, None]
        for layer, cache in zip(self.layers, caches):
            x = layer(x, cache, position, mask)
        return self.logits(self.norm(x)).argmax(-1)


def config(file):
    net = json.loads((CONFIGS / file).read_text())["net"]
    if ARGS.tiny:
        net |= {"num_tokens": 50, "max_seq_len": 16}
        net["attn_layers"] |= {"dim": 32, "depth": 1, "heads": 2}
    return net


def training(model, loss_of, dtype, shape, vocabulary):
    """Microseconds of a step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.arange(shape[0] * shape[1], device=ARGS.device).reshape(shape) * 7919 % vocabulary

    def step(_):
        optimizer.zero_grad()
        with torch.autocast(ARGS.device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return timed(STEPS, lambda: None, step)


@torch.no_grad()
def decoding(model, step):
    """Microseconds of a token after half of the context, by the host's clock."""
    prompt, dtype = model.length // 2, model.logits.weight.dtype
    room = (1, model.heads, model.length, 64)
    caches = [tuple(torch.zeros(room, device=ARGS.device, dtype=dtype) for _ in range(2)) for _ in model.layers]
    wait = torch.cuda.synchronize if ARGS.device == "cuda" else lambda: None
    token = torch.zeros((1, 1), device=ARGS.device, dtype=torch.int64)
    steps = 2 if ARGS.tiny else 64

    def run(count):
        nonlocal token
        for number in range(count):
            # The output of a compiled step is overwritten by the next one.
            token = step(token, torch.tensor([prompt + number], device=ARGS.device), caches).clone()
        wait()

    run(1 if ARGS.tiny else 4)
    start = clock.perf_counter()
    run(steps)
    return (clock.perf_counter() - start) / steps * 1e6


def models():
    # Without a compiler for the host, or with little time left, compiled lines are what is lost.
    for compiled in (False, True):
        for name, file, dtypes, batch in MODELS:
            net = config(file)
            shape = (2 if ARGS.tiny else batch, net["max_seq_len"] + 1)
            suffix = " compiled" if compiled else ""
            for dtype in dtypes:

                def train():
                    model = Model(net).to(ARGS.device)
                    loss_of = torch.compile(model) if compiled else model
                    return training(model, loss_of, dtype, shape, net["num_tokens"])

                def decode():
                    model = Model(net).to(ARGS.device, DTYPES[dtype])
                    step = torch.compile(model.decode, mode="reduce-overhead") if compiled else model.decode
                    return decoding(model, step)

                line(f"{name} training step{suffix}", dtype, shape, train)
                line(f"{name} decode step{suffix}", dtype, (1, net["max_seq_len"] // 2), decode)


def x_transformers():
    try:
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
    except ImportError as error:
        print(f"# skipped: lines of x-transformers 0.22.0: {error}", flush=True)
        return
    net = config("decoder.json")
    layers = {key: net["attn_layers"][key] for key in ("dim", "depth", "heads")}
    shape = (1, net["max_seq_len"] + 1)
    for dtype in ("f32", "bf16"):

        def train():
            wrapper = TransformerWrapper(
                num_tokens=net["num_tokens"], max_seq_len=net["max_seq_len"], attn_layers=Decoder(**layers)
            )
            model = AutoregressiveWrapper(wrapper).to(ARGS.device)
            return training(model, model, dtype, shape, net["num_tokens"])

        line("D training step x-transformers", dtype, shape, train)


def main():
    global ARGS, FLUSH
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=("kernels", "models"), help="a half of the lines (default: both)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, each once")
    ARGS = parser.parse_args()
    if ARGS.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("PyTorch finds no GPU")
        FLUSH = torch.empty(64 if ARGS.tiny else 64 << 20, device="cuda")
        print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if ARGS.section != "models":
        peaks()
        attention()
        memory_bound()
        decoding_attention()
    if ARGS.section != "kernels":
        models()
        x_transformers()


if __name__ == "__main__":
    main()
