#!/usr/bin/env python3
"""Writes losses, gradients and three steps of BertForSequenceClassification on tests/files/bert, for `tests/train/classifier.rs`.

Needs torch and transformers. Dropout is off: its masks are drawn otherwise here.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

HERE = Path(__file__).resolve().parent
RATE, STEPS = 0.01, 3

expected = {}
for name, classes in (("classes", 3), ("values", 1)):
    torch.manual_seed(classes)
    config = BertConfig.from_pretrained(
        HERE.parent / "bert", num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager"
    )
    model = BertForSequenceClassification.from_pretrained(HERE.parent / "bert", config=config)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    torch.nn.init.normal_(model.bert.pooler.dense.weight, std=0.3)
    model.train()
    lengths = [7, 4, 9, 6]
    rows = [torch.randint(5, 40, (length,)) for length in lengths]
    tokens, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    labels = torch.tensor([2, 0, 1, 1]) if classes > 1 else torch.tensor([0.5, -1.0, 2.0, 0.25])
    for key, parameter in model.named_parameters():
        if key.startswith(("classifier", "bert.pooler")):
            expected[f"{name}.initial.{key}"] = parameter.detach().clone()
    expected |= {f"{name}.row.{i}": row for i, row in enumerate(rows)}
    expected[f"{name}.labels"] = labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        out = model(tokens, attention_mask=mask, labels=labels)
        out.loss.backward()
        losses.append(out.loss.item())
        if step == 0:
            expected[f"{name}.logits"] = out.logits.detach().clone()
            for key in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight",
                        "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.1.output.dense.weight"):
                expected[f"{name}.grad.{key}"] = model.get_parameter(key).grad.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    expected[f"{name}.losses"] = torch.tensor(losses)
    print(name, losses)
save_file({key: value.contiguous() for key, value in expected.items()}, HERE / "expected.safetensors")
