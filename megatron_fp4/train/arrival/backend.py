"""`precision.backend=auto` becomes one backend, the same on all ranks, before a model is built.

Every rank tries the candidates in one order; rank 0 takes the first that no rank rejects. So one broken GPU moves all
ranks to the next backend, with its host in the line that says so, and nobody trains on kernels that computed something
wrong beside them.

Not here: what is tried (precision/selftest/), and the order (precision/auto.py).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_fp4.comm.agree import number_ranges
from megatron_fp4.comm.rendezvous import Rendezvous
from megatron_fp4.precision.auto import (
    NOTHING_QUANTIZED,
    PREFERENCE,
    WHY,
    BackendChoice,
    candidates,
    quantizes,
    recipe_objection,
)
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.selftest.examine import TRIAL_SECONDS, Rejection, examine
from megatron_fp4.precision.selftest.trial import quantized_precisions
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig

PATIENCE_SECONDS = 2 * TRIAL_SECONDS
"""How long a rank waits for the others' trial of one backend."""
MAX_KINDS = 3


@dataclass(frozen=True)
class _Answer:
    """What a rank says of one backend. reason: "" if it can be taken; absent: its GPU is of another kind."""

    host: str
    device: str
    reason: str = ""
    failed: bool = False
    absent: bool = False


def settle_backend(
    checked: CheckedConfig, world_size: int, rendezvous: Rendezvous, device: torch.device
) -> CheckedConfig:
    """The configuration with the backend that `auto` stands for, and how it was chosen; as it is for any other name.

    Collective. Raises ValueError on all ranks, with hosts and devices, if even the emulation fails on one of them.
    """
    if checked.config.precision.backend is not BackendName.auto:
        return checked
    if not quantizes(checked.plan):
        return _with_choice(checked.config, world_size, NOTHING_QUANTIZED)
    rejected: list[Rejection] = []
    for name in PREFERENCE:
        answer = _answer(name, checked, world_size, device)
        text = rendezvous.decided_by_rank0(
            f"the self-test of {name.name}", json.dumps(vars(answer)), _judge(name, rejected), PATIENCE_SECONDS
        )
        verdict = json.loads(text)
        if verdict["taken"]:
            where = f"which passed its self-test on {verdict['where']}"
            return _with_choice(checked.config, world_size, BackendChoice(name, WHY[name], tuple(rejected), where))
        if verdict["reason"]:
            rejected.append(Rejection(name, verdict["reason"], verdict["failed"]))
    raise AssertionError("the last backend is taken or refused")


def with_backend(config: RunConfig, name: BackendName) -> RunConfig:
    """The same run, computed by another backend."""
    return replace(config, precision=replace(config.precision, backend=name))


def _with_choice(config: RunConfig, world_size: int, choice: BackendChoice) -> CheckedConfig:
    return replace(check_config(with_backend(config, choice.name), world_size), choice=choice.lines)


def _answer(name: BackendName, checked: CheckedConfig, world_size: int, device: torch.device) -> _Answer:
    """This rank's."""
    config, host = with_backend(checked.config, name), socket.gethostname()
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    what = str(device) if capability is None else f"{device} ({torch.cuda.get_device_name(device)})"
    if name not in candidates(capability):
        reason = "not considered on this device" if capability is None else "not considered on compute capability"
        reason += "" if capability is None else f" {capability[0]}.{capability[1]}"
        return _Answer(host, what, reason, absent=True)
    if reason := recipe_objection(name, config.precision):
        return _Answer(host, what, reason)
    try:
        check_config(config, world_size)  # shapes and choices that only this backend refuses
    except ValueError as error:
        return _Answer(host, what, str(error))
    precisions = quantized_precisions(table.by_name for _, table in checked.plan.labelled_tables())
    rejection = examine(config.precision, precisions, device)
    return _Answer(host, what) if rejection is None else _Answer(host, what, rejection.reason, rejection.failed)


def _judge(name: BackendName, rejected: Sequence[Rejection]) -> Callable[[Sequence[str]], str]:
    """What rank 0 makes of the answers. It raises ValueError where the last backend fails."""

    def judge(texts: Sequence[str]) -> str:
        answers = [_Answer(**json.loads(text)) for text in texts]
        ranks: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            if answer.reason:
                ranks.setdefault(answer.reason, []).append(rank)
        if not ranks:
            devices = dict.fromkeys(answer.device.partition(" (")[2].rstrip(")") or answer.device for answer in answers)
            where = f"{'all ' if len(answers) > 1 else ''}{len(answers)} rank(s), {', '.join(devices)}"
            return json.dumps({"taken": True, "where": where})
        everywhere = len(ranks) == 1 and len(*ranks.values()) == len(answers)
        if everywhere and all(answer.absent for answer in answers):
            return json.dumps({"taken": False, "reason": "", "failed": False})
        if everywhere and not any(answer.failed for answer in answers):
            reason = next(iter(ranks))
        else:
            reason = "; ".join(_who(kind, answers, text) for text, kind in list(ranks.items())[:MAX_KINDS])
        if name is PREFERENCE[-1]:
            better = "".join(f"; {rejection}" for rejection in rejected)
            raise ValueError(
                f"precision.backend=auto: no backend can be trusted on every rank: {name.name}: {reason}{better}"
            )
        return json.dumps({"taken": False, "reason": reason, "failed": any(answer.failed for answer in answers)})

    return judge


def _who(ranks: Sequence[int], answers: Sequence[_Answer], reason: str) -> str:
    """`rank 3 (host, cuda:3 (NVIDIA B200)): reason`; of several ranks the first hosts and devices."""
    places = [f"{answers[rank].host} {answers[rank].device}" for rank in ranks[:MAX_KINDS]]
    more = ", ..." if len(ranks) > MAX_KINDS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {number_ranges(ranks)} ({', '.join(places)}{more}): {reason}"
