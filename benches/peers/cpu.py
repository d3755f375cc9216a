#!/usr/bin/env python3
"""Runs this library and its peers in turns on the CPU, and prints the table of ratios.

    cpu.py setup [--old VENV] [--new VENV]     makes the virtual environments, builds the peers and this library
    cpu.py run [--only D-train,op-softmax*]    measures, and appends to the raw file
    cpu.py run --resume [--within SECONDS]     goes on with what the raw file does not have of this commit
    cpu.py table                               prints the table of what the raw file has last
    cpu.py summary                             the ratios of the models alone, a line each

Every contender is a process of its own that has its model ready; they do their steps one after the other, so that each
round is measured within the same seconds. The ratio of a round is our time divided by the peer's; the table has the
median, the smallest and the largest of the rounds. "tuned" is PyTorch with glibc's malloc told to keep its memory.
"""

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONFIGS = ROOT / "benches" / "configs"
RESULTS = ROOT / "benches" / "results"
RAW = RESULTS / "cpu-raw.jsonl"
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


class Model:
    """A workload of a whole model, and what of a peer's time it may take."""

    def __init__(self, config, mode, batch, length, targets, peers, dtype="f32", precision="highest", memory=None):
        self.config, self.mode, self.batch, self.length = config, mode, batch, length
        self.targets, self.peers, self.dtype, self.precision, self.memory = targets, peers, dtype, precision, memory


TORCH = ["0.22", "new", "new tuned"]
RUST = ["candle", "burn"]
BF16 = ["new bf16", "new bf16 tuned"]
MODELS = {
    "D-forward": Model("decoder", "forward", 1, 1024, {"new": 0.70}, TORCH + RUST, memory=0.28),
    "D-train": Model(
        "decoder", "train", 1, 1024, {"new": 0.55, "new tuned": 0.65, "candle": 0.10, "burn": 0.18}, TORCH + RUST, memory=0.85
    ),
    "B-train": Model("decoder-bytes", "train", 4, 256, {"new": 0.55}, TORCH + RUST),
    "E-forward": Model("encoder", "forward", 1, 1024, {}, TORCH),
    "E-train": Model("encoder", "train", 1, 1024, {"new": 0.55}, TORCH),
    "X-train": Model("encoder-decoder", "train", 1, 1024, {"new": 0.55}, TORCH),
    "D-4096-train": Model("decoder-long", "train", 1, 4096, {"new": 0.50}, ["new", "new tuned"], memory=1.4),
    "D-8192-train": Model("decoder-long", "train", 1, 8192, {"new": 0.50}, ["new"], memory=2.2),
    "D-train-high": Model("decoder", "train", 1, 1024, {"new": 0.30}, ["new"], precision="high"),
    "D-forward-bf16": Model("decoder", "forward", 1, 1024, {"new bf16": 0.35}, BF16, dtype="bf16"),
    "D-train-bf16": Model(
        "decoder", "train", 1, 1024, {"new bf16": 0.25, "new bf16 tuned": 0.35}, BF16, dtype="bf16"
    ),
    "B-train-bf16": Model("decoder-bytes", "train", 4, 256, {"new bf16": 0.40}, BF16, dtype="bf16"),
}


def op_target(name):
    """The largest ratio of our time to PyTorch's best, with multiply-adds of f32."""
    if name.startswith("attention"):
        return 1 / 1.2
    return 1 / 1.5 if name.startswith(("matmul", "batched")) and name.endswith("bf16") else 1.0


# Of the bandwidth of a copy, for ops that memory limits.
SHARE = 0.8


def newest(pattern):
    found = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if path.suffix == "" and os.access(path, os.X_OK)]
    return found[-1] if found else None


