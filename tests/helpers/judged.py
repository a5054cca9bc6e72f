"""A trained run as lm-eval asks it, in this process, and what it may be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.inference.generate import TextGenerator
from megatron_fp4.inference.harness import HarnessModel
from megatron_fp4.inference.lead import Led
from megatron_fp4.inference.model import RowModel
from megatron_fp4.inference.precisions import table_of
from megatron_fp4.train.open import open_trained


def judged_model(run_dir: Path, precision: str) -> HarnessModel:
    """The model of a run in a precision, with rows as long as its sequence."""
    trained = open_trained(load_run_config(run_dir), documents_apart=True)
    rows = RowModel(trained)
    rows.compute_in(table_of(trained, precision))
    generator = TextGenerator(trained, rows)
    led = Led({"score": rows.score, "complete": generator.complete}, trained.mesh.world)
    return HarnessModel(led, generator.tokenizer, trained.checked.config.data.seq_length)


def asked(kind: str, *arguments: Any) -> Instance:
    """A request of lm-eval."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
