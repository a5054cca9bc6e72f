"""The pages under docs/ say what is true: their Python examples run and print what the page shows."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [page for page in PAGES if "\n>>> import" in page.read_text()]


def test_there_are_examples() -> None:
    assert "data.md" in [page.name for page in EXAMPLES]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.name)
def test_examples_print_what_the_page_shows(page: Path) -> None:
    failures, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 0
    assert failures == 0, f"{page.name}: {failures} of {tried} examples print something else"
