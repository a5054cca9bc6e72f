"""The plan against a rehearsed step: peak of memory within 3 %, bytes of every axis within 1 %, no rank waits for ever.

Both come from different code: the plan from single blocks and formulas, the rehearsal from the trainer's whole step.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from megatron_fp4.cli.render.rehearsal import deviations, render
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.data.config import DataConfig
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.optim import Algorithm, OptimConfig
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat, MomentsConfig
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.config import BackendName, PrecisionConfig, Rule
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.sections import TrainConfig
from tests.helpers.rehearsed import rehearse_all
from tests.models.test_count import load

SIZES: dict[str, Any] = {"hidden": 256, "ffn_hidden": 1024, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 4096}
GPT = replace(load("gpt_tiny"), pattern="*-", num_layers=2, **SIZES)
DEEP = replace(GPT, pattern="*-*-", num_layers=4)
TIED = replace(GPT, tied_embeddings=True)
WIDE = replace(DEEP, hidden=4096, ffn_hidden=14336, num_heads=32, num_kv_heads=8, head_dim=128)
HYBRID = replace(load("hybrid_tiny"), pattern="M*-M", num_layers=4, vocab_size=4096)
EXPERTS = replace(
    HYBRID, pattern="ME*E",
    moe=MoeConfig(num_experts=16, top_k=4, ffn_hidden=256, shared_ffn_hidden=512, latent=128, expert_bias=True),
)  # fmt: skip
AHEAD = replace(EXPERTS, mtp=MtpConfig(depth=2, pattern="*E", shared=True))
NVFP4 = PrecisionConfig(recipes={"nvfp4": nvfp4_paper()}, rules=[Rule("head"), Rule("*", use="nvfp4")])

COMPACT = OptimConfig(
    master=MasterFormat.remainder, moments=MomentsConfig(MomentFormat.fp8, MomentFormat.fp8, MomentFormat.bf16)
)


def case(
    model: ModelConfig,
    num_gpus: int,
    ranks: str,
    *,
    precision: PrecisionConfig | None = None,
    documents: bool = False,
    recompute: str = "none",
    seq_length: int = 512,
    optim: OptimConfig | None = None,
    **layout: Any,
) -> tuple[RunConfig, int, str]:
    """Configuration, ranks of the world, ranks that are rehearsed; two microbatches a step."""
    parallel = ParallelConfig(**layout)
    config = RunConfig(
        model=model,
        precision=precision or PrecisionConfig(),
        parallel=parallel,
        optim=optim or OptimConfig(),
        data=DataConfig(seq_length=seq_length, reset_documents=documents),
        train=TrainConfig(
            micro_batch=1, global_batch=2 * parallel.resolve_dp(num_gpus), recompute=Recompute[recompute]
        ),
    )
    return config, num_gpus, ranks


CASES = {
    "gpt": case(GPT, 4, "0", precision=NVFP4, tp=2),
    "gpt, full": case(GPT, 4, "0", recompute="full", tp=2),
    "gpt, selective": case(GPT, 2, "0", precision=NVFP4, recompute="selective", tp=2),
    "gpt, documents over cp": case(GPT, 4, "3", documents=True, tp=2, cp=2),
    "wide, two copies": case(replace(WIDE, activation=Activation.swiglu), 4, "0", recompute="full", tp=2),
    "wide, pipeline": case(WIDE, 4, "last", seq_length=4096, recompute="full", pp=2),
    "wide, zbv": case(WIDE, 4, "last", recompute="full", pp=2, schedule="zbv"),
    "wide, tied": case(replace(WIDE, tied_embeddings=True, vocab_size=65536), 4, "last", recompute="full", pp=2),
    "tied": case(TIED, 4, "0", tp=2),
    "tied, both ends on a rank": case(replace(DEEP, tied_embeddings=True), 4, "first", pp=2, schedule="zbv"),
    "tied, pipeline": case(TIED, 8, "first,last", tp=2, pp=2),
    "hybrid, full": case(HYBRID, 4, "0", recompute="full", tp=2),
    "hybrid over cp": case(HYBRID, 4, "0", tp=2, cp=2),
    "hybrid, one rank": case(HYBRID, 1, "0", precision=NVFP4),
    "hybrid, pipeline": case(HYBRID, 8, "last", tp=2, pp=2),
    "hybrid, zbv": case(HYBRID, 4, "first", pp=2, schedule="zbv"),
    "experts": case(EXPERTS, 4, "0", recompute="full", tp=2, ep=4),
    "experts of later tokens": case(AHEAD, 4, "0", precision=NVFP4, recompute="selective", tp=2, ep=4),
    "gpt, interleaved": case(DEEP, 4, "cell", recompute="selective", pp=2, schedule="interleaved_1f1b"),
    "transformer engine": case(GPT, 4, "0", precision=replace(NVFP4, backend=BackendName.transformer_engine), tp=2),
    "gpt, zero bubble": case(DEEP, 2, "first,last", pp=2, schedule="interleaved_zero_bubble"),
    "swiglu, full": case(
        replace(DEEP, activation=Activation.swiglu), 4, "first", precision=NVFP4, recompute="full", pp=2
    ),
    "compact state": case(GPT, 4, "0", optim=COMPACT, tp=2),
    "compact state, muon": case(HYBRID, 2, "0", optim=replace(COMPACT, algorithm=Algorithm.muon)),
    "cell": case(GPT, 8, "cell", tp=2, pp=2),
}


Reports = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def reports() -> Reports:
    return dict(zip(CASES, rehearse_all(list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_as_planned(name: str, reports: Reports) -> None:
    report = reports[name]
    assert deviations(report) == []
    assert render(report).endswith("verdict: as planned")


def test_a_cell_is_all_ranks_of_two_copies(reports: Reports) -> None:
    assert [entry["rank"] for entry in reports["cell"]["ranks"]] == list(range(8))


@pytest.mark.parametrize("name", ["cell", "gpt, interleaved"])
def test_evaluation_and_save_follow(name: str, reports: Reports) -> None:
    """An evaluation keeps nothing for a backward pass; a save takes host memory once, and none of the device."""
    for entry in reports[name]["ranks"]:
        assert entry["evaluation"]["peak"] < entry["memory"]["peak"]
        assert sum(entry["evaluation"]["read_backs"].values()) == 1
        first, later = entry["first_save"], entry["later_save"]
        assert first["peak"] == later["peak"] < entry["memory"]["peak"]
        assert first["bytes_out"] == later["bytes_out"] == first["pinned_bytes"] > 0 == later["pinned_bytes"]


def test_what_stands_in_is_told(reports: Reports) -> None:
    """Compiled stages are launches of their own; Transformer Engine's kernels are not among those that are counted."""
    emulated, engine = reports["gpt"], reports["transformer engine"]
    assert emulated["ranks"][0]["kernels"]["compiled_stages"] > 0 == engine["ranks"][0]["kernels"]["compiled_stages"]
    assert "torch compiles is one launch" in render(emulated)
    assert "operands have the sizes of transformer_engine's" in render(engine)
    assert [list(rank["read_backs"].values()) for rank in engine["ranks"]] == [[1]]


def test_a_large_difference_is_told(reports: Reports) -> None:
    """A plan that is 4 % over, and one that knows nothing of an axis."""
    report = deepcopy(reports["gpt"])
    memory = report["ranks"][0]["memory"]
    memory["plan"] = 1.04 * memory["peak"]
    report["ranks"][0]["messages"]["axes"]["tensor"]["plan"] = 0.0
    lines = deviations(report)
    assert "(+4.0%)" in lines[0]
    assert "tensor traffic" in lines[1]
    assert "rank 0" in render(report)


def test_a_crossing_too_many_is_told(reports: Reports) -> None:
    """A read-back somewhere in the step or the evaluation, and a constant that is sent in it."""
    report = deepcopy(reports["gpt"])
    entry = report["ranks"][0]
    entry["read_backs"]["layers/loss.py:1"] = 1
    entry["copies_in"]["numerics/hadamard.py:1"] = 416
    entry["evaluation"]["read_backs"]["train/evaluate.py:1"] = 1
    lines = deviations(report)
    assert len(lines) == 3
    assert "1 x layers/loss.py:1" in lines[0]
    assert "read-backs in the evaluation" in lines[1]
    assert "416 x numerics/hadamard.py:1" in lines[2]
