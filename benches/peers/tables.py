"""Tables of what cpu.py measured."""

import json
from statistics import median

import machine
from workloads import GGUF, MODELS, RUST, TORCH, model_target, op_target

# The least share of a copy's bandwidth, and of the peak of multiply-adds with one thread and with more.
COPY_SHARE, PEAK_SHARE_ONE, PEAK_SHARE = 0.8, 0.90, 0.85
REFERENCES = ("copy", "peak")


def spread(values, digits):
    low, mid, high = min(values), median(values), max(values)
    return f"{mid:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def time_text(values):
    mid = median(values)
    return f"{spread(values, 3)} s" if mid >= 0.1 else f"{spread([1e3 * value for value in values], 3 if mid < 1e-3 else 2)} ms"


def target_of(record, peer, fastest):
    case = record["case"]
    if record["kind"] == "model":
        return model_target(case, peer, record.get("level"))
    if record["kind"] == "gguf":
        return GGUF[case.split("-", 1)[1].rpartition("-")[0]]
    return op_target(case[3:]) if peer == fastest else None


def last_column(record, peer):
    """Returns the memory of the process, or for an op its share of a peak."""
    if record["kind"] == "op":
        return share(record, peer)
    peak = record["peak"].get(peer)
    if peak and record["kind"] == "gguf":
        return f"{peak / 1e9:.2f} ({peak / record['file_bytes']:.2f} of the file)"
    return f"{peak / 1e9:.2f}" if peak else ""


def rows(record):
    """Returns the lines of a record in the table."""
    case, seconds = record["case"], record["seconds"]
    ours = seconds["ours"]
    lines = [f"| {case} | {record['threads']} | this | {time_text(ours)} | | | {last_column(record, 'ours')} |"]
    peers = [peer for peer in seconds if peer not in ("ours", *REFERENCES)]
    fastest = min(peers, key=lambda peer: median(seconds[peer]), default=None)
    for peer in peers:
        beside = record.get("beside", {}).get(peer, ours)
        ratios = [mine / other for mine, other in zip(beside, seconds[peer])]
        target = target_of(record, peer, fastest)
        verdict = "" if target is None else f"≤ {target:.2f}{' ✓' if median(ratios) <= target else ''}"
        cells = [peer, time_text(seconds[peer]), spread(ratios, 2), verdict, last_column(record, peer)]
        lines.append(f"| | | {' | '.join(cells)} |")
    return lines


def share(record, peer):
    """Returns the rate of an op as a share of that of a copy, or of multiply-adds, in the same rounds."""
    work, seconds = record.get("work", {}), record["seconds"]
    reference = next((name for name in REFERENCES if name in seconds), None)
    if "ours" not in work or reference is None or len(seconds[reference]) != len(seconds[peer]):
        return ""
    limit = work[reference]
    rates = [work["ours"] / mine / (limit / other) for mine, other in zip(seconds[peer], seconds[reference])]
    least = COPY_SHARE if reference == "copy" else PEAK_SHARE if record["threads"] > 1 else PEAK_SHARE_ONE
    low = peer == "ours" and median(rates) < least
    return f"{100 * median(rates):.0f} %{f' (below {100 * least:.0f} %)' if low else ''}"


def merged(path):
    """Returns the last measurement of each case, number of threads and peer.

    Each peer keeps our times of its own rounds under `beside`.
    """
    records = {}
    for line in open(path):
        record = json.loads(line)
        key = (record["kind"], record["case"], record["threads"])
        ours = record["seconds"]["ours"]
        record["beside"] = {peer: ours for peer in record["seconds"]}
        for part in ["seconds", "peak", "beside", "work"]:
            record[part] = {**records.get(key, {}).get(part, {}), **record.get(part, {})}
        records[key] = record
    if not records:
        raise SystemExit(f"{path} is empty")
    machines = {(record["processor"], record.get("level"), record.get("forced", False)) for record in records.values()}
    if len(machines) > 1:
        raise SystemExit(f"{path} has several machines or levels, and a table has one: {sorted(map(str, machines))}")
    return records


