"""A checkpoint as files of others: `config.json` and `model.safetensors`, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.checkpoint import offline
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.config import transformers_config
from megatron_fp4.models.foreign.families import to_transformers

TRANSFORMERS_VERSION = "5.23.0"
ALWAYS_FP32 = (".A_log", ".dt_bias", ".D")
"""Ends of the names that stay FP32 in a file of another type, as in training: three numbers a head of Mamba-2."""


def write_transformers(checkpoint: Path, config: ModelConfig, seq_length: int, to: Path, dtype: torch.dtype) -> Path:
    """Write the master weights, `rounded` to `dtype`, as a model of transformers into the empty folder `to`.

    Returns `to`. Raises ValueError where transformers has no such architecture, and if `to` is not empty.
    """
    from safetensors.torch import save_file

    values = transformers_config(config, seq_length=seq_length)
    keys = [info.key for info in offline.list_tensors(checkpoint) if info.kind == "master"]
    masters = {key.split("/", 1)[1]: tensor for key, tensor in offline.read_tensors(checkpoint, keys).items()}
    tensors = rounded(to_transformers(config, masters), dtype)
    to.mkdir(parents=True, exist_ok=True)
    if any(to.iterdir()):
        raise ValueError(f"{to} is not empty; choose another output directory")
    values |= {"dtype": str(dtype).removeprefix("torch."), "transformers_version": TRANSFORMERS_VERSION}
    (to / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    save_file(tensors, str(to / "model.safetensors"), metadata={"format": "pt"})
    return to


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Masters of any shapes in the type of the file, but for the ALWAYS_FP32."""
    return {
        name: tensor.to(torch.float32 if name.endswith(ALWAYS_FP32) else dtype).contiguous()
        for name, tensor in tensors.items()
    }
