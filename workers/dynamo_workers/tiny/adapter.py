"""A random LoRA adapter for the tiny Llama, so that adapters are served with nothing downloaded.

In the format of PEFT, as engines read it: `adapter_config.json` and `adapter_model.safetensors`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_workers.tiny.model import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MADE_BY,
    write_safetensors,
)

RANK = 8
_OUTPUTS = {"q_proj": HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
"""The layers it changes, and the size of what they put out."""


def write_adapter(out: Path, *, seed: int = 0) -> None:
    """Writes an adapter to the folder `out` (made if missing; same seed, same bytes)."""
    out.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "made_by": MADE_BY,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(_OUTPUTS),
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    random = np.random.default_rng(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, size in _OUTPUTS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes = {"lora_A": (RANK, HIDDEN), "lora_B": (size, RANK)}
            for half, shape in shapes.items():
                values = random.standard_normal(shape).astype(np.float32) * np.float32(0.3)
                weights[f"{prefix}.{half}.weight"] = values
    write_safetensors(out / "adapter_model.safetensors", weights)
