"""Every schedule computes what one process computes, bit for bit, in NVFP4 with stochastic rounding."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import build_mesh
from megatron_fp4.data.ramp import BatchRampConfig
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.pipeline.schedules import schedule_rule
from megatron_fp4.precision import EmulatedBackend, WgradQueue, linear_op
from megatron_fp4.proofs.distance import compare, worst
from megatron_fp4.proofs.parity import Case, Record, run_case, synthetic_inputs
from megatron_fp4.train.trainable import build_trainable
from tests.helpers.parity import parity_case

STEPS, MICROBATCHES, LINEARS = 2, 4, 4 * 2 * 2 + 1  # 8 blocks with 2 linears each, and the head
SCHEDULES = {
    2: ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"],
    4: ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"],  # and dualpipev, which needs 8
}


def the_case(mtp: MtpConfig | None = None, **train: Any) -> Case:
    model = {"mtp": mtp} if mtp else {}
    return parity_case(pattern="*-*-*-*-", steps=STEPS, num_heads=2, num_kv_heads=2, train=train, **model)


class Counts:
    """Weight gradients asked for (by linear) and computed, and the most that waited at once."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.computed = self.waiting = 0
        ask, matmul = linear_op._weight_gradient, EmulatedBackend.matmul

        def counted_ask(call: Any, *args: Any) -> Any:
            self.asked[call.sharding.name] += 1
            result = ask(call, *args)
            self.waiting = max(self.waiting, sum(self.asked.values()) - self.computed)
            return result

        def counted_matmul(backend: Any, *args: Any, **kwargs: Any) -> Any:
            self.computed += kwargs.get("accumulate_into") is not None
            return matmul(backend, *args, **kwargs)

        linear_op._weight_gradient, EmulatedBackend.matmul = counted_ask, counted_matmul  # type: ignore[method-assign]
        self._restore = (ask, matmul)

    def stop(self) -> None:
        linear_op._weight_gradient, EmulatedBackend.matmul = self._restore  # type: ignore[method-assign]


def run_schedules(process: Process, cases: list[tuple[Case, ParallelConfig]]) -> list[tuple[Record, Any]]:
    """Each schedule in turn, in the same processes."""
    results = []
    for case, parallel in cases:
        counts = Counts()
        record = run_case(process, case, parallel, build_mesh(parallel, process.world))
        counts.stop()
        results.append((record, (counts.asked, counts.computed, counts.waiting)))
    return results


@pytest.fixture(scope="module")
def reference() -> Record:
    ((record, _),) = run_local(run_schedules, 1, [(the_case(), ParallelConfig())])[0]
    return record


def parallel(pp: int, schedule: str) -> ParallelConfig:
    one_per_rank = schedule == "interleaved_zero_bubble" and pp == 4
    return ParallelConfig(pp=pp, schedule=schedule, virtual_stages=int(one_per_rank))


@pytest.mark.parametrize("pp", [2, 4])
def test_schedules_equal_one_process(pp: int, reference: Record) -> None:
    _check_schedules(reference, the_case(), [parallel(pp, schedule) for schedule in SCHEDULES[pp]])


def test_dualpipev_on_four_ranks() -> None:
    """It takes as many microbatches as stages: the others run above with more stages than microbatches."""
    case = the_case(global_batch=8)
    ((reference, _),) = run_local(run_schedules, 1, [(case, ParallelConfig())])[0]
    _check_schedules(reference, case, [parallel(4, "dualpipev")])


def _check_schedules(reference: Record, case: Case, layouts: list[ParallelConfig]) -> None:
    per_rank = run_local(run_schedules, layouts[0].pp, [(case, layout) for layout in layouts])
    for number, layout in enumerate(layouts):
        name = layout.schedule
        records = [results[number][0] for results in per_rank]
        comparison = compare(reference, records)
        assert worst(comparison.grads) == 0.0, f"{name}: wrong microbatch, order or scale of a gradient"
        assert comparison.loss_error == 0.0, f"{name}: a loss is lost, counted twice or scaled"
        assert comparison.norm_error == 0.0, f"{name}: the norm is not that of all stages"
        assert worst(comparison.masters[STEPS]) == 0.0, f"{name}: a stage is not updated, or with another learning rate"
        assert not comparison.replicas, f"{name}: parameters were not refreshed after the step"
        _check_counts([results[number][1] for results in per_rank], layout, case.config.train.global_batch)


def _check_counts(counts: list[Any], layout: ParallelConfig, microbatches: int = MICROBATCHES) -> None:
    name = layout.schedule
    asked: Counter[str] = sum((asked for asked, _, _ in counts), Counter())
    assert len(asked) == LINEARS, f"{name}: some linears had no backward at all"
    assert set(asked.values()) == {STEPS * microbatches}, f"{name}: a backward ran twice (dgrad/wgrad split)"
    computed = sum(computed for _, computed, _ in counts)
    assert computed == STEPS * microbatches * LINEARS, f"{name}: a queued weight gradient was lost or doubled"
    deferred = max(waiting for _, _, waiting in counts) > 1
    assert deferred == schedule_rule(name).defers_wgrad, f"{name}: weight gradients at the wrong time"