class Tools:
    """Where the programs are."""

    def __init__(self, args):
        self.old, self.new = Path(args.old).absolute(), Path(args.new).absolute()
        self.xt = args.xt.absolute()
        self.interleaved = newest("target/release/deps/interleaved-*")
        self.candle = HERE / "candle/target/release/candle-peer"
        self.burn = HERE / "burn/target/release/burn-peer"

    def model(self, peer, model, threads):
        """Command and environment of a contender, or None where it is not there."""
        config = CONFIGS / f"{model.config}.json"
        shape = [str(model.batch), str(model.length)]
        limit = {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        if peer == "ours":
            command = [self.xt, "bench", "--config", config, "--mode", model.mode, "--batch", shape[0]]
            command += ["--seq-len", shape[1], "--dtype", model.dtype, "--precision", model.precision]
            return command + ["--threads", str(threads), "--interleaved", "--json"], {}
        if peer in RUST:
            net = json.loads(config.read_text())["net"]
            binary = self.candle if peer == "candle" else self.burn
            return ([binary, model.mode, *shape, str(net["num_tokens"])], limit) if binary.exists() else None
        python = self.old if peer == "0.22" else self.new
        command = [python / "bin/python", HERE / "torch_cpu.py", "--threads", str(threads)]
        command += ["model", config, model.mode, *shape] + (["--bf16"] if "bf16" in peer else [])
        return command, {**limit, **(TUNED if "tuned" in peer else {})}

    def op(self, peer, name, threads):
        limit = {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        if peer == "ours":
            return [self.interleaved, name], limit
        command = [self.new / "bin/python", HERE / "torch_cpu.py", "--threads", str(threads), "op", name]
        command += ["--compile"] if "compiled" in peer else []
        return command, {**limit, **(TUNED if "tuned" in peer else {})}


class Contender:
    def __init__(self, peer, command, environment):
        self.peer, self.seconds, self.bytes = peer, [], None
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def step(self):
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            step = json.loads(self.process.stdout.readline())
            self.bytes = step.get("bytes")
            return step["seconds"]
        except (BrokenPipeError, ValueError, KeyError):
            raise SystemExit(f"{self.peer} failed: {self.process.communicate()[1].strip()[-2000:]}") from None

    def finish(self):
        out, _ = self.process.communicate()
        return json.loads(out.strip().splitlines()[-1]) if out.strip() else {}


def measure(case, contenders, args, record):
    """Rounds of one step each, until their number or the time is up."""
    started = time.monotonic()
    contenders, first = [(peer, found) for peer, found in contenders if found], {}
    # One after the other: a first step must not share the processor with the start of the next contender.
    for index, (peer, found) in enumerate(contenders):
        contenders[index] = Contender(peer, *found)
        first[peer] = contenders[index].step()
    if record["kind"] == "model":
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
        "processor": processor(),
        "threads": args.threads,
        "commit": commit(),
        "seconds": {contender.peer: contender.seconds for contender in contenders},
        "first": first,
        "peak": {peer: end["peak_resident_bytes"] for peer, end in ends.items() if "peak_resident_bytes" in end},
        "bytes": {contender.peer: contender.bytes for contender in contenders if contender.bytes},
    }
    args.raw.parent.mkdir(parents=True, exist_ok=True)
    with open(args.raw, "a") as file:
        file.write(json.dumps(record) + "\n")
    print("\n".join(rows(record)), flush=True)


def processor():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def commit():
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip()


def op_names(tools):
    """Each with whether memory limits it."""
    out = subprocess.run([tools.interleaved], capture_output=True, text=True, check=True).stdout
    return [(words[0], len(words) > 1) for words in map(str.split, out.splitlines())]


def run(args):
    tools = Tools(args)
    patterns = args.only.split(",") if args.only else ["*"]
    wanted = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    only_peers = args.peers.split(",") if args.peers else None
    allowed = lambda peer: peer == "ours" or only_peers is None or peer in only_peers
    started = time.monotonic()
    there = set()
    if args.resume and args.raw.exists():
        records = map(json.loads, open(args.raw))
        there = {(record["case"], record["threads"]) for record in records if record["commit"] == commit()}

    def due(case):
        if not wanted(case) or (case, args.threads) in there:
            return False
        if args.within and time.monotonic() - started > args.within:
            raise SystemExit(f"the time is up before {case}: go on with --resume")
        return True

    for case, model in MODELS.items():
        if due(case):
            peers = [peer for peer in ["ours", *model.peers] if allowed(peer)]
            found = [(peer, tools.model(peer, model, args.threads)) for peer in peers]
            measure(case, found, args, {"kind": "model", "dtype": model.dtype, "precision": model.precision})
    for name, limited in op_names(tools) if tools.interleaved else []:
        if due(f"op-{name}"):
            peers = ["ours", "eager", "eager tuned"] + (["compiled tuned"] if args.compile else [])
            found = [(peer, tools.op(peer, name, args.threads)) for peer in peers if allowed(peer)]
            # What memory limits is related to a copy of the same seconds.
            found += [("copy", tools.op("ours", "copy", args.threads))] if limited else []
            measure(f"op-{name}", found, args, {"kind": "op"})


def spread(values, digits):
    low, mid, high = min(values), median(values), max(values)
    return f"{mid:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def time_text(values):
    mid = median(values)
    return f"{spread(values, 3)} s" if mid >= 0.1 else f"{spread([1e3 * value for value in values], 3 if mid < 1e-3 else 2)} ms"


def rows(record):
    """Lines of the table."""
    case, seconds, peak = record["case"], record["seconds"], record["peak"]
    ours = seconds["ours"]
    threads = f"{record['threads']}"
    memory = lambda peer: f"{peak[peer] / 1e9:.2f}" if peer in peak and record["kind"] == "model" else share(record, peer)
    lines = [f"| {case} | {threads} | this | {time_text(ours)} | | | {memory('ours')} |"]
    model = MODELS.get(case)
    peers = [peer for peer in seconds if peer not in ("ours", "copy")]
    fastest = min(peers, key=lambda peer: median(seconds[peer]), default=None)
    for peer in peers:
        beside = record.get("beside", {}).get(peer, ours)
        ratios = [mine / other for mine, other in zip(beside, seconds[peer])]
        target = model.targets.get(peer) if model else (op_target(case[3:]) if peer == fastest else None)
        verdict = "" if target is None else f"≤ {target:.2f}{' ✓' if median(ratios) <= target else ''}"
        lines.append(f"| | | {peer} | {time_text(seconds[peer])} | {spread(ratios, 2)} | {verdict} | {memory(peer)} |")
    return lines


def share(record, peer):
    """The bandwidth of an op as a share of that of a copy in the same rounds."""
    bytes, copy = record.get("bytes", {}), record["seconds"].get("copy")
    if "ours" not in bytes or not copy or len(copy) != len(record["seconds"][peer]):
        return ""
    rates = [bytes["ours"] / mine / (bytes["copy"] / other) for mine, other in zip(record["seconds"][peer], copy)]
    low = peer == "ours" and median(rates) < SHARE
    return f"{100 * median(rates):.0f} %{' (below 80 %)' if low else ''}"


def merged(path):
    """What was measured last of each case and number of threads, and of each peer in it.

    Each peer keeps our times of its own rounds under `beside`.
    """
    records = {}
    for line in open(path):
        record = json.loads(line)
        key = (record["kind"], record["case"], record["threads"])
        ours = record["seconds"]["ours"]
        record["beside"] = {peer: ours for peer in record["seconds"]}
        for part in ["seconds", "peak", "beside", "bytes"]:
            record[part] = {**records.get(key, {}).get(part, {}), **record.get(part, {})}
        records[key] = record
    return records


def table(args):
    records = merged(args.raw)
    order = {case: index for index, case in enumerate(MODELS)}
    if not records:
        raise SystemExit(f"{args.raw} is empty")
    head = lambda last: f"| workload | threads | | seconds | ours / theirs | target | {last} |\n|{'---|' * 7}"
    dates = sorted({record["date"] for record in records.values()})
    machines = sorted({record["processor"] for record in records.values()})
    print(f"# This library and its peers on the CPU\n\n{dates[-1]}, {'; '.join(machines)}. Median (smallest–largest) of interleaved")
    print("rounds; `benches/peers/cpu.py run` measures, `cpu.py table` prints this. Peak memory is that of the whole process.")
    print()
    print("D: `benches/configs/decoder.json`, 1 × 1024 tokens if nothing else is said; B: `decoder-bytes.json`, 4 × 256;")
    print("E: `encoder.json` with a mask, and X: `encoder-decoder.json`, 1 × 1024. \"0.22\" is x-transformers 0.22.0, \"new\" the")
    print("newest with flash attention, \"tuned\" the same with glibc's malloc told to keep its memory.\n")
    print("The last column of ops that memory limits: bytes that the formula must read and write by their time, as a share of")
    print("what a copy of 128 MiB reached in the same rounds; in the caches it can pass 100 %.\n")
    best = "Single ops, the target held against PyTorch's best"
    for kind, title, last in [("model", "Models", "peak memory, GB"), ("op", best, "share of a copy")]:
        keys = [key for key in records if key[0] == kind]
        keys.sort(key=lambda key: (-key[2], order.get(key[1], 0), key[1]) if kind == "model" else (-key[2], key[1]))
        if keys:
            print(f"## {title}\n")
            print(head(last))
            for key in keys:
                print("\n".join(rows(records[key])))
            print()


def summary(args):
    records = [record for (kind, *_), record in merged(args.raw).items() if kind == "model"]
    order = {case: index for index, case in enumerate(MODELS)}
    records.sort(key=lambda record: (-record["threads"], order.get(record["case"], 0)))
    # What autocast computes stands in the same column as what it is compared with.
    columns = TORCH + RUST
    head = ["workload", "threads", "this, seconds", *(f"/ {peer}" for peer in columns), "peak memory, GB"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for record in records:
        plain = lambda times: {peer.replace(" bf16", ""): values for peer, values in times.items()}
        seconds, beside = plain(record["seconds"]), plain(record["beside"])
        ours = seconds["ours"]
        ratio = lambda peer: f"{median([mine / other for mine, other in zip(beside[peer], seconds[peer])]):.2f}"
        cells = [ratio(peer) if peer in seconds else "" for peer in columns]
        peak = f"{record['peak']['ours'] / 1e9:.2f}" if "ours" in record["peak"] else ""
        print(f"| {record['case']} | {record['threads']} | {median(ours):.3f} | {' | '.join(cells)} | {peak} |")


def setup(args):
    for path, package in [(args.old, "x-transformers==0.22.0"), (args.new, "x-transformers")]:
        if not (Path(path) / "bin/python").exists():
            subprocess.run([sys.executable, "-m", "venv", path], check=True)
            subprocess.run([Path(path) / "bin/pip", "install", "torch", "numpy", package], check=True)
    for peer in RUST:
        subprocess.run(["cargo", "build", "--release"], cwd=HERE / peer, check=True)
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    subprocess.run(["cargo", "bench", "-p", "x-transformers", "--bench", "interleaved", "--no-run"], cwd=ROOT, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["setup", "run", "table", "summary"])
    parser.add_argument("--old", default=HERE / "venv-old", help="virtual environment with x-transformers 0.22.0")
    parser.add_argument("--new", default=HERE / "venv-new", help="one with the newest x-transformers")
    parser.add_argument("--xt", type=Path, default=ROOT / "target/release/xt", help="this library's command")
    parser.add_argument("--raw", type=Path, default=RAW, help="file of measurements, one JSON object a line")
    parser.add_argument("--only", help="workloads, with wildcards, separated by commas: D-train,op-gelu*")
    parser.add_argument("--peers", help="contenders beside this library: new,new tuned")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7, help="rounds at most")
    parser.add_argument("--limit", type=float, default=80, help="seconds of a workload, after three rounds")
    parser.add_argument("--resume", action="store_true", help="leave out what the raw file has of this commit")
    parser.add_argument("--within", type=float, help="begin no workload after so many seconds; --resume goes on")
    parser.add_argument("--compile", action="store_true", help="also PyTorch's compiled ops, which take a minute at first")
    args = parser.parse_args()
    {"setup": setup, "run": run, "table": table, "summary": summary}[args.command](args)


if __name__ == "__main__":
    main()
