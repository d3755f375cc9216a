#!/usr/bin/env python3
"""Writes losses, gradients and three steps of sentence-transformers on tests/files/bert, for `tests/train/embedder.rs`.

Needs torch, transformers and sentence-transformers. Dropout is off: its masks are drawn otherwise here. Cases: pairs, triplets
with hard negatives, and pairs with scores; the second has a dense layer and a LayerNorm after the pooling.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentence_transformers import losses, models
from transformers import BertModel

HERE = Path(__file__).resolve().parent
RATE, STEPS, ROWS = 0.01, 3, 4


class Encoder(torch.nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.bert = BertModel.from_pretrained(
            HERE.parent / "bert", add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        self.tail = torch.nn.Sequential(*modules)

    def forward(self, features):
        features = dict(features)
        out = self.bert(features["input_ids"], attention_mask=features["attention_mask"])
        features["token_embeddings"] = out.last_hidden_state
        return self.tail(features)


def texts(lengths):
    """Rows of tokens, padded."""
    rows = [torch.randint(5, 40, (length,)) for length in lengths]
    ids, mask = torch.zeros(ROWS, max(lengths), dtype=torch.long), torch.zeros(ROWS, max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return rows, {"input_ids": ids, "attention_mask": mask}


def dense(dim):
    layers = [models.Dense(dim, 12, activation_function=torch.nn.Tanh()), models.LayerNorm(12)]
    torch.nn.init.normal_(layers[1].norm.weight, mean=1.0, std=0.2)
    return layers


torch.manual_seed(3)
dim = json.loads((HERE.parent / "bert/config.json").read_text())["hidden_size"]
expected = {}
for name, columns, pooling, more in (
    ("pairs", 2, "mean", lambda: [models.Normalize()]),
    ("triplets", 3, "cls", lambda: dense(dim)),
    ("scores", 2, "mean", lambda: []),
):
    model = Encoder([models.Pooling(dim, pooling_mode=pooling), *more()])
    model.train()
    loss = (losses.CoSENTLoss if name == "scores" else losses.MultipleNegativesRankingLoss)(model)
    features = []
    for column in range(columns):
        rows, feature = texts([[7, 4, 9, 6], [3, 8, 5, 5], [6, 6, 2, 7]][column])
        features.append(feature)
        expected |= {f"{name}.row.{column}.{i}": row for i, row in enumerate(rows)}
    labels = torch.tensor([0.75, 0.25, 1.0, 0.25]) if name == "scores" else torch.arange(ROWS)
    expected[f"{name}.labels"] = labels
    for key, parameter in model.named_parameters():
        if key.startswith("tail"):
            expected[f"{name}.initial.{key}"] = parameter.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    values = []
    for step in range(STEPS):
        optimizer.zero_grad()
        out = loss(features, labels)
        out.backward()
        values.append(out.item())
        if step == 0:
            expected[f"{name}.vectors"] = model(features[0])["sentence_embedding"].detach().clone()
            for key, parameter in model.named_parameters():
                if key.startswith("tail") or key in (
                    "bert.embeddings.word_embeddings.weight",
                    "bert.encoder.layer.0.attention.self.query.weight",
                    "bert.encoder.layer.1.output.dense.weight",
                ):
                    expected[f"{name}.grad.{key}"] = parameter.grad.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    expected[f"{name}.losses"] = torch.tensor(values)
    expected[f"{name}.trained"] = model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").detach().clone()
    print(name, values)
save_file({key: value.contiguous() for key, value in expected.items()}, HERE / "expected.safetensors")
