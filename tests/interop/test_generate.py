"""A text is continued token by token, and ends where a document ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.interop.generate import TextGenerator

EOS = 7


class Letters:
    """A tokenizer of one letter a token: a is 0."""

    special = SimpleNamespace(eos=EOS)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def counting(tokens: Tensor, *_: Any) -> Tensor:
    """Logits `[S, V]` of a model that prefers the next letter, and finds the one after it half as likely."""
    rows = torch.full((tokens.shape[1], 10), -30.0)
    for row, token in enumerate(tokens[0].tolist()):
        rows[row, (token + 1) % 10] = 0.0
        rows[row, (token + 2) % 10] = -0.6931
    return rows


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> TextGenerator:
    trained = SimpleNamespace(checked=SimpleNamespace(tokenizer=Letters()), model=counting)
    monkeypatch.setattr("megatron_fp4.interop.generate.open_trained", lambda *_: trained)
    return TextGenerator(config=None)  # type: ignore[arg-type]


def test_the_likeliest_tokens(generator: TextGenerator) -> None:
    assert generator.continuation("ab", 3, temperature=0.0, top_k=5, seed=0) == "cde"
    assert generator.continuation("ab", 30, temperature=0.0, top_k=5, seed=0) == "cdefg", "h is the end of a document"
    assert generator.continuation("ab", 3, temperature=9.0, top_k=1, seed=0) == "cde", "there is one to draw from"


def test_draws_follow_seed_and_temperature(generator: TextGenerator) -> None:
    def drawn(seed: int, temperature: float = 1.0) -> str:
        return generator.continuation("i", 1, temperature=temperature, top_k=2, seed=seed)

    texts = [drawn(seed) for seed in range(200)]
    assert texts == [drawn(seed) for seed in range(200)]
    assert set(texts) == {"j", "a"}
    assert texts.count("j") / 200 == pytest.approx(2 / 3, abs=0.1), "twice as likely"
    assert {drawn(seed, temperature=0.02) for seed in range(50)} == {"j"}


def test_a_run_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = SimpleNamespace(checked=SimpleNamespace(tokenizer=None), model=None)
    monkeypatch.setattr("megatron_fp4.interop.generate.open_trained", lambda *_: trained)
    with pytest.raises(ValueError, match=r"no data\.tokenizer"):
        TextGenerator(config=None)  # type: ignore[arg-type]
