"""A LoRA adapter of a tiny base model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def make_adapter(base: Path, directory: Path) -> Path:
    """A LoRA adapter of the base model that changes its answers, and the base model with it merged in: `adapter` and
    `merged` of `directory`, which is returned."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rank, scale, tensors = 4, 2.0, {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            a = torch.randn(rank, module.in_features) * 0.2
            b = torch.randn(module.out_features, rank) * 0.2
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight.data += scale * b @ a
    model.save_pretrained(directory / "merged")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": ["q_proj", "v_proj"],
              "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}  # fmt: skip
    (directory / "adapter").mkdir(parents=True)
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter" / "adapter_model.safetensors")
    return directory
