#!/usr/bin/env python3
"""Writes table.txt, which the contract suite holds every op against, with PyTorch on the CPU (pip install torch mpmath).

Each case is an op on inputs with extreme values. The table has its inputs, and for each dtype the output and the
gradient of each input as PyTorch gives them, element by element:

    NUMBER       finite; the value is that of the same formula in f64, from inputs rounded to the dtype
    inf -inf nan
    .            finite, nothing more: in f64, where f32 shows that PyTorch's own value is lost to an overflow
    A|B          PyTorch has B, exact arithmetic has A: PyTorch overflows on the way. What is exact in f64 is taken from
                 f32, whose formula in f64 does not overflow

Symbols of inputs: max (the largest number), den (the smallest), big and sml (whose squares overflow and underflow).
A list may be `a b*3 c`, with three times b, or `a b c ~ 5:d 9:e`: a, b, c again and again to the end, but d at position
5 and e at 9.
"""

import functools
import math
import sys
from pathlib import Path

import mpmath
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SMALL = {"f64": 2.0**-600, "f32": 2.0**-80, "f16": 2.0**-14, "bf16": 2.0**-80}
BIG = {"f64": 2.0**600, "f32": 2.0**80, "f16": 2.0**12, "bf16": 2.0**80}
DEN = {"f64": 5e-324, "f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}


def number(symbol, dtype):
    """The value of a symbol of an input."""
    if not isinstance(symbol, str):
        return float(symbol)
    if symbol[0] == "-":
        return -number(symbol[1:], dtype)
    values = {"max": torch.finfo(NAMES[dtype]).max, "big": BIG[dtype], "sml": SMALL[dtype], "den": DEN[dtype]}
    return values[symbol] if symbol in values else float(symbol)


FORMATS = {torch.float16: (11, -14, 65504.0), torch.bfloat16: (8, -126, 255.0 * 2.0**120), torch.float32: (24, -126, None)}


def rounded(x, dtype):
    """To nearest even, once: PyTorch rounds to f32 first and then to the half types."""
    if dtype not in FORMATS or not math.isfinite(x) or x == 0:
        return x
    bits, least, _ = FORMATS[dtype]
    step = 2.0 ** (max(math.frexp(x)[1] - 1, least) - bits + 1)
    # A step below the normal range of f64 does not occur: those of the others end far above it.
    y = math.copysign(round(abs(x) / step) * step, x)
    return math.copysign(math.inf, x) if abs(y) > torch.finfo(dtype).max else y


def compact(tokens):
    """A list as in the explanation above, in the shortest form there is."""
    runs = []
    for token in tokens:
        if runs and runs[-1][0] == token:
            runs[-1][1] += 1
        else:
            runs.append([token, 1])
    best = " ".join(token if count == 1 else f"{token}*{count}" for token, count in runs)
    for period in range(1, min(24, len(tokens))):
        base = []
        for phase in range(period):
            column = tokens[phase::period]
            base.append(max(set(column), key=lambda token: (column.count(token), token)))
        rest = [f"{i}:{token}" for i, token in enumerate(tokens) if token != base[i % period]]
        text = " ".join([*base, "~", *rest])
        if len(text) < len(best):
            best = text
    return best


def shape_text(shape):
    return ",".join(map(str, shape)) or "-"


class Input:
    """Symbols and a shape; `grad` for those with a gradient."""

    def __init__(self, symbols, shape=None, grad=True, kind="float"):
        self.symbols = list(symbols)
        self.shape = [len(self.symbols)] if shape is None else list(shape)
        self.grad, self.kind = grad and kind == "float", kind
        assert math.prod(self.shape) == len(self.symbols), (self.shape, len(self.symbols))

    def tensor(self, dtype):
        if self.kind == "int":
            return torch.tensor(self.symbols, dtype=torch.int64).reshape(self.shape)
        if self.kind == "bool":
            return torch.tensor(self.symbols, dtype=torch.bool).reshape(self.shape)
        values = [rounded(number(symbol, dtype), NAMES[dtype]) for symbol in self.symbols]
        return torch.tensor(values, dtype=torch.float64).to(NAMES[dtype]).reshape(self.shape)

    def text(self):
        kind = {"float": "in" if self.grad else "const", "int": "int", "bool": "bool"}[self.kind]
        tokens = [str(int(s)) if self.kind != "float" else s if isinstance(s, str) else f"{s:g}" for s in self.symbols]
        return f"{kind} {shape_text(self.shape)} {compact(tokens)}"


def evaluate(function, tensors, inputs, cotangent, like=None):
    """Output and gradients; the cotangent has the dtype of the output, or its values as the dtype `like` has them."""
    leaves = [t.clone().requires_grad_() if i.grad else t for t, i in zip(tensors, inputs)]
    output = function(*leaves)
    result = [output.detach()]
    wanted = [leaf for leaf, i in zip(leaves, inputs) if i.grad]
    if wanted:
        g = torch.tensor(cotangent, dtype=torch.float64)
        g = g.repeat(-(-max(output.numel(), 1) // len(g)))[: output.numel()].reshape(output.shape).to(like or output.dtype).to(output.dtype)
        grads = torch.autograd.grad(output, wanted, g, allow_unused=True)
        result += [torch.zeros_like(w) if grad is None else grad for w, grad in zip(wanted, grads)]
    return result


def category(x):
    return "nan" if math.isnan(x) else "inf" if x == math.inf else "-inf" if x == -math.inf else "."


def digits(x, dtype, exact=False):
    if exact:
        return repr(x)
    for symbol in ["max", "big", "sml", "den"]:
        if abs(x) == number(symbol, dtype):
            return symbol if x > 0 else f"-{symbol}"
    # A number whose last digits are those of one dtype would need a line of its own.
    text = "0" if abs(x) < DEN[dtype] / 2 else f"{x:.4g}"
    return text.replace("e+", "e").replace("e0", "e").replace("e-0", "e-")


def far(a, b):
    return abs(a - b) > 0.05 * max(abs(a), abs(b)) + 1e-37


class Table:
    def __init__(self):
        self.lines = []
        self.uneven = 0

    def case(self, name, function, inputs, cotangent=(1.0, -0.5), elementwise=False, wide=None, exact=False, of_output=False):
        """One case; `wide` is the formula in f64 if another one than `function`.

        `elementwise`: each element is right by itself, `exact`: to the last bit;
        `of_output`: gradients are computed from the output, which is rounded.
        """
        flag = " elementwise" if elementwise else " exact" if exact else " of_output" if of_output else ""
        self.lines.append(f"case {name}{flag}")
        self.lines += [i.text() for i in inputs]
        if any(i.grad for i in inputs):
            self.lines.append("g " + compact([c if isinstance(c, str) else f"{c:g}" for c in cotangent]))
        results = {dtype: self.dtype(function, wide or function, inputs, cotangent, elementwise, exact, dtype) for dtype in NAMES}
        # What f32 loses on the way, f64 loses too.
        lossy = results["f32"][1]
        texts = {}
        for dtype, (tensors, _) in results.items():
            rows = []
            for at, tokens in enumerate(tensors):
                if dtype == "f64":
                    exact = [token.split("|")[0] for token in results["f32"][0][at]]
                    tokens = [self.f64(*pair, lossy[at]) for pair in zip(tokens, exact)]
                rows.append(compact(tokens) if tokens else "empty")
            texts.setdefault(" | ".join(rows), []).append(dtype)
        self.lines += [f"{','.join(dtypes)} = {text}" for text, dtypes in texts.items()]

    @staticmethod
    def f64(token, exact, lossy):
        """A token of f64, where PyTorch has to do for exact arithmetic, beside the exact one of f32."""
        def of(text):
            return text if text in ("inf", "-inf", "nan") else "."

        own, _, of_torch = token.partition("|")
        exact, of_torch = of(exact), of(of_torch or own)
        if exact == of(own):
            return "." if lossy and token == own and exact == "." else token
        return exact if exact == of_torch else f"{exact}|{of_torch}"

    def dtype(self, function, wide, inputs, cotangent, elementwise, bits, dtype):
        """Tokens of output and gradients, and for each tensor whether PyTorch's values are far from exact ones."""
        cotangent = [number(c, dtype) for c in cotangent]
        # As the dtype has them.
        cotangent = torch.tensor(cotangent, dtype=torch.float64).to(NAMES[dtype]).double().tolist()
        tensors = [i.tensor(dtype) for i in inputs]
        own = evaluate(function, tensors, inputs, cotangent)
        exact = evaluate(wide, [t.double() if t.is_floating_point() else t for t in tensors], inputs, cotangent, own[0].dtype)
        alone = [None] * len(own)
        if elementwise and dtype != "f64":
            # PyTorch's loops have a vector and a scalar form, which may differ.
            alone[0] = self.one_by_one(function, tensors)
        all_tokens, lossy = [], []
        for o, e, a in zip(own, exact, alone):
            to = o.dtype
            e, o = e.double().flatten().tolist(), o.double().flatten().tolist()
            a = o if a is None else a
            tokens, lost = [], False
            for o, e, a in zip(o, e, a):
                r = rounded(e, to)
                of_torch, of_exact = category(o), category(r)
                if category(a) != of_torch:
                    self.uneven += 1
                    of_torch = of_exact
                value = digits(r if bits else e, dtype, bits) if of_exact == "." else of_exact
                tokens.append(value if of_torch == of_exact else f"{value}|{of_torch}")
                lost |= of_torch != of_exact or of_torch == "." and far(o, r)
            all_tokens.append(tokens)
            lossy.append(lost)
        return all_tokens, lossy

    @staticmethod
    def one_by_one(function, tensors):
        n = max(t.numel() for t in tensors)
        if any(t.numel() != n for t in tensors):
            return None
        flat = [t.flatten() for t in tensors]
        return [function(*(t[i : i + 1].clone() for t in flat)).double().item() for i in range(n)]


VALUES = [0, "-0", "den", "-den", "sml", "-sml", 1, -1, 20, -20, 100, -100, "big", "-big", "max", "-max", "inf", "-inf", "nan"]
PAIRED = [0, "-0", "den", "sml", 1, -2, "big", "-big", "max", "-max", "inf", "-inf", "nan"]
FEW = [0, "den", 1, -20, "big", "-max", "inf", "-inf", "nan"]


def product(values):
    return [a for a in values for _ in values], [b for _ in values for b in values]


# Rows of a width; all end in ordinary values, but those whose name says that all are one.
SMALL_VALUES = [0.5, -1.25, 2, -0.75]


def ordinary(width):
    return [SMALL_VALUES[i % 4] for i in range(width)]


def spiked(*spikes):
    def row(width):
        values = ordinary(width)
        for at, symbol in spikes:
            values[at % width] = symbol
        return values

    return row


def cycled(*symbols):
    return lambda width: [symbols[i % len(symbols)] for i in range(width)]


PATTERNS = {
    "zeros": cycled(0),
    "negative_zeros": cycled("-0"),
    "den": cycled("den", "-den", 0),
    "sml": cycled("sml", "-sml"),
    "equal": cycled(0.5),
    "max": cycled("max"),
    "lowest": cycled("-max"),
    "alternating_max": cycled("max", "-max"),
    "alternating_big": cycled("big", "-big", "big"),
    "max_but_one": lambda width: ["max"] * (width - 1) + ["-max"],
    "one_max": spiked((3, "max")),
    "one_lowest": spiked((-1, "-max")),
    "one_big": spiked((33, "big")),
    "all_inf": cycled("inf"),
    "all_negative_inf": cycled("-inf"),
    "one_inf": spiked((5, "inf")),
    "one_negative_inf": spiked((-2, "-inf")),
    "both_inf": spiked((1, "inf"), (2, "-inf")),
    "one_nan": spiked((-1, "nan")),
    "all_nan": cycled("nan"),
    "nan_inf": spiked((0, "inf"), (4, "nan")),
}
WIDTHS = [67, 40]


def rows():
    """Each pattern at a width that fills vectors and leaves a tail; some in short rows and in rows of one."""
    for at, (name, pattern) in enumerate(PATTERNS.items()):
        yield f"{name}_{WIDTHS[at % 2]}", pattern(WIDTHS[at % 2])
        if at % 3 == 0:
            yield f"{name}_7", pattern(7)
        if name in ("max", "den", "all_inf", "all_negative_inf", "all_nan", "zeros"):
            yield f"{name}_1", pattern(1)


def logistic(x):
    e = mpmath.exp(-abs(x))
    y = 1 / (1 + e)
    return (y if x >= 0 else e * y), e * y * y


def gelu_tanh_gate(x):
    angle, turn = 2 * mpmath.sqrt(2 / mpmath.pi), mpmath.mpf("0.044715")
    gate, slope = logistic(angle * (x + turn * x**3))
    return gate, slope * angle * (1 + 3 * turn * x**2)


def quick_gelu_gate(x):
    gate, slope = logistic(mpmath.mpf("1.702") * x)
    return gate, slope * mpmath.mpf("1.702")


def normal(x):
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2, mpmath.exp(-(x**2) / 2) / mpmath.sqrt(2 * mpmath.pi)


def gated(gate):
    """x gate(x) and its derivative, from the gate and its derivative."""

    def both(x):
        # Further out no type holds a gate other than 0 or 1, nor a slope.
        value, slope = gate(max(min(x, 10000), -10000))
        return x * value, value + max(min(x, 10000), -10000) * slope

    return both


def exactly(both, function):
    """A function with a value and a derivative by mpmath; infinities and NaN are PyTorch's."""

    class Exact(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            finite = [both(mpmath.mpf(v)) if math.isfinite(v) else (0, 0) for v in x.flatten().tolist()]
            value, slope = (torch.tensor([float(v[i]) for v in finite], dtype=x.dtype).reshape(x.shape) for i in (0, 1))
            ctx.save_for_backward(x, slope)
            return torch.where(x.isfinite(), value, function(x))

        @staticmethod
        def backward(ctx, g):
            x, slope = ctx.saved_tensors
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (own,) = torch.autograd.grad(function(leaf), leaf, g)
            return torch.where(x.isfinite(), g * slope, own)

    return Exact.apply


EXACT = {
    "sigmoid": exactly(lambda x: logistic(max(min(x, 10000), -10000)), torch.sigmoid),
    "tanh": exactly(lambda x: (mpmath.tanh(max(min(x, 10000), -10000)), mpmath.sech(max(min(x, 10000), -10000)) ** 2), torch.tanh),
    "gelu": exactly(gated(normal), F.gelu),
    "gelu_tanh": exactly(gated(gelu_tanh_gate), lambda x: F.gelu(x, approximate="tanh")),
    "silu": exactly(gated(logistic), F.silu),
    "quick_gelu": exactly(gated(quick_gelu_gate), lambda x: x * torch.sigmoid(1.702 * x)),
}


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def pointwise(table):
    unary = {
        "neg": torch.neg,
        "exp": torch.exp,
        "ln": torch.log,
        "sqrt": torch.sqrt,
        "square": torch.square,
        "tanh": torch.tanh,
        "erf": torch.erf,
        "cos": torch.cos,
        "affine": lambda x: x * 1.5 - 0.25,
        **ACTIVATIONS,
    }
    for name, function in unary.items():
        gradients = [1, "max", "inf", "nan", 0]
        cotangent = [g for g in gradients for _ in VALUES]
        table.case(name, function, [Input(VALUES * len(gradients))], cotangent, elementwise=True, wide=EXACT.get(name))
    a, b = product(PAIRED)
    binary = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}
    for name, function in binary.items():
        table.case(name, function, [Input(a), Input(b)], [1.0], elementwise=True)
        table.case(f"{name} steep", function, [Input(a), Input(b)], ["max"], elementwise=True)
    for name in ["eq", "ne", "lt", "le", "gt", "ge"]:
        function = getattr(torch, name)
        table.case(name, function, [Input(a, grad=False), Input(b, grad=False)], elementwise=True)
    mask = [i % 3 == 0 for i in range(len(a))]
    table.case("where_cond", torch.where, [Input(mask, kind="bool"), Input(a), Input(b)], [1.0, "inf", "nan"])
    for value in ["max", "-inf", "nan"]:
        fill = lambda x, m, value=value: x.masked_fill(m, number(value, "f32") if x.dtype != torch.float16 else 65504.0 if value == "max" else float(value))
        wide = lambda x, m, value=value: x.masked_fill(m, float(value) if value != "max" else 65504.0)
        if value == "max":
            fill = wide
        mask = [i % 2 == 0 for i in range(len(VALUES))]
        table.case(f"masked_fill {value}", fill, [Input(VALUES), Input(mask, kind="bool")], [1.0, "inf"], wide=wide)


def activations(table):
    for name, function in ACTIVATIONS.items():
        exact = EXACT.get(name, function)

        def add(x, b, function=function):
            return function(x + b)

        def glu(x, function=function):
            value, gate = x.chunk(2, -1)
            return value * function(gate)

        def add_glu(x, b, function=function):
            return glu(x + b, function)

        add_wide, glu_wide, add_glu_wide = (functools.partial(f, function=exact) for f in (add, glu, add_glu))
        width = len(VALUES)
        bias = [0.5] * width
        table.case(f"add_activation {name} x", add, [Input(VALUES * 2, [2, width]), Input(bias)], [1.0], wide=add_wide)
        inputs = [Input(bias, [1, width]), Input(VALUES)]
        table.case(f"add_activation {name} bias", add, inputs, [1.0, "inf"], wide=add_wide)
        values, gates = product(FEW)
        both = Input(values + gates, [1, 2 * len(values)])
        table.case(f"glu {name}", glu, [both], [1.0], wide=glu_wide)
        if name in ("sigmoid", "gelu", "silu"):
            bias = Input([0.5] * (2 * len(values)))
            table.case(f"add_glu {name}", add_glu, [both, bias], [1.0], wide=add_glu_wide)


def gru(table):
    slots = [[], [], [], [], [], [], []]
    usual = [0.75, -0.5, 1, 0.25, -1.5, 0.5, 2]
    for slot in range(7):
        for value in PAIRED:
            for other in range(7):
                slots[other].append(value if other == slot else usual[other])
    h, gates = slots[0], slots[1:]
    dim = len(h)

    def cell(h, i, u):
        (ir, iz, new), (hr, hz, hn) = i.chunk(3, -1), u.chunk(3, -1)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(new + r * hn)
        return n + z * (h - n)

    inputs = [Input(h, [1, dim]), Input(sum(gates[:3], []), [1, 3 * dim]), Input(sum(gates[3:], []), [1, 3 * dim])]
    table.case("gru_gate", cell, inputs, [1.0], elementwise=False)


def rms(x, g, eps, features=None):
    return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5).clamp(min=eps) * g


def exact_layer_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    # Without what rounding left of equal numbers.
    centred = x - mean - (x - mean).mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w + b


NORMS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5), 2, False),
    "clamped_rms_norm": (lambda x, g: rms(x, g, 1e-8), 1, False),
    "rms_norm": (lambda x, g: F.rms_norm(x, x.shape[-1:], g, 1e-6), 1, False),
    "scale_norm": (lambda x, g: rms(x, g, 1e-5), 1, True),
}


