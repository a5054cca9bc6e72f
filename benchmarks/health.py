"""What a step costs whose FP4 health is measured, as a multiple of the same step without, in one process.

`python -m benchmarks.health --help`. At an interval of 100 steps a run pays (ratio - 1) / 100 of a step.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.timing import CLOCKS, paired_seconds, print_table
from megatron_fp4.comm.host_memory import keep_freed_memory
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.config import DataConfig
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.config import PrecisionConfig, Rule
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.probes import make_probed_backend
from megatron_fp4.proofs.parity import Case, synthetic_inputs
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.telemetry.monitors.zeros import linear_health
from megatron_fp4.train.trainable import build_trainable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="do not compile the run's own quantizers")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    model = ModelConfig(
        num_layers=args.layers, hidden=args.hidden, ffn_hidden=4 * args.hidden, num_heads=8, num_kv_heads=8,
        vocab_size=8192,
    )  # fmt: skip
    precision = PrecisionConfig(
        recipes={"nvfp4": nvfp4_paper()}, rules=[Rule("head"), Rule("*", use="nvfp4")], compile=not args.eager
    )
    config = RunConfig(
        model=model,
        precision=precision,
        data=DataConfig(seq_length=args.tokens // 4),
        train=TrainConfig(micro_batch=2, global_batch=4),
    )
    mesh, device = ParallelMesh.single_process(), torch.device("cpu")
    backend, probes = make_probed_backend(precision, channels=True)
    probe = probes.channels
    assert probe is not None
    case = Case("health", config, PrecisionPlan(precision, model_linears(model)).table(), 1)
    trainable = build_trainable(config, case.table, backend, mesh, device)
    inputs, num_targets = synthetic_inputs(case, mesh, 0, device)
    optimizer = trainable.optimizer

    def step() -> None:
        optimizer.zero_grad()
        trainable.engine.train(inputs.split(2), 1.0 / num_targets, optimizer.begin_last_microbatch)
        optimizer.step(optimizer.finish_grads(), lr=1e-4, max_norm=1.0)

    def measured() -> None:
        probe.begin()
        step()
        probe.recording = False
        linear_health(model, trainable.engine.stages, probe, optimizer, mesh, device)

    seconds = paired_seconds({"a step": step, "a measured step": measured}, args.rounds, CLOCKS[args.clock])
    print_table(f"hidden {args.hidden}, {args.layers} layers, {args.tokens} tokens", seconds, "a step")
    ratios = [a / b for a, b in zip(seconds["a measured step"], seconds["a step"], strict=True)]
    print(f"at an interval of 100 steps: {statistics.median(ratios) - 1:.2f}% of a step")


if __name__ == "__main__":
    main()
