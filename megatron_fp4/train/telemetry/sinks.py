"""Copies of the numbers for people, in TensorBoard and wandb; each may hang or fail without anybody waiting for it.

A thread of its own makes the sink and feeds it from a bounded queue. Whatever the sink does (an import that takes a
minute, a login that waits for an answer, an exception), `write` returns at once; when the queue is full or the sink
raises, it is switched off with one warning and training goes on.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_fp4.train.sections import LoggingConfig, WandbMode

MAX_WAITING = 10_000
"""Records; some hours of a run while a logger's server is away."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for what is still queued."""


class Sink(Protocol):
    """A destination of numbers."""

    def write(self, step: int, values: dict[str, float]) -> None: ...
    def rewind(self, step: int) -> None:
        """What was written for later steps is void, where the destination can forget."""

    def close(self) -> None: ...


class BackgroundSink:
    """Feeds the sink that `make` returns, from a thread."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._make = make
        self._queue: queue.Queue[Callable[[Sink], None]] = queue.Queue(MAX_WAITING)
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name}-logger", daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._put(lambda sink: sink.write(step, values))

    def rewind(self, step: int) -> None:
        self._put(lambda sink: sink.rewind(step))

    def close(self) -> None:
        self._put(self._finish)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"it did not finish within {CLOSE_SECONDS:g} s")

    def _put(self, act: Callable[[Sink], None]) -> None:
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            self._warn(f"{MAX_WAITING} records wait for it")

    def _finish(self, sink: Sink) -> None:
        sink.close()
        self._off.set()

    def _work(self) -> None:
        try:
            sink = self._make()
            while not self._off.is_set():
                self._queue.get()(sink)
        except BaseException as error:  # logging must never stop a run
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, why: str) -> None:
        if not self._off.is_set():
            print(f"warning: {self._name} logging is off from here on: {why}", file=sys.stderr, flush=True)
        self._off.set()


class TensorBoardSink:
    """Scalars under `tensorboard/` in the run directory. resume_step: what it holds of later steps is void."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[[int], Any] = lambda last: SummaryWriter(str(run_dir / "tensorboard"), purge_step=last + 1)
        self._writer = self._open(resume_step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """wandb with an own step axis. `run_id` is stored in the checkpoint, so that a resume goes on in the same run."""

    def __init__(self, config: LoggingConfig, run_dir: Path, run_id: str, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or run_dir.name,
            id=run_id,
            resume="allow",
            mode=_wandb_mode(config.wandb),
            dir=str(run_dir),
            config=settings,
            settings=wandb.Settings(init_timeout=60, console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        pass  # wandb forgets nothing; on the step axis the later record of a step is drawn over the earlier one

    def close(self) -> None:
        self._run.finish()


def _wandb_mode(mode: WandbMode) -> Literal["online", "offline"]:
    if mode is WandbMode.auto:
        import wandb

        return "online" if wandb.login(prompt=False) else "offline"
    return "online" if mode is WandbMode.online else "offline"