def norms(table):
    for op, (function, parameters, single) in NORMS.items():

        centred = op == "layer_norm"

        def weights(width, special=None, at=0):
            sizes = [1] if single else [width] * parameters
            lists = [[1.5] if single else cycled(1.5, -2)(size) for size in sizes]
            if special is not None:
                lists[at][2 % len(lists[at])] = special
            return [Input(values) for values in lists]

        for name, row in rows():
            # A second row where parameters' sums over rows are of interest.
            x = row + ordinary(len(row)) if name in ("one_nan_40", "one_max_40") else row
            shape = [len(x) // len(row), len(row)]
            table.case(f"{op} {name}", function, [Input(x, shape), *weights(len(row))], wide=exact_layer_norm if centred else None)
        for special in ["max", "inf", "nan", 0]:
            for at in range(parameters):
                x = Input(ordinary(40), [1, 40])
                table.case(f"{op} weight {at} {special}", function, [x, *weights(40, special, at)])
        for g in ["max", "inf", "nan", "big"]:
            x = Input(ordinary(40) * 2, [2, 40])
            cotangent = [1.0, -0.5] * 20 + [g] + [0.5] * 39
            table.case(f"{op} g {g}", function, [x, *weights(40)], cotangent)

        def summed(x, residual, *rest, function=function):
            total = x + residual
            return torch.cat([total, function(total, *rest)], 0)

        exact = functools.partial(summed, function=exact_layer_norm if centred else function)

        for name in ["zeros", "sml", "max", "alternating_max", "one_max", "one_inf", "both_inf", "one_nan"]:
            row = PATTERNS[name](40)
            # The sum itself does not overflow: the norm is that of the rounded sum.
            residual = cycled("-0", 0)(40) if "max" in row[:2] else spiked((2, "max"))(40)
            inputs = [Input(row, [1, 40]), Input(residual, [1, 40]), *weights(40)]
            table.case(f"add_{op} {name}", summed, inputs, wide=exact)


def entmax(x):
    """Peters, Niculae and Martins: the largest support that its threshold lets in."""
    y = (x.double() if x.dtype == torch.float64 else x.float()).detach()
    y = (y - y.max(-1, keepdim=True).values) / 2
    ordered = y.sort(-1, descending=True).values
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype)
    mean, squares = ordered.cumsum(-1) / count, (ordered**2).cumsum(-1) / count
    delta = (1 - count * (squares - mean**2)) / count
    tau = mean - delta.clamp(min=0).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    tau = tau.gather(-1, (size - 1).clamp(min=0))
    return ((y - tau).clamp(min=0) ** 2).to(x.dtype)


class Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = entmax(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        root = y.sqrt()
        d = g * root
        return d - d.sum(-1, keepdim=True) / root.sum(-1, keepdim=True) * root


def row_ops(table):
    def keep(x):
        return ~(x < x.topk(min(3, x.shape[-1]), dim=-1).values[..., -1:])

    for name, row in rows():
        x = Input(row, [1, len(row)])
        constant = Input(row, [1, len(row)], grad=False)
        table.case(f"softmax {name}", lambda x: x.softmax(-1), [x], of_output=True)
        table.case(f"entmax15 {name}", Entmax.apply, [x], of_output=True)
        table.case(f"sum {name}", lambda x: x.sum(-1), [x], [1.0])
        table.case(f"mean {name}", lambda x: x.mean(-1), [x], [1.0])
        table.case(f"max {name}", lambda x: x.max(-1).values, [x], [1.0])
        table.case(f"argmax {name}", lambda x: x.argmax(-1), [constant])
        table.case(f"top_k_mask {name}", keep, [constant])
        for target in [0, len(row) - 1] if len(row) > 1 else [0]:
            inputs = [Input(row, [1, len(row)]), Input([target], kind="int")]
            of_rows = lambda x, t: F.cross_entropy(x if x.dtype == torch.float64 else x.float(), t)
            table.case(f"cross_entropy {name} {target}", of_rows, inputs, [1.0])
    for g in ["max", "inf", "nan"]:
        for op, function in {"softmax": lambda x: x.softmax(-1), "entmax15": Entmax.apply}.items():
            table.case(f"{op} g {g}", function, [Input(ordinary(40), [1, 40])], [0.5] * 33 + [g] + [1.0] * 6)
    masked = Input(["max" if i == 0 else "-max" if i % 3 else 0.5 for i in range(40)], [1, 40])
    table.case("softmax masked", lambda x: x.softmax(-1), [masked], of_output=True)
    table.case("entmax15 masked", Entmax.apply, [masked], of_output=True)
    for special in ["inf", "nan", "max"]:
        row = spiked((4, special))(40)
        inputs = [Input(row + ordinary(40), [2, 40]), Input([-100, 3], kind="int")]
        of_rows = lambda x, t: F.cross_entropy(x if x.dtype == torch.float64 else x.float(), t)
        table.case(f"cross_entropy ignored {special}", of_rows, inputs, [1.0])
    for g in ["max", "inf", "nan", 0]:
        inputs = [Input(ordinary(40), [1, 40]), Input([3], kind="int")]
        table.case(f"cross_entropy g {g}", of_rows, inputs, [g])
    for special in ["max", "big", "inf", "-inf", "nan", "den"]:
        x = Input([0.5, special, -1, 2, 1] * 3, [3, 5])
        table.case(f"sum_to {special}", lambda x: x.sum(0), [x], [1.0])
        table.case(f"sum rows {special}", lambda x: x.sum(0), [x], [1.0])


def cross_entropy_of_linear(table):
    def loss(x, w, b, t):
        logits = F.linear(x, w, b)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), t)

    for special in ["max", "-max", "big", "sml", "inf", "-inf", "nan"]:
        for slot in range(3):
            x, w, b = ordinary(10), ordinary(35), ordinary(7)
            [x, w, b][slot][1] = special
            inputs = [Input(x, [2, 5]), Input(w, [7, 5]), Input(b), Input([1, 0], kind="int")]
            table.case(f"linear_cross_entropy {slot} {special}", loss, inputs, [1.0])


