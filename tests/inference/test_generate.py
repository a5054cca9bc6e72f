"""A text is continued token by token, and ends where a document ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.inference.generate import TextGenerator
from megatron_fp4.inference.model import Prompt, RowModel, Sampling
from megatron_fp4.train.inputs import Inputs

EOS = 7


class Letters:
    """A tokenizer of one letter a token: a is 0."""

    special = SimpleNamespace(eos=EOS)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


class Counting:
    """An engine whose model prefers the next letter, and finds the one after it half as likely."""

    stages: tuple[()] = ()
    reports_loss = True

    def logits(self, inputs: Inputs) -> torch.Tensor:
        tokens = inputs.tokens.reshape(-1)
        rows = torch.full((len(tokens), 10), -30.0)
        rows[torch.arange(len(tokens)), (tokens + 1) % 10] = 0.0
        rows[torch.arange(len(tokens)), (tokens + 2) % 10] = -0.6931
        return rows


def trained(tokenizer: object) -> Any:
    plan = SimpleNamespace(evaluation_table=lambda phase: SimpleNamespace(rows=()))
    config = SimpleNamespace(model=SimpleNamespace(vocab_size=10))
    return SimpleNamespace(
        checked=SimpleNamespace(tokenizer=tokenizer, config=config, plan=plan),
        engine=Counting(), mesh=ParallelMesh.single_process(), device=torch.device("cpu"), phase=0,
        assign=lambda table: None,
    )  # fmt: skip


def continued(text: str, num_tokens: int, **sampling: float) -> str:
    model = trained(Letters())
    (added,) = TextGenerator(model, RowModel(model)).continuations([text], num_tokens, Sampling(**sampling))  # type: ignore[arg-type]
    return added


def test_the_likeliest_tokens() -> None:
    assert continued("ab", 3) == "cde"
    assert continued("ab", 30) == "cdefg", "h is the end of a document"
    assert continued("ab", 3, temperature=9.0, top_k=1) == "cde", "there is one to draw from"
    assert continued("ab", 0) == ""


def test_draws_follow_seed_and_temperature() -> None:
    def drawn(seed: int, temperature: float = 1.0) -> str:
        return continued("i", 1, temperature=temperature, top_k=2, seed=seed)

    texts = [drawn(seed) for seed in range(200)]
    assert texts == [drawn(seed) for seed in range(200)]
    assert set(texts) == {"j", "a"}
    assert texts.count("j") / 200 == pytest.approx(2 / 3, abs=0.1), "twice as likely"
    assert {drawn(seed, temperature=0.02) for seed in range(50)} == {"j"}


def test_several_texts_end_where_each_ends() -> None:
    model = trained(Letters())
    generator = TextGenerator(model, RowModel(model))
    assert generator.continuations(["ab", "fg", "e"], 4, Sampling()) == ["cdef", "", "fg"]


def test_a_run_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"no data\.tokenizer"):
        TextGenerator(trained(None), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "refusal"),
    [
        (lambda: Prompt([1], -1), "-1 tokens cannot be added"),
        (lambda: Sampling(temperature=-0.5), "temperature = -0.5"),
        (lambda: Sampling(temperature=math.nan), "temperature = nan"),
        (lambda: Sampling(temperature=1e-40), "temperature = 1e-40 must be 0, .*or at least 1e-06"),
        (lambda: Sampling(1.0, top_k=-1), "top-k = -1"),
    ],
)
def test_choices_that_would_not_end_or_not_draw(make: Callable[[], object], refusal: str) -> None:
    """-1 tokens were reached never, so a text without an end went on for ever."""
    with pytest.raises(ValueError, match=refusal):
        make()
