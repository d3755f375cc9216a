#!/usr/bin/env python3
"""Sets the lines of `cargo bench --bench cuda` beside those of torch_cuda.py.

    cuda_table.py [--into FILE] FOLDER…

reads ours.tsv, ladder.tsv, torch.tsv and results.tsv of the folders that
`scripts/gpu-check run` has filled, of which a later one wins line by line, and
writes FILE: by default benches/results/cuda-CARD.md, with date and card.
"""

import argparse
import re
import sys
from datetime import date
from pathlib import Path


def read(folders, name, key=3):
    """Comment lines, and the fields of the others by their first ones."""
    comments, rows = [], {}
    for path in (folder / name for folder in folders):
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        # A stage that was ended amid a line leaves a part of it.
        split = [line.split("\t") for line in lines if "\t" in line and not line.startswith("#")]
        rows |= {tuple(row[:key]): row[key:] for row in split if len(row) > key and all(row)}
        comments += [line[1:].strip() for line in lines if line.startswith("#")]
    return list(dict.fromkeys(comments)), rows


def table(header, rows):
    """The lines of a table of Markdown, its rows by column."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def number(text):
    try:
        return float(text)
    except ValueError:
        return None


def kernels(ours, torch):
    for key, fields in ours.items():
        if len(fields) != 4 or number(fields[0]) is None:
            continue
        micros, rate, unit, share = fields
        peer = torch.get(key, [""])[0]
        ratio = f"{number(peer) / float(micros):.2f}" if number(peer) and float(micros) else ""
        yield [*key, micros, f"{rate} {unit}", share, peer, ratio]
    for key in torch:
        if key not in ours:
            yield [*key, "", "", "", torch[key][0], ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    comments, ours = read(args.folders, "ours.tsv")
    torch_comments, torch = read(args.folders, "torch.tsv")
    _, ladder = read(args.folders, "ladder.tsv", 4)
    _, stages = read(args.folders, "results.tsv", 1)
    if not ours:
        sys.exit(f"{', '.join(map(str, args.folders))}: ours.tsv has no lines")
    card = comments[0]
    versions = next((line for line in torch_comments if "torch" in line), "without PyTorch")
    out = [
        f"# Kernels on {card}",
        "",
        f"{date.today()}, {versions}. Medians in microseconds, the second-level cache flushed; of decoding by the clock of",
        "the host. Percent are of the copy bandwidth or of the matrix product of the same table. Made by",
        "`scripts/gpu-check`.",
        "",
    ]
    header = ["kernel", "dtype", "shape", "µs", "rate", "%", "PyTorch µs", "PyTorch / this"]
    out += table(header, kernels(ours, torch))
    missing = [f"- {line}" for line in torch_comments if ": " in line and "torch" not in line.split(":")[0]]
    if missing:
        out += ["PyTorch gave no number for", "", *missing, ""]
    if ladder:
        out += ["## From the naive kernel to the shipped one", ""]
        rows = ([*key, fields[0], " ".join(fields[1:3]), *fields[3:4]] for key, fields in ladder.items())
        out += table(["kernel", "rung", "dtype", "shape", "µs", "rate", "% of a copy"], rows)
    out += ["## Stages", ""]
    rows = ([*key, *fields] for key, fields in stages.items() if key != ("stage",))
    out += table(["stage", "status", "exit code", "seconds", "limit"], rows)
    name = re.search(r"\((.*),", card)
    slug = re.sub(r"[^a-z0-9]+", "-", (name.group(1) if name else card).lower()).strip("-")
    path = args.into or Path(__file__).parent.parent / "results" / f"cuda-{slug}.md"
    path.write_text("\n".join(out).rstrip() + "\n")
    print(path)


if __name__ == "__main__":
    main()
