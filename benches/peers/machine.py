"""Processor, vector level and commit of a measurement."""

import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Microarchitectures by vendor and family, then by the models that begin them. Virtual machines often hide the name.
CORES = {
    ("AuthenticAMD", 23): [(0x00, "Zen"), (0x30, "Zen 2")],
    ("AuthenticAMD", 25): [
        (0x00, "Zen 3"), (0x10, "Zen 4"), (0x20, "Zen 3"), (0x40, "Zen 3+"), (0x50, "Zen 3"), (0x60, "Zen 4"),
    ],
    ("AuthenticAMD", 26): [(0x00, "Zen 5")],
    ("GenuineIntel", 6): [
        (60, "Haswell"), (61, "Broadwell"), (63, "Haswell"), (71, "Broadwell"), (78, "Skylake"), (79, "Broadwell"),
        (85, "Skylake-SP"), (94, "Skylake"), (106, "Ice Lake-SP"), (140, "Tiger Lake"), (143, "Sapphire Rapids"),
        (151, "Alder Lake"), (173, "Granite Rapids"), (183, "Raptor Lake"), (207, "Emerald Rapids"),
    ],
}  # fmt: skip
LEVELS = {
    "portable": "portable code",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 with BF16, without AMX",
    "amx": "AVX-512 with AMX",
}


def fields():
    """Fields of the first processor in /proc/cpuinfo, and the number of processors."""
    blocks = Path("/proc/cpuinfo").read_text().strip().split("\n\n")
    lines = (line.split(":", 1) for line in blocks[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}, len(blocks)


def core(vendor, family, model):
    """Returns the microarchitecture, or family and model if it is not listed."""
    known = [name for first, name in CORES.get((vendor, family), []) if first <= model]
    exact = [name for first, name in CORES.get((vendor, family), []) if first == model]
    found = exact if vendor == "GenuineIntel" else known
    return found[-1] if found else f"family {family} model {model}"


def name():
    """Returns the name of the processor: "AMD EPYC (Zen 4)"."""
    known, _ = fields()
    title = re.sub(r"\((R|TM)\)|CPU|Processor|@.*|\d+-Core", "", known.get("model name", platform.processor()))
    title = " ".join(title.split())
    if "cpu family" not in known:
        return title or platform.machine()
    return f"{title} ({core(known.get('vendor_id'), int(known['cpu family']), int(known['model']))})"


def slug():
    """Returns the name as part of a file name: "amd-epyc-zen4"."""
    text = re.sub(r"[^a-z0-9]+", "-", name().lower()).strip("-")
    return text.replace("zen-", "zen")


def processor():
    return f"{name()}, {fields()[1]} cores"


def commit():
    """Of the tree without its results, which a run appends to."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!benches/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def level(xt):
    """Returns the vector level in use, and True if XT_CPU forces one below the processor's."""

    def of(environment):
        out = subprocess.run([xt, "devices"], capture_output=True, text=True, check=True, env=environment).stdout
        return re.search(r"^cpu: .*, (\w+) vector code", out, re.M).group(1)

    used = of(os.environ)
    return used, used != of({key: value for key, value in os.environ.items() if key != "XT_CPU"})