def order(key):
    kind, case, threads = key
    if kind == "model":
        return -threads, list(MODELS).index(case) if case in MODELS else 0, case
    if kind == "gguf":
        part, _, file = case.split("-", 1)[1].rpartition("-")
        return file, -threads, list(GGUF).index(part)
    return -threads, 0, case


def table(path):
    """Returns the file of a processor."""
    records = merged(path)
    some = next(iter(records.values()))
    level, threads = some.get("level"), sorted({record["threads"] for record in records.values()})
    dates = sorted({record["date"] for record in records.values()})
    commits = sorted({record["commit"] for record in records.values()})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    instructions = machine.LEVELS.get(level, level) or "level not recorded"
    head = f"{some['processor']}; {instructions}; {' and '.join(map(str, threads))} threads; {span}; commit"
    lines = ["# This library and its peers on the CPU", ""]
    if some.get("forced"):
        lines += [f"**Forced to `{level}` by XT_CPU: this does not measure a machine of that level.**", ""]
    lines += [
        f"{head}{'s' * (len(commits) > 1)} {', '.join(commits)}.",
        "",
        "Median (smallest–largest) of interleaved rounds; `benches/peers/cpu.py all` measures on any machine and writes its",
        "file. Peak memory is that of the whole process.",
        "",
        "D: `benches/configs/decoder.json`, 1 × 1024 tokens if nothing else is said; B: `decoder-bytes.json`, 4 × 256;",
        'E: `encoder.json` with a mask, and X: `encoder-decoder.json`, 1 × 1024. "0.22" is x-transformers 0.22.0, "new" the',
        'newest with flash attention, "tuned" the same with glibc\'s malloc told to keep its memory.',
        "",
    ]
    about_ops = [
        "The last column: of ops that memory limits, the bytes that the formula must read and write by their time, as a",
        "share of what a copy of 128 MiB reached in the same rounds (in the caches it can pass 100 %); of f32 products, their",
        "operations by their time, as a share of the peak of multiply-adds in registers in the same rounds.",
    ]
    about_files = [
        "SmolLM2-135M-Instruct in each type of llama.cpp, which is `llama-cpp-2` compiled for this processor: loading until",
        "a token can be computed, prompts of the given lengths, and 64 tokens after a prompt of 128.",
    ]
    parts = [
        ("model", "Models", "peak memory, GB", []),
        ("gguf", "Quantised weights beside llama.cpp", "peak memory, GB", about_files),
        ("op", "Single ops, the target held against the fastest peer", "share of a peak", about_ops),
    ]
    for kind, title, last, about in parts:
        keys = sorted((key for key in records if key[0] == kind), key=order)
        if keys:
            lines += [f"## {title}", "", *about, *[""] * bool(about)]
            lines += [f"| workload | threads | | seconds | ours / theirs | target | {last} |", "|---" * 7 + "|"]
            lines += [line for key in keys for line in rows(records[key])] + [""]
    return "\n".join(lines).rstrip() + "\n"


def summary(path):
    """Returns a table of the models' ratios, one line each."""
    records = {key: record for key, record in merged(path).items() if key[0] == "model"}
    # bf16 peers share the columns of the f32 ones.
    columns = TORCH + RUST
    head = ["workload", "threads", "this, seconds", *(f"/ {peer}" for peer in columns), "peak memory, GB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in sorted(records, key=order):
        record = records[key]
        plain = lambda times: {peer.replace(" bf16", ""): values for peer, values in times.items()}
        seconds, beside = plain(record["seconds"]), plain(record["beside"])
        ratio = lambda peer: f"{median([mine / other for mine, other in zip(beside[peer], seconds[peer])]):.2f}"
        cells = [ratio(peer) if peer in seconds else "" for peer in columns]
        peak = f"{record['peak']['ours'] / 1e9:.2f}" if "ours" in record["peak"] else ""
        cells = [record["case"], str(record["threads"]), f"{median(seconds['ours']):.3f}", *cells, peak]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
