"""`precision.backend=auto`: the order, the self-test that decides, and one choice for all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.cli import preflight, pretrain
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.rendezvous import Rendezvous
from megatron_fp4.planning.report import run_plan
from megatron_fp4.precision import EmulatedBackend
from megatron_fp4.precision.auto import candidates, recipe_objection
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.recipes import RECIPES
from megatron_fp4.precision.selftest import examine
from megatron_fp4.precision.selftest.examine import Question, Rejection
from megatron_fp4.train.arrival import backend as arrival
from megatron_fp4.train.arrival.backend import settle_backend
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.telemetry.slow_paths import slow_paths
from tests.helpers.tiny_run import tiny_run

TE, TRITON, FP8, EMULATED = (
    BackendName.transformer_engine,
    BackendName.triton,
    BackendName.native_fp8,
    BackendName.emulated,
)
CUDA = torch.device("cuda", 0)
SMALL = ("model=gpt_tiny", "model.vocab_size=96", "data.sources=[{name: a, paths: [a]}]", "precision.backend=auto")


def checked(*overrides: str) -> CheckedConfig:
    return check_config(to_run_config(compose_config([*SMALL, *overrides])), 1)


class Ranks(Rendezvous):
    """Rank 0 of several, whose others say what it says, changed by `others`."""

    def __init__(self, world_size: int, others: Callable[[int, str, dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__(Launch(), None)
        self._size, self._others = world_size, others

    def decided_by_rank0(
        self, name: str, message: str, decide: Callable[[Sequence[str]], str], timeout_seconds: float
    ) -> str:
        backend = name.removeprefix("the self-test of ")
        rest = [json.dumps(self._others(rank, backend, json.loads(message))) for rank in range(1, self._size)]
        return decide([message, *rest])


def alone() -> Rendezvous:
    return Rendezvous(Launch(), None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU of a compute capability, on which these backends cannot be taken."""

    def install(capability: tuple[int, int], *rejections: Rejection) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA TEST")
        by_name = {one.backend: one for one in rejections}
        monkeypatch.setattr(arrival, "examine", lambda config, *_: by_name.get(config.backend))

    return install


@pytest.mark.parametrize(
    ("capability", "order"),
    [
        (None, (EMULATED,)),
        ((7, 5), (EMULATED,)),
        ((8, 0), (TRITON, EMULATED)),
        ((9, 0), (TRITON, FP8, EMULATED)),
        ((10, 0), (TE, TRITON, EMULATED)),
        ((10, 3), (TE, TRITON, EMULATED)),
        ((12, 0), (TRITON, EMULATED)),
    ],
)
def test_the_order_on_each_kind_of_gpu(capability: tuple[int, int] | None, order: tuple[BackendName, ...]) -> None:
    """Transformer Engine's NVFP4 gives zero gradients on 12.x, and says that it is available there."""
    assert candidates(capability) == order


def test_recipes_that_a_backend_does_not_compute() -> None:
    def message(name: BackendName, recipe: str) -> str:
        return recipe_objection(name, PrecisionConfig(recipes={recipe: RECIPES[recipe]}))

    assert "mxfp4 has no quantizer there" in message(TE, "mxfp4")
    assert "no kernels for any quantized GEMM" in message(TRITON, "fp8")
    assert "only GEMMs of two fp8_block operands" in message(FP8, "nvfp4")
    assert [message(name, "nvfp4") for name in (TE, TRITON, EMULATED)] == ["", "", ""]
    assert message(FP8, "fp8") == ""


def test_the_first_that_passes_is_taken(gpu: Callable[..., None]) -> None:
    gpu((10, 0))
    settled = settle_backend(checked(), 1, alone(), CUDA)
    assert settled.config.precision.backend is settled.plan.config.backend is TE
    assert settled.choice == (
        "precision.backend=auto chose transformer_engine (FP4 and FP8 tensor cores by NVIDIA's kernels),"
        " which passed its self-test on 1 rank(s), NVIDIA TEST",
    )


def test_what_fails_its_self_test_is_skipped_loudly(gpu: Callable[..., None]) -> None:
    gpu((10, 0), Rejection(TE, "it is not installed", False), Rejection(TRITON, "fprop.x: codes[3, 5]: ...", True))
    settled = settle_backend(checked(), 1, alone(), CUDA)
    assert settled.config.precision.backend is EMULATED
    sentence, loud = settled.choice
    assert "chose emulated" in sentence
    assert "transformer_engine cannot be taken: it is not installed; triton FAILED its self-test" in sentence
    assert loud.startswith("WARNING: triton FAILED its self-test: rank 0 (")
    assert "NVIDIA TEST)): fprop.x: codes[3, 5]: ..." in loud
    assert "precision.backend=emulated on GPUs with FP4" in slow_paths(settled.config, settled.plan, fp4=True)[0]


def test_a_shape_that_only_one_backend_refuses(gpu: Callable[..., None]) -> None:
    """Transformer Engine needs multiples of 32 along the contraction, the kernels of 16."""
    gpu((10, 0))
    odd = checked("model.ffn_hidden=272", "train.micro_batch=1", "train.global_batch=1", "data.seq_length=64")
    settled = settle_backend(odd, 1, alone(), CUDA)
    assert settled.config.precision.backend is TRITON
    assert "transformer_engine cannot be taken" in settled.choice[0]