def products(table):
    for special in ["max", "-max", "big", "sml", "den", "inf", "-inf", "nan"]:
        for m, k, n in [(3, 7, 5), (1, 67, 4), *([(2, 5, 33), (13, 3, 4)] if special in ("max", "inf", "nan") else [])]:
            a, b = ordinary(m * k), ordinary(k * n)
            a[k // 2] = special
            name = f"matmul {m}x{k}x{n} {special}"
            table.case(f"{name} left", torch.matmul, [Input(a, [m, k]), Input(b, [k, n])], [1.0, 0.5])
            a, b = ordinary(m * k), ordinary(k * n)
            b[n + 2] = special
            if k in (5, 67):
                table.case(f"{name} right", torch.matmul, [Input(a, [m, k]), Input(b, [k, n])], [1.0, 0.5])
        bias = ordinary(5)
        bias[1] = special
        inputs = [Input(ordinary(21), [3, 7]), Input(ordinary(35), [5, 7]), Input(bias)]
        table.case(f"linear {special} bias", F.linear, inputs, [1.0, 0.5])
        weight = ordinary(35)
        weight[8] = special
        inputs = [Input(ordinary(21), [3, 7]), Input(weight, [5, 7]), Input(ordinary(5))]
        table.case(f"linear {special} weight", F.linear, inputs, [1.0, 0.5])


def attention(table):
    def attend(q, k, v, bias=None, causal=False):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=0.5)

    def small(count):
        return [[0.5, -0.25, 1, -0.5, 0.75][i % 5] for i in range(count)]

    def case(name, special, values, shapes, at, function=attend, decode=False):
        lists = [small(math.prod(shape)) for shape in shapes]
        for position in at:
            lists[values][position] = special
        table.case(f"{name} {special}", function, [Input(v, s, grad=not decode) for v, s in zip(lists, shapes)], STEEP)

    # Of which no sums cancel.
    STEEP = (1.0, -0.5, 0.25, 2.0, -1.0)
    query, keys, one = [1, 1, 2, 4], [1, 1, 3, 4], [1, 1, 1, 4]
    for special in ["max", "-max", "big", "sml", "inf", "-inf", "nan"]:
        for slot, name in enumerate("qkv"):
            case(f"attention {name}", special, slot, [query, keys, keys], [1])
            case(f"attention_decode {name}", special, slot, [one, keys, keys], [1], decode=True)
        case("attention causal", special, 2, [keys] * 3, [9], lambda q, k, v: attend(q, k, v, causal=True))
        case("attention bias", special, 3, [query, keys, keys, [2, 3]], [1])
        case("attention bias row", special, 3, [query, keys, keys, [2, 3]], [0, 1, 2])


