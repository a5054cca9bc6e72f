"""One rank: bit for bit torch's AdamW, gradients taken over, skipped steps, state as rectangles."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import pytest
import torch

from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement
from megatron_fp4.optim import OptimConfig, Overlap, Zero1Optimizer
from tests.optim.synthetic import QKV_ROWS, SHAPES, Toy, contribute, exact_gradient, make_parameters, tokens_of

CONFIG = OptimConfig(weight_decay=0.1, bucket_mib=0.01)


def optimizer_of(parameters: dict[str, LogicalParameter], config: OptimConfig = CONFIG) -> Zero1Optimizer:
    return Zero1Optimizer(parameters.items(), config, ParallelMesh.single_process(), sequence_parallel=False)


def reference_of(parameters: dict[str, LogicalParameter], config: OptimConfig = CONFIG) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters.values() if (p.dim() > 1) is decays], "weight_decay": decay}
        for decays, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def test_equals_torch_adamw_bit_for_bit() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer, reference = optimizer_of(ours), reference_of(theirs)
    for step in range(6):
        lr = 1e-3 * (step + 1)
        optimizer.zero_grad()
        optimizer.begin_last_microbatch()
        for name, shape in SHAPES.items():
            gradient = exact_gradient(name, shape, step, 0)
            contribute(ours[name], gradient)
            theirs[name].grad = gradient.clone()
        norm = optimizer.finish_grads()
        report = optimizer.step(norm, lr=lr, max_norm=0.0)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        assert (report.skipped, report.clip_factor, report.lr) == (False, 1.0, lr)
        for name in SHAPES:
            assert torch.equal(ours[name], theirs[name]), f"step {step}, {name}: wrong decay group, rate or moments"


def test_clipping_scales_the_gradients_that_adam_sees() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer, reference = optimizer_of(ours), reference_of(theirs)
    optimizer.zero_grad()
    for name, shape in SHAPES.items():
        contribute(ours[name], exact_gradient(name, shape, 0, 0))
    norm = optimizer.finish_grads()
    report = optimizer.step(norm, lr=1e-3, max_norm=2.0)
    norm = torch.cat([exact_gradient(n, s, 0, 0).flatten() for n, s in SHAPES.items()]).norm()
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-6)
    assert report.clip_factor == pytest.approx(2.0 / float(norm), rel=1e-5)
    for name, shape in SHAPES.items():
        theirs[name].grad = exact_gradient(name, shape, 0, 0) * report.clip_factor
    reference.param_groups[0]["lr"] = reference.param_groups[1]["lr"] = 1e-3
    reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_gradients_from_autograd_and_from_the_layers_arrive_in_main_grad() -> None:
    model = Toy()
    plain = copy.deepcopy(model)
    optimizer = optimizer_of(dict(model.named_parameters()))
    optimizer.zero_grad()
    for part in range(2):
        model(tokens_of(0, part)).backward()
        plain(tokens_of(0, part)).backward()
    optimizer.finish_grads()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.main_grad, expected, msg=f"{name}: lost or counted twice")
        assert ours.grad is None, f"{name}: a second copy of the gradient stays"


def test_gradient_left_by_an_engine_without_hooks_is_not_lost() -> None:
    parameters = make_parameters()
    optimizer = optimizer_of(parameters)
    optimizer.zero_grad()
    for name, shape in SHAPES.items():
        parameters[name].grad = exact_gradient(name, shape, 0, 0)
    optimizer.finish_grads()
    assert all(torch.equal(parameters[n].main_grad, exact_gradient(n, s, 0, 0)) for n, s in SHAPES.items())


def test_bf16_parameters_follow_fp32_masters() -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = optimizer_of(parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(20):  # steps so small that BF16 alone would not move
        optimizer.zero_grad()
        for name, shape in SHAPES.items():
            contribute(parameters[name], torch.ones(shape))
        norm = optimizer.finish_grads()
        assert not optimizer.step(norm, lr=1e-4, max_norm=0.0).skipped, step
    masters = {shard.name: shard.tensors["master"] for shard in optimizer.state_shards()}
    name = "head.weight"
    assert parameters[name].dtype == torch.bfloat16
    assert torch.equal(parameters[name], masters[name].bfloat16()), "parameters are not the rounded masters"
    assert not torch.equal(parameters[name], before[name]), "the updates were lost in BF16"
    assert not torch.equal(masters[name], masters[name].bfloat16().float()), "masters are kept in BF16"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_skips_the_step_and_is_named(bad: float) -> None:
    parameters = make_parameters()
    changes = []
    optimizer = Zero1Optimizer(
        parameters.items(), CONFIG, ParallelMesh.single_process(), False, on_weights_changed=lambda: changes.append(1)
    )
    for name, shape in SHAPES.items():
        contribute(parameters[name], exact_gradient(name, shape, 0, 0))
    norm = optimizer.finish_grads()
    optimizer.step(norm, lr=1e-3, max_norm=1.0)
    saved = copy.deepcopy([shard.tensors for shard in optimizer.state_shards()])
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.zero_grad()
    parameters["blocks.0.attention.qkv.weight"].main_grad[50, 3] = bad  # row 2 of k
    parameters["blocks.1.norm.weight"].main_grad[8] = -bad
    norm = optimizer.finish_grads()
    report = optimizer.step(norm, lr=1e-3, max_norm=1.0)
    assert report.skipped
    assert report.nonfinite == ("blocks.0.attention.k.weight", "blocks.1.norm.weight"), "wrong rows are blamed"
    assert optimizer.step_count == 1, "a skipped step counts in the bias correction"
    assert changes == [1], "caches of quantized weights are dropped though no weight changed"
    for old, shard in zip(saved, optimizer.state_shards(), strict=True):
        assert all(torch.equal(old[kind], shard.tensors[kind]) for kind in old), f"{shard.name} changed"
    assert all(torch.equal(weights[name], parameters[name]) for name in SHAPES)


def test_state_shards_are_the_logical_tensors_and_load_in_place() -> None:
    parameters = make_parameters()
    optimizer = optimizer_of(parameters)
    shards = {shard.name: shard for shard in optimizer.state_shards()}
    start = 0
    for part, rows in QKV_ROWS.items():
        shard = shards[f"blocks.0.attention.{part}.weight"]
        assert (shard.where.global_shape, shard.where.offset, shard.writes) == ((rows, 16), (0, 0), True)
        whole = parameters["blocks.0.attention.qkv.weight"]
        assert torch.equal(shard.tensors["master"], whole[start : start + rows]), f"{part} shows other rows"
        start += rows
    assert shards["blocks.1.conv.weight"].tensors["exp_avg"].shape == (48, 1, 4)
    changes: list[int] = []
    optimizer._on_weights_changed = lambda: changes.append(1)
    for shard in shards.values():
        for tensor in shard.tensors.values():
            tensor.fill_(3.0)
    optimizer.after_load(41)
    assert all(bool((parameter == 3.0).all()) for parameter in parameters.values()), "masters were not loaded in place"
    assert changes == [1]


def test_rows_that_are_still_being_sent_are_not_updated() -> None:
    """FP32 parameters are their own masters; a module whose forward was skipped has not waited for its gather."""
    parameters = make_parameters()
    optimizer = optimizer_of(parameters)
    assert optimizer.state_shards()[0].tensors["master"].data_ptr() in {p.data_ptr() for p in parameters.values()}
    log: list[str] = []

    class Gather:
        def wait(self) -> None:
            log.append("arrived")

    optimizer._params._pending[0] = Gather()  # type: ignore[assignment]
    update = optimizer._adamw.update
    optimizer._adamw.update = lambda *args: (log.append("updated"), update(*args))  # type: ignore[method-assign,assignment]
    norm = optimizer.finish_grads()
    optimizer.step(norm, lr=1e-3, max_norm=0.0)
    assert log == ["arrived", "updated"]
    optimizer._params._pending[0] = Gather()  # type: ignore[assignment]
    optimizer.state_shards()  # whoever loads state writes into it
    assert log == ["arrived", "updated", "arrived"]


def test_restored_state_continues_bit_for_bit() -> None:
    def run(optimizer: Zero1Optimizer, parameters: dict[str, LogicalParameter], steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            for name, shape in SHAPES.items():
                contribute(parameters[name], exact_gradient(name, shape, step, 0))
            norm = optimizer.finish_grads()
            optimizer.step(norm, lr=1e-2, max_norm=1.0)

    whole, restored = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16, seed=9)
    first = optimizer_of(whole)
    run(first, whole, range(3))
    second = optimizer_of(restored, OptimConfig(bucket_mib=100.0))  # other buckets: state does not know them
    source = {shard.name: shard.tensors for shard in first.state_shards()}
    for shard in second.state_shards():
        for kind, tensor in shard.tensors.items():
            tensor.copy_(source[shard.name][kind])
    second.after_load(first.step_count)
    run(first, whole, range(3, 6))
    run(second, restored, range(3, 6))
    assert all(torch.equal(whole[name], restored[name]) for name in SHAPES)


def test_overlap_on_with_one_rank() -> None:
    config = OptimConfig(bucket_mib=0.001, overlap_reduce=Overlap.always, overlap_gather=Overlap.always)
    losses = []
    for each in (config, OptimConfig()):
        model = Toy()
        optimizer = optimizer_of(dict(model.named_parameters()), each)
        optimizer.gather_beside_forward(model)
        for step in range(3):
            optimizer.zero_grad()
            optimizer.begin_last_microbatch()
            loss = model(tokens_of(step, 0))
            loss.backward()
            norm = optimizer.finish_grads()
            optimizer.step(norm, lr=1e-2, max_norm=1.0)
            losses.append(float(loss.detach()))
    assert losses[:3] == losses[3:]
    assert losses[0] != losses[2]


def test_calls_out_of_order_are_caught() -> None:
    optimizer = optimizer_of(make_parameters())
    optimizer.zero_grad()
    with pytest.raises(AssertionError, match="finish_grads comes first"):
        optimizer.step(1.0, lr=1e-3, max_norm=0.0)
    optimizer.finish_grads()
    with pytest.raises(AssertionError, match="twice"):
        optimizer.finish_grads()
    with pytest.raises(ValueError, match="no parameters"):
        Zero1Optimizer([], CONFIG, ParallelMesh.single_process(), False)


def test_replica_that_is_owned_elsewhere_is_not_counted() -> None:
    parameters = make_parameters()
    placement = parameters["head.weight"].placement
    parameters["head.weight"].placement = Placement(placement.rectangles, writes=False)
    optimizer = optimizer_of(parameters)
    optimizer.zero_grad()
    parameters["head.weight"].main_grad.fill_(100.0)
    parameters["blocks.1.norm.weight"].main_grad[0] = 3.0
    assert optimizer.finish_grads() == 3.0, "the second copy of a tied weight enters the norm"
    assert {shard.name for shard in optimizer.state_shards() if not shard.writes} == {"head.weight"}


def test_sums_in_fp64_keep_what_fp32_loses() -> None:
    """2^24 + 1 - 2^24 is 1 in FP64 and 0 in FP32; what AdamW sees is the sum, rounded once."""
    ours, theirs = make_parameters(), make_parameters()
    optimizer = Zero1Optimizer(ours.items(), CONFIG, ParallelMesh.single_process(), False, sum_dtype=torch.float64)
    optimizer.zero_grad()
    for parameter in ours.values():
        for part in (2.0**24, 1.0, -(2.0**24)):
            contribute(parameter, torch.full(parameter.shape, part, dtype=torch.float64))
    norm = optimizer.finish_grads()
    assert norm == pytest.approx(sum(parameter.numel() for parameter in ours.values()) ** 0.5, rel=1e-7)
    optimizer.step(norm, lr=1e-3, max_norm=0.0)
    reference = reference_of(theirs)
    for parameter in theirs.values():
        parameter.grad = torch.ones(parameter.shape)
    for group in reference.param_groups:
        group["lr"] = 1e-3
    reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.parametrize(("mib", "num_buckets"), [(0.01, 2), (1.0, 1), (1e-9, 4)])
def test_buckets_hold_the_mib_that_are_configured(mib: float, num_buckets: int) -> None:
    """Four matrices of 2048 elements; 0.01 MiB are 2621 elements, which the second of a bucket exceeds."""
    weights = {f"w{n}": LogicalParameter.whole(f"w{n}", torch.zeros(32, 64)) for n in range(4)}
    assert len(optimizer_of(weights, OptimConfig(bucket_mib=mib)).buckets) == num_buckets


class OneOfTwo(Group):
    """A group of two ranks that nothing communicates over."""

    def __init__(self, rank: int) -> None:
        object.__setattr__(self, "name", "tp")
        object.__setattr__(self, "ranks", (0, 1))
        object.__setattr__(self, "rank", rank)


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False)])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_replica_is_summed_with_sequence_parallel_and_counted_on_one_rank(
    rank: int, counts: bool, sequence_parallel: bool
) -> None:
    def replica() -> dict[str, LogicalParameter]:
        norm = LogicalParameter.whole("norm", torch.ones(64))
        norm.placement = Placement(norm.placement.rectangles, tp_replicated=True)
        return {"norm": norm, "w": LogicalParameter.whole("w", torch.zeros(32, 64))}

    mesh = dataclasses.replace(ParallelMesh.single_process(), tp=OneOfTwo(rank))
    optimizer = Zero1Optimizer(replica().items(), CONFIG, mesh, sequence_parallel)
    summed = [(bucket.kind.tp_summed, [slot.name for slot in bucket.slots]) for bucket in optimizer.buckets]
    assert summed == ([(False, ["w"]), (True, ["norm"])] if sequence_parallel else [(False, ["w", "norm"])])
    assert {shard.name: shard.writes for shard in optimizer.state_shards()} == {"norm": counts, "w": True}
    alone = Zero1Optimizer(replica().items(), CONFIG, ParallelMesh.single_process(), True)
    assert not any(bucket.kind.tp_summed for bucket in alone.buckets), "one rank has nobody to sum with"


@pytest.mark.parametrize(
    ("overlap", "expected"), [(Overlap.always, True), (Overlap.never, False), (Overlap.auto, False)]
)
def test_gradients_travel_during_backward_where_it_is_asked_for(overlap: Overlap, expected: bool) -> None:
    mesh = dataclasses.replace(ParallelMesh.single_process(), dp_cp=OneOfTwo(0))
    optimizer = Zero1Optimizer(make_parameters().items(), OptimConfig(overlap_reduce=overlap), mesh, False)
    assert optimizer._grads._overlap is expected


@pytest.mark.parametrize("overlap", [Overlap.always, Overlap.never, Overlap.auto])
def test_parameters_arrive_beside_a_forward_only_after_a_step_that_one_follows(overlap: Overlap) -> None:
    """Whoever reads the parameters of a load, or of a step without hooks in the forward, must not get old ones."""
    model = Toy()
    optimizer = optimizer_of(dict(model.named_parameters()), OptimConfig(overlap_gather=overlap))
    waits: list[bool] = []
    optimizer._params.refresh = lambda masters, wait: waits.append(wait)  # type: ignore[method-assign]

    def step() -> None:
        optimizer.zero_grad()
        optimizer.step(optimizer.finish_grads(), lr=1e-3, max_norm=0.0)

    step()
    with mock.patch.object(optimizer._params, "gather_beside_forward") as hooks:
        optimizer.gather_beside_forward(model)
        optimizer.gather_beside_forward(model)
    beside = overlap is Overlap.always  # auto: on CPUs nothing is gained
    assert hooks.call_count == beside, "hooks of a second call would wait twice"
    step()
    optimizer.after_load(optimizer.step_count)
    assert waits == [True, not beside, True]
