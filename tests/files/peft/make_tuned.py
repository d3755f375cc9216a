#!/usr/bin/env python3
"""Writes three steps of PEFT on examples whose prompts do not count, for `tests/train/examples.rs`: needs torch, transformers and peft.

Rows are padded, labels of prompts and padding are -100, and the loss of a step is the mean over all of its targets, in two
micro-batches, as `transformers.Trainer` computes it.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
STEPS, RATE = 3, 0.02

torch.manual_seed(1)
base = AutoModelForCausalLM.from_pretrained(HERE.parent / "llama", dtype=torch.float32)
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
expected = {f"initial.{name}": p.detach().clone() for name, p in trained.items()}
lengths, prompts = [7, 12, 4, 9], [3, 5, 1, 8]
rows = [torch.randint(0, 40, (length,)) for length in lengths]
expected |= {f"row.{i}": row for i, row in enumerate(rows)}
expected["prompts"] = torch.tensor(prompts)
width = max(lengths)
tokens, labels = torch.zeros(4, width, dtype=torch.long), torch.full((4, width), -100)
for i, (row, prompt) in enumerate(zip(rows, prompts)):
    tokens[i, : len(row)] = row
    labels[i, prompt : len(row)] = row[prompt:]
optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
count = (labels[:, 1:] != -100).sum()
losses = []
for step in range(STEPS):
    optimizer.zero_grad()
    total = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        loss = model(tokens[part], labels=labels[part], num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    losses.append(total)
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.step()
expected["losses"] = torch.tensor(losses)
expected |= {f"trained.{name}": p.detach().clone() for name, p in trained.items()}
save_file({key: value.contiguous() for key, value in expected.items()}, HERE / "tuned.safetensors")
print(losses, count)