def copies(table):
    x = Input(VALUES * 2, [2, len(VALUES)])
    table.case("contiguous", lambda x: x.t().contiguous(), [x], [1.0, "inf", "nan", "max", "den"])
    table.case("cat", lambda a, b: torch.cat([a, b], 0), [x, x], [1.0, "inf", "nan", "max", "den"])
    near = [65519, 65520, 65536, 2.0**-25, 2.0**-24, 3 * 2.0**-25, 1 + 2.0**-11, 1 + 2.0**-9, 2.0**-133, 2.0**-134, 3.3953e38]
    # To f16 and bf16 by way of f32 these would round twice.
    twice = [1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40, 1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-11 - 2.0**-40]
    values = VALUES + [repr(v) for v in near + twice]
    for name, to in NAMES.items():
        # The value must be exact: it is what rounding is about.
        table.case(f"to_dtype {name}", lambda x, to=to: x.to(to), [Input(values)], [1.0, "inf", "nan", "max"], wide=lambda x: x * 1, exact=True)
    table.case("to_dtype bool", lambda x: x.to(torch.bool), [Input(values, grad=False)])
    whole = [0, "-0", 1, -1, 20.75, -20.75, 100, -100]
    table.case("to_dtype i64", lambda x: x.to(torch.int64), [Input(whole, grad=False)])
    # What PyTorch's loops leave undefined: as Rust's `as`.
    edges = Input(["inf", "-inf", "nan", "den", "-den"], grad=False)
    saturated = lambda x: torch.tensor([2**63 - 1, -(2**63), 0, 0, 0])
    table.case("to_dtype i64 saturated", saturated, [edges])


