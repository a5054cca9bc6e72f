"""A run that learns from a teacher, which computes in BF16, while it computes in NVFP4 itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.proofs.distance import compare
from megatron_fp4.proofs.layouts import parse_layout
from megatron_fp4.proofs.parity import run_cases
from megatron_fp4.proofs.verdict import TOLERANCES, find_failures
from megatron_fp4.storage.append import read_values
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.sections import DistillationConfig
from tests.helpers.parity import FP32, parity_case
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer, masters

PARTS = ("loss", "distillation_kl", "grad_norm")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = tiny_run(tmp_path_factory.mktemp("teacher"), "precision=bf16", "train.stop_after_steps=30")
    make_trainer(run.overrides)[0].fit()
    return run


def student(source: TinyRun, folder: Path, *overrides: str) -> TinyRun:
    teacher = source.run_dir / "checkpoints"
    learned = (f"train.distillation.teacher='{teacher}'", "train.seed=5", "train.stop_after_steps=6")
    settings = ("precision=nvfp4_forward", "optim.warmup_tokens=0", *learned, *overrides)
    return TinyRun(source.run_dir, tuple(one for one in source.overrides if one != "precision=bf16")).with_overrides(
        *settings, run_dir=folder
    )


def values_of(run: TinyRun) -> list[tuple[float, ...]]:
    rows = [row for row in read_values(run.run_dir / "metrics.jsonl") if "grad_norm" in row]
    return [tuple(row[name] for name in PARTS) for row in rows]


def test_the_student_comes_nearer_and_goes_on_after_a_stop(source: TinyRun, tmp_path: Path) -> None:
    whole, stopped = student(source, tmp_path / "whole"), student(source, tmp_path / "stopped")
    trainer, _ = make_trainer(whole.overrides)
    trainer.fit()
    values = values_of(whole)
    assert values[-1][1] < 0.9 * values[0][1]
    make_trainer(stopped.with_overrides("train.stop_after_steps=3").overrides)[0].fit()
    resumed, _ = make_trainer(stopped.overrides)
    resumed.fit()
    assert values_of(stopped) == values
    for name, master in masters(trainer).items():
        assert torch.equal(master, masters(resumed)[name]), name


def test_another_teacher_is_refused_in_the_middle_of_a_run(source: TinyRun, tmp_path: Path) -> None:
    run = student(source, tmp_path / "run", "train.stop_after_steps=1")
    make_trainer(run.overrides)[0].fit()
    other = tmp_path / "other"
    shutil.copytree(run.run_dir / "checkpoints", other)
    with pytest.raises(ValueError, match="other weights than the teacher of this run so far"):
        make_trainer(run.with_overrides(f"train.distillation.teacher='{other}'").overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("parallel.pp=2", "train.global_batch=8"), "parallel.pp = 2.*set parallel.pp=1"),
        (("train.label_smoothing=0.1",), "set train.label_smoothing=0"),
        (("model.loss_impl=te",), "set model.loss_impl=torch"),
    ],
)
def test_refusals(source: TinyRun, overrides: tuple[str, ...], reason: str) -> None:
    run = student(source, source.run_dir, *overrides)
    with pytest.raises(ValueError, match=reason):
        check_config(to_run_config(compose_config(run.overrides)), 2)


def test_a_teacher_of_another_model_is_refused(source: TinyRun, tmp_path: Path) -> None:
    run = student(source, tmp_path / "run", "model.norm_eps=1e-3")
    with pytest.raises(ValueError, match=r"holds another model than this run's:\n  model.norm_eps"):
        make_trainer(run.overrides)


def test_a_student_with_multi_token_prediction_learns_from_a_teacher_without(source: TinyRun, tmp_path: Path) -> None:
    """As it may begin with weights without: nothing of a teacher but the next token is learned."""
    mtp = ("model.mtp={depth: 1, pattern: T, loss_scale: 0.3}", f"train.init_from='{source.run_dir}'")
    run = student(source, tmp_path / "run", *mtp, "train.stop_after_steps=1")
    make_trainer(run.overrides)[0].fit()
    (values,) = values_of(run)
    assert 0.0 < values[1] < 0.1, "it is the teacher's own divergence, but for NVFP4"


def test_no_layout_changes_what_is_learned() -> None:
    how = DistillationConfig("drawn", weight=0.7, temperature=2.0)
    ahead = MtpConfig(depth=1, pattern="-", loss_scale=0.3)
    cases = [parity_case(seq_length=64), parity_case(FP32, name="fp32", seq_length=64, mtp=ahead)]
    cases = [
        replace(case, config=replace(case.config, train=replace(case.config.train, distillation=how))) for case in cases
    ]
    layout = parse_layout("tp2 cp2")
    *references, labels_only = run_local(run_cases, 1, [*cases, parity_case(seq_length=64)], ParallelConfig())[0]
    assert labels_only.norms[0] != references[0].norms[0], "the teacher was not asked"
    per_rank = run_local(run_cases, layout.world_size, cases, layout.parallel)
    for number, (case, reference) in enumerate(zip(cases, references, strict=True)):
        failures = find_failures(compare(reference, [records[number] for records in per_rank]), TOLERANCES[case.name])
        assert not failures, [str(failure) for failure in failures[:5]]
