#!/usr/bin/env python3
"""PyTorch's times for the lines of `cargo bench --bench cuda`.

Prints the same table, tab-separated, with the same names and shapes: kernel,
dtype, shape, microseconds. Times are medians of CUDA events with the
second-level cache flushed, the device being busy while a round is enqueued, as
there. Ops are PyTorch's eager kernels; attention is
scaled_dot_product_attention; the training step is x-transformers 0.22.0's
decoder, with a third line for torch.compile.

    python3 -m venv venv
    venv/bin/pip install torch x-transformers==0.22.0
    venv/bin/python benches/peers/torch_cuda.py
"""

import torch
import torch.nn.functional as F

WARM, COUNTED = 5, 25
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FLUSH = None


def time(prepare, timed):
    """Median microseconds of `timed(prepare())`."""
    times = []
    for round in range(WARM + COUNTED):
        prepared = prepare()
        FLUSH.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        timed(prepared)
        end.record()
        end.synchronize()
        if round >= WARM:
            times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def line(name, dtype, shape, prepare, timed):
    print(f"{name}\t{dtype}\t{list(shape)}\t{time(prepare, timed):.1f}", flush=True)


def op(name, dtype, inputs, f):
    """Forward pass, and backward pass alone."""
    shape = inputs[0].shape
    with torch.no_grad():
        line(f"{name} forward", dtype, shape, lambda: None, lambda _: f(*inputs))
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    cotangent = torch.rand_like(f(*leaves))

    def prepare():
        for leaf in leaves:
            leaf.grad = None
        return f(*leaves)

    line(f"{name} backward", dtype, shape, prepare, lambda y: y.backward(cotangent))


def rotary(x, angles):
    half = x.shape[-1] // 2
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def main():
    global FLUSH
    if not torch.cuda.is_available():
        print("skipped: PyTorch finds no GPU")
        return
    device = "cuda"
    FLUSH = torch.empty(64 << 20, device=device)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    rand = lambda shape, dtype: torch.rand(shape, device=device, dtype=DTYPES[dtype]) - 0.5
    x = rand((64 << 20,), "f32")
    line("copy", "f32", x.shape, lambda: None, lambda _: x.clone())
    for dtype in DTYPES:
        a, b = rand((4096, 4096), dtype), rand((4096, 4096), dtype)
        line("matmul", dtype, (4096, 4096, 4096), lambda: None, lambda _: a @ b)

    rows, dim, vocabulary = 8192, 1024, 32000
    for dtype in ("f32", "bf16"):
        x, weight, bias = rand((rows, dim), dtype), rand((dim,), dtype), rand((dim,), dtype)
        op("softmax", dtype, [x], lambda x: x.softmax(-1))
        op("layer_norm", dtype, [x, weight, bias], lambda x, w, b: F.layer_norm(x, (dim,), w, b))
        op("add_layer_norm", dtype, [x, x.clone(), weight, bias], lambda x, r, w, b: F.layer_norm(x + r, (dim,), w, b))
        op("rms_norm", dtype, [x, weight], lambda x, w: F.rms_norm(x, (dim,), w))
        op("gelu", dtype, [x], F.gelu)
        op("bias gelu", dtype, [x, bias], lambda x, b: F.gelu(x + b))
        op("glu gelu", dtype, [x], lambda x: (lambda a, b: a * F.gelu(b))(*x.chunk(2, -1)))
        op("bias glu gelu", dtype, [x, bias], lambda x, b: (lambda a, b: a * F.gelu(b))(*(x + b).chunk(2, -1)))
        op("transpose", dtype, [x], lambda x: x.t().contiguous())
        inv_freq = 10000 ** (-torch.arange(32, device=device) / 32)
        angles = torch.outer(torch.arange(rows // 8, device=device), inv_freq)
        heads = rand((8, dim // 64, rows // 8, 64), dtype)
        op("rotary", dtype, [heads], lambda x: rotary(x, angles))
        logits = rand((rows // 4, vocabulary), dtype)
        targets = torch.arange(rows // 4, device=device) * 7 % vocabulary
        op("cross_entropy", dtype, [logits], lambda x: F.cross_entropy(x, targets))

    params = [torch.randn(1 << 20, device=device, requires_grad=True) for _ in range(24)]
    for p in params:
        p.grad = torch.ones_like(p)
    adamw = torch.optim.AdamW(params, fused=True)

    def step(_):
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adamw.step()

    line("adamw", "f32", (24, 1 << 20), lambda: None, step)

    for shape in ((4, 16, 2048, 64), (4, 16, 2048, 128), (1, 16, 8192, 64)):
        for dtype in ("bf16", "f16", "f32"):
            if dtype == "f32" and shape[2] > 4096:
                continue
            qkv = [rand(shape, dtype) for _ in range(3)]
            op("attention", dtype, qkv, F.scaled_dot_product_attention)
            op("attention causal", dtype, qkv, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))

    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    for dtype in ("f32", "bf16"):
        for compiled in (False, True):
            net = TransformerWrapper(
                num_tokens=20000, max_seq_len=1024, attn_layers=Decoder(dim=512, depth=6, heads=8)
            )
            model = AutoregressiveWrapper(net).to(device)
            loss_of = torch.compile(model) if compiled else model
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            tokens = torch.arange(1025, device=device)[None] * 7919 % 20000

            def step(_):
                optimizer.zero_grad()
                with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
                    loss = loss_of(tokens)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

            name = "training step compiled" if compiled else "training step"
            line(name, dtype, (1, 1025), lambda: None, step)


if __name__ == "__main__":
    main()
