"""Task files: questions whose choices a model ranks, one JSON object a line.

    {"context": "The cat sat on the", "choices": [" mat", " sea"], "answer": 0}

Context and choice are encoded as one text, and what is not the context's is the choice, as lm-eval does it. A choice
without context stands behind the token that ends documents.

Not here: who answers them (train/evaluation/tasks.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.data.config import TaskConfig
from megatron_fp4.data.text.tokenizer import Tokenizer, eos_of


@dataclass(frozen=True)
class Choice:
    """One choice of question `question`, from 0. ids: with its context; the last `num_targets` are its own.

    length: of its text, in characters.
    """

    question: int
    ids: list[int]
    num_targets: int
    length: int


@dataclass(frozen=True)
class TaskSet:
    """A task file in tokens. answers: the right choice of each question. fingerprint: of the lines that were read."""

    name: str
    choices: list[Choice]
    answers: list[int]
    fingerprint: str


def read_tasks(config: TaskConfig, tokenizer: Tokenizer, seq_length: int) -> TaskSet:
    """The questions of a file. Raises ValueError (FileNotFoundError) with the line that is none.

    What is longer than a sequence loses the beginning of its context.
    """
    path = Path(config.path)
    if not path.is_file():
        raise FileNotFoundError(f"data.tasks {config.name!r}: {path} does not exist")
    choices: list[Choice] = []
    answers: list[int] = []
    digest = hashlib.sha256()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if config.max_questions and len(answers) == config.max_questions:
                break
            if not line.strip():
                continue
            where = f"data.tasks {config.name!r}, line {number} of {path}"
            context, texts, answer = _question(line, where)
            for text in texts:
                ids, num_targets = _encoded(context, text, tokenizer)
                if not 0 < num_targets <= seq_length:
                    raise ValueError(
                        f"{where}: choice {text[:40]!r} has {num_targets} tokens, must be 1 to {seq_length}"
                        " (data.seq_length)"
                    )
                choices.append(Choice(len(answers), ids[-(seq_length + 1) :], num_targets, len(text)))
            answers.append(answer)
            digest.update(line.encode())
    if not answers:
        raise ValueError(f"data.tasks {config.name!r}: {path} has no question")
    return TaskSet(config.name, choices, answers, digest.hexdigest()[:16])


def _question(line: str, where: str) -> tuple[str, list[str], int]:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    known = isinstance(value, dict)
    context, texts, answer = (value.get(key) if known else None for key in ("context", "choices", "answer"))
    if (
        not isinstance(context, str)
        or not isinstance(texts, list)
        or len(texts) < 2
        or not all(isinstance(text, str) and text for text in texts)
        or type(answer) is not int
        or not 0 <= answer < len(texts)
    ):
        raise ValueError(
            f'{where}: a question is {{"context": "...", "choices": ["...", "..."], "answer": 0}}, two choices or more'
            " and the number of the right one, from 0"
        )
    return context, texts, answer


def _encoded(context: str, text: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids of both, and how many are the choice's. Blanks at the end of the context go to the choice."""
    if not context:
        (own,) = tokenizer.encode_batch([text])
        return [eos_of(tokenizer), *(int(token) for token in own)], len(own)
    trimmed = context.rstrip()
    whole, before = tokenizer.encode_batch([context + text, trimmed or context])
    return [int(token) for token in whole], len(whole) - len(before)
