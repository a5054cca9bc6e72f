"""What a rehearsed step of a rank did, as plain values, beside what the plan says.

Not here: the text for people (cli/render/rehearsal.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from megatron_fp4.comm.mesh import rank_grid
from megatron_fp4.planning.backend import forecast_backend
from megatron_fp4.planning.rehearsal.backend import modelled
from megatron_fp4.planning.rehearsal.between import between_steps, crossings
from megatron_fp4.planning.rehearsal.live import PASSING, LiveKinds
from megatron_fp4.planning.rehearsal.messages import Message, Messages
from megatron_fp4.planning.rehearsal.on_cuda import shortened
from megatron_fp4.planning.rehearsal.sequence import misfits
from megatron_fp4.planning.rehearsal.step import RehearsedRank, rehearsed_rank
from megatron_fp4.planning.report import run_plan
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig

ACTIVATIONS = ("activations", "working set")


def choose_ranks(text: str, num_gpus: int, config: RunConfig, plan: Mapping[str, Any]) -> list[int]:
    """Global ranks, ascending, that `first,last,worst,17` names. worst: one with the most memory, by the plan.

    cell: all ranks of two data-parallel copies, whose messages are then matched with each other. Raises ValueError for
    another word, and for a rank that the world does not have.
    """
    totals = [entry["total"] for entry in plan["memory_per_rank"]["pipeline_ranks"]]
    words = {
        "first": [0],
        "last": [num_gpus - 1],
        "worst": [num_gpus // len(totals) * totals.index(max(totals))],
        "cell": rank_grid(config.parallel, num_gpus)[:, :2].flatten().tolist(),
    }
    ranks: set[int] = set()
    for word in text.split(","):
        if word not in words and not word.isdecimal():
            raise ValueError(f"--ranks {text}: {word!r} is none of {', '.join(words)} or a number")
        ranks |= set(words[word] if word in words else [int(word)])
    if max(ranks) >= num_gpus:
        raise ValueError(f"--ranks {text}: there is no rank {max(ranks)} among {num_gpus}")
    return sorted(ranks)


def rehearse(
    config: RunConfig, num_gpus: int, ranks: str, on_backward_error: Callable[[str], NoReturn]
) -> dict[str, Any]:
    """The second step of each of the chosen ranks; the first one teaches the optimizer which gradients it may send.

    Raises ValueError for what `plan` refuses, RehearsalRefused for what a device would. on_backward_error: see
    `Watch`.
    """
    if config.model.vocab_size:  # the tokenizer is not needed, and need not be on this machine
        config = replace(config, data=replace(config.data, tokenizer=""))
    num_gpus = num_gpus or config.parallel.smallest_world
    config, choice = forecast_backend(config, None, num_gpus)
    in_run = run_plan(config, num_gpus)
    short = shortened(config, num_gpus)
    plan = run_plan(short, num_gpus)
    checked = check_config(short, num_gpus)
    reports, sequences = [], {}
    for rank in choose_ranks(ranks, num_gpus, config, in_run):
        began = time.monotonic()
        busy = time.process_time()
        with rehearsed_rank(checked, num_gpus, rank, on_backward_error) as rehearsed:
            of_build = _large(rehearsed.watch.live)
            rehearsed.step(1 if config.parallel.pp == 1 else None)
            rehearsed.step()
            report = _of_rank(rehearsed, rank, plan)
            sequences[rank] = list(rehearsed.watch.messages.sequence)
            for name, act in between_steps(rehearsed).items():
                act()
                report[name] = crossings(rehearsed.watch)
                sequences[rank] += rehearsed.watch.messages.sequence
        report["large_tensors"] = of_build + report["large_tensors"]
        seconds = {"seconds": time.monotonic() - began, "processor_seconds": time.process_time() - busy}
        reports.append({**report, **seconds})
    return {
        "gpus": num_gpus,
        "backend": {"name": config.precision.backend.name, "reason": str(choice or "")},
        "microbatches": {
            "in_run": in_run["run"]["microbatches_per_step"],
            "rehearsed": plan["run"]["microbatches_per_step"],
        },
        "modelled": list(modelled(checked.config)),
        "ranks": reports,
        "waiting_for_ever": misfits(sequences),
    }


def _of_rank(rehearsed: RehearsedRank, rank: int, plan: Mapping[str, Any]) -> dict[str, Any]:
    watch, mesh = rehearsed.watch, rehearsed.run.mesh
    return {
        "rank": rank,
        "place": {name: getattr(mesh, name).rank for name in ("pp", "dp", "cp", "tp")},
        "copies_in": dict(watch.copies.copies_in.most_common()),
        "read_backs": dict(watch.copies.read_backs.most_common()),
        "memory": _memory(watch.live, plan["memory_per_rank"]["pipeline_ranks"][mesh.pp.rank]),
        "large_tensors": _large(watch.live),
        "messages": _messages(watch.messages, plan["bytes_sent_per_step"][mesh.pp.rank]),
        "kernels": {
            "total": watch.kernels.total,
            "compiled_stages": watch.kernels.compiled,
            "gemms": watch.kernels.gemms,
            "by_part": _summed((part, count) for (_, part), count in watch.kernels.by_part.items()),
            "by_phase": _summed((phase, count) for (phase, _), count in watch.kernels.by_part.items()),
            "calls": dict(watch.kernels.calls),
        },
    }


def _summed(pairs: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for key, value in pairs:
        total[key] = total.get(key, 0) + value
    return total


def _memory(live: LiveKinds, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Peak in bytes, by the plan's kinds, and who holds most of what is not state."""
    kinds = dict(planned["bytes"])
    kinds[PASSING] = sum(kinds.pop(kind) for kind in ACTIVATIONS)
    passing = [(held, size) for held, size in live.at_peak.most_common() if held.kind == PASSING]
    measured = live.by_kind()
    return {
        "peak": live.peak,
        "plan": planned["total"],
        "kinds": {
            kind: {"measured": measured.get(kind, 0), "plan": kinds.get(kind, 0)} for kind in {**kinds, **measured}
        },
        "at": live.peak_origin,
        "holders": {f"{held.origin} ({held.phase})": size for held, size in passing[:8]},
    }


def _large(live: LiveKinds) -> list[dict[str, Any]]:
    return [{"tensor": tensor, "origin": origin, "count": count} for (tensor, origin), count in live.large.items()]


def _messages(messages: Messages, planned: Mapping[str, float]) -> dict[str, Any]:
    """Bytes sent by axis, beside the plan's; and every kind of message, in the order of its first."""
    sent = _summed((message.axis, message.sent) for message in messages.sequence)
    kinds: dict[tuple[str, str, str], list[Message]] = {}
    for message in messages.sequence:
        kinds.setdefault((message.phase, message.group, message.kind), []).append(message)
    return {
        "axes": {
            axis: {"measured": sent.get(axis, 0.0), "plan": planned.get(axis, 0.0)} for axis in {**planned, **sent}
        },
        "collectives": [
            {
                "phase": phase,
                "group": group,
                "ranks": len(of_kind[0].ranks),
                "kind": kind,
                "count": len(of_kind),
                "sent": sum(message.sent for message in of_kind),
            }
            for (phase, group, kind), of_kind in kinds.items()
        ],
    }
