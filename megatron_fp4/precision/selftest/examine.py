"""Whether a backend can be taken on a device: it is there, it takes the recipes, and it passes its self-test.

On a GPU a backend with kernels of its own is tried in a process of its own: a kernel that reads beyond its memory ends
every later call of the process that launched it, and one that hangs cannot be stopped from within.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_fp4.precision.backends.choose import check_backend_device, make_backend
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.selftest.trial import self_test
from megatron_fp4.precision.spec import LinearPrecision

TRIAL_SECONDS = 300.0
"""How long a trial in a process of its own may take; kernels are compiled in it, once per machine."""
MARK = "outcome of the self-test: "
MAX_OBJECTIONS = 3
MODULE = "megatron_fp4.precision.selftest.examine"
"""This one, as a child runs it."""
OF_TORCH = (BackendName.emulated, BackendName.reference)
OCCUPIED = "busy or unavailable"
"""What CUDA says where a GPU is given to one process only."""


@dataclass(frozen=True)
class Rejection:
    """Why a backend is not taken. failed: it computed something wrong or broke; else it is not for this run."""

    backend: BackendName
    reason: str
    failed: bool

    def __str__(self) -> str:
        verb = "FAILED its self-test" if self.failed else "cannot be taken"
        return f"{self.backend.name} {verb}: {self.reason}"


@dataclass(frozen=True)
class Question:
    """What is asked of a backend: config names it; precisions: what the run computes in; device: where."""

    config: PrecisionConfig
    precisions: Sequence[LinearPrecision]
    device: str


def examine(config: PrecisionConfig, precisions: Sequence[LinearPrecision], device: torch.device) -> Rejection | None:
    """Why the backend that `config` names cannot be taken on `device`; None if it can."""
    question = Question(config, precisions, str(device))
    if device.type != "cuda" or config.backend in OF_TORCH:
        return answer(question)
    rejection = answer_of_child(question)
    if rejection is not None and OCCUPIED in rejection.reason:
        return answer(question)
    return rejection


def answer(question: Question) -> Rejection | None:
    """The answer of `examine`, from this process."""
    config, device = question.config, torch.device(question.device)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            backend = make_backend(replace(config, compile=config.compile and device.type == "cuda"))
            check_backend_device(config.backend, device)
            objections = self_test(backend, question.precisions, device, config.compute_dtype.torch_dtype)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except ValueError as error:  # what a backend refuses
        return Rejection(config.backend, str(error), failed=False)
    except Exception as error:  # a kernel may fail in any way
        return Rejection(config.backend, f"{type(error).__name__}: {first_line(error)}", failed=True)
    if not objections:
        return None
    more = len(objections) - MAX_OBJECTIONS
    text = "; ".join(objections[:MAX_OBJECTIONS]) + (f"; and {more} more" if more > 0 else "")
    return Rejection(config.backend, text, failed=True)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def answer_of_child(question: Question) -> Rejection | None:
    """The answer of a process of its own."""
    command, backend = [sys.executable, "-m", MODULE], question.config.backend
    try:
        done = subprocess.run(command, input=pickle.dumps(question), capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return Rejection(backend, f"it did not end within {TRIAL_SECONDS:g} s", failed=True)
    lines = done.stdout.decode(errors="replace").splitlines()
    outcome = next((line.removeprefix(MARK) for line in reversed(lines) if line.startswith(MARK)), None)
    if outcome is None:
        last = next(iter(reversed(done.stderr.decode(errors="replace").strip().splitlines())), "it said nothing")
        return Rejection(backend, f"its process ended with code {done.returncode}: {last}", failed=True)
    fields: dict[str, Any] = json.loads(outcome)
    return Rejection(backend, fields["reason"], fields["failed"]) if fields else None


def main() -> None:
    """The child: a question on standard input, its answer on the last line of standard output."""
    rejection = answer(pickle.loads(sys.stdin.buffer.read()))
    fields = {} if rejection is None else {"reason": rejection.reason, "failed": rejection.failed}
    print(f"{MARK}{json.dumps(fields)}", flush=True)


if __name__ == "__main__":
    main()
