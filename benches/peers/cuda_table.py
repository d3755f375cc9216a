#!/usr/bin/env python3
"""Sets the lines of `cargo bench --bench cuda` beside those of torch_cuda.py.

    cuda_table.py cuda.tsv torch.tsv

writes benches/results/cuda-CARD.md with date and card.
"""

import re
import sys
from datetime import date
from pathlib import Path


def read(path):
    """Comment lines, and the fields of the others by (kernel, dtype, shape)."""
    lines = Path(path).read_text().splitlines()
    comments = [line[1:].strip() for line in lines if line.startswith("#")]
    rows = [line.split("\t") for line in lines if "\t" in line and not line.startswith("#")]
    return comments, {tuple(row[:3]): row[3:] for row in rows}


def main():
    ours_header, ours = read(sys.argv[1])
    torch_header, torch = read(sys.argv[2])
    card = ours_header[0]
    name = re.search(r"\((.*),", card)
    slug = re.sub(r"[^a-z0-9]+", "-", (name.group(1) if name else card).lower()).strip("-")
    out = [
        f"# Kernels on {card}",
        "",
        f"{date.today()}, {torch_header[0] if torch_header else 'without PyTorch'}. Medians in microseconds, the",
        "second-level cache flushed. Percent are of the copy bandwidth or of the matrix product of the same table.",
        "Made by `scripts/gpu-check`.",
        "",
        "| kernel | dtype | shape | µs | rate | % | PyTorch µs | PyTorch / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, (micros, rate, unit, share) in ours.items():
        peer = torch.get(key, [None])[0]
        ratio = f"{float(peer) / float(micros):.2f}" if peer else ""
        out.append(f"| {' | '.join(key)} | {micros} | {rate} {unit} | {share} | {peer or ''} | {ratio} |")
    for key in torch.keys() - ours.keys():
        out.append(f"| {' | '.join(key)} | | | | {torch[key][0]} | |")
    path = Path(__file__).parent.parent / "results" / f"cuda-{slug}.md"
    path.write_text("\n".join(out) + "\n")
    print(path)


if __name__ == "__main__":
    main()
