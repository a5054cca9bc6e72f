"""`megatron-fp4 health RUN`: does quantization make weight gradients of a trained model exactly zero, and what helps?

Reads a checkpoint and a batch of the run's data, computes the gradient in the run's precision and in BF16, says of each
linear which GEMM made zeros, and tries rules for them on the same batch. In one process, whatever layout wrote the
checkpoint, or under torchrun at the run's tp, pp and cp with as many copies as ranks are left. docs/health.md explains
the verdicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.cli.arguments import CommandParser, above_zero
from megatron_fp4.cli.trained.opening import add_choice, chosen_checkpoint, on_ranks
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.proofs.health.examine import THRESHOLD, Examination, Illness, examine
from megatron_fp4.proofs.health.patient import Patient, open_patient
from megatron_fp4.proofs.health.remedies import as_yaml
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.monitors.zeros import LinearHealth

EXITS = {0: "healthy", 1: "a rule would help, or is needed"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 where run, checkpoint or data are not there."""
    parser = CommandParser("health", __doc__, EXITS, "runs/mine")
    add_choice(parser)
    parser.add_argument("--samples", type=above_zero, default=0, help="sequences of the batch (default: the run's, or 8"
                        " microbatches of each rank if that is less)")  # fmt: skip
    parser.add_argument("--threshold", type=float, default=THRESHOLD,
                        help="part of a gradient that one GEMM may make zero")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="an object for programs")
    args = parser.parse_args(arguments)
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold = {args.threshold:g}, must be between 0 and 1")
    ill: list[Illness | str] = []

    def use(config: RunConfig, process: Process) -> None:
        checkpoint = chosen_checkpoint(args)
        state = read_state(checkpoint)
        meta = {**state["meta"], "step": state["step"]}
        with open_patient(config, process, checkpoint, meta, args.samples) as patient:
            examination = examine(patient, args.threshold)
            ill.extend([*examination.illnesses, *examination.unfollowed(args.threshold)])
            if process.world.rank == 0:
                as_object = as_json(patient, examination, args.threshold)
                print(json.dumps(as_object) if args.json else describe(args, patient, examination))

    return on_ranks(args.run, use) or int(bool(ill))


def describe(args: argparse.Namespace, patient: Patient, examination: Examination) -> str:
    """The examination as text."""
    first, stop = patient.samples
    lines = [
        f"{args.run.resolve().name}: step {patient.step}, samples {first} to {stop - 1}; parts of the weight gradients"
        " that are exactly zero",
        f"{'linear':32}{'in BF16':>9}{'now':>9}{'advised':>9}  of these by underflow",
    ]
    after = examination.after or examination.now
    for bf16, now, advised in zip(examination.bf16, examination.now, after, strict=True):
        zeros = [f"{one.zeros / one.numel:9.2%}" for one in (bf16, now)]
        zeros.append(f"{advised.zeros / advised.numel:9.2%}" if examination.after else " " * 9)
        makers = [f"{count / now.numel:.2%} {gemm} of {name}" for (name, gemm), count in now.makers()]
        lines.append(f"{now.name:32}{''.join(zeros)}  {', '.join(makers) or '-'}")
    if unfollowed := examination.unfollowed(args.threshold):
        lost = [one.name for one in examination.now if not one.first and (one.lost_y or one.lost_dx)]
        lines.append(
            f"{', '.join(unfollowed)}: more zeros than in BF16, by channels that attention or the state space mixes;"
            f" GEMMs of {', '.join(lost) or 'no linear there'} lose channels: try 1x16 weights there"
        )
    if not examination.illnesses:
        return "\n".join(
            lines if unfollowed else [*lines, f"healthy: no GEMM makes {args.threshold:.2%} of a gradient zero"]
        )
    lines += ["", *(_verdict(illness) for illness in examination.illnesses)]
    if examination.rules:
        lines += ["", as_yaml(examination.rules, examination.recipes)]
    lines += [
        f"{gemm} of {name} makes zeros all the same: no rule that was tried helps" for name, gemm in examination.still
    ]
    if examination.replaced:
        lines.append(f"leave out the rules for {', '.join(examination.replaced)}, which these replace")
    return "\n".join(lines)


def _verdict(illness: Illness) -> str:
    names, victims = (_listed(some) for some in (illness.names, illness.victims))
    share = f"{illness.before / illness.elements:.2%}"
    text = f"{illness.gemm} of {names} makes {share} of the weight gradients of {victims} zero"
    if illness.remedy is None:
        return f"{text}: nothing else can be computed there"
    return f"{text}; with {illness.remedy.label} {illness.after / illness.elements:.2%}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def as_json(patient: Patient, examination: Examination, threshold: float = THRESHOLD) -> dict[str, Any]:
    """Every number, and the advice as settings."""

    def all_of(linears: Sequence[LinearHealth] | None) -> list[dict[str, Any]] | None:
        return None if linears is None else [dataclasses.asdict(one) for one in linears]

    illnesses = [
        {
            **{key: getattr(one, key) for key in ("names", "gemm", "victims", "before", "after", "elements")},
            "remedy": one.remedy.label if one.remedy else None,
        }
        for one in examination.illnesses
    ]
    return {
        "step": patient.step,
        "samples": list(patient.samples),
        "healthy": not examination.illnesses and not examination.unfollowed(threshold),
        "unfollowed": examination.unfollowed(threshold),
        "illnesses": illnesses,
        "rules": [dataclasses.asdict(rule) for rule in examination.rules],
        "yaml": as_yaml(examination.rules, examination.recipes) if examination.rules else "",
        "replaced": examination.replaced,
        "still": examination.still,
        **{key: all_of(getattr(examination, key)) for key in ("now", "bf16", "after")},
    }
