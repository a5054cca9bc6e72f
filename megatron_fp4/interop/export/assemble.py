"""From a checkpoint and what the user asks for to an `Export`: everything is decided, and refused, here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.data.text.special import UNSAID, SpecialChoice
from megatron_fp4.interop.export.calibrate import check_inputs, source_of_scales
from megatron_fp4.interop.export.card import CardFacts, losses_of, model_card
from megatron_fp4.interop.export.folder import Export, json_bytes
from megatron_fp4.interop.export.phase import tensors_as_trained
from megatron_fp4.interop.export.plan import (
    Requantize,
    dense_tensors,
    unquantized_modules,
)
from megatron_fp4.interop.export.quantized import ExportFormat, config_sections, quantization_files
from megatron_fp4.interop.export.text import ExportedText, exported_text, without_tokenizer
from megatron_fp4.interop.export.weights import Masters, QuantizationErrors
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.config import transformers_config
from megatron_fp4.train.config import RunConfig

TRANSFORMERS_VERSION = "5.23.0"
CARD = "README.md"


@dataclass(frozen=True)
class ExportOptions:
    """What the user asks for. precision_at: a step in whose precision the codes are made, None: that of the last one.

    tokenizer: its file, None: that of the run's settings; with_tokenizer: False leaves it out.
    """

    form: ExportFormat = ExportFormat.hf
    dtype: torch.dtype = torch.bfloat16
    part_bytes: int = 5 * 10**9
    requantize: Requantize | None = None
    precision_at: int | None = None
    tokenizer: str | None = None
    with_tokenizer: bool = True
    choice: SpecialChoice = UNSAID

    def __post_init__(self) -> None:
        if not self.form.coded and (self.requantize or self.precision_at is not None):
            raise ValueError(
                "--requantize and --precision-at choose how weights become codes, and --format hf writes none"
            )
        if self.part_bytes < 1:
            raise ValueError(f"--part-gb must be above 0, got {self.part_bytes / 1e9:g}")


@dataclass(frozen=True, eq=False)
class Assembled:
    """An export that may begin, and the sentences that say what it is. name: of the model, on its card."""

    export: Export
    about: list[str]
    state: Mapping[str, Any]
    config: RunConfig
    checkpoint: Path

    def card(self, name: str) -> bytes:
        """README.md, after the weights were written: a table of errors is known only then."""
        errors = self.export.errors
        tables = {"What the codes cost, and what other codes would": errors.table()} if errors else {}
        architecture = transformers_config(self.config.model, seq_length=1)["architectures"][0]
        facts = CardFacts(name, architecture, self.export.num_parameters, self.about, tables)
        return model_card(facts, self.state, losses_of(self.checkpoint, self.state)).encode()


def assemble(
    checkpoint: Path,
    state: Mapping[str, Any],
    config: RunConfig,
    options: ExportOptions,
    inputs: Mapping[str, Tensor] | None = None,
) -> Assembled:
    """state, config: the checkpoint's small state, and the settings in it. inputs: see `calibrate.input_amax`.

    Of `config` only model and data are read where no codes are written. Raises ValueError or FileNotFoundError, before
    anything is written, for what cannot be exported.
    """
    values = transformers_config(config.model, seq_length=config.data.seq_length)
    text = _text(config, options)
    masters = Masters(checkpoint, config.model)
    dtype = str(options.dtype).removeprefix("torch.")
    about = [f"{'All other' if options.form.coded else 'The'} weights are the FP32 masters, rounded to {dtype}."]
    tensors = dense_tensors(config.model)
    if options.form.coded:
        tensors, sentence = tensors_as_trained(config, state, options.requantize, options.precision_at)
        unquantized = unquantized_modules(config.model, tensors)
        values["quantization_config"] = config_sections(options.form, unquantized, activations=inputs is not None)
        about = [sentence, *about]
    if inputs is not None:
        check_inputs(inputs, {one.coded.linear for one in tensors if one.coded is not None})
        about.append(f"Activations are quantized too, with global scales {source_of_scales(state)}.")
    about += _differences_of_others(config.model)
    files = _json_files(two_dialects(values), text, options)
    export = Export(
        options.form,
        tensors,
        masters,
        options.dtype,
        config.precision.compute_dtype.torch_dtype,
        files,
        options.part_bytes,
        QuantizationErrors() if options.requantize else None,
        inputs or {},
    )
    return Assembled(export, [*about, *text.notes], state, config, checkpoint)


def _differences_of_others(model: ModelConfig) -> list[str]:
    """Sentences on what others compute otherwise."""
    sentences = []
    if model.moe.capacity_factor:
        sentences.append("Training left out tokens of full experts; transformers and servers compute all of them.")
    if model.mtp.depth:
        sentences.append("transformers 5.23 leaves the layers for further tokens (mtp.*) unread; vLLM reads them.")
    return sentences


def _text(config: RunConfig, options: ExportOptions) -> ExportedText:
    path = options.tokenizer or config.data.tokenizer
    if not options.with_tokenizer or not path:
        return without_tokenizer(options.choice)
    return exported_text(path, config.data, options.choice, config.data.seq_length)


def _json_files(values: dict[str, Any], text: ExportedText, options: ExportOptions) -> dict[str, bytes]:
    dtype = str(options.dtype).removeprefix("torch.")
    values |= {**text.config_ids(), "dtype": dtype, "torch_dtype": dtype, "transformers_version": TRANSFORMERS_VERSION}
    generation = {**text.config_ids(), "transformers_version": TRANSFORMERS_VERSION}
    files = {"config.json": values, "generation_config.json": generation}
    if "quantization_config" in values:
        files |= quantization_files(options.form, values["quantization_config"])
    return {**{name: json_bytes(content) for name, content in files.items()}, **text.files}


def two_dialects(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding also where transformers 4 looks for it: without, 4.57 takes base 10,000 and says nothing."""
    rope = values.get("rope_parameters")
    if not rope:
        return values
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return values | older | ({"rope_scaling": scaling} if rope.get("rope_type", "default") != "default" else {})
