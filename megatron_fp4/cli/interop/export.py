"""`megatron-fp4 checkpoint export A --to DIRECTORY`: its arguments, and the settings in the checkpoint.

    --format hf                   for transformers, in high precision
    --format compressed-tensors   the 4-bit codes of training, for vLLM, SGLang and transformers
    --format modelopt             the same, for TensorRT-LLM and what reads its files

Not here: what is written (interop/export).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.cli.schema import build, twin
from megatron_fp4.data.text.special import choice_of
from megatron_fp4.interop.export.assemble import CARD, ExportOptions, assemble
from megatron_fp4.interop.export.calibrate import input_amax
from megatron_fp4.interop.export.folder import write_folder
from megatron_fp4.interop.export.plan import Requantize
from megatron_fp4.interop.export.quantized import ExportFormat
from megatron_fp4.storage.local import local_path
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.evaluation.inputs import INPUTS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """What `checkpoint export` takes beside the checkpoint and --to."""
    parser.add_argument("--format", choices=[form.value for form in ExportFormat], default=ExportFormat.hf.value)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all tensors that are not codes")
    parser.add_argument("--part-gb", type=float, default=5.0, help="largest file of weights (default: 5)")
    parser.add_argument("--force", action="store_true", help="replace what is in the directory")
    parser.add_argument("--tokenizer", type=local_path, help="its file, where it is not where the run had it")
    parser.add_argument("--no-tokenizer", action="store_true", help="write none")
    for role, meaning in (("eos", "ends"), ("bos", "begins"), ("pad", "pads")):
        parser.add_argument(f"--{role}", metavar="TOKEN_OR_ID", help=f"the token that {meaning} a text")
    parser.add_argument(
        "--requantize",
        choices=[way.value for way in Requantize],
        help="codes of this kind instead of those of training, with the error of each kind in a table",
    )
    parser.add_argument(
        "--precision-at", type=int, metavar="STEP", help="codes as in this step of the run, not as in the last one"
    )
    parser.add_argument(
        "--activations",
        type=int,
        metavar="TOKENS",
        help="quantize activations too (W4A4), with global scales measured on so many tokens of the run's held-out set",
    )


def export(checkpoint: Path, args: argparse.Namespace) -> None:
    """Write, and print what was written. Raises ValueError and OSError for what cannot be done."""
    if not 0 < args.part_gb < math.inf:
        raise ValueError(f"--part-gb must be above 0 and finite, got {args.part_gb:g}")
    options = ExportOptions(
        form=ExportFormat(args.format),
        dtype=DTYPES[args.dtype],
        part_bytes=int(args.part_gb * 1e9),
        requantize=Requantize(args.requantize) if args.requantize else None,
        precision_at=args.precision_at,
        tokenizer=str(args.tokenizer) if args.tokenizer else None,
        with_tokenizer=not args.no_tokenizer,
        choice=choice_of(args),
    )
    state = read_state(checkpoint)
    config = _settings(state["meta"].get("config"), checkpoint, whole=options.form.coded)
    inputs = _input_scales(checkpoint, state, args.activations, options)
    assembled = assemble(checkpoint, state, config, options, inputs)
    written = write_folder(
        assembled.export, args.to, force=args.force, last=(CARD, lambda: assembled.card(args.to.name))
    )
    print(f"written: {args.to}, {written}")
    for sentence in assembled.about:
        print(f"  {sentence}")
    if assembled.export.errors is not None:
        print(assembled.export.errors.table())


def _input_scales(
    checkpoint: Path, state: Mapping[str, Any], tokens: int | None, options: ExportOptions
) -> dict[str, Tensor] | None:
    """Scales of training, where they were static; else see `calibrate.input_amax`. None where activations stay as they
    are. Raises ValueError without the run."""
    static = {name: torch.tensor(amax) for name, amax in state["meta"].get(INPUTS, {}).items()}
    if static and tokens is not None:
        raise ValueError(
            f"--activations {tokens}: the run multiplied with static scales of its inputs (amax_scope=static), and they"
            " are what is written; leave --activations out"
        )
    if tokens is None:
        return static if static and options.form.coded else None
    if not options.form.coded or tokens < 1:
        raise ValueError(
            f"--activations {tokens}: a number of tokens, of a format with codes (compressed-tensors, modelopt)"
        )
    run_dir = checkpoint.absolute().parent.parent
    try:
        config = load_run_config(run_dir)
    except ValueError as error:
        raise ValueError(f"--activations reads the held-out set of the run, and {error}") from None
    return input_amax(config, state["step"], tokens)


def _settings(settings: Any, checkpoint: Path, *, whole: bool) -> RunConfig:
    """The run's settings as the checkpoint has them; only model and data unless `whole`. Raises ValueError."""
    if not isinstance(settings, Mapping) or not settings.keys() >= {"model", "data"}:
        raise ValueError(f"{checkpoint} has no settings of a model, so it cannot be exported")
    wanted = settings if whole else {name: settings[name] for name in ("model", "data")}
    try:  # enums are stored by name, which omegaconf reads
        merged = OmegaConf.merge(OmegaConf.structured(twin(RunConfig)), OmegaConf.create(dict(wanted)))
        values: Any = OmegaConf.to_container(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"the settings in {checkpoint} are not of this version: {error}") from None
    return build(RunConfig, values)
