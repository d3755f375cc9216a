#!/usr/bin/env python3
"""Writes small models of Hugging Face transformers and what it computes with them, for tests/io/pretrained.rs.

    pip install torch transformers gguf safetensors

    llama/       a Llama in two files of safetensors with their index, with biases and grouped heads
    bert/        a BERT with pooled head in two files of `torch.save` with their index
    llama3/      a Llama whose rotation is stretched as that of Llama 3.1
    mistral/     a Mistral that looks back a few tokens
    qwen2/       a Qwen2 with tied embeddings, whose rotation is stretched linearly
    llama.gguf   a Llama with tied embeddings in blocks of eight bits, with a byte-level tokenizer and tokens of a chat
"""

import json
import shutil
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
    Qwen2ForCausalLM,
)

FOLDER = Path(__file__).parent


def expect(path, tensors):
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def drawn(limit, shape):
    return torch.randint(0, limit, shape, generator=torch.Generator().manual_seed(4))


def unsettle(model):
    """Moves weights away from the small ones and the constants of an initialisation."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data += 0.2 * noise


def of_llama(model, tokens, n):
    out = model(input_ids=tokens, output_hidden_states=True)
    continued = model.generate(tokens[:1], max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {
        "tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool), "hidden": out.hidden_states[-1],
        "logits": out.logits[:, -4:], "continued": continued[:, tokens.shape[1]:],
    }


@torch.no_grad()
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, max_position_embeddings=32, rms_norm_eps=1e-3, attention_bias=True, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager", eos_token_id=3,
    )
    model = LlamaForCausalLM(config).eval()
    unsettle(model)
    folder = FOLDER / "llama"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="16KB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    expect(folder / "expected.safetensors", of_llama(model, drawn(40, (2, 9)), 12))


@torch.no_grad()
def like_llama(name, config, model, **options):
    torch.manual_seed(2)
    model = model(config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=32, attn_implementation="eager", eos_token_id=3, **options,
    )).eval()
    unsettle(model)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    expect(folder / "expected.safetensors", of_llama(model, drawn(40, (2, 9)), 12))


def sentences(model, tokens, mask):
    """One vector for each row, of one token type, in three ways."""
    out = model(input_ids=tokens, attention_mask=mask.long())
    mean = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return {"mean": mean, "first": out.last_hidden_state[:, 0], "pooler": out.pooler_output}


@torch.no_grad()
def bert():
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, attn_implementation="eager",
    )
    model = BertModel(config).eval()
    unsettle(model)
    folder = FOLDER / "bert"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config.save_pretrained(folder)
    # As transformers wrote them before it wrote safetensors alone.
    named = list(model.state_dict().items())
    half = len(named) // 2
    places = {}
    for number, part in enumerate([named[:half], named[half:]], 1):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(dict(part), folder / name)
        places.update({key: name for key, _ in part})
    index = {"metadata": {"total_size": sum(4 * tensor.numel() for _, tensor in named)}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")
    tokens, types = drawn(40, (2, 9)), drawn(2, (2, 9))
    mask = torch.arange(9)[None] < torch.tensor([9, 6])[:, None]
    out = model(input_ids=tokens, token_type_ids=types, attention_mask=mask.long())
    expect(folder / "expected.safetensors", {
        "tokens": tokens, "token_types": types, "mask": mask, "hidden": out.last_hidden_state, "pooled": out.pooler_output,
        **sentences(model, tokens, mask),
    })


def neighbours(weight, heads):
    """Rows of queries and keys as GGUF has them: features that rotate together are neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_file():
    dim, inner, heads, kv_heads, depth = 32, 64, 4, 2, 2
    texts = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġt", "he", "Ġthe"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + texts
    path = FOLDER / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(depth)
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(1000.0)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_layer_norm_rms_eps(1e-4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * len(texts))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(7)

    def add(name, *shape, scale):
        values = (scale * random.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + values)
            return
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = neighbours(values, heads if "attn_q" in name else kv_heads)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), dim, scale=1.0)
    add("output_norm.weight", dim, scale=0.2)
    for layer in range(depth):
        add(f"blk.{layer}.attn_norm.weight", dim, scale=0.2)
        add(f"blk.{layer}.ffn_norm.weight", dim, scale=0.2)
        add(f"blk.{layer}.attn_q.weight", dim, dim, scale=0.3)
        add(f"blk.{layer}.attn_k.weight", dim // heads * kv_heads, dim, scale=0.3)
        add(f"blk.{layer}.attn_v.weight", dim // heads * kv_heads, dim, scale=0.3)
        add(f"blk.{layer}.attn_output.weight", dim, dim, scale=0.3)
        add(f"blk.{layer}.ffn_gate.weight", inner, dim, scale=0.3)
        add(f"blk.{layer}.ffn_up.weight", inner, dim, scale=0.3)
        add(f"blk.{layer}.ffn_down.weight", dim, inner, scale=0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # transformers reads a folder with the file in it.
        shutil.copy(path, folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        expect(FOLDER / "llama.safetensors", of_llama(model, drawn(len(tokens), (1, 9)), 12))


llama()
like_llama("llama3", LlamaConfig, LlamaForCausalLM, rope_parameters={
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
})
like_llama("mistral", MistralConfig, MistralForCausalLM, sliding_window=4)
like_llama("qwen2", Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True, rope_parameters={
    "rope_type": "linear", "rope_theta": 300.0, "factor": 2.0,
})
bert()
gguf_file()
