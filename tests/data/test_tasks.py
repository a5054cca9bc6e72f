"""Task files in tokens, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fp4.data.config import DataConfig, TaskConfig
from megatron_fp4.data.tasks import read_tasks


class Letters:
    """A token a letter; a blank and the letter behind it are one token."""

    special = SimpleNamespace(require=lambda role, where: 99)
    path = Path("letters.json")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text.replace(" ", "")] for text in texts]


def written(folder: Path, *lines: Any) -> TaskConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return TaskConfig("quiz", str(path))


def question(**other: Any) -> dict[str, Any]:
    return {"context": "ab ", "choices": ["c", "de"], "answer": 1, **other}


def test_contexts_and_choices_in_tokens(tmp_path: Path) -> None:
    tasks = read_tasks(written(tmp_path, question(), "", question(context="", id=7, answer=0)), Letters(), 8)  # type: ignore[arg-type]
    a, b, c, d, e = (ord(letter) for letter in "abcde")
    assert [(choice.question, choice.ids, choice.num_targets, choice.length) for choice in tasks.choices] == [
        (0, [a, b, c], 1, 1), (0, [a, b, d, e], 2, 2), (1, [99, c], 1, 1), (1, [99, d, e], 2, 2),
    ]  # fmt: skip
    assert tasks.answers == [1, 0]


def test_a_long_context_loses_its_beginning(tmp_path: Path) -> None:
    tasks = read_tasks(written(tmp_path, question()), Letters(), 2)  # type: ignore[arg-type]
    assert [len(choice.ids) for choice in tasks.choices] == [3, 3]
    assert tasks.choices[1].ids == [ord("b"), ord("d"), ord("e")]


def test_the_beginning_of_a_file(tmp_path: Path) -> None:
    config = written(tmp_path, question(), question(answer=0), "no question")
    tasks = read_tasks(TaskConfig("quiz", config.path, max_questions=2), Letters(), 8)  # type: ignore[arg-type]
    assert tasks.answers == [1, 0]
    one = read_tasks(TaskConfig("quiz", config.path, max_questions=1), Letters(), 8)  # type: ignore[arg-type]
    assert one.fingerprint != tasks.fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 .* not JSON"),
        ("[1]", "a question is"),
        (question(context=None), "a question is"),
        (question(choices=["c"]), "two choices or more"),
        (question(choices=["c", ""]), "two choices or more"),
        (question(answer=2), "the number of the right one, from 0"),
        (question(answer=-1), "the number of the right one, from 0"),
        (question(answer=True), "the number of the right one, from 0"),
        (question(choices=["c", "d" * 9]), "has 9 tokens, must be 1 to 8"),
        (question(choices=["c", " "]), "has 0 tokens, must be 1 to 8"),
    ],
)
def test_what_is_no_question(line: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_tasks(written(tmp_path, question(), line), Letters(), 8)  # type: ignore[arg-type]


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.tasks 'quiz': .* does not exist"):
        read_tasks(TaskConfig("quiz", str(tmp_path / "none")), Letters(), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no question"):
        read_tasks(written(tmp_path, ""), Letters(), 8)  # type: ignore[arg-type]


def test_settings() -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer is not set"):
        DataConfig(tasks=[TaskConfig("quiz", "q.jsonl")])
    with pytest.raises(ValueError, match="names must be unique"):
        DataConfig(tokenizer="t.json", tasks=[TaskConfig("quiz", "q"), TaskConfig("quiz", "r")])
