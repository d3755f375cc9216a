#!/usr/bin/env python3
"""Writes adapters of tests/files/llama by PEFT, with logits, losses and gradients: needs torch, transformers and peft.

Each adapter trains for three steps of AdamW first, so that its updates are not zero.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
ADAPTERS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all": dict(r=2, lora_alpha=3, use_rslora=True, target_modules="all-linear"),
    "half": dict(r=3, lora_alpha=6, target_modules=["gate_proj", "o_proj"]),
    "dora": dict(r=2, lora_alpha=4, use_dora=True, target_modules=["k_proj", "up_proj", "down_proj"]),
}

expected = {}
for name, options in ADAPTERS.items():
    torch.manual_seed(len(name))
    base = AutoModelForCausalLM.from_pretrained(HERE.parent / "llama", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**options, task_type="CAUSAL_LM"))
    tokens = torch.randint(0, 40, (2, 12))
    place = lambda key: key.replace(".default", "").removesuffix(".weight") if "magnitude" in key else key.replace(".default", "")
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected[f"{name}.initial.{place(key)}"] = parameter.detach().clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for step in range(4):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        if step == 3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "llama"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    expected |= {f"{name}.tokens": tokens, f"{name}.losses": torch.tensor(losses), f"{name}.logits": out.logits.detach()}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected[f"{name}.grad.{place(key)}"] = parameter.grad
    merged = model.merge_and_unload()
    expected[f"{name}.merged"] = merged(tokens).logits.detach()
save_file({key: value.contiguous().clone() for key, value in expected.items()}, HERE / "expected.safetensors")