def test_the_failure_of_one_rank_moves_all(gpu: Callable[..., None]) -> None:
    gpu((9, 0))

    def others(rank: int, backend: str, answer: dict[str, Any]) -> dict[str, Any]:
        broken = rank == 5 and backend == "triton"
        changed = {"reason": "wgrad is all zero", "failed": True} if broken else {}
        return {**answer, "host": f"node{rank // 4}", **changed}

    settled = settle_backend(checked(), 1, Ranks(8, others), CUDA)
    assert settled.config.precision.backend is EMULATED
    assert "8 rank(s), NVIDIA TEST" in settled.choice[0]
    assert "rank 5 (node1 cuda:0 (NVIDIA TEST)): wgrad is all zero" in settled.choice[1]


def test_ranks_on_other_gpus(gpu: Callable[..., None]) -> None:
    """A Hopper node among Blackwell ones: what is not considered there is taken nowhere."""
    gpu((10, 0))

    def others(rank: int, backend: str, answer: dict[str, Any]) -> dict[str, Any]:
        hopper = backend == "transformer_engine"
        changed = {"reason": "not considered on compute capability 9.0", "absent": True} if hopper else {}
        return {**answer, **changed}

    settled = settle_backend(checked(), 1, Ranks(3, others), CUDA)
    assert settled.config.precision.backend is TRITON
    assert "ranks 1-2 (" in settled.choice[0]


def test_nothing_left(gpu: Callable[..., None]) -> None:
    """Also the emulation can fail, on a broken GPU: refused with its place."""
    gpu((9, 0), Rejection(TRITON, "it hung", True), Rejection(EMULATED, "fprop: largest error nan, limit 1", True))
    with pytest.raises(
        ValueError, match=r"no backend can be trusted on every rank: emulated: rank 0 \(.* fprop: large"
    ):
        settle_backend(checked(), 1, alone(), CUDA)


def test_a_run_that_quantizes_nothing(gpu: Callable[..., None]) -> None:
    gpu((9, 0), Rejection(EMULATED, "is not asked", True))
    settled = settle_backend(checked("precision=bf16"), 1, alone(), CUDA)
    assert settled.choice == (
        "precision.backend=auto chose emulated (no GEMM is quantized), which all backends compute alike",
    )


def test_another_name_is_left_alone() -> None:
    named = checked("precision.backend=reference")
    assert settle_backend(named, 1, alone(), torch.device("cpu")) is named


def test_a_run_says_it_first_and_a_resume_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "precision.backend=auto", "train.stop_after_steps=1", "train.save_interval_steps=1")
    assert pretrain.main(run.overrides) in (0, 85)
    first = capsys.readouterr().out
    assert first.startswith("precision.backend=auto chose emulated (the emulation, which multiplies in BF16), which")
    assert (run.run_dir / "precision.txt").read_text().startswith("precision.backend=auto chose emulated")
    assert pretrain.main([*run.overrides, "precision.backend=reference", "train.stop_after_steps=2"]) in (0, 85)
    assert "precision.backend  emulated" in capsys.readouterr().out


def test_a_failing_emulation_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = EmulatedBackend.matmul
    monkeypatch.setattr(EmulatedBackend, "matmul", lambda *args, **kwargs: right(*args, **kwargs) * 1.5)
    run = tiny_run(tmp_path, "precision.backend=auto")
    assert pretrain.main(run.overrides) == 2
    assert "error: precision.backend=auto: no backend can be trusted" in capsys.readouterr().err
    assert preflight.main(run.overrides) == 1
    assert "FAILED  backend        precision.backend=auto: no backend can be trusted" in capsys.readouterr().out


def test_preflight_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(tiny_run(tmp_path, "precision.backend=auto").overrides) == 0
    assert "ok      auto           precision.backend=auto chose emulated" in capsys.readouterr().out


def test_plan_forecasts_it() -> None:
    paper = to_run_config(compose_config(["experiment=paper_8b_1t", "parallel=gb200_8b_1024"]))
    report = run_plan(paper, 1024)
    assert report["backend"]["name"] == report["run"]["backend"] == "transformer_engine"
    assert "would choose transformer_engine" in report["backend"]["reason"]
    assert [w["text"][:24] for w in report["warnings"] if w["about"] == "kernels"] == ["model.mamba_kernel=torch"]
    explicit = replace(paper, precision=replace(paper.precision, backend=EMULATED))
    texts = [w["text"] for w in run_plan(explicit, 1024)["warnings"] if w["about"] == "backend"]
    assert texts[0].startswith("backend emulated multiplies in BF16")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("import os; os._exit(9)", "its process ended with code 9: it said nothing"),
        ("raise RuntimeError('CUDA error: an illegal memory access')", "code 1: RuntimeError: CUDA error: an illegal"),
        ("import time; time.sleep(60)", "it did not end within 3 s"),
    ],
)
def test_a_kernel_that_breaks_its_process(
    fault: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a trial has a process of its own: a sticky CUDA error or a hang ends it, and not the run."""
    (tmp_path / "planted_fault.py").write_text(fault)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(examine, "MODULE", "planted_fault")
    monkeypatch.setattr(examine, "TRIAL_SECONDS", 3.0)
    rejection = examine.examine(PrecisionConfig(TRITON), [], CUDA)
    assert rejection is not None
    assert rejection.failed
    assert message in rejection.reason


def test_the_child_answers() -> None:
    question = Question(PrecisionConfig(EMULATED, compile=False), [RECIPES["nvfp4"]], "cpu")
    assert examine.answer_of_child(question) is None
    refused = examine.answer_of_child(replace(question, config=PrecisionConfig(FP8, recipes={"fp8": RECIPES["fp8"]})))
    assert refused is not None
    assert not refused.failed
    assert "needs a Hopper GPU" in refused.reason
