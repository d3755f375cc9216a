#!/usr/bin/env python3
"""Train x-transformers' (PyTorch) decoder on the bytes of a text file.

This is the reference that `xt train` is compared with: both follow the recipe
below, so that their loss curves can be laid side by side.

Model      AutoregressiveWrapper(TransformerWrapper(256 tokens, Decoder)),
           learned absolute positions, float32, no dropout.
Data       the first floor(0.9 * N) bytes train, the rest validate.
Step       `batch_size` windows of `seq_len + 1` bytes at uniformly random
           offsets of the train split.
Optimiser  AdamW, betas (0.9, 0.99), eps 1e-8, weight decay 0.01 on every
           parameter; gradients clipped to a global norm (1.0).
Rate       linear warm-up, then a cosine from `lr` down to `lr / 10`.
Validation mean loss (nats per byte) over 64 windows of `seq_len + 1` bytes
           spaced evenly over the validation split; before training, every
           `every` steps and at the end.

Writes OUT/metrics.csv with the columns step,split,loss,bits_per_byte. A train
row holds the mini-batch loss that step computed before its update (steps count
from 0); a validation row holds the loss after `step` updates.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

VALIDATION_WINDOWS = 64
NUM_TOKENS = 256


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--text", type=Path, required=True, help="text to train on, read as bytes")
    p.add_argument("--out", type=Path, required=True, help="folder for metrics.csv")
    p.add_argument("--dim", type=int, default=256, help="model width (default %(default)s)")
    p.add_argument("--depth", type=int, default=4, help="number of layers (default %(default)s)")
    p.add_argument("--heads", type=int, default=4, help="attention heads (default %(default)s)")
    p.add_argument("--seq-len", type=int, default=256, help="context, in bytes (default %(default)s)")
    p.add_argument("--batch-size", type=int, default=8, help="windows per step (default %(default)s)")
    p.add_argument("--steps", type=int, default=300, help="updates (default %(default)s)")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default %(default)s)")
    p.add_argument("--warmup", type=int, default=30, help="warm-up steps (default %(default)s)")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default %(default)s)")
    p.add_argument("--every", type=int, default=50, help="steps between validations (default %(default)s)")
    p.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    return p.parse_args()


def build_model(dim, depth, heads, seq_len, **extra):
    """The compared model; `extra` goes to Decoder unchanged."""
    return AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=NUM_TOKENS,
            max_seq_len=seq_len,
            attn_layers=Decoder(dim=dim, depth=depth, heads=heads, **extra),
        )
    )


def learning_rate(step, lr, warmup, steps):
    """Linear warm-up over `warmup` steps, then a cosine from `lr` to `0.1 * lr`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def windows(data, starts, length):
    """Stack data[s : s + length] for every start, as int64 tokens."""
    return torch.from_numpy(np.stack([data[s : s + length] for s in starts]).astype(np.int64))


def validation_windows(data, length):
    """`VALIDATION_WINDOWS` windows, from the first possible start to the last."""
    room = len(data) - length
    starts = [w * room // (VALIDATION_WINDOWS - 1) for w in range(VALIDATION_WINDOWS)]
    return windows(data, starts, length)


@torch.no_grad()
def validate(model, tokens, batch_size):
    """Mean loss in nats over every predicted byte of `tokens`, dropout off."""
    model.eval()
    total = 0.0
    for batch in tokens.split(batch_size):
        total += model(batch).item() * len(batch)
    model.train()
    return total / len(tokens)


def main():
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    data = np.frombuffer(args.text.read_bytes(), dtype=np.uint8)
    cut = len(data) * 9 // 10
    train, held_out = data[:cut], data[cut:]
    length = args.seq_len + 1
    if len(held_out) < length:
        raise SystemExit(f"{args.text}: too short for windows of {length} bytes")
    validation = validation_windows(held_out, length)

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = build_model(args.dim, args.depth, args.heads, args.seq_len)
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    optimiser = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01
    )
    print(f"{count} parameters, {len(train)} train bytes, {len(held_out)} validation bytes", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "split", "loss", "bits_per_byte"])

        def record(step, split, loss):
            table.writerow([step, split, f"{loss:.6f}", f"{loss / math.log(2):.6f}"])

        def record_validation(step):
            loss = validate(model, validation, args.batch_size)
            record(step, "validation", loss)
            file.flush()
            print(f"step {step}: validation loss {loss:.4f}, {loss / math.log(2):.4f} bits/byte", flush=True)
            return loss

        model.train()
        final = record_validation(0)
        seconds = 0.0
        for step in range(args.steps):
            started = time.perf_counter()
            # The last start that fits is len(train) - length, hence the + 1.
            starts = rng.integers(0, len(train) - length + 1, size=args.batch_size)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, args.lr, args.warmup, args.steps)
            optimiser.zero_grad(set_to_none=True)
            loss = model(windows(train, starts, length))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            optimiser.step()
            record(step, "train", loss.item())
            seconds += time.perf_counter() - started

            done = step + 1
            if done % args.every == 0 or done == args.steps:
                final = record_validation(done)

    print(
        f"final: seed {args.seed}, {args.steps} steps, validation loss {final:.4f} nats, "
        f"{final / math.log(2):.4f} bits/byte, {seconds / max(args.steps, 1):.3f} s/step"
    )


if __name__ == "__main__":
    main()
