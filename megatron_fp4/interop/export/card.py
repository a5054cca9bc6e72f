"""README.md of an exported model: what it was trained on, how far, to which loss, and in which precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.precision.table import grouped
from megatron_fp4.storage.append import read_values
from megatron_fp4.train.telemetry.metrics import METRICS_FILE


@dataclass(frozen=True)
class CardFacts:
    """What only the export knows. about: sentences on the weights. tables: texts to be shown as they are, by title."""

    name: str
    architecture: str
    num_parameters: int
    about: Sequence[str]
    tables: Mapping[str, str]


def model_card(facts: CardFacts, state: Mapping[str, Any], losses: Mapping[str, float]) -> str:
    """The page. state: the checkpoint's small state. losses: by name, nats per token."""
    meta, settings = state["meta"], state["meta"]["config"]
    tokens = f"{state['tokens']:,}" if state["tokens"] is not None else "?"
    versions = ", ".join(f"{name} {version}" for name, version in (meta.get("versions") or {}).items())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {facts.name}",
        "",
        f"{facts.architecture}, {facts.num_parameters:,} parameters, trained with megatron_fp4: step {state['step']},"
        f" {tokens} tokens of {settings['data']['seq_length']} a sample.",
        "",
        *(f"- {sentence}" for sentence in facts.about),
        "",
        "## Data",
        "",
        *_data(settings["data"]),
        "",
        "## Loss",
        "",
        *([f"- {name}: {loss:.4f} nats per token" for name, loss in losses.items()] or ["Not known."]),
        "",
        "## Precision",
        "",
        "The last step before the checkpoint computed:",
        "",
        *_block("\n".join(grouped({name: _text(text) for name, text in meta.get("precision", {}).items()}))),
    ]
    for title, text in facts.tables.items():
        lines += [f"{title}:", "", *_block(text)]
    return "\n".join([*lines, f"Versions of the training: {versions or 'not known'}.", ""])


def _text(precision: Any) -> str:
    return precision if isinstance(precision, str) else " ".join(precision)  # a list in older checkpoints


def _block(text: str) -> list[str]:
    return ["```", text, "```", ""]


def _data(data: Mapping[str, Any]) -> list[str]:
    """The sources, what was held out, and the tokenizer."""
    lines = [f"- {source['name']}: {', '.join(source['paths'])}" for source in data.get("sources", [])]
    for phase in data.get("phases", []):
        weights = ", ".join(f"{name} {weight:g}" for name, weight in phase["weights"].items()) or "by size"
        lines.append(
            f"- phase {phase['name']}: {weights}" + (f", {phase['tokens']:,} tokens" if phase["tokens"] else "")
        )
    lines += [f"- held out: {one['name']}, {', '.join(one['paths'])}" for one in data.get("evaluation", [])]
    return [*lines, f"- tokenizer: {data.get('tokenizer') or 'none'}"]


def losses_of(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, float]:
    """The newest losses up to the checkpoint that the run's metrics.jsonl, two folders above it, has."""
    losses: dict[str, float] = {}
    for record in read_values(checkpoint.absolute().parent.parent / METRICS_FILE):
        if record["step"] <= state["step"]:
            held_out = {key: value for key, value in record.items() if re.fullmatch("eval/.*/loss", key)}
            training = {"training loss of the last step": record["loss"]} if "loss" in record else {}
            held = {name.removeprefix("eval/").removesuffix("/loss"): value for name, value in held_out.items()}
            losses |= {name: value for name, value in {**training, **held}.items() if isinstance(value, float)}
    if not losses and state["score"] is not None:
        losses["first held-out set"] = float(state["score"])
    return losses
