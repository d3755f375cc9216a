#!/usr/bin/env python3
"""Writes small GGUF files, and what other programs make of them, for tests/io/gguf.rs.

    pip install torch transformers gguf safetensors

    blocks.gguf      random blocks of every quantised type, with scales up to the limits of their type
    rounded.safetensors
                     values, and the blocks that they are rounded to
    mixture.gguf     a Llama whose tensors are of as many types, as those of `Q4_K_M` and its like are
    biases.gguf      a Llama with biases everywhere and factors of the rotation, and metadata that llama.cpp allows
    qwen2.gguf       a Qwen2 with biases and a head of its own; qwen2-0000N-of-00003.gguf: the same in three files
    rotations.safetensors
                     what the model in llama3/ computes when its config asks for other rotations, and what
                     biases.gguf and qwen2.gguf do with other metadata

The package gguf makes the values of blocks, transformers the outputs of models.
"""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

FOLDER = Path(__file__).parent
KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
# Where the f16 scales of a block lie.
SCALES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
    "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}
VOCABULARY = 40


def random_blocks(kind, rows, columns, random, scale):
    """Blocks of random integers, with scales that give values of about `scale`."""
    values, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = random.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in SCALES[kind]:
        numbers = (scale * random.uniform(0.5, 1.5, blocks.shape[:2])).astype(np.float16)
        blocks[..., at:at + 2] = numbers[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def blocks():
    random = np.random.default_rng(3)
    # The largest number, the smallest ones, zeros of both signs, and usual ones; as many as a K type has blocks here.
    extremes = np.array([0x7BFF, 0xFBFF, 0x0001, 0x83FF, 0x0000, 0x8000, 0x2C00, 0xB400], dtype=np.uint16)
    writer = gguf.GGUFWriter(FOLDER / "blocks.gguf", "llama")
    expected = {}
    for kind in KINDS:
        values, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
        drawn = random_blocks(kind, 2, 1024, random, 0.01).reshape(-1, size)
        for n, block in enumerate(drawn):
            for at in SCALES[kind]:
                block[at:at + 2] = np.array([extremes[(n + at // 2) % len(extremes)]]).view(np.uint8)
        drawn = drawn.reshape(2, -1)
        writer.add_tensor(kind, drawn, raw_dtype=Kind[kind])
        expected[kind] = torch.from_numpy(gguf.quants.dequantize(drawn, Kind[kind]))
    finish(writer)
    save_file(expected, FOLDER / "blocks.safetensors")


def rounded():
    random = np.random.default_rng(5)
    values = random.standard_normal((8, 256)).astype(np.float32)
    # A block of zeros, one of a single value, and ties.
    values[0, :32], values[0, 32:64], values[1] = 0, -0.75, np.round(values[1] * 4) / 4
    tensors = {kind: gguf.quants.quantize(values, Kind[kind]) for kind in ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]}
    save_file({"values": torch.from_numpy(values)} | {kind: torch.from_numpy(blocks) for kind, blocks in tensors.items()},
              FOLDER / "rounded.safetensors")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(weight, heads):
    """Rows of queries and keys as files of the architecture llama have them: features that rotate together are neighbours."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tokens():
    return torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits[:, -4:].contiguous()


def metadata(writer, architecture, config, **also):
    add = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads, **also,
    }
    for key, value in add.items():
        key = f"{architecture}.{key}"
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-3)
    writer.add_float32(f"{architecture}.rope.freq_base", 500.0)
    # Room for the metadata that tests put in its place.
    writer.add_string("zz.filler", "." * 600)


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def write_model(path, architecture, model, kinds, writer=None, **also):
    """Writes a model whose parameters become those of the file, which has blocks of these types; the others are f32."""
    config, random = model.config, np.random.default_rng(11)
    writer = writer or gguf.GGUFWriter(path, architecture)
    metadata(writer, architecture, config, **also)
    permuted = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if architecture == "llama" else {}
    state = model.state_dict()

    def add(name, theirs):
        parameter, short = state[theirs], name.split(".")[-2]
        kind = kinds.get(short, "F32") if name.endswith("weight") and parameter.dim() == 2 else "F32"
        if kind == "F32":
            values = parameter.numpy()
        else:
            rows, columns = parameter.shape
            # About the values of a weight that keeps the size of what it is applied to.
            drawn = random_blocks(kind, rows, columns, random, 1.0)
            scale = 1.0 / math.sqrt(columns) / gguf.quants.dequantize(drawn, Kind[kind]).std()
            drawn = drawn.reshape(rows, -1, gguf.GGML_QUANT_SIZES[Kind[kind]][1])
            for at in SCALES[kind]:
                numbers = drawn[..., at:at + 2].copy().view(np.float16) * np.float16(scale)
                drawn[..., at:at + 2] = numbers.view(np.uint8)
            drawn = drawn.reshape(rows, -1)
            writer.add_tensor(name, drawn, raw_dtype=Kind[kind])
            values = torch.from_numpy(gguf.quants.dequantize(drawn, Kind[kind]))
            if short in permuted:
                heads = permuted[short]
                values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
            parameter.copy_(values)
            return
        writer.add_tensor(name, neighbours(values, permuted[short]) if short in permuted else values)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    for layer in range(config.num_hidden_layers):
        theirs = f"model.layers.{layer}"
        add(f"blk.{layer}.attn_norm.weight", f"{theirs}.input_layernorm.weight")
        add(f"blk.{layer}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight")
        for name, module in NAMES.items():
            for part in ["weight", "bias"]:
                if f"{theirs}.{module}.{part}" in state:
                    add(f"blk.{layer}.{name}.{part}", f"{theirs}.{module}.{part}")
    if not config.tie_word_embeddings:
        add("output.weight", "lm_head.weight")
    finish(writer)


def unsettle(model):
    """Moves parameters away from the small ones and the constants of an initialisation."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel() + len(name)))
        parameter.data += 0.2 * noise
    return model.eval().requires_grad_(False)


def options(**also):
    return {
        "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
        "attn_implementation": "eager", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **also,
    }


def mixture():
    model = LlamaForCausalLM(LlamaConfig(**options(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32,
        num_hidden_layers=1,
    ))).eval().requires_grad_(False)
    kinds = {
        "token_embd": "Q4_K", "attn_q": "Q5_K", "attn_k": "Q6_K", "attn_v": "Q3_K", "attn_output": "IQ4_NL",
        "ffn_gate": "Q2_K", "ffn_up": "IQ4_XS", "ffn_down": "Q5_0", "output": "Q6_K",
    }
    also = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    write_model(FOLDER / "mixture.gguf", "llama", model, kinds, **also)
    return {"mixture": logits(model)}


class Factors(torch.nn.Module):
    """Divides the frequencies of a rotation."""

    def __init__(self, inner, factors):
        super().__init__()
        inner.inv_freq /= factors
        self.inner = inner

    def forward(self, *arguments, **keywords):
        return self.inner(*arguments, **keywords)


def with_rope(model, rope, factors=None):
    """The same parameters with another rotation."""
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": {"rope_theta": 500.0, **rope}})
    config._attn_implementation = "eager"
    other = type(model)(config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    if factors is not None:
        other.model.rotary_emb = Factors(other.model.rotary_emb, factors)
    return other


def yarn(factor, original, **also):
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **also}


def biases():
    torch.manual_seed(5)
    model = unsettle(LlamaForCausalLM(LlamaConfig(**options(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=True,
    ))))
    factors = torch.tensor([1.0, 3.25, 8.0, 8.0])
    kinds = {name: "Q5_1" for name in ["token_embd", "attn_q", "attn_k", "ffn_down"]}
    writer = gguf.GGUFWriter(FOLDER / "biases.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.add_uint64("general.hash", 2**64 - 1)
    writer.add_uint64("general.parameter_count", 12345)
    writer.add_int8("general.small", -5)
    writer.add_custom_alignment(64)
    write_model(FOLDER / "biases.gguf", "llama", model, kinds, writer, **{
        "attention.head_count_kv": [2, 2], "feed_forward_length": [32, 32], "attention.head_count": [4, 4],
    })
    linear, plain = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}
    return {
        "biases.folder": logits(model),
        "biases": logits(with_rope(model, plain, factors)),
        "biases.linear": logits(with_rope(model, linear, factors)),
        "biases.yarn": logits(with_rope(model, yarn(4.0, 16), factors)),
    }


def qwen2():
    torch.manual_seed(6)
    model = unsettle(Qwen2ForCausalLM(Qwen2Config(**options(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
    ))))
    kinds = {name: "Q8_0" for name in ["token_embd", "attn_q", "attn_output", "ffn_up", "output"]}
    write_model(FOLDER / "qwen2.gguf", "qwen2", model, kinds)
    parts = gguf.GGUFWriter(FOLDER / "qwen2.gguf", "qwen2", split_max_tensors=11)
    parts.add_string("only.in.the.first", "part")
    write_model(FOLDER / "qwen2.gguf", "qwen2", model, kinds, parts)
    # The factor of attention that llama.cpp's keys give: one of their own times that of the paper.
    own, log = 1.25, 0.1 * math.log(4.0)
    return {
        "qwen2": logits(model),
        "qwen2.yarn": logits(with_rope(model, yarn(4.0, 16))),
        "qwen2.yarn_keys": logits(with_rope(model, yarn(
            4.0, 16, beta_fast=8.0, beta_slow=0.5, attention_factor=own * (log + 1.0) / (0.5 * log + 1.0),
        ))),
    }


def rotations():
    """Other rotations for the parameters in llama3/, by the keys that its config.json gets."""
    cases = {
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}},
        "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 300.0},
        "yarn": {"rope_parameters": {"rope_theta": 500.0, **yarn(4.0, 16)}},
        "yarn_without_original": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0}},
        "yarn_betas": {"rope_parameters": {"rope_theta": 500.0, **yarn(8.0, 12, beta_fast=4.0, beta_slow=0.25)}},
        "yarn_attention": {"rope_parameters": {"rope_theta": 500.0, **yarn(4.0, 16, attention_factor=1.5)}},
        "yarn_mscale": {"rope_parameters": {"rope_theta": 500.0, **yarn(4.0, 16, mscale=2.0, mscale_all_dim=0.5)}},
        "yarn_one_mscale": {"rope_parameters": {"rope_theta": 500.0, **yarn(4.0, 16, mscale=2.0)}},
        "yarn_whole": {"rope_parameters": {"rope_theta": 20.0, **yarn(4.0, 32, beta_fast=3.0, truncate=False)}},
        "yarn_short": {"rope_parameters": {"rope_theta": 500.0, **yarn(8.0, 4)}},
        "yarn_null": {"rope_parameters": {"rope_theta": 500.0, **yarn(None, 8)}},
        "both_keys": {
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 700.0,
        },
        "empty": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 50.0}},
    }
    found = {}
    base = json.loads((FOLDER / "llama3" / "config.json").read_text())
    base.pop("rope_parameters")
    state = LlamaForCausalLM.from_pretrained(FOLDER / "llama3").state_dict()
    for name, keys in cases.items():
        model = LlamaForCausalLM(LlamaConfig(**{**base, **json.loads(json.dumps(keys))})).eval()
        model.load_state_dict(state)
        found[f"llama3.{name}"] = logits(model)
    (FOLDER / "rotations.json").write_text(json.dumps(cases, indent=1) + "\n")
    # Windows: all layers of a Qwen2 or none of them.
    base = json.loads((FOLDER / "qwen2" / "config.json").read_text())
    state = AutoModelForCausalLM.from_pretrained(FOLDER / "qwen2").state_dict()
    for name, keys in {
        "all": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        "none": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        "types": {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
        "off": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    }.items():
        for key in ["layer_types", "sliding_window", "use_sliding_window", "max_window_layers"]:
            base.pop(key, None)
        model = Qwen2ForCausalLM(Qwen2Config(**{**base, **keys})).eval()
        model.load_state_dict(state)
        found[f"qwen2.window.{name}"] = logits(model)
    return found


blocks()
rounded()
save_file({"tokens": tokens(), **mixture(), **biases(), **qwen2(), **rotations()}, FOLDER / "rotations.safetensors")
