"""Communication beside computation changes no bit, whatever the backward does.

A model with an unused weight, one used twice, an embedding through autograd and linears that accumulate by themselves
runs on two ranks with overlap on and off; the number of contributions changes between steps, and on one rank only.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.optim import OptimConfig, Overlap, Zero1Optimizer
from megatron_fp4.optim.zero1 import LateGradientError
from tests.helpers.distributed import mesh_for, run_distributed
from tests.optim.layouts import packed, unpacked
from tests.optim.synthetic import Toy, tokens_of

NUM_STEPS = 10
MICROBATCHES = 4  # of the global batch


def config_of(reduce: Overlap, gather: Overlap, bucket_mib: float = 0.0005) -> OptimConfig:
    return OptimConfig(bucket_mib=bucket_mib, overlap_reduce=reduce, overlap_gather=gather)


def skips(step: int, rank: int) -> bool:
    """Whether the weight that is used twice is left out: on all ranks in step 3 and 4, on rank 1 in step 7."""
    return step in (3, 4) or (step == 7 and rank == 1)


def train(mesh: ParallelMesh, config: OptimConfig, dtype: torch.dtype, microbatches: range, **calls: Any) -> Toy:
    """Ten steps on `microbatches` of each global batch. calls: `armed=False` never announces the last microbatch."""
    model = Toy(dtype=dtype)
    optimizer = Zero1Optimizer(model.named_parameters(), config, mesh, sequence_parallel=False)
    optimizer.gather_beside_forward(model)
    sent_early = []
    repeated = []

    def accumulate(step: int, *, armed: bool) -> None:
        optimizer.zero_grad()
        for part in microbatches:
            loss = model(tokens_of(step, part), skip_twice=skips(step, mesh.dp_cp.rank)) / 48
            if part == microbatches[-1] and armed:
                optimizer.begin_last_microbatch()
            loss.backward()

    for step in range(NUM_STEPS):
        accumulate(step, armed=calls.get("armed", True))
        sent_early.append(len(optimizer._grads._pending))
        try:
            norm = optimizer.finish_grads()
        except LateGradientError:
            repeated.append(step)
            accumulate(step, armed=False)
            norm = optimizer.finish_grads()
        assert not optimizer.step(norm, lr=1e-2, max_norm=1.0).skipped
    optimizer.wait_parameters()
    model.sent_early = sent_early  # type: ignore[assignment]
    model.repeated = repeated  # type: ignore[assignment]
    return model


def poisoned_step(mesh: ParallelMesh) -> tuple[bool, tuple[str, ...], bool, float]:
    """(skipped, names, state unchanged, norm) of a step in which only rank 1 makes a NaN."""
    model = Toy()
    optimizer = Zero1Optimizer(model.named_parameters(), config_of(Overlap.always, Overlap.never), mesh, False)
    for poison in (False, True):
        before = [{kind: t.clone() for kind, t in shard.tensors.items()} for shard in optimizer.state_shards()]
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        if poison and mesh.dp.rank == 1:
            model.down.main_grad[3, 2] = math.nan
        optimizer.begin_last_microbatch()
        model(tokens_of(0, mesh.dp.rank)).backward()
        norm = optimizer.finish_grads()
        report = optimizer.step(norm, lr=1e-2, max_norm=1.0)
    shards = optimizer.state_shards()
    same = all(torch.equal(old[k], s.tensors[k]) for old, s in zip(before, shards, strict=True) for k in old)
    same &= all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    return report.skipped, report.nonfinite, same and optimizer.step_count == 1, report.grad_norm


def ramped_steps(mesh: ParallelMesh) -> list[int]:
    """How many buckets leave early in steps of 1, 2, 1, 3, 2 and 3 microbatches, each announced as a whole."""
    model = Toy()
    optimizer = Zero1Optimizer(model.named_parameters(), config_of(Overlap.always, Overlap.never), mesh, False)
    sent_early = []
    for step, count in enumerate((1, 2, 1, 3, 2, 3)):
        optimizer.zero_grad()
        optimizer.begin_last_microbatch(count)
        for part in range(count):
            model(tokens_of(step, part)).backward()
        sent_early.append(min(3, len(optimizer._grads._pending)))
        optimizer.step(optimizer.finish_grads(), lr=1e-2, max_norm=1.0)
    return sent_early


def all_cases(rank: int, world_size: int) -> bytes:
    mesh = mesh_for(rank, world_size)
    local_microbatches = range(rank, MICROBATCHES, world_size)
    off, on = Overlap.never, Overlap.always
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        runs = {"off": (off, off, {}), "reduce": (on, off, {}), "gather": (off, on, {}), "both": (on, on, {})}
        runs["one bucket"] = (on, off, {"bucket_mib": 1.0})
        for name, (reduce, gather, more) in runs.items():
            model = train(mesh, config_of(reduce, gather, **more), dtype, local_microbatches)
            results[f"{name} {dtype}"] = ([p.detach() for p in model.parameters()], model.sent_early)
    model = train(mesh, config_of(on, off), torch.float32, local_microbatches, armed=False)
    results["never armed"] = ([p.detach() for p in model.parameters()], model.sent_early)
    results["repeated"] = train(mesh, config_of(on, off), torch.float32, local_microbatches).repeated
    results["poisoned"] = poisoned_step(mesh)
    results["ramp"] = ramped_steps(mesh)
    return packed(results)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return [unpacked(result) for result in run_distributed(all_cases, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", ["reduce", "gather", "both", "one bucket"])
def test_overlap_changes_no_bit(run: str, dtype: torch.dtype, ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        for index, (a, b) in enumerate(zip(results[f"{run} {dtype}"][0], ranks[0][f"off {dtype}"][0], strict=True)):
            assert torch.equal(a, b), f"rank {rank}: parameter {index} was read before it was complete"


def test_buckets_leave_during_backward(ranks: list[dict[str, Any]]) -> None:
    early = ranks[0]["reduce torch.float32"][1]
    assert early[0] == 0, "in the first step no count is known"
    assert min(early[1:3]) >= 3, f"nothing was sent during the backward: {early}"
    assert max(ranks[0]["off torch.float32"][1]) == 0
    assert max(ranks[0]["never armed"][1]) == 0


def test_without_the_announcement_all_is_sent_at_the_end(ranks: list[dict[str, Any]]) -> None:
    pairs = zip(ranks[0]["never armed"][0], ranks[0]["off torch.float32"][0], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_late_gradient_is_an_error_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    """The weight that was left out comes back in step 5, and in step 8 on rank 1: after its bucket has left."""
    assert [results["repeated"] for results in ranks] == [[5, 8], [5, 8]]


def test_another_number_of_microbatches_is_no_late_gradient(ranks: list[dict[str, Any]]) -> None:
    """A pipeline announces all of a step at once: of a ramp's next number nothing is known yet."""
    assert [results["ramp"] for results in ranks] == [[0, 0, 3, 0, 3, 3]] * 2


