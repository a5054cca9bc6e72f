"""Two ranks, a fault on one of them: both say the same, nobody hangs, older checkpoints stay."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, SaveFailed, commit, load
from megatron_fp4.checkpoint.write import Staging
from megatron_fp4.comm.bootstrap import start_process
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.local import free_port
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.durable import HashingFile
from megatron_fp4.storage.lock import RunLocked
from megatron_fp4.train.arrival.locking import hold_run
from megatron_fp4.train.resume.origin import choose_checkpoint
from megatron_fp4.train.sections import Resume
from tests.checkpoint.synthetic import Layout, shards_of, wrong_shards
from tests.helpers.distributed import mesh_for, run_distributed

TWO = Layout(tp=2)
TIMEOUT_SECONDS = 8.0


@contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any], on: bool) -> Generator[None, None, None]:
    original = getattr(owner, name)
    if on:
        setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def no_space(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def out_of_memory(*_: object) -> None:
    raise RuntimeError("out of memory")


def never_ends(*_: object) -> None:
    time.sleep(TIMEOUT_SECONDS + 60)


def refused(action: Callable[[], object], kind: type[Exception]) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "nothing was raised"


def scenarios(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """What this rank saw in each scenario, and how long it took."""
    world = mesh_for(rank, world_size).world
    second = rank == 1
    seen: dict[str, Any] = {}

    def run(name: str, on: tuple[Any, str, Callable[..., Any]], asynchronous: bool, **settings: Any) -> None:
        store = CheckpointStore(Path(root, name), world, CheckpointConfig(asynchronous=asynchronous, **settings))
        store.save(1, shards_of(TWO, rank, filled=True, version=1), {})
        store.wait()
        began = time.monotonic()
        with replaced(*on, on=second):
            first = store.save(2, shards_of(TWO, rank, filled=True, version=2), {})
            report = store.wait() or first
        seconds = time.monotonic() - began
        left = store.complete_steps()
        retry = store.save(3, shards_of(TWO, rank, filled=True, version=3), {})
        retry = store.wait() or retry
        shards = shards_of(TWO, rank, filled=False)
        with replaced(load, "read_description", never_ends, on=second):  # rank 0 reads it and hands it on
            store.load(store.choose(), shards)
        wrong = wrong_shards(shards, TWO, rank, version=3)
        files = sorted(os.listdir(Path(root, name)))
        seen[name] = (report.status.value, report.error, left, retry.status.value, wrong, files, seconds)

    run("full_sync", (HashingFile, "write", no_space), False)
    run("full_async", (HashingFile, "write", no_space), True)
    run("no_memory", (Staging, "copy", out_of_memory), True)
    run("hung", (commit, "write_part", never_ends), True, timeout_seconds=2.0)
    seen["refusals"] = refusals(Path(root, "refusals"), world)
    seen["mirror"] = mirrored(Path(root, "mirror"), world)
    return seen


def refusals(root: Path, world: Group) -> dict[str, Any]:
    second = world.rank == 1
    store = CheckpointStore(root, world, CheckpointConfig(max_failures=1, asynchronous=False))
    shards = shards_of(TWO, world.rank, filled=True)
    for step in (1, 2):
        store.save(step, shards, {})
    messages: dict[str, Any] = {}
    holed = shards[1:] if second else shards  # rank 1's rows of the embedding
    messages["hole"] = refused(lambda: store.save(3, holed, {}), ValueError)
    messages["meta"] = refused(lambda: store.save(3, shards, {"x": {1} if second else 1}), ValueError)
    with replaced(HashingFile, "write", no_space, on=second):
        messages["abort"] = refused(lambda: store.save(3, shards, {}), SaveFailed)
    with replaced(Path, "mkdir", no_space, on=world.rank == 0):
        messages["mkdir"] = refused(lambda: store.save(3, shards, {}), SaveFailed)
    if world.rank == 0:  # a file that rank 1 wrote
        os.truncate(root / "step_00000002" / "data_0000.bin", 5000)
    chosen = store.choose()
    store.load(chosen, shards)
    messages["fallback"] = chosen.step
    lock = hold_run(root, "", world)
    messages["locked"] = refused(lambda: hold_run(root, "", world), RunLocked)
    lock.release()
    return messages


def mirrored(root: Path, world: Group) -> dict[str, Any]:
    """Two steps are mirrored; a byte of rank 1's part of the newer one flips in the store; another disk goes on."""
    url, config = f"file://{root}/store", CheckpointConfig(asynchronous=False)
    sending = CheckpointStore(root / "sending", world, config, mirror=url)
    assert sending.mirror is not None
    sending.mirror.start()
    for step in (1, 2):
        sending.save(step, shards_of(TWO, world.rank, filled=True, version=step), {})
    seen = {"missing": sending.mirror.finish(60.0)}
    if world.rank == 0:
        newest = next((root / "store").glob("step_00000002.*/data_0000.bin"))
        content = bytearray(newest.read_bytes())
        content[-1 - 4096] ^= 1
        newest.write_bytes(bytes(content))
    going_on = CheckpointStore(root / "going_on", world, config, mirror=url)
    chosen = going_on.choose_newest()
    assert chosen is not None
    shards = shards_of(TWO, world.rank, filled=False)
    going_on.load(chosen, shards)
    empty = CheckpointStore(root / "empty", world, config, mirror=url)
    never = refused(lambda: choose_checkpoint(Resume.never, empty), ValueError)
    return {**seen, "step": chosen.step, "wrong": wrong_shards(shards, TWO, world.rank, version=1), "never": never}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(scenarios, 2, str(tmp_path_factory.mktemp("agreement")))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("full_sync", "rank 1: OSError: [Errno 28] No space left on device"),
        ("full_async", "rank 1: OSError: [Errno 28] No space left on device"),
        ("no_memory", "rank 1: MemoryError: no host memory for the copy (out of memory)"),
        ("hung", "rank 0: TimeoutError: no part of rank 1 within the time-out"),
    ],
)
def test_a_failed_save_costs_only_itself(seen: list[dict[str, Any]], name: str, error: str) -> None:
    for rank in range(2):
        status, message, left, retry, wrong, files, seconds = seen[rank][name]
        assert status == "failed", f"rank {rank} believes in a checkpoint that is not there"
        assert error in message, f"rank {rank} does not know the cause"
        assert left == [1], "the older checkpoint must stay"
        assert retry == "committed", "the next save is the retry"
        assert wrong == []
        assert files == ["latest", "step_00000001", "step_00000003"], "the failed save still takes up disk space"
        assert seconds < TIMEOUT_SECONDS, "the failure was noticed by a time-out instead of by the directory"


