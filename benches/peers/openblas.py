#!/usr/bin/env python3
"""OpenBLAS, as NumPy's packages have it, on the products of cpu.py: one round for each line of standard input.

    openblas.py matmul-nn-1024x512x2048-f32

Prints a line of JSON with the median seconds of a repetition in each round. OPENBLAS_NUM_THREADS says how many threads.
"""

import json
import sys
import time

import numpy

ROUND = 0.06


def product(name):
    kind, form, sizes, _ = name.split("-")
    m, k, n = (int(size) for size in sizes.split("x"))
    batch = (8,) if kind == "batched" else ()
    random = numpy.random.default_rng(0)

    def operand(rows, columns, flipped):
        shape = (*batch, columns, rows) if flipped else (*batch, rows, columns)
        x = random.standard_normal(shape, dtype=numpy.float32)
        # A view: BLAS reads transposed operands as they lie.
        return x.swapaxes(-1, -2) if flipped else x

    a, b = operand(m, k, form[0] == "t"), operand(k, n, form[1] == "t")
    # NumPy allocates the result in each call, as the others do.
    return lambda: numpy.matmul(a, b)


def repetition(run):
    clock = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - clock
    del result
    return elapsed


def main():
    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if "openblas" not in blas:
        raise SystemExit(f"this NumPy has {blas}, not OpenBLAS")
    run = product(sys.argv[1])
    for _ in sys.stdin:
        clock, times = time.perf_counter(), []
        while not times or time.perf_counter() - clock < ROUND:
            times.append(repetition(run))
        print(json.dumps({"seconds": sorted(times)[len(times) // 2]}), flush=True)


if __name__ == "__main__":
    main()
