#!/usr/bin/env python3
"""Writes the cases of this folder, in the form of tests/parity/README.md: options beyond x-transformers 0.22.

Golden values are those of today's x-transformers (made with 2.31.10) and of Hugging Face transformers (5.24.0), in
float64 from float32 weights. Names are turned into those of this crate. x-transformers' LayerNorm without a bias is
replaced by PyTorch's with one, which 0.22 has.

    pip install torch x-transformers transformers safetensors && tests/parity_today/make.py
"""

import json
import re
from pathlib import Path

import torch
import x_transformers.x_transformers as xt
from safetensors.torch import save_file
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

# Both compute their softmax in float32, whatever the model's dtype.
torch.nn.functional.softmax = lambda x, dim=-1, dtype=None: torch.softmax(x, dim)

FOLDER = Path(__file__).parent
TOKENS, LENGTH, BATCH = 19, 7, 2


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.2
            # In f32 steps, so that f32 weights in the file are the ones that were computed with.
            parameter.copy_((parameter.float() + noise).to(parameter.dtype))


def grouped(key, value):
    """Query head h uses key head h / 2 here, h % 2 in x-transformers: heads 0, 2, 1, 3 of theirs are 0, 1, 2, 3 here."""
    order = torch.tensor([0, 2, 1, 3])
    if key.endswith("to_q.weight"):
        return value.reshape(4, 8, -1)[order].reshape(32, -1).contiguous()
    if key.endswith("to_out.weight"):
        return value.reshape(-1, 4, 8)[:, order].reshape(-1, 32).contiguous()
    return value


def write(name, config, model, rename, run, inputs, turn=lambda key, value: value):
    """`rename` gives this crate's name of a parameter, `turn` its values."""
    randomise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            # Otherwise the row of the padding token has no gradient.
            module.padding_idx = None
    model.double().eval()
    out = run(model)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    (out * cotangent.double()).sum().backward()
    weights, expected = {}, {"out": out.detach().float().contiguous()}
    for key, parameter in model.named_parameters():
        new = rename(key)
        weights[new] = turn(new, parameter.detach().float().contiguous())
        if parameter.grad is not None and parameter.grad.abs().sum() > 0:
            expected[f"grad.{new}"] = turn(new, parameter.grad.float().contiguous())
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "weights.safetensors")
    save_file(inputs | {"cotangent": cotangent}, folder / "inputs.safetensors")
    save_file(expected, folder / "expected.safetensors")


def tokens():
    return torch.randint(0, TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def mask():
    kept = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    kept[1, 4:] = False
    return kept


def biased_norms(module):
    for name, child in module.named_children():
        if isinstance(child, xt.LayerNorm):
            setattr(module, name, torch.nn.LayerNorm(child.gamma.shape[0]))
        else:
            biased_norms(child)


def today(key):
    key = re.sub(r"\.ff\.0\.", ".net.0.", key)
    key = re.sub(r"\.ff\.\d\.", ".net.3.", key)
    return key.replace("attn_layers.final_norm.", "norm.").replace("token_emb.emb.", "token_emb.")


def x_transformers(name, kind, layers, ours=None, wrapper=None, our_wrapper=None, with_mask=False):
    """`ours` and `our_wrapper`: keywords of this crate where they differ, or where the defaults do."""
    common = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8}
    wrapper = wrapper or {}
    model = xt.TransformerWrapper(
        num_tokens=TOKENS, max_seq_len=9, attn_layers=getattr(xt, kind)(**common, **layers, verbose=False), **wrapper
    )
    biased_norms(model)
    config = {
        "model": "TransformerWrapper",
        "num_tokens": TOKENS,
        "max_seq_len": 9,
        "logits_bias": False,
        **(wrapper if our_wrapper is None else our_wrapper),
        "attn_layers": {"kind": kind, **common, "attn_out_bias": False, **(layers if ours is None else ours)},
    }
    x = tokens()
    inputs = {"x": x} | ({"mask": mask()} if with_mask else {})
    run = lambda model: model(x, mask=mask()) if with_mask else model(x)
    turn = {"turn": grouped} if layers.get("attn_kv_heads") == 2 else {}
    write(name, config, model, today, run, inputs, **turn)


x_transformers("kv_heads", "Decoder", {"attn_kv_heads": 2})
x_transformers("kv_heads_one_mem_kv", "Decoder", {"attn_kv_heads": 1, "attn_num_mem_kv": 2})
# Padded queries see nothing here, as in 0.22, but everything in today's: the mean is over the others.
x_transformers(
    "kv_heads_encoder_mask", "Encoder", {"attn_kv_heads": 2}, wrapper={"average_pool_embed": True}, with_mask=True
)
x_transformers("ff_swish", "Decoder", {"ff_swish": True})
x_transformers("ff_swish_glu", "Decoder", {"ff_swish": True, "ff_glu": True})
x_transformers("ff_no_bias", "Decoder", {"ff_no_bias": True})
x_transformers("post_emb_norm", "Encoder", {}, wrapper={"post_emb_norm": True})
x_transformers("average_pool", "Encoder", {}, wrapper={"average_pool_embed": True}, with_mask=True)
x_transformers("weight_tie_layers", "Decoder", {"weight_tie_layers": True})
x_transformers(
    "weight_tie_layers_post_norm",
    "Encoder",
    {"weight_tie_layers": True, "pre_norm": False},
    ours={"weight_tie_layers": True, "pre_norm": False, "final_norm": "none"},
)
x_transformers(
    "final_norm_none", "Decoder", {"pre_norm_has_final_norm": False}, ours={"final_norm": "none"}
)
x_transformers(
    "final_norm_rms", "Decoder", {"use_rmsnorm": True, "norm_add_unit_offset": False}, ours={"use_rmsnorm": True, "final_norm": "same"}
)