def gathers(table):
    values = VALUES * 2
    table_input = Input(values, [len(VALUES), 2])
    indices = [i % len(VALUES) for i in range(0, 60, 3)]
    function = lambda w, t: F.embedding(t, w)
    table.case("embedding", function, [table_input, Input(indices, kind="int")], [1.0, "max", "max", 0.5, "inf", "nan", "-inf", 1])

    def shift(x):
        moved = F.pad(x[..., : x.shape[-1] // 2], (0, 0, 1, -1), value=0.0)
        return torch.cat([moved, x[..., x.shape[-1] // 2 :]], -1)

    table.case("shift_tokens", shift, [Input(values, [1, len(VALUES), 2])], [1.0, "inf", "nan", "max"])

    def masked(x, m):
        left = x[..., : x.shape[-1] // 2].masked_fill(~m[..., None], 0.0)
        return torch.cat([F.pad(left, (0, 0, 1, -1), value=0.0), x[..., x.shape[-1] // 2 :]], -1)

    mask = Input([i % 2 == 0 for i in range(len(VALUES))], [1, len(VALUES)], kind="bool")
    table.case("shift_tokens masked", masked, [Input(values, [1, len(VALUES), 2]), mask], [1.0, "inf", "nan", "max"])

    def turned(x):
        angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.25, 0.0625], dtype=torch.float64)
        cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype if x.dtype == torch.float64 else torch.float32) for f in (torch.cos, torch.sin))
        wide = x if x.dtype == torch.float64 else x.float()
        a, b = wide.chunk(2, -1)
        return (wide * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)

    for special in VALUES[2:]:
        row = ordinary(18)
        row[0], row[7], row[16] = special, special, special
        table.case(f"rotary {special}", turned, [Input(row, [3, 6])], [1.0, "max" if special == "max" else 0.5])

    def bias(t):
        # Causal, four buckets, distances from 5 on in the last one: 0, 1, then logarithmic.
        distance = torch.arange(6)[:, None] - torch.arange(7)[None, :]
        distance = distance.clamp(min=0)
        far = 2 + (torch.log(distance.clamp(min=1) / 2.0) / math.log(5 / 2.0) * 2).floor().long()
        bucket = torch.where(distance < 2, distance, far.clamp(max=3))
        return t[bucket].permute(2, 0, 1) * 1.5

    for special in ["max", "big", "den", "inf", "-inf", "nan"]:
        inputs = [Input([0.5, special, 1, special, special, 2, -1, 0.25], [4, 2])]
        table.case(f"relative_position_bias {special}", bias, inputs, [1.0, "max", 0.5, "-max", 1, 1, "inf"])

    def waves(f):
        p = torch.arange(2, 7, dtype=torch.float64)[:, None] * f.double()
        return torch.cat([p.sin(), p.cos()], -1).to(f.dtype)

    table.case("sinusoid", waves, [Input([0, "-0", "den", "sml", 1, 20, "inf", "-inf", "nan"], grad=False)])
    for name, function, inputs in [
        ("dropout", lambda x: x * 1, [Input(VALUES)]),
        ("dropout_add", lambda x, r: x + r, [Input(product(PAIRED)[0]), Input(product(PAIRED)[1])]),
    ]:
        table.case(name, function, inputs, [1.0, "inf", "nan", "max"])


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = Table()
    for part in [pointwise, activations, gru, norms, row_ops, cross_entropy_of_linear, products, attention, copies, gathers]:
        part(table)
    head = [
        "# Classes and values of every op at extreme inputs, from PyTorch; make.py writes this file and explains it.",
        f"# torch {torch.__version__.split('+')[0]}",
    ]
    text = "\n".join(head + table.lines) + "\n"
    Path(__file__).with_name("table.txt").write_text(text)
    print(f"torch {torch.__version__}: {len(text)} bytes, {sum(l.startswith('case') for l in table.lines)} cases")
    print(f"{table.uneven} elements where PyTorch's vector loops have another class than its scalar ones")


if __name__ == "__main__":
    sys.exit(main())
