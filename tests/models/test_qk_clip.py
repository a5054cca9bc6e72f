"""A head whose logits are too large falls to the threshold, at every layout bit for bit the same."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import Group, build_mesh
from megatron_fp4.comm.rect import Shard
from megatron_fp4.layers.qk_clip.maxima import LogitMaxima
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.optim.config import Algorithm, QkClipConfig
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from megatron_fp4.proofs.distance import assemble
from megatron_fp4.proofs.layouts import parse_layouts
from megatron_fp4.proofs.parity import Case, copies, synthetic_inputs
from megatron_fp4.train.refusals.effect import check_qk_clip
from megatron_fp4.train.trainable import Trainable, build_trainable
from tests.helpers.parity import FP32, HYBRID, parity_case

ALONE = Process(Launch(), Group.single(), torch.device("cpu"))
THRESHOLD = 5.0
PLANTED = {"blocks.0.attention.qkv.q.weight": 300.0, "blocks.0.attention.qkv.q.bias": 1.0}
"""The scale of the planted head, the last of 4, whose key head is the last of 2; what is added to its bias."""


def clip_case(
    algorithm: Algorithm = Algorithm.adamw,
    *,
    recompute: Recompute = Recompute.none,
    threshold: float = THRESHOLD,
    **model: Any,
) -> Case:
    optim = {
        "algorithm": algorithm,
        "lr": 1e-30,
        "weight_decay": 0.0,
        "qk_clip": QkClipConfig(threshold=threshold, alpha=0.25),
        "bucket_mib": 0.01,
    }
    settings = {"num_kv_heads": 2, "qkv_bias": True, "sliding_window": 24, **model}
    return parity_case(FP32, reset_documents=True, optim=optim, train={"recompute": recompute}, **settings)


def plant(trainable: Trainable, head_dim: int = 16) -> None:
    """Make the last query head of block 0 large: weights scaled, bias not 0."""
    for shard in trainable.optimizer.state_shards():
        if shard.name in PLANTED:
            row = torch.arange(shard.where.shape[0]) + shard.where.offset[0]
            of_head = (row >= shard.where.global_shape[0] - head_dim).view(-1, *[1] * (len(shard.where.shape) - 1))
            master, value = shard.tensors["master"], PLANTED[shard.name]
            master.copy_(torch.where(of_head, master * value if master.dim() == 2 else master + value, master))
    trainable.optimizer.after_load(0)


def two_steps(process: Process, case: Case, parallel: ParallelConfig) -> tuple[list[dict[str, float]], list[Shard]]:
    """Reports of the same batch before and after the clip, and all masters after the first step."""
    mesh = build_mesh(parallel, process.world)
    config = replace(case.config, parallel=parallel)
    trainable = build_trainable(config, case.table, EmulatedBackend(compile=False), mesh, process.device)
    plant(trainable)
    reports, masters = [], []
    inputs, num_targets = synthetic_inputs(case, mesh, 0, process.device)
    for _ in range(2):
        trainable.optimizer.zero_grad()
        microbatches = inputs.split(config.train.micro_batch)
        trainable.engine.train(microbatches, 1.0 / num_targets, trainable.optimizer.begin_last_microbatch)
        trainable.optimizer.step(trainable.optimizer.finish_grads(), lr=config.optim.lr, max_norm=0.0)
        assert trainable.optimizer.rows is not None
        reports.append(trainable.optimizer.rows.report())
        masters = masters or copies(trainable.optimizer.state_shards(), "master")
    return reports, masters


def layouts_in_turn(process: Process, cases: list[Case], layouts: list[ParallelConfig]) -> list[Any]:
    return [two_steps(process, case, parallel) for parallel in layouts for case in cases]


def test_a_planted_head_falls_to_the_threshold_and_no_layout_changes_a_bit() -> None:
    cases = [clip_case(), clip_case(Algorithm.muon)]
    alone = layouts_in_turn(ALONE, cases, [ParallelConfig()])
    _, untouched = two_steps(ALONE, clip_case(threshold=1e9), ParallelConfig())
    before, after = alone[0][0]
    assert before["qk_clip/max_logit"] == before["qk_clip/max_logit/blocks.0"] > 2 * THRESHOLD
    assert before["qk_clip/max_logit/blocks.2"] < THRESHOLD
    assert before["qk_clip/clipped_heads"] == 2, "both queries of the key head"
    assert after["qk_clip/max_logit"] == pytest.approx(THRESHOLD, rel=1e-5)
    _check_factors(untouched, alone[0][1], THRESHOLD / before["qk_clip/max_logit"])

    layouts = [layout.parallel for layout in parse_layouts("tp2, pp2, dp2, cp2")]
    ranks = run_local(layouts_in_turn, 2, cases, layouts)
    for number, parallel in enumerate(layouts):
        for which in range(len(cases)):
            results = [rank[number * len(cases) + which] for rank in ranks]
            reports, masters = alone[which]
            assert all(of_rank == reports for of_rank, _ in results), f"{parallel}: other maxima than one process"
            whole = assemble([shard for _, shards in results for shard in shards], "master")
            for name, expected in assemble(masters, "master").items():
                off = float((whole[name] - expected).abs().max())
                assert off <= (1e-28 if name.endswith("bias") else 0.0), f"{parallel}: {name} off by {off}"


def _check_factors(untouched: list[Shard], clipped: list[Shard], ratio: float) -> None:
    """The rows of one group of block 0, weights and biases, and nothing else."""
    before, after = assemble(untouched, "master"), assemble(clipped, "master")
    for name, whole in before.items():
        expected = whole.clone()
        if name.startswith("blocks.0.attention.qkv.q."):
            expected[32:] *= ratio**0.25
        elif name.startswith("blocks.0.attention.qkv.k."):
            expected[16:] *= ratio**0.75
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=0)
        if not name.startswith(("blocks.0.attention.qkv.q.", "blocks.0.attention.qkv.k.")):
            assert torch.equal(after[name], whole), name


def test_recompute_looks_once_and_sees_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    observe = LogitMaxima._observe

    def counted(self: LogitMaxima, *args: Any) -> None:
        looks.append(1)
        observe(self, *args)

    monkeypatch.setattr(LogitMaxima, "_observe", counted)
    results = []
    for recompute in Recompute:
        looks.clear()
        reports, _ = two_steps(ALONE, clip_case(recompute=recompute), ParallelConfig())
        results.append((reports, len(looks)))
    assert results[0][1] == 2 * 2 * 4, "two attentions, in two steps of four microbatches"
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_a_skipped_step_clips_nothing_and_a_hybrid_clips_its_attention() -> None:
    case = clip_case(**{**HYBRID, "pattern": "M-*-"})
    trainable = build_trainable(
        case.config,
        case.table,
        EmulatedBackend(compile=False),
        build_mesh(ParallelConfig(), ALONE.world),
        torch.device("cpu"),
    )
    assert trainable.optimizer.rows is not None
    trainable.optimizer.zero_grad()
    trainable.optimizer.finish_grads()
    assert trainable.optimizer.step(math.nan, lr=1.0, max_norm=0.0).skipped
    assert trainable.optimizer.rows.report() == {}
    reports, _ = two_steps(ALONE, case, ParallelConfig())
    assert list(reports[0]) == ["qk_clip/max_logit", "qk_clip/clipped_heads", "qk_clip/max_logit/blocks.2"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_head_of_multi_token_prediction_is_clipped(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {f"mtp.0.{name}": value for name, value in PLANTED.items()}
    monkeypatch.setattr("tests.models.test_qk_clip.PLANTED", planted)
    case = clip_case(mtp=MtpConfig(depth=2, pattern="*-", shared=shared))
    (before, after), _ = two_steps(ALONE, case, ParallelConfig())
    assert before["qk_clip/max_logit"] == before["qk_clip/max_logit/mtp.0.blocks.0"] > 2 * THRESHOLD
    assert before["qk_clip/clipped_heads"] == 2
    near = 1e-2 if shared else 1e-5  # the second depth looks at what the first one made of other weights
    assert after["qk_clip/max_logit/mtp.0.blocks.0"] == pytest.approx(THRESHOLD, rel=near)
    assert ("qk_clip/max_logit/mtp.1.blocks.0" in before) is not shared


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"qk_norm": QkNorm.head}, r"optim.qk_clip.threshold = 5 has no effect with model.qk_norm=head"),
        ({"pattern": "M-", **{k: v for k, v in HYBRID.items() if k != "pattern"}}, r"no block of the model has attent"),
    ],
)
def test_a_clip_that_scales_no_logit_is_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_qk_clip(clip_case(**{**model, "qkv_bias": "pattern" not in model}).config)
