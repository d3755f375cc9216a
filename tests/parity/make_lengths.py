#!/usr/bin/env python3
"""Writes the cases of lengths: sequences beyond `max_seq_len`, odd rotations, and texts whose rows end at different steps.

    pip install torch x-transformers==0.22.0 safetensors
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from x_transformers import (
    AutoregressiveWrapper, ContinuousTransformerWrapper, Decoder, Encoder, TransformerWrapper, XTransformer,
)

FOLDER = Path(__file__).parent
KINDS = {"Decoder": Decoder, "Encoder": Encoder}


def build(config):
    config = {key: value for key, value in config.items() if key != "call"}
    name = config.pop("model")
    if name == "XTransformer":
        return XTransformer(**config)
    if name == "AutoregressiveWrapper":
        return AutoregressiveWrapper(build(config.pop("net")), **config)
    layers = dict(config.pop("attn_layers"))
    layers = KINDS[layers.pop("kind")](**layers)
    wrapper = {"TransformerWrapper": TransformerWrapper, "ContinuousTransformerWrapper": ContinuousTransformerWrapper}[name]
    return wrapper(attn_layers=layers, **config)


def save(path, tensors):
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)


def case(name, config, inputs, seed=0):
    """Weights and inputs in f32, outputs and gradients of the same numbers in f64, rounded to f32."""
    torch.manual_seed(seed)
    model = build(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # The frequencies of a rotation are f32 whatever the model is.
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save(folder / "weights.safetensors", model.state_dict())
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    call = config.get("call")
    model.double()
    for key, value in model.named_buffers():
        module, leaf = model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        setattr(module, leaf, buffers[key])
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    if call:
        options = {key: value for key, value in call.items() if key != "method"}
        order = ["seq_in", "seq_out_start", "start_tokens"]
        with torch.no_grad():
            out = model.generate(*[wide[key] for key in order if key in wide], **options)
        save(folder / "inputs.safetensors", inputs)
        save(folder / "expected.safetensors", {"out": out})
        return out
    x = wide["x"]
    if x.is_floating_point():
        x.requires_grad_()
    out = model(x, **({"mask": wide["mask"]} if "mask" in wide else {}))
    expected = {}
    if out.dim() == 0:
        out.backward()
        expected["loss"] = out.reshape(1)
    else:
        inputs["cotangent"] = torch.randn(out.shape)
        out.backward(inputs["cotangent"].double())
        expected["out"] = out
    expected |= {f"grad.{key}": value.grad for key, value in model.named_parameters() if value.grad is not None}
    if x.grad is not None:
        expected["grad.input.x"] = x.grad
    expected = {key: value.float() for key, value in expected.items() if value.abs().max() > 0}
    save(folder / "inputs.safetensors", inputs)
    save(folder / "expected.safetensors", expected)


def layers(kind="Decoder", **options):
    return {"kind": kind, "dim": 8, "depth": 1, "heads": 2, "attn_dim_head": 32, "ff_mult": 1, **options}


def wrapper(most, tokens=12, **options):
    return {"model": "TransformerWrapper", "num_tokens": tokens, "max_seq_len": most, "attn_layers": layers(**options)}


def tokens(*shape, most=12):
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(sum(shape)))


def main():
    rotary = {"rotary_pos_emb": True}
    case("length_rotary_longer", wrapper(4, **rotary), {"x": tokens(2, 9)})
    case("length_rel_pos_longer", wrapper(4, rel_pos_bias=True), {"x": tokens(2, 9)})
    case("length_none_longer", wrapper(4) | {"use_pos_emb": False}, {"x": tokens(1, 7)})
    case("length_max_0", wrapper(0, **rotary), {"x": tokens(2, 6)})
    continuous = {"model": "ContinuousTransformerWrapper", "max_seq_len": 0, "dim_in": 3, "dim_out": 2}
    case("length_continuous_0", continuous | {"attn_layers": layers("Encoder", **rotary)}, {"x": torch.randn(2, 5, 3)})
    loss = {"model": "AutoregressiveWrapper", "net": wrapper(4, **rotary)}
    case("length_loss_longer", loss, {"x": tokens(2, 10)})
    case("rotary_odd_33", wrapper(8, rotary_emb_dim=33, attn_dim_head=40, **rotary), {"x": tokens(2, 6)})
    case("rotary_odd_default", wrapper(8, attn_dim_head=70, **rotary), {"x": tokens(1, 6)})
    case("rotary_odd_95", wrapper(8, rotary_emb_dim=95, attn_dim_head=96, **rotary), {"x": tokens(1, 6)})
    greedy = {"method": "generate", "filter_thres": 0.99, "seq_len": 8}
    net = wrapper(8, attn_dim_head=8)
    prompt = torch.tensor([[1, 3, 2], [1, 2, 4], [3, 3, 3]])
    ending = {"model": "AutoregressiveWrapper", "net": net}
    # A model whose rows have a token in common, and one that is only in the second.
    for seed in range(1000):
        free = case("generate_ends_all", ending | {"call": greedy}, {"start_tokens": prompt}, seed).tolist()
        rows = [begin + row for begin, row in zip(prompt.tolist(), free)]
        common = [token for token in free[0] if all(token in row for row in rows) and token not in prompt[0]]
        lone = [token for token in free[1][:4] if token not in rows[0] + [1, 2, 3, 4]]
        if common and lone and free[0] != free[1]:
            break
    common, lone = common[0], lone[0]
    case("generate_ends_all", ending | {"call": greedy | {"eos_token": common}}, {"start_tokens": prompt}, seed)
    case("generate_ends_one", ending | {"call": greedy | {"eos_token": lone}}, {"start_tokens": prompt}, seed)
    case("generate_ends_prompt", ending | {"call": greedy | {"eos_token": 3}}, {"start_tokens": prompt}, seed)
    held = torch.tensor([[3, 1], [2, 3]])
    case("generate_ends_held", ending | {"call": greedy | {"eos_token": 3}, "pad_value": 7}, {"start_tokens": held})
    flat = {"call": greedy | {"eos_token": 1, "seq_len": 3}}
    case("generate_ends_flat", ending | flat, {"start_tokens": torch.tensor([1, 2])})
    window = {"model": "AutoregressiveWrapper", "net": wrapper(0, **rotary), "call": greedy | {"seq_len": 12}}
    case("generate_max_0", window, {"start_tokens": prompt})
    both = {
        "model": "XTransformer", "dim": 8, "enc_num_tokens": 12, "enc_depth": 1, "enc_heads": 2, "enc_max_seq_len": 8,
        "dec_num_tokens": 12, "dec_depth": 1, "dec_heads": 2, "dec_max_seq_len": 8, "call": greedy | {"eos_token": 2},
    }
    case("generate_ends_x", both, {"seq_in": tokens(2, 6), "seq_out_start": torch.tensor([[2], [1]])})


if __name__ == "__main__":
    main()
