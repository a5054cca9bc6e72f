"""`megatron-fp4 checkpoint import FOLDER --to DIRECTORY`: its arguments, and what it says.

    --from transformers   config.json and safetensors
    --from megatron       a torch_dist checkpoint of Megatron-LM, or the directory of all of a run

Without --from it is what lies in the folder. Not here: what is read (models/foreign), and written (interop/read.py).
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint import edit, offline
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.interop.read import Imported, import_weights
from megatron_fp4.layers.rope import RopeScaling
from megatron_fp4.models.foreign.megatron_weights import MegatronWeights, megatron_directory
from megatron_fp4.models.foreign.read_config import CONFIG
from megatron_fp4.models.foreign.source import ForeignSource, is_foreign
from megatron_fp4.models.foreign.weights import ForeignWeights
from megatron_fp4.train.refusals.effect import ROPE_SCALING
from megatron_fp4.train.resume.same_model import FREE, FREE_INSIDE

VOCABULARY = "model.vocab_size="
MOST_LISTED = 5


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """What `checkpoint import` takes beside the folder and --to; `args.overrides` is what else is given."""
    parser.add_argument("--from", dest="origin", choices=("transformers", "megatron"), help="what the folder is")
    parser.description = "model.KEY=VALUE says of a checkpoint of Megatron-LM what its arguments do not."


def import_folder(folder: Path, args: argparse.Namespace) -> None:
    """Write, and print what was written. Raises ValueError and OSError for what cannot be done."""
    edit.check_destination(args.to, 0)
    print(_described(import_weights(_source(folder, args.origin, args.overrides), args.to)))


def _source(folder: Path, origin: str | None, overrides: list[str]) -> ForeignSource:
    if strange := [text for text in overrides if not text.startswith(("model=", "model."))]:
        raise ValueError(f"{strange[0]} says nothing of the model in {folder}; give model=... and model.KEY=VALUE")
    if origin is None and not is_foreign(folder):
        raise ValueError(_what_it_is(folder))
    if origin == "transformers" or (origin is None and (folder / CONFIG).is_file()):
        if overrides:
            raise ValueError(f"{overrides[0]}: {folder / CONFIG} says what model it is; take it away")
        if not (folder / CONFIG).is_file() and megatron_directory(folder) is not None:
            raise ValueError(f"{folder} is a torch_dist checkpoint of Megatron-LM; import it by --from megatron")
        return ForeignWeights(folder)
    if len(overrides) == 1 and overrides[0].startswith(VOCABULARY):
        return MegatronWeights(folder, vocab_size=to_run_config(compose_config(overrides)).model.vocab_size)
    return MegatronWeights(folder, to_run_config(compose_config(overrides)).model if overrides else None)


def _what_it_is(folder: Path) -> str:
    """Why a folder is not imported, and what to do with it instead."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    inside = folder / "checkpoints"
    try:
        ours = offline.resolve(inside if inside.is_dir() else folder)
    except FileNotFoundError:
        return f"{folder} is neither a folder of transformers ({CONFIG}) nor a torch_dist checkpoint of Megatron-LM"
    return (
        f"{folder} holds a checkpoint of this program, {ours.name}, which needs no import: train.init_from={folder}"
        f" begins with its weights, `checkpoint extract {folder} --to DIRECTORY` copies them"
    )


def _described(imported: Imported) -> str:
    """What was written, what was not taken, and the settings of a run that begins with it."""
    lines = [f"written: {imported.directory}", *(f"  {note}" for note in imported.source.notes)]
    if skipped := imported.source.skipped:
        more = f" and {len(skipped) - MOST_LISTED} more" if len(skipped) > MOST_LISTED else ""
        lines.append(f"skipped, no weights ({len(skipped)}): {', '.join(skipped[:MOST_LISTED])}{more}")
    texts = [shlex.quote(text) for text in _overrides(imported.model)]
    return "\n".join([*lines, f"a run on it: train.init_from={imported.directory} {' '.join(texts)}"])


def _overrides(model: Mapping[str, Any]) -> Iterator[str]:
    """All settings that say what the weights mean, whatever model a configuration begins with."""
    hybrid = "M" in model["pattern"]
    for name, value in model.items():
        if name == "rope_scaling":
            kind = RopeScaling[value["kind"]]
            yield from (_override(f"rope_scaling.{key}", value[key]) for key in value if key in ROPE_SCALING[kind])
        elif name in FREE_INSIDE:
            settings = [key for key in value if key not in FREE_INSIDE[name]]
            if value.get("num_experts") or value.get("depth"):
                yield from (_override(f"{name}.{key}", value[key]) for key in settings)
        elif name not in FREE and (hybrid or not name.startswith("mamba_")):
            yield _override(name, value)


def _override(name: str, value: Any) -> str:
    return f"model.{name}={str(value).lower() if isinstance(value, bool) else value}"
