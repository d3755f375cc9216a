"""Commands of this library and its peers: each runs as a process that does one step for every line it is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

from machine import ROOT

HERE = Path(__file__).resolve().parent
CONFIGS = ROOT / "benches" / "configs"
RUST = {
    "candle": HERE / "candle/target/release/candle-peer",
    "burn": HERE / "burn/target/release/burn-peer",
    "rusting_brain": HERE / "rusting_brain/target/release/rusting-brain-peer",
    "fastnn": HERE / "fastnn/target/release/fastnn-peer",
}
LLAMA = HERE / "llama/target/release/llama-peer"
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
# What XT_CPU does to this library, for the peers that can be told.
LIKEWISE = {
    "avx2": {
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "OPENBLAS_CORETYPE": "Zen",
    }
}


def threads_of(count):
    """Environment variables from which the contenders take their number of threads."""
    names = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MATMUL_NUM_THREADS"]
    return {name: str(count) for name in names}


def newest(pattern):
    found = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if path.suffix == "" and os.access(path, os.X_OK)]
    return found[-1] if found else None


class Tools:
    """Returns command and environment of each contender, or None if its program is missing."""

    def __init__(self, old, new, xt):
        self.old, self.new = Path(old).absolute() / "bin/python", Path(new).absolute() / "bin/python"
        self.xt = Path(xt).absolute()
        self.interleaved = newest("target/release/deps/interleaved-*")
        self.gguf_bench = newest("target/release/deps/gguf-*")
        self.missing = set()

    def found(self, peer, command, environment):
        if command[0] and Path(command[0]).exists():
            return command, environment
        if peer not in self.missing:
            self.missing.add(peer)
            print(f"{peer} is left out: {command[0] or 'its program'} is not there", file=sys.stderr)
        return None

    def model(self, peer, model, threads):
        config = CONFIGS / f"{model.config}.json"
        shape = [str(model.batch), str(model.length)]
        limit = threads_of(threads)
        if peer == "ours":
            command = [self.xt, "bench", "--config", config, "--mode", model.mode, "--batch", shape[0]]
            command += ["--seq-len", shape[1], "--dtype", model.dtype, "--precision", model.precision]
            return self.found(peer, [*command, "--threads", str(threads), "--interleaved", "--json"], {})
        if peer in RUST:
            net = json.loads(config.read_text())["net"]
            return self.found(peer, [RUST[peer], model.mode, *shape, str(net["num_tokens"])], limit)
        command = [self.old if peer == "0.22" else self.new, HERE / "torch_cpu.py", "--threads", str(threads)]
        command += ["model", config, model.mode, *shape] + (["--bf16"] if "bf16" in peer else [])
        return self.found(peer, command, {**limit, **(TUNED if "tuned" in peer else {})})

    def op(self, peer, name, threads):
        limit = threads_of(threads)
        if peer == "ours":
            return self.found(peer, [self.interleaved, name], limit)
        if peer == "gemm":
            return self.found(peer, [self.interleaved, f"gemm:{name}"], limit)
        if peer == "OpenBLAS":
            return self.found(peer, [self.new, HERE / "openblas.py", name], limit)
        command = [self.new, HERE / "torch_cpu.py", "--threads", str(threads), "op", name]
        command += ["--compile"] if "compiled" in peer else []
        return self.found(peer, command, {**limit, **(TUNED if "tuned" in peer else {})})

    def gguf(self, peer, part, file, threads):
        """`part` is load, decode, or a prompt with its length."""
        kind, _, length = part.partition("-")
        how = ["--interleaved", kind, "--prompt", length or "128", "--new", "64"]
        if peer == "ours":
            return self.found(peer, [self.gguf_bench, file, *how], threads_of(threads))
        return self.found(peer, [LLAMA, file, *how, "--threads", str(threads)], {})


class Contender:
    """A running process."""

    def __init__(self, peer, command, environment):
        self.peer, self.seconds, self.work = peer, [], None
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **LIKEWISE.get(os.environ.get("XT_CPU"), {}), **environment},
        )

    def step(self):
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            step = json.loads(self.process.stdout.readline())
            self.work = step.get("work")
            return step["seconds"]
        except (BrokenPipeError, ValueError, KeyError):
            raise SystemExit(f"{self.peer} failed: {self.process.communicate()[1].strip()[-2000:]}") from None

    def finish(self):
        out, _ = self.process.communicate()
        return json.loads(out.strip().splitlines()[-1]) if out.strip() else {}
