"""Stands in for PyTorch where there is none: benches/peers/torch_cuda.py runs, and every time is a microsecond.

Values are shapes alone. `XT_STAND_IN_TORCH=compile` makes torch.compile fail.
"""

import os
import sys
import types
from contextlib import contextmanager

__version__ = "0 (a stand-in)"


class Value:
    dtype = None

    def __init__(self, shape=(2, 16, 32)):
        self.shape, self.grad = tuple(shape), None

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Value(self.shape)

    def is_floating_point(self):
        return True

    def chunk(self, count, dim):
        return [Value(self.shape)] * count

    def unbind(self, dim):
        return [Value()] * 3

    def operator(self, *_):
        return Value(self.shape)

    __add__ = __sub__ = __rsub__ = __mul__ = __matmul__ = __mod__ = __truediv__ = __neg__ = operator
    __rpow__ = __le__ = __getitem__ = operator


def of_shape(shape=(), *args, **kwargs):
    return Value(shape if isinstance(shape, tuple) else (1,))


arange = lambda *args, **kwargs: Value((2, 16))
rand = zeros = empty = tensor = outer = cat = ones_like = rand_like = of_shape
float32 = bfloat16 = float16 = int64 = None


class no_grad:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __call__(self, function):
        return function


@contextmanager
def autocast(*args, **kwargs):
    yield


def compile(function, **kwargs):
    if os.environ.get("XT_STAND_IN_TORCH") == "compile":
        raise RuntimeError("a stand-in compiles nothing\nand says so in two lines")
    return function


class Module:
    def __init__(self, *args, **kwargs):
        self.weight = Value()

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        return Value()

    def to(self, *args):
        return self

    def parameters(self):
        return []


class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e-3


def module(name, **content):
    made = types.ModuleType(f"{__name__}.{name}")
    made.__dict__.update(content)
    sys.modules[made.__name__] = made
    return made


anything = lambda *args, **kwargs: Value()
cuda = module(
    "cuda", is_available=lambda: True, get_device_name=lambda: "a stand-in", synchronize=lambda: None, Event=Event
)
optim = module("optim", AdamW=lambda *args, **kwargs: Value())
names = ("cross_entropy", "gelu", "layer_norm", "rms_norm", "scaled_dot_product_attention")
functional = module("nn.functional", **{name: anything for name in names})
layers = {name: Module for name in ("Embedding", "GELU", "LayerNorm", "Linear", "Sequential")}
nn = module("nn", Module=Module, ModuleList=list, functional=functional, utils=Value(), **layers)
version = module("version", cuda="none")
