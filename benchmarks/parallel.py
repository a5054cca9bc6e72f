"""What parallel layouts cost: time of a step, idle time of pipelines, bytes sent.

    python -m benchmarks.parallel time --layouts "tp2, dp2, pp2, tp2 pp2"
    python -m benchmarks.parallel bubble
    python -m benchmarks.parallel bytes

Each question gets the measurement that a small machine can answer. Times of layouts are ratios to one process
that does the same global batch in the same run (more ranks than cores: expect above 1). Pipeline bubbles are measured
with stages that sleep instead of computing, so that cores do not matter and only the schedule does; beside them stand
the formula of the literature and what the schedule's own order of actions allows ("order"). Bytes are counted at
torch.distributed in a real step, and printed beside the formula of planning/traffic.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megatron_fp4.comm import collectives
from megatron_fp4.comm.bootstrap import Process, exit_process
from megatron_fp4.comm.config import Overlap, ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.data.config import DataConfig
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.partition import split_stages
from megatron_fp4.optim import bucket_comm
from megatron_fp4.pipeline.engine import PipelineEngine, StageShapes
from megatron_fp4.pipeline.order import bubble, pipeline_order, simulate
from megatron_fp4.pipeline.schedules import SCHEDULES, schedule_rule, stages_of_rank, stages_per_rank
from megatron_fp4.planning.idle import PipelineShape
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.traffic import bytes_sent
from megatron_fp4.precision import EmulatedBackend, WgradQueue
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.proofs.layouts import Layout, parse_layouts
from megatron_fp4.proofs.parity import Case, synthetic_inputs
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import TokenLoss
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.trainable import Trainable, build_trainable

MODEL = ModelConfig(num_layers=8, hidden=256, ffn_hidden=1024, num_heads=8, num_kv_heads=4, vocab_size=4096)
GLOBAL_BATCH, SEQ_LENGTH = 4, 256
DEFAULT_LAYOUTS = "tp2, cp2, dp2, pp2, pp2:zbv, tp2 pp2 dp2"


def the_case() -> Case:
    """BF16, nothing quantized: what is measured is communication, not the emulation of FP4."""
    config = RunConfig(
        model=MODEL,
        precision=PrecisionConfig(),
        data=DataConfig(seq_length=SEQ_LENGTH),
        train=TrainConfig(micro_batch=1, global_batch=GLOBAL_BATCH),
    )
    return Case("bf16", config, PrecisionPlan(config.precision, model_linears(MODEL)).table())


class Ready(NamedTuple):
    trainable: Trainable
    mesh: ParallelMesh
    step: Callable[[], None]


def prepare(process: Process, parallel: ParallelConfig) -> Ready:
    """A model on this rank and a function that trains it for one step."""
    case, mesh = the_case(), build_mesh(parallel, process.world)
    config = replace(case.config, parallel=parallel)
    trainable = build_trainable(config, case.table, EmulatedBackend(), mesh, process.device)
    inputs, num_targets = synthetic_inputs(case, mesh, 0, process.device)

    def step() -> None:
        optimizer = trainable.optimizer
        optimizer.zero_grad()
        trainable.engine.train(inputs.split(1), 1.0 / num_targets, optimizer.begin_last_microbatch)
        norm = optimizer.finish_grads()
        optimizer.step(norm, lr=1e-4, max_norm=1.0)

    return Ready(trainable, mesh, step)


# -- time -------------------------------------------------------------------------------------------------------------


def time_steps(process: Process, parallel: ParallelConfig, repeats: int) -> float:
    """Median seconds of a step, the first one left out."""
    step = prepare(process, parallel).step
    step()
    seconds = []
    for _ in range(repeats):
        collectives.barrier(process.world)
        began = time.perf_counter()
        step()
        collectives.barrier(process.world)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def report_times(layouts: list[Layout], repeats: int) -> None:
    """Each layout between two runs of one process: if those differ much, the machine is busy and the ratio is noise."""
    print(f"{'layout':<22} {'ms':>7} {'ratio':>6}   one process before, after (ms)")

    def alone() -> float:
        return float(run_local(time_steps, 1, ParallelConfig(), repeats)[0])

    before = alone()
    for layout in layouts:
        seconds = max(run_local(time_steps, layout.world_size, layout.parallel, repeats))
        after = alone()
        ratio = seconds / ((before + after) / 2)
        print(
            f"{layout.name:<22} {seconds * 1e3:7.0f} {ratio:6.2f}   {before * 1e3:.0f}, {after * 1e3:.0f}", flush=True
        )
        before = after


# -- bubble -----------------------------------------------------------------------------------------------------------


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, queue: WgradQueue | None) -> Tensor:
        ctx.seconds, ctx.queue = seconds, queue
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        if ctx.queue is None:
            time.sleep(ctx.seconds)
        else:
            ctx.queue.put(lambda: time.sleep(ctx.seconds))
        return dy, None, None


class SleepingStage(nn.Module):
    """A stage that takes time and no processor."""

    def __init__(self, seconds: float, queue: WgradQueue | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 8))
        self._seconds, self._queue = seconds, queue

    def forward(self, x: Tensor, address: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        x = x if x.is_floating_point() else x.reshape(-1, 1).expand(-1, 8).float()
        out: Tensor = _Sleep.apply(x * self.weight, self._seconds, self._queue)
        return out


class _Rows(NamedTuple):
    tokens: Tensor
    labels: Tensor
    address: Tensor
    positions: Tensor
    documents: Tensor
    ahead: Tensor | None = None


def measure_bubble(process: Process, parallel: ParallelConfig, num_microbatches: int, piece_seconds: float) -> float:
    """Part of a step in which a rank waits, 1 - work / time, measured in the second of two steps.

    piece_seconds: forward, and each half of the backward, of one rank's part of a microbatch.
    """
    mesh, virtual = build_mesh(parallel, process.world), stages_per_rank(parallel)
    defers_wgrad = schedule_rule(parallel.schedule).defers_wgrad
    queues = [WgradQueue() if defers_wgrad else None for _ in stages_of_rank(mesh.pp.rank, parallel)]
    stages = [SleepingStage(piece_seconds / virtual, queue) for queue in queues]
    engine = PipelineEngine(
        stages,
        [queue.take for queue in queues if queue is not None],
        TokenLoss(8, mesh.tp),
        StageShapes((1, 8), (8, 8), torch.float32),
        parallel,
        mesh.pp,
        process.device,
    )
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    rows = [_Rows(zeros, zeros, zeros, zeros, zeros) for _ in range(num_microbatches)]
    seconds = 0.0
    for _ in range(2):
        collectives.barrier(process.world)
        began = time.perf_counter()
        engine.train(rows, 1.0, lambda _: None)
        seconds = time.perf_counter() - began
    slowest = max(collectives.all_gather_object(seconds, process.world))
    return 1.0 - 3 * piece_seconds * num_microbatches / slowest


def report_bubbles(pp: int, num_microbatches: int, piece_seconds: float) -> None:
    print(f"pp {pp}, {num_microbatches} microbatches\n{'schedule':<26} {'measured':>8} {'order':>7} {'formula':>7}")
    for schedule, rule in SCHEDULES.items():
        parallel = ParallelConfig(pp=pp, schedule=schedule)
        measured = run_local(measure_bubble, pp, parallel, num_microbatches, piece_seconds)[0]
        ideal = bubble(simulate(pipeline_order(parallel, num_microbatches)))
        formula = PipelineShape(schedule, pp, num_microbatches, rule.stages).bubble
        print(f"{schedule:<26} {measured:8.3f} {ideal:7.3f} {formula:7.3f}", flush=True)


# -- bytes ------------------------------------------------------------------------------------------------------------


def count_bytes(process: Process, parallel: ParallelConfig) -> tuple[float, float]:
    """Bytes that this rank sends in its second step: counted, and by the formula."""
    ready = prepare(process, parallel)
    ready.step()
    sent = [0.0]

    def counted(fn: Callable[..., Any], nbytes: Callable[..., float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent[0] += nbytes(*args, **kwargs)
            return fn(*args, **kwargs)

        return call

    def others(kwargs: dict[str, Any]) -> int:
        return dist.get_world_size(kwargs["group"]) - 1

    collectives._all_gather = counted(collectives._all_gather, lambda out, x, **kw: x.nbytes * others(kw))
    dist.all_to_all_single = counted(
        dist.all_to_all_single, lambda out, x, *splits, **kw: x.nbytes * others(kw) / (others(kw) + 1)
    )
    bucket_comm._exchange = counted(bucket_comm._exchange, lambda out, received, group: sum(x.nbytes for x in out))
    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        _count_sends(name, sent)
    ready.step()
    return sent[0], _by_formula(parallel, ready.mesh)


def _count_sends(name: str, sent: list[float]) -> None:
    make_ops = getattr(PipelineStage, name)

    def counted_ops(stage: Any, number: int) -> Any:
        ops = make_ops(stage, number)
        sent[0] += sum(op.tensor.nbytes for op in ops)
        return ops

    setattr(PipelineStage, name, counted_ops)


def _by_formula(parallel: ParallelConfig, mesh: ParallelMesh) -> float:
    ranges = split_stages(MODEL, parallel.pp * stages_per_rank(parallel))
    local_ranges = [ranges[number] for number in stages_of_rank(mesh.pp.rank, parallel)]
    settings = RankSettings(
        tp=mesh.tp.size,
        cp=mesh.cp.size,
        dp=mesh.dp.size,
        micro_batch=1,
        seq_length=SEQ_LENGTH,
        num_microbatches=GLOBAL_BATCH // mesh.dp.size,
    )
    return sum(bytes_sent(MODEL, local_ranges, settings).values())


def report_bytes(layouts: list[Layout]) -> None:
    print(f"{'layout':<22} {'rank':>4} {'counted MB':>10} {'formula MB':>10} {'ratio':>6}")
    for layout in layouts:
        counts = run_local(count_bytes, layout.world_size, layout.parallel)
        for rank in sorted({0, layout.world_size - 1}):
            counted, formula = counts[rank]
            print(
                f"{layout.name:<22} {rank:>4} {counted / 1e6:10.2f} {formula / 1e6:10.2f} {counted / formula:6.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "bubble", "bytes"])
    parser.add_argument("--layouts", default=DEFAULT_LAYOUTS)
    parser.add_argument("--overlap-tensor", choices=[o.name for o in Overlap], default="auto", help="where tp > 1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--piece-ms", type=float, default=40.0, help="sleep of a forward pass in the bubble measurement"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    layouts = [
        replace(layout, parallel=replace(layout.parallel, overlap_tensor=Overlap[args.overlap_tensor]))
        if layout.parallel.tp > 1
        else layout
        for layout in parse_layouts(args.layouts)
    ]
    if args.what == "time":
        report_times(layouts, args.repeats)
    elif args.what == "bubble":
        report_bubbles(args.pp, args.microbatches, args.piece_ms / 1e3)
    else:
        report_bytes(layouts)


if __name__ == "__main__":
    main()
    exit_process(0)
