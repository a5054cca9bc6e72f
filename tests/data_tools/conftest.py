import random
from pathlib import Path

import pytest

from data_tools.train_tokenizer import train

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "token",
    "and",
    "writes",
    "another",
    "one;",
    "loss",
    "=",
    "sum(p",
    "*",
    "log(q))",
    "#",
    "2048",
    "naïve",
    "π",
]


def text_of(seed: int, words: int) -> str:
    """Deterministic prose-like text with line ends."""
    chooser = random.Random(seed)
    return " ".join(chooser.choice(WORDS) + ("\n" if chooser.random() < 0.1 else "") for _ in range(words))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "t.model"
    lines = (line for seed in range(40) for line in text_of(seed, 200).splitlines() if line.strip())
    train(lines, path, vocab_size=380, model_type="bpe", threads=1)
    return path
