#!/usr/bin/env python3
"""Replaces the large gradients of cases by sums with drawn signs, `sums.NAME`, which `Case::compare` takes for them.

    pip install numpy safetensors
    tests/parity/shorten.py FOLDER ..
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

COUNT = 32
LARGE = 64


def signed_sums(values):
    """Those of the crate x-transformers-parity."""
    values = values.astype(np.float64).ravel()
    i = np.arange(1, values.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    rows = []
    for j in range(1, COUNT + 1):
        x = i + np.uint64(j * 0xD1B54A32D192ED03 % 2**64)
        x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        negative = (x ^ (x >> np.uint64(32))) >> np.uint64(63) == 1
        rows.append(np.where(negative, -values, values).sum())
    return np.array(rows, np.float32)


for folder in sys.argv[1:]:
    path = Path(folder) / "expected.safetensors"
    shorter = {}
    for name, values in load_file(path).items():
        is_large = name.startswith("grad.") and values.size > LARGE
        shorter[f"sums.{name}" if is_large else name] = signed_sums(values) if is_large else np.ascontiguousarray(values)
    save_file(shorter, path)
