#!/usr/bin/env python3
"""Writes losses, gradients and three steps of PyTorch x-transformers on images and pairs, for `tests/train/vision.rs`.

Run it with x-transformers 0.22.0, which writes 1.safetensors, and with 2.31, which writes 2.safetensors. Needs torch too.
"""

from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer

HERE = Path(__file__).resolve().parent
RATE, STEPS = 0.01, 3
MAJOR = "2" if version("x-transformers").startswith("2") else "1"
expected = {}


def unsettled(model):
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def record(name, model, loss_of):
    """Weights before, loss and gradients of the first step, losses of all."""
    tied = dict(model.named_parameters())
    expected.update({f"{name}.initial.{key}": value.detach().clone() for key, value in tied.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            expected.update({f"{name}.grad.{key}": value.grad.clone() for key, value in tied.items() if value.grad is not None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    expected[f"{name}.losses"] = torch.tensor(losses)
    print(name, losses)


def of_logits(logits, target):
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), target[:, 1:], ignore_index=-100)


def images():
    torch.manual_seed(0)
    options = dict(num_register_tokens=2) if MAJOR == "2" else {}
    model = unsettled(ViTransformerWrapper(
        image_size=12, patch_size=4, num_classes=3, attn_layers=Encoder(dim=16, depth=2, heads=2, attn_dim_head=8), **options
    ))
    pixels = torch.randint(0, 256, (4, 12, 12, 3), dtype=torch.uint8)
    labels = torch.tensor([2, 0, 1, 1])
    given = ((pixels.float() / 255) - 0.5) / 0.5
    given = given.permute(0, 3, 1, 2)
    expected.update({"images.pixels": pixels, "images.labels": labels, "images.given": given.contiguous()})
    expected["images.logits"] = model(given).detach()
    record("images", model, lambda: torch.nn.functional.cross_entropy(model(given), labels))


def pairs():
    torch.manual_seed(1)
    model = unsettled(XTransformer(
        dim=16, enc_num_tokens=24, enc_depth=1, enc_heads=2, enc_attn_dim_head=8, enc_max_seq_len=12,
        dec_num_tokens=24, dec_depth=1, dec_heads=2, dec_attn_dim_head=8, dec_max_seq_len=12, tie_token_emb=True,
    ))
    lengths = [(7, 5), (4, 8), (9, 3), (6, 6)]
    source, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.bool)
    # A token begins each target and ends it; what follows does not count.
    target = torch.full((4, 10), -100)
    for i, (n, m) in enumerate(lengths):
        source[i, :n], mask[i, :n] = torch.randint(1, 24, (n,)), True
        row = torch.tensor([0, *torch.randint(1, 24, (m,)).tolist(), 0])
        target[i, : m + 2] = row
        expected[f"pairs.source.{i}"], expected[f"pairs.target.{i}"] = source[i, :n].clone(), row[1:-1].clone()

    def loss():
        if MAJOR == "2":
            return model(source, target, mask=mask)
        # 0.22 reads the values that it ignores as tokens.
        context = model.encoder(source, mask=mask, return_embeddings=True)
        return of_logits(model.decoder.net(target[:, :-1].clamp(min=0), context=context, context_mask=mask), target)

    record("pairs", model, loss)


def captions():
    torch.manual_seed(2)
    encoder = ViTransformerWrapper(image_size=12, patch_size=4, attn_layers=Encoder(dim=16, depth=1, heads=2, attn_dim_head=8))
    decoder = TransformerWrapper(num_tokens=24, max_seq_len=12, attn_layers=Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, cross_attend=True))
    model = unsettled(torch.nn.ModuleDict({"encoder": encoder, "decoder": torch.nn.ModuleDict({"net": decoder})}))
    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    given = (((pixels.float() / 255) - 0.5) / 0.5).permute(0, 3, 1, 2)
    target = torch.full((3, 9), -100)
    for i, m in enumerate((4, 7, 2)):
        row = torch.tensor([0, *torch.randint(1, 24, (m,)).tolist(), 0])
        target[i, : m + 2] = row
        expected[f"captions.target.{i}"] = row[1:-1].clone()
    expected["captions.pixels"] = pixels

    def loss():
        context = encoder(given, return_embeddings=True)
        return of_logits(decoder(target[:, :-1].clamp(min=0), context=context), target)

    record("captions", model, loss)


images()
pairs()
captions()
save_file({key: value.contiguous() for key, value in expected.items()}, HERE / f"{MAJOR}.safetensors")