def test_refusals_are_the_same_on_all_ranks(seen: list[dict[str, Any]]) -> None:
    first, second = (one["refusals"] for one in seen)
    assert first == second, "one rank raised and the other went on, or into a collective"
    assert "the shards of all ranks hold" in first["hole"]
    assert "rank 1: meta.meta.x" in first["meta"]
    assert "saves in a row failed" in first["abort"]
    assert "No space left" in first["mkdir"]
    assert first["fallback"] == 1, "rank 0 verified its own files only"
    assert f"pid {os.getpid()}" not in first["locked"]
    assert "is in use by pid" in first["locked"]


def test_all_ranks_take_the_same_checkpoint_of_a_mirror(seen: list[dict[str, Any]]) -> None:
    first, second = (one["mirror"] for one in seen)
    assert first == second
    assert first["missing"] == []
    assert first["step"] == 1, "damage in the share of one rank is damage for all"
    assert first["wrong"] == []
    assert "already holds checkpoint 2 and train.resume=never; choose another checkpoint.mirror" in first["never"]


def die_while_writing(rank: int, port: int, root: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = start_process("cpu", 6.0, Launch(rank, 2, rank, 2, "torchrun")).world
    store = CheckpointStore(root, world, CheckpointConfig(asynchronous=False, timeout_seconds=1.0))
    store.save(1, shards_of(TWO, rank, filled=True, version=1), {})
    killer = replaced(HashingFile, "write", lambda *_: os.kill(os.getpid(), signal.SIGKILL), on=rank == 1)
    with killer:
        store.save(2, shards_of(TWO, rank, filled=True, version=2), {})
    os._exit(0)


def test_sigkill_of_one_rank_during_a_save_ends_all_and_leaves_the_old_one(tmp_path: Path) -> None:
    context, port = mp.get_context("spawn"), free_port()
    ranks = [context.Process(target=die_while_writing, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert ranks[1].exitcode == -signal.SIGKILL
    assert ranks[0].exitcode not in (0, None), "the surviving rank hangs, or believes that it saved"
    store = CheckpointStore(tmp_path, Group.single("world"), CheckpointConfig())
    assert store.complete_steps() == [1]
    one = shards_of(Layout(), 0, filled=False)
    store.load(store.choose(), one)
    assert wrong_shards(one, Layout(), 0, version=1) == []
