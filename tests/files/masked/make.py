#!/usr/bin/env python3
"""Writes a small BERT with a masked-LM head, and its losses, gradients and three steps, for `tests/train/masked_lm.rs`.

Needs torch and transformers. Dropout is off: its masks are drawn otherwise here. The tokens that are masked are given.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

HERE = Path(__file__).resolve().parent
RATE, STEPS, MASK = 0.01, 3, 4

torch.manual_seed(5)
config = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
)
model = BertForMaskedLM(config)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
model.tie_weights()
model.save_pretrained(HERE)
(HERE / "generation_config.json").unlink(missing_ok=True)
model.train()
labels = torch.randint(5, 40, (4, 9))
tokens = labels.clone()
targets = torch.full((4, 9), -100)
for row, at, token in ((0, 1, MASK), (0, 5, MASK), (1, 0, 17), (2, 8, MASK), (2, 3, None), (2, 4, MASK)):
    targets[row, at] = labels[row, at]
    if token is not None:
        tokens[row, at] = token
expected = {"tokens": tokens, "targets": targets}
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
losses = []
for step in range(STEPS):
    optimizer.zero_grad()
    out = model(tokens, labels=targets)
    out.loss.backward()
    losses.append(out.loss.item())
    if step == 0:
        expected["predicted"] = out.logits.argmax(-1)
        for key, parameter in model.named_parameters():
            if key.startswith("cls") or key in (
                "bert.embeddings.word_embeddings.weight",
                "bert.encoder.layer.0.attention.self.query.weight",
                "bert.encoder.layer.1.output.dense.weight",
            ):
                expected[f"grad.{key}"] = parameter.grad.clone()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
expected["losses"] = torch.tensor(losses)
expected["trained"] = model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").detach().clone()
print(losses, [key for key in expected if key.startswith("grad")])
save_file({key: value.contiguous() for key, value in expected.items()}, HERE / "expected.safetensors")