def test_one_rank_poisons_the_step_of_all(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        skipped, names, unchanged, norm = results["poisoned"]
        assert skipped, f"rank {rank} went on"
        assert not math.isfinite(norm)
        assert names == ("down",), f"rank {rank} blames {names}"
        assert unchanged, f"rank {rank}: a skipped step changed something"


def test_accumulation_over_ranks_and_microbatches_is_one_batch(ranks: list[dict[str, Any]]) -> None:
    """FP32 sums in another order: equal to rounding, where a lost or doubled microbatch would be far off."""
    results = ranks[0]["off torch.float32"][0]
    one_rank = train_like_two_ranks()
    for index, (a, b) in enumerate(zip(results, one_rank, strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=f"parameter {index}")


def train_like_two_ranks() -> list[torch.Tensor]:
    """The same global batches on one rank, four microbatches accumulated; rank 1's parts skip as rank 1 does."""
    model = Toy()
    optimizer = Zero1Optimizer(model.named_parameters(), OptimConfig(), ParallelMesh.single_process(), False)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for part in range(MICROBATCHES):
            (model(tokens_of(step, part), skip_twice=skips(step, part % 2)) / 48).backward()
        norm = optimizer.finish_grads()
        optimizer.step(norm, lr=1e-2, max_norm=1.0)
    return [parameter.detach() for parameter in model.parameters()]
