"""The command: exit codes and what a user reads."""

from __future__ import annotations

import pytest

from megatron_fp4.cli.verify_parallel import main
from tests.train import planted

SMALL = ["model=gpt_tiny", "model.vocab_size=100", "--steps", "2", "--layouts"]


def test_a_right_layout_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "pp2:zbv"]) == 0
    output = capsys.readouterr().out
    assert "3 of 3 comparisons passed" in output
    assert output.count("equal") == 3, "a pipeline changes no bit"


def test_a_planted_bug_fails_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "tp2"], worker=planted.missing_amax) == 1
    output = capsys.readouterr().out
    assert "2 of 3 comparisons passed" in output, "an amax matters in the quantized case only"
    assert "likely cause: only the quantized precision differs: an amax is not reduced" in output


@pytest.mark.parametrize("layouts", ["tp3x", "pp2:2f2b", "pp4:dualpipev, pp3:dualpipev dp61"])
def test_what_cannot_run_is_refused(layouts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, layouts]) == 2
    assert capsys.readouterr().err.startswith("error: ")