def rotary_case(name, theirs, ours, wider):
    common = {"dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 34 if wider else 32}
    layers = xt.Decoder(**common, rotary_pos_emb=True, rotary_emb_dim=32, verbose=False, **theirs)
    model = xt.TransformerWrapper(num_tokens=TOKENS, max_seq_len=9, attn_layers=layers)
    biased_norms(model)
    ours = {"rotary_pos_emb": True, "rotary_emb_dim": 32, "rotary_qk_only": True, "rotary_interleaved": True, **ours}
    config = {
        "model": "TransformerWrapper",
        "num_tokens": TOKENS,
        "max_seq_len": 9,
        "logits_bias": False,
        "attn_layers": {"kind": "Decoder", **common, "attn_out_bias": False, **ours},
    }
    x = tokens()
    write(name, config, model, today, lambda model: model(x), {"x": x})


rotary_case("rotary_interleaved", {}, {}, False)
rotary_case("rotary_interleaved_part", {}, {}, True)
rotary_case("rotary_interleaved_mem_kv", {"attn_num_mem_kv": 2}, {"attn_num_mem_kv": 2}, False)
# Their base is rescaled: 10000 · 4^(32/30).
rotary_case("rotary_base", {"rotary_base_rescale_factor": 4.0}, {"rotary_base": 10000 * 4.0 ** (32 / 30)}, False)
rotary_case("rotary_interpolation_factor", {"rotary_interpolation_factor": 4.0}, {"rotary_interpolation_factor": 4.0}, False)


# Hugging Face's models.

COMMON = dict(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=9)
BERT_LAYER = {
    "attention.self.query": "0.1.to_q",
    "attention.self.key": "0.1.to_k",
    "attention.self.value": "0.1.to_v",
    "attention.output.dense": "0.1.to_out",
    "attention.output.LayerNorm": "0.0.2",
    "intermediate.dense": "1.1.net.0.0",
    "output.dense": "1.1.net.3",
    "output.LayerNorm": "1.0.2",
}


def bert_name(key, depth=2):
    key = key.removeprefix("bert.")
    start, end = key.rsplit(".", 1)
    table = {
        "embeddings.word_embeddings": "token_emb",
        "embeddings.position_embeddings": "pos_emb.emb",
        "embeddings.token_type_embeddings": "token_type_emb",
        "embeddings.LayerNorm": "post_emb_norm",
        "pooler.dense": "pooler",
        "cls.predictions": "mlm_head",
        "cls.predictions.transform.dense": "mlm_head.dense",
        "cls.predictions.transform.LayerNorm": "mlm_head.norm",
    }
    if start in table:
        return f"{table[start]}.{end}"
    layer, rest = re.fullmatch(r"encoder\.layer\.(\d+)\.(.*)", start).groups()
    place, rest = BERT_LAYER[rest].split(".", 1)
    index = 2 * int(layer) + int(place)
    if index == 2 * depth - 1 and rest == "0.2":
        return f"norm.{end}"
    return f"attn_layers.layers.{index}.{rest}.{end}"


def bert_config(activation, extra):
    return {
        "model": "TransformerWrapper",
        "num_tokens": TOKENS,
        "max_seq_len": 9,
        "post_emb_norm": True,
        "num_token_types": 3,
        "scale_pos_emb": False,
        **extra,
        "attn_layers": {
            "kind": "Encoder", "dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "pre_norm": False,
            "norm_eps": 1e-3, "attn_qkv_bias": True, "ff_mult": 1.5, **activation,
        },
    }


def bert_inputs():
    types = torch.randint(0, 3, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    return {"x": tokens(), "token_types": types, "mask": mask()}


def hugging(model, inputs):
    given = {"input_ids": inputs["x"], "token_type_ids": inputs.get("token_types"), "attention_mask": inputs["mask"].long()}
    return model(**{key: value for key, value in given.items() if value is not None})


torch.manual_seed(0)
config = BertConfig(**COMMON, type_vocab_size=3, layer_norm_eps=1e-3, attn_implementation="eager")
full = {"x": bert_inputs()["x"], "token_types": bert_inputs()["token_types"], "mask": torch.ones(BATCH, LENGTH, dtype=torch.bool)}
write(
    "bert_mlm", bert_config({}, {"tie_embedding": True, "mlm_head": True}), BertForMaskedLM(config), bert_name,
    lambda model: hugging(model, full).logits, full,
)
config.hidden_act = "gelu_new"
write(
    "bert_gelu_tanh", bert_config({"ff_gelu_tanh": True}, {"return_only_embed": True}), BertModel(config, add_pooling_layer=False), bert_name,
    lambda model: hugging(model, full).last_hidden_state, full,
)

def albert_name(key):
    key = key.removeprefix("albert.")
    start, end = key.rsplit(".", 1)
    layer = "encoder.albert_layer_groups.0.albert_layers.0."
    table = {
        "embeddings.word_embeddings": "token_emb",
        "embeddings.position_embeddings": "pos_emb.emb",
        "embeddings.token_type_embeddings": "token_type_emb",
        "embeddings.LayerNorm": "post_emb_norm",
        "encoder.embedding_hidden_mapping_in": "project_emb",
        layer + "attention.query": "attn_layers.layers.0.1.to_q",
        layer + "attention.key": "attn_layers.layers.0.1.to_k",
        layer + "attention.value": "attn_layers.layers.0.1.to_v",
        layer + "attention.dense": "attn_layers.layers.0.1.to_out",
        layer + "attention.LayerNorm": "attn_layers.layers.0.0.2",
        layer + "ffn": "attn_layers.layers.1.1.net.0.0",
        layer + "ffn_output": "attn_layers.layers.1.1.net.3",
        layer + "full_layer_layer_norm": "attn_layers.layers.1.0.2",
        "predictions": "mlm_head",
        "predictions.dense": "mlm_head.dense",
        "predictions.LayerNorm": "mlm_head.norm",
    }
    return f"{table[start]}.{end}"


albert = AlbertConfig(**COMMON, embedding_size=6, type_vocab_size=3, layer_norm_eps=1e-3, hidden_act="gelu", attn_implementation="eager")
config = bert_config({"weight_tie_layers": True, "final_norm": "none"}, {"emb_dim": 6, "tie_embedding": True, "mlm_head": True})
write("albert_mlm", config, AlbertForMaskedLM(albert), albert_name, lambda model: hugging(model, full).logits, full)


def llama_name(key):
    key = key.removeprefix("model.")
    table = {"embed_tokens.weight": "token_emb.weight", "norm.weight": "norm.g", "lm_head.weight": "to_logits.weight"}
    if key in table:
        return table[key]
    layer, rest = re.fullmatch(r"layers\.(\d+)\.(.*)", key).groups()
    place, name = {
        "input_layernorm.weight": (0, "0.0.g"),
        "self_attn.q_proj.weight": (0, "1.to_q.weight"),
        "self_attn.k_proj.weight": (0, "1.to_k.weight"),
        "self_attn.v_proj.weight": (0, "1.to_v.weight"),
        "self_attn.o_proj.weight": (0, "1.to_out.weight"),
        "post_attention_layernorm.weight": (1, "0.0.g"),
        "mlp.proj.weight": (1, "1.net.0.proj.weight"),
        "mlp.down_proj.weight": (1, "1.net.3.weight"),
    }[rest]
    return f"attn_layers.layers.{2 * int(layer) + place}.{name}"


class Gated(torch.nn.Module):
    """Llama's feedforward with both of its first layers in one, as here."""

    def __init__(self, dim, inner):
        super().__init__()
        self.proj = torch.nn.Linear(dim, 2 * inner, bias=False)
        self.down_proj = torch.nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        up, gate = self.proj(x).chunk(2, dim=-1)
        return self.down_proj(up * torch.nn.functional.silu(gate))


llama = LlamaConfig(
    **COMMON | {"hidden_size": 64}, num_key_value_heads=1, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=False,
    attn_implementation="eager",
)
class Angles(torch.nn.Module):
    """Llama's angles, which are computed in float32 there, in float64 from the same frequencies."""

    def __init__(self, frequencies):
        super().__init__()
        self.frequencies = frequencies

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequencies.double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


model = LlamaForCausalLM(llama)
model.model.rotary_emb = Angles(model.model.rotary_emb.inv_freq.clone())
# Llama's own norm goes through float32.
model.model.norm = torch.nn.RMSNorm(64, eps=1e-3)
for layer in model.model.layers:
    layer.mlp = Gated(64, 24)
    layer.input_layernorm = torch.nn.RMSNorm(64, eps=1e-3)
    layer.post_attention_layernorm = torch.nn.RMSNorm(64, eps=1e-3)
config = {
    "model": "TransformerWrapper", "num_tokens": TOKENS, "max_seq_len": 9, "logits_bias": False,
    "attn_layers": {
        "kind": "Decoder", "dim": 64, "depth": 2, "heads": 2, "attn_dim_head": 32, "attn_kv_heads": 1, "attn_out_bias": False,
        "use_rmsnorm": True, "norm_eps": 1e-3, "final_norm": "same", "rotary_pos_emb": True, "rotary_emb_dim": 32,
        "rotary_qk_only": True, "rotary_base": 500.0, "ff_mult": 0.375, "ff_glu": True, "ff_swish": True, "ff_no_bias": True,
    },
}
x = tokens()
write("llama", config, model, llama_name, lambda model: model(input_ids=x).logits, {"x": x})
