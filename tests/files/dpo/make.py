#!/usr/bin/env python3
"""Writes losses, rewards, gradients and three steps of trl's DPOTrainer on tests/files/llama, for `tests/train/dpo.rs`.

Needs torch, transformers, peft, trl and datasets. All weights, with a frozen copy as the reference, and a LoRA adapter, whose base
is the reference.
"""

import copy
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).resolve().parent
RATE, STEPS, BETA = 0.01, 3, 0.1

inner = Tokenizer(WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
inner.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w3", pad_token="w0", unk_token="w0")
torch.manual_seed(7)
words = lambda count: " ".join(f"w{i}" for i in torch.randint(4, 40, (count,)).tolist())
data = [
    {"prompt": words(prompt) + " ", "chosen": words(chosen), "rejected": words(rejected)}
    for prompt, chosen, rejected in ((3, 4, 2), (5, 1, 6), (2, 3, 3))
]
expected = {}
for name in ("all", "adapter"):
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(HERE.parent / "llama", dtype=torch.float32)
    # Farther from the reference than at the start of a run, where all rewards are 0.
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), beta=BETA, per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=True,
    )
    trainer = DPOTrainer(
        model=model, ref_model=copy.deepcopy(model) if name == "all" else None, args=args, train_dataset=Dataset.from_list(data),
        processing_class=tokenizer, peft_config=lora if name == "adapter" else None,
    )
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    model = trainer.model
    model.train()
    trained = {key.replace(".default", ""): p for key, p in model.named_parameters() if p.requires_grad}
    if name == "adapter":
        expected |= {f"initial.{key}": p.detach().clone() for key, p in trained.items()}
    else:
        expected |= {key: inputs[key] for key in ("input_ids", "attention_mask", "completion_mask")}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    losses, accuracies, margins, rewards = [], [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        trainer._metrics["train"].clear()
        loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
        losses.append(loss.item())
        metrics = trainer._metrics["train"]
        accuracies.append(metrics["rewards/accuracies"][-1])
        margins.append(metrics["rewards/margins"][-1])
        rewards.append([metrics["rewards/chosen"][-1], metrics["rewards/rejected"][-1]])
        if step == 1:
            keys = list(trained) if name == "adapter" else [
                "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight",
                "model.layers.1.mlp.down_proj.weight",
            ]
            expected |= {f"{name}.grad.{key}": trained[key].grad.clone() for key in keys}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    expected |= {
        f"{name}.losses": torch.tensor(losses), f"{name}.accuracies": torch.tensor(accuracies),
        f"{name}.margins": torch.tensor(margins), f"{name}.rewards": torch.tensor(rewards),
    }
    if name == "adapter":
        expected |= {f"trained.{key}": p.detach().clone() for key, p in trained.items()}
    print(name, losses, accuracies, margins)
save_file({key: value.contiguous() for key, value in expected.items()}, HERE / "expected.safetensors")
