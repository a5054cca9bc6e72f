"""A checkpoint as files of others: `config.json` and `model.safetensors`, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_fp4.checkpoint import offline
from megatron_fp4.interop.config import transformers_config
from megatron_fp4.interop.families import to_transformers
from megatron_fp4.models.config import ModelConfig

TRANSFORMERS_VERSION = "5.23.0"


def write_transformers(checkpoint: Path, config: ModelConfig, seq_length: int, to: Path, dtype: torch.dtype) -> Path:
    """Write the master weights, rounded to `dtype`, as a model of transformers into the empty folder `to`; returns it.

    Raises ValueError where transformers has no such architecture, and if `to` is not empty.
    """
    from safetensors.torch import save_file

    values = transformers_config(config, seq_length=seq_length)
    keys = [info.key for info in offline.list_tensors(checkpoint) if info.kind == "master"]
    masters = {key.split("/", 1)[1]: tensor for key, tensor in offline.read_tensors(checkpoint, keys).items()}
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in to_transformers(config, masters).items()}
    to.mkdir(parents=True, exist_ok=True)
    if any(to.iterdir()):
        raise ValueError(f"{to} is not empty; choose another output directory")
    values |= {"dtype": str(dtype).removeprefix("torch."), "transformers_version": TRANSFORMERS_VERSION}
    (to / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    save_file(tensors, str(to / "model.safetensors"), metadata={"format": "pt"})
    return to
