"""Static scales of inputs: measured once, the same at any layout and after a resume, and multiplied with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.checkpoint.offline import resolve
from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.precision import EmulatedBackend
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.operand import AmaxScope, Format, Operand
from megatron_fp4.precision.spec import Dgrad, Fprop
from megatron_fp4.precision.statistics import sums_of
from megatron_fp4.storage.append import read_values
from megatron_fp4.train.evaluation.inputs import INPUTS
from megatron_fp4.train.open import open_trained
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import TrainerInProcess, make_trainer

STATIC = Operand(Format.nvfp4, amax_scope=AmaxScope.static)
COPY = Copy("fprop", STATIC, along=1)


def origin(x: torch.Tensor, amax: torch.Tensor | None) -> OperandOrigin:
    rows, cols = (torch.arange(size) for size in x.shape)
    return OperandOrigin("linear", "x", rows, cols, Group.single(), seed=0, step=0, amax=amax)


def test_the_number_that_is_given_makes_the_scale_and_larger_elements_saturate() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3, 5] = 40.0
    amax = torch.tensor(2.0)
    left, right = (EmulatedBackend(), ReferenceBackend())
    ours, codes = (one.quantize(x, origin(x, amax), [COPY])[0] for one in (left, right))
    identity = torch.eye(64, dtype=torch.bfloat16)
    plain = Copy("fprop", Operand(), along=1)
    products = [
        one.matmul(operand, one.quantize(identity, origin(identity, None), [plain])[0], out_dtype=torch.float32)
        for one, operand in ((left, ours), (right, codes))
    ]
    assert torch.equal(*products)
    assert products[0][3, 5] == pytest.approx(2.0, rel=1e-6), "6 times the largest scale"
    beyond = (x.abs() > amax).sum()
    counts = [sums_of(x, STATIC, 1, 0, known)[5] for known in (amax, None)]
    assert counts[0] >= beyond, "what a scale that is rounded down clips is counted too"
    assert counts[1] < beyond
    unknown = left.quantize(x, origin(x, None), [COPY])[0].tensors
    measured = left.quantize(x, origin(x, None), [Copy("fprop", Operand(Format.nvfp4), along=1)])[0].tensors
    assert all(torch.equal(a, b) for a, b in zip(unknown, measured, strict=True))


def test_only_the_input_of_fprop_has_one() -> None:
    for make in (lambda: Fprop(w=STATIC), lambda: Dgrad(dy=STATIC)):
        with pytest.raises(ValueError, match="it is measured of Fprop's x alone"):
            make()


@pytest.mark.parametrize("change", [{"rht_size": 16}, {"center": True}])
def test_what_changes_the_input_first_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="measured of x before these"):
        Fprop(replace(STATIC, **change), Operand(rht_size=change.get("rht_size", 0)))


def run_of(folder: Path, *overrides: str) -> TinyRun:
    options = ("precision=nvfp4_forward_static", "precision.calibration_batches=3")
    return tiny_run(folder, *options, "train.statistics_interval_steps=4", "train.stop_after_steps=4", *overrides)


def values_of(trainer: TrainerInProcess) -> dict[str, float]:
    linears = linears_of(trainer.run.engine.stages[0])
    return {name: float(one.input_amax) for name, one in linears.items() if one.input_amax is not None}


def test_a_run_measures_once_and_keeps_what_it_measured(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    trainer, _ = make_trainer(run.overrides)
    values = values_of(trainer)
    assert values.keys() == set(trainer.run.plan.table().static_inputs)
    trainer.fit()
    assert values_of(trainer) == values
    stored = read_state(resolve(run.run_dir / "checkpoints"))["meta"][INPUTS]
    assert stored == values
    changes = ("precision.calibration_batches=1",)
    resumed, _ = make_trainer(run.with_overrides(*changes).overrides)
    assert values_of(resumed) == values, "measured again"
    rows = [row for row in read_values(run.run_dir / "metrics.jsonl") if row["step"] == 4]
    shares = {key: value for row in rows for key, value in row.items() if "saturation" in key}
    assert shares
    opened = open_trained(trainer.run.config)
    linears = linears_of(opened.engine.stages[0])
    assert {name: float(one.input_amax) for name, one in linears.items() if one.input_amax is not None} == values


def test_linears_of_multi_token_prediction_have_one(tmp_path: Path) -> None:
    """They read batches that look ahead; an evaluation, which leaves them out, reads those of the rest."""
    run = run_of(tmp_path, "model.mtp={depth: 2, pattern: T, shared: true}", "train.stop_after_steps=1")
    trainer, _ = make_trainer(run.overrides)
    values = values_of(trainer)
    assert {"mtp.0.projection", "mtp.0.blocks.0.mlp.down"} <= values.keys()
    trainer.fit()
    assert values_of(make_trainer(run.overrides)[0]) == values
    of_rest = linears_of(open_trained(trainer.run.config).engine.stages[0])
    amaxes = {name: one.input_amax for name, one in of_rest.items() if one.input_amax is not None}
    assert amaxes == {name: value for name, value in values.items() if not name.startswith("mtp.")}


def test_more_batches_than_the_run_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="but the run has 40 more of 4 samples; set it to 40"):
        make_trainer(run_of(tmp_path, "precision.calibration_batches=41").overrides)


def _two_ranks(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, float]:
    return values_of(make_trainer(overrides, rank, world_size)[0])


def test_no_layout_changes_them(tmp_path: Path) -> None:
    proof = "precision.compute_dtype=fp32"
    alone = values_of(make_trainer(run_of(tmp_path, proof).overrides)[0])
    for got in run_distributed(_two_ranks, 2, run_of(tmp_path, proof, "parallel.tp=2").overrides):
        assert got == alone
