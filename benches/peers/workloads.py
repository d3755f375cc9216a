"""Workloads of cpu.py, their contenders, and the targets: our time divided by a peer's."""


class Model:
    """A workload of a whole model, and its targets: in general, and at AVX2."""

    def __init__(self, config, mode, batch, length, targets, peers, dtype="f32", precision="highest", avx2=False):
        self.config, self.mode, self.batch, self.length = config, mode, batch, length
        self.targets, self.peers, self.dtype, self.precision = targets, peers, dtype, precision
        self.avx2 = {**targets, "new": 0.65, "new tuned": 0.68} if avx2 else targets


TORCH = ["0.22", "new", "new tuned"]
RUST = ["candle", "burn", "rusting_brain", "fastnn"]
D_RUST = ["candle", "burn"]
BF16 = ["new bf16", "new bf16 tuned"]
MODELS = {
    "D-forward": Model("decoder", "forward", 1, 1024, {"new": 0.70}, TORCH + D_RUST, avx2=True),
    "D-train": Model(
        "decoder",
        "train",
        1,
        1024,
        {"new": 0.55, "new tuned": 0.65, "candle": 0.10, "burn": 0.18},
        TORCH + D_RUST,
        avx2=True,
    ),
    "B-train": Model(
        "decoder-bytes",
        "train",
        4,
        256,
        {"new": 0.55, "rusting_brain": 0.50, "fastnn": 0.06},
        TORCH + RUST,
        avx2=True,
    ),
    "E-forward": Model("encoder", "forward", 1, 1024, {}, TORCH),
    "E-train": Model("encoder", "train", 1, 1024, {"new": 0.55}, TORCH, avx2=True),
    "X-train": Model("encoder-decoder", "train", 1, 1024, {"new": 0.55}, TORCH, avx2=True),
    "D-4096-train": Model("decoder-long", "train", 1, 4096, {"new": 0.50}, ["new", "new tuned"]),
    "D-8192-train": Model("decoder-long", "train", 1, 8192, {"new": 0.50}, ["new"]),
    "D-train-high": Model("decoder", "train", 1, 1024, {"new": 0.30}, ["new"], precision="high"),
    "D-forward-bf16": Model("decoder", "forward", 1, 1024, {"new bf16": 0.35}, BF16, dtype="bf16"),
    "D-train-bf16": Model(
        "decoder", "train", 1, 1024, {"new bf16": 0.25, "new bf16 tuned": 0.35}, BF16, dtype="bf16"
    ),
    "B-train-bf16": Model("decoder-bytes", "train", 4, 256, {"new bf16": 0.40}, BF16, dtype="bf16"),
}
# Workloads of a quantised model, in the order of the table, and their targets; a prompt has its length.
GGUF = {"load": None, "prompt-128": 0.75, "prompt-512": 0.75, "decode": 0.90}
# Workloads that `all` also measures with one thread.
ONE_THREAD = "D-train,gguf-*,op-matmul-*-f32,op-batched-*-f32"


def model_target(case, peer, level):
    model = MODELS.get(case)
    return (model.avx2 if level == "avx2" else model.targets).get(peer) if model else None


def op_peers(name, compiled):
    peers = ["eager", "eager tuned"] + (["compiled tuned"] if compiled else [])
    return peers + (["OpenBLAS", "gemm"] if name.startswith(("matmul", "batched")) and name.endswith("f32") else [])


def op_target(name):
    """The largest ratio of our time to that of the fastest peer."""
    if name.startswith("attention"):
        return 0.7
    if name.startswith(("matmul", "batched")):
        return 0.95 if name.endswith("f32") else 1 / 1.5
    return 1.0