def test_a_batch_ramp_equals_one_process() -> None:
    """Four microbatches, then six, then eight: each number needs a schedule and receive buffers of its own."""
    ramp = BatchRampConfig(start_samples=4, increment_samples=2, ramp_samples=10)
    case = the_case(global_batch=8, batch_ramp=ramp, micro_batch=1)
    case = replace(case, num_steps=3)
    ((whole, _),) = run_local(run_schedules, 1, [(case, ParallelConfig())])[0]
    layouts = [parallel(2, schedule) for schedule in ("1f1b", "interleaved_1f1b", "zbv")]
    per_rank = run_local(run_schedules, 2, [(case, layout) for layout in layouts])
    for number, layout in enumerate(layouts):
        comparison = compare(whole, [results[number][0] for results in per_rank])
        assert comparison.loss_error == 0.0, (
            f"{layout.schedule}: a loss of a ramped step is lost, counted twice or scaled"
        )
        assert worst(comparison.masters[3]) == 0.0, f"{layout.schedule}: a ramped step has other gradients"


def test_recompute_equals_keeping(reference: Record) -> None:
    """A recomputed block must draw the same rounding noise, and queue its weight gradients once."""
    layouts = [parallel(2, schedule) for schedule in ("1f1b", "zbv", "dualpipev")]
    full = the_case(recompute=Recompute.full)
    cases = [(full, layout) for layout in layouts]
    cases.append((the_case(recompute=Recompute.selective), layouts[1]))
    per_rank = run_local(run_schedules, 2, cases)
    for number, (case, layout) in enumerate(cases):
        name = f"{layout.schedule}, {case.config.train.recompute.name}"
        comparison = compare(reference, [results[number][0] for results in per_rank])
        assert worst(comparison.grads) == 0.0, f"{name}: recomputed activations differ"
        _check_counts([results[number][1] for results in per_rank], layout)


def evaluate_between_steps(process: Process, case: Case, layout: ParallelConfig) -> list[float]:
    """Evaluation losses before and after a step (the second on half as long samples), and that step's loss."""
    mesh = build_mesh(layout, process.world)
    config = replace(case.config, parallel=layout)
    trainable = build_trainable(config, case.table, EmulatedBackend(), mesh, process.device)
    inputs, count = synthetic_inputs(case, mesh, 0, process.device)
    microbatches = inputs.split(1)
    values = [trainable.engine.evaluate(microbatches[1]).sum()]
    trainable.optimizer.zero_grad()
    values.append(trainable.engine.train(microbatches, 1.0 / count, trainable.optimizer.begin_last_microbatch))
    norm = trainable.optimizer.finish_grads()
    trainable.optimizer.step(norm, lr=1e-2, max_norm=0.0)
    short = type(inputs)(*(tensor[:1, :16].contiguous() for tensor in inputs if tensor is not None))
    values.append(trainable.engine.evaluate(short).sum())
    reports = trainable.engine.reports_loss
    assert reports or not any(bool(value) for value in values), "only the last stage may report a loss"
    return [float(value) if reports else 0.0 for value in values]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_evaluation(schedule: str) -> None:
    """Evaluation passes every stage once, takes any length, and leaves the training buffers alone; the loss of each
    depth of multi-token prediction is beside that of the next token."""
    case = the_case(MtpConfig(depth=2, pattern="*", shared=True) if schedule == "zbv" else None)
    (expected,) = run_local(evaluate_between_steps, 1, case, ParallelConfig())
    per_rank = run_local(evaluate_between_steps, 2, case, parallel(2, schedule))
    assert [sum(values) for values in zip(*per_rank, strict=True)] == expected


def test_taking_separates_microbatches() -> None:
    """A drain that also ran the next microbatch's weight gradients would hold up the pipeline and its memory."""
    queue, done = WgradQueue(), []
    queue.put(lambda: done.append("first"))
    first = queue.take()
    queue.put(lambda: done.append("second"))
    second = queue.take()
    assert not done, "taking computes nothing"
    second()
    assert done == ["second"]
    first()
    first()
    assert done == ["second", "first"], "running twice must not add twice"


def test_stages_start_different_from_each_other() -> None:
    """Noise keyed by local instead of logical names would give neighbouring blocks equal weights."""
    (record,) = run_local(run_schedules, 1, [(the_case(), ParallelConfig())])[0]
    ups = [shard.tensors["master"] for shard in record[0].masters[0] if shard.name.endswith("mlp.up.weight")]
    assert len(ups) == 4
    assert all(not torch.equal(ups[0], other) for other in ups[1:])
