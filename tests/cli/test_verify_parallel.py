"""The command: exit codes and what a user reads."""

from __future__ import annotations

import pytest

from megatron_fp4.cli.verify_parallel import main
from tests.helpers import planted

TIED = ["model=gpt_tiny", "model.vocab_size=100", "model.tied_embeddings=true", "precision=bf16", "--steps", "2"]
SMALL = ["model=gpt_tiny", "model.vocab_size=100", "--steps", "2", "--layouts"]


def test_a_right_layout_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "pp2:zbv"]) == 0
    output = capsys.readouterr().out
    assert "3 of 3 comparisons passed" in output
    assert output.count("equal") == 3, "a pipeline changes no bit"


def test_a_planted_bug_fails_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "tp2"], worker=planted.run_cases_with(planted.local_amax)) == 1
    output = capsys.readouterr().out
    assert "2 of 3 comparisons passed" in output, "an amax matters in the quantized case only"
    assert "likely cause: only the quantized precision differs: an amax is not reduced" in output


@pytest.mark.parametrize(
    ("layout", "bug", "cause"),
    [
        ("pp2", planted.doubled_tied_gradient, "2 times the right one"),
        ("tp2", planted.unsummed_replicas, "norm weights"),
        ("tp2", planted.unsummed_grad_norm, "norm is"),
    ],
    ids=["tied-twice", "norm-weights", "grad-norm"],
)
def test_other_planted_bugs(layout: str, bug: planted.Bug, cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TIED, "--layouts", layout], worker=planted.run_cases_with(bug)) == 1
    output = capsys.readouterr().out
    assert "0 of 2 comparisons passed" in output, "in FP32 and in BF16"
    assert cause in output


@pytest.mark.parametrize("layouts", ["tp3x", "pp2:2f2b", "pp4:dualpipev, pp3:dualpipev dp61"])
def test_what_cannot_run_is_refused(layouts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, layouts]) == 2
    assert capsys.readouterr().err.startswith("error: ")
