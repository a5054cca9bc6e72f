"""A small trained model with a tokenizer, of which some linears computed in NVFP4."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.text import toy_vocabularies as toy
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer


def llama_run(folder: Path, *overrides: str) -> TinyRun:
    """Two blocks, of which the first computes in NVFP4; base 500,000; a tokenizer; a held-out set."""
    tokenizer = toy.sentencepiece_model(folder / "toy.model", byte_fallback=True)
    shard = folder / "shards" / "toy"
    return tiny_run(
        folder,
        "model.activation=swiglu", "model.rope_base=500000", "model.vocab_size=448", f"data.tokenizer='{tokenizer}'",
        "precision=nvfp4", "precision.keep_bf16.last=1", "train.stop_after_steps=3",
        f"data.evaluation=[{{name: held, paths: ['{shard}'], max_tokens: 512, may_overlap: true}}]",
        *overrides,
    )  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Three steps of `llama_run`, in this process."""
    run = llama_run(tmp_path_factory.mktemp("export"))
    make_trainer(run.overrides)[0].fit()
    return run
