"""A tiny random Llama, so that a real engine runs with nothing downloaded.

The weights mean nothing: the model exists to be served, routed to and cached. They are written
straight in the safetensors format (8 bytes little-endian header length, a JSON header with dtype,
shape and byte range of each tensor, then the raw values), so that torch is not needed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_workers.tiny.files import BOS, END, EOS, FOLDER, SPECIAL_TOKENS, TOKENIZER_FILES

HIDDEN = 64
INTERMEDIATE = 128
LAYERS = 2
HEADS = 2
KV_HEADS = 1
HEAD_DIM = 32  # the smallest that vLLM's attention kernels on CPU accept
MAX_POSITIONS = 32768

MADE_BY = "dynamo model tiny"
"""Stands in config.json under `made_by`: marks a folder that may be rewritten."""


def is_tiny_model(folder: Path) -> bool:
    """Whether `folder` holds a model, or an adapter for it, that this package wrote."""
    for name in ("config.json", "adapter_config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("made_by") == MADE_BY:
            return True
    return False


def write_model(out: Path, *, seed: int = 0) -> None:
    """Writes model and tokenizer to the folder `out` (made if missing; same seed, same bytes)."""
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = len(
        json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    )
    end_ids = [SPECIAL_TOKENS.index(END), SPECIAL_TOKENS.index(EOS)]
    bos_id = SPECIAL_TOKENS.index(BOS)
    _write_json(out / "config.json", _config(vocabulary, bos_id, end_ids))
    _write_json(out / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": end_ids})
    _write_json(
        out / "special_tokens_map.json",
        {
            "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (BOS, END)],
            "bos_token": BOS,
            "eos_token": END,
        },
    )
    for name in TOKENIZER_FILES:
        shutil.copyfile(FOLDER / name, out / name)
    write_safetensors(out / "model.safetensors", _weights(vocabulary, seed))


def _config(vocabulary: int, bos_id: int, end_ids: list[int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "dtype": "bfloat16",
        "eos_token_id": end_ids,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "made_by": MADE_BY,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def _weights(vocabulary: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Float32 tensors by their names in a Llama checkpoint, shapes (out, in)."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> NDArray[np.float32]:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    weights = {"model.embed_tokens.weight": normal(vocabulary, HIDDEN, scale=1.0)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{name}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{name}.self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN, scale=0.1),
            f"{name}.self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN, scale=0.1),
            f"{name}.self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN, scale=0.1),
            f"{name}.self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM, scale=0.1),
            f"{name}.mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN, scale=0.1),
            f"{name}.mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN, scale=0.1),
            f"{name}.mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE, scale=0.1),
        }
    weights["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    # The normed hidden state has length 8, so logits spread by 4: greedy choices are far apart
    # and do not flip with the batch that a request happens to run in.
    weights["lm_head.weight"] = normal(vocabulary, HIDDEN, scale=0.5)
    return weights


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest even (finite values only)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint16] = (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype("<u2")
    return rounded


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Writes `tensors` as bfloat16 in the safetensors format, in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs = []
    offset = 0
    for name, values in tensors.items():
        blob = to_bfloat16(values).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format pads the header so that the values are aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
