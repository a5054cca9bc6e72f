"""Where the ranks of a job meet: a key-value store in which they can speak before any process group exists.

A collective needs a device, a backend and time-outs, and those are settings, which two ranks may have read differently.
The store of the rendezvous needs an address and a rank. So what must be equal on all ranks is compared here, in one
exchange: every rank says a few bytes, rank 0 looks at all of them and says one thing, which every rank receives.

Not here: what is compared (train/arrival/agreement.py); the notice board of a job that hangs (board.py).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_fp4.comm.agree import number_ranges
from megatron_fp4.comm.launch import Launch, MeetingPlace, meeting_place

log = logging.getLogger(__name__)
SPARE_SECONDS = 30.0
"""How much longer a rank waits for the word of one that itself waits."""
MAX_LISTED_HOSTS = 20
AGREED, REFUSED = "=", "!"


class RanksNotMet(RuntimeError):
    """The ranks did not meet, or one left; the message names those that did not come. A restart may help."""


class RankFailed(RuntimeError):
    """What ranks had to do together failed on one of them; the message names it, and says why. The same on all."""


class Rendezvous:
    """The ranks that have met. store: None for a world of one rank."""

    def __init__(self, launch: Launch, store: dist.Store | None) -> None:
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.store = store
        self._exchanges = 0

    @staticmethod
    def alone() -> Rendezvous:
        """That of a world of one rank."""
        return Rendezvous(Launch(), None)

    def decided_by_rank0(
        self, name: str, message: str, decide: Callable[[Sequence[str]], str], timeout_seconds: float
    ) -> str:
        """What `decide` of rank 0 makes of what every rank said, in rank order; the same on all ranks.

        Every rank calls it, with the same names in the same order. A ValueError of `decide` is raised on all ranks.
        Raises RanksNotMet if a rank has not spoken in time; rank 0 names it.
        """
        if self.store is None:
            return decide([message])
        self._exchanges += 1
        key, timeout = f"exchange/{self._exchanges}", timedelta(seconds=timeout_seconds)
        speakers = [f"{key}/{rank}" for rank in range(self.world_size)]
        try:
            self.store.set(speakers[self.rank], message)
            if self.rank == 0:
                self.store.wait(speakers, timeout)
                self.store.set(
                    f"{key}/decision", _decision(decide, [text.decode() for text in self.store.multi_get(speakers)])
                )
            else:  # rank 0 speaks of who is late, so it is given the time to
                self.store.wait([f"{key}/decision"], timeout + timedelta(seconds=SPARE_SECONDS))
            decision = self.store.get(f"{key}/decision").decode()
        except dist.DistError as error:
            raise RanksNotMet(self._silent(name, speakers, timeout_seconds)) from error
        if decision.startswith(REFUSED):
            raise ValueError(decision.removeprefix(REFUSED))
        return decision.removeprefix(AGREED)

    def told_by_rank0(self, name: str, text: str, timeout_seconds: float) -> str:
        """`text` of rank 0, on every rank that asks. Rank 0 waits for nobody: not all may know that they must ask.

        Raises RanksNotMet if rank 0 has said nothing in time.
        """
        if self.store is None:
            return text
        key = f"told/{name}"
        try:
            if self.rank == 0:
                self.store.set(key, text)
            self.store.wait([key], timedelta(seconds=timeout_seconds))
            return self.store.get(key).decode()
        except dist.DistError as error:
            raise RanksNotMet(self._silent(name, [], timeout_seconds)) from error

    def wait_for_all(self, name: str, timeout_seconds: float) -> None:
        """Return when every rank has called this: a barrier with a patience of its own. Raises RanksNotMet."""
        with self.together(name, timeout_seconds):
            pass

    @contextmanager
    def together(self, name: str, timeout_seconds: float) -> Iterator[None]:
        """Around what every rank does, for as long as the slowest needs: it ends when all have done it.

        An exception of one rank ends it with RankFailed on all: at once where a rank waits, else when it has done its
        own. Raises RanksNotMet if a rank has not done it in time; rank 0 names it.
        """
        self._exchanges += 1
        key = f"exchange/{self._exchanges}"
        try:
            yield
        except Exception as error:
            text = str(error)
            if not isinstance(error, ValueError):
                text = f"{type(error).__name__}: {error}"
                log.warning("rank %d fails in %s", self.rank, name, exc_info=error)
            raise RankFailed(self._first_failure(key, f"rank {self.rank}: {text}")) from error
        if self.store is not None:
            self._wait_for_the_others(self.store, key, name, timeout_seconds)

    def _first_failure(self, key: str, sentence: str) -> str:
        with suppress(dist.DistError):  # rank 0 has left: this one speaks for itself
            if self.store is not None:
                sentence = self.store.compare_set(f"{key}/outcome", "", REFUSED + sentence).decode()
        return sentence.removeprefix(REFUSED)

    def _wait_for_the_others(self, store: dist.Store, key: str, name: str, seconds: float) -> None:
        speakers = [f"{key}/{rank}" for rank in range(self.world_size)]
        patience = timedelta(seconds=seconds if self.rank == 0 else seconds + SPARE_SECONDS)
        try:
            store.set(speakers[self.rank], "")
            if store.add(f"{key}/arrivals", 1) == self.world_size:
                store.set(f"{key}/outcome", AGREED)
            store.wait([f"{key}/outcome"], patience)
            outcome = store.get(f"{key}/outcome").decode()
        except dist.DistError as error:
            raise RanksNotMet(self._silent(name, speakers, seconds)) from error
        if outcome.startswith(REFUSED):
            raise RankFailed(outcome.removeprefix(REFUSED))

    def leave(self) -> None:
        """Return when every rank has called this, or after some seconds: rank 0 holds the store for the others."""
        if self.store is None:
            return
        with suppress(dist.DistError):  # rank 0 has left already
            self.store.add("left", 1)
            end = time.monotonic() + SPARE_SECONDS
            while self.rank == 0 and self.store.add("left", 0) < self.world_size and time.monotonic() < end:
                time.sleep(0.05)

    def _silent(self, name: str, speakers: Sequence[str], seconds: float) -> str:
        assert self.store is not None
        try:
            silent = [rank for rank, key in enumerate(speakers) if self.rank == 0 and not self.store.check([key])]
        except dist.DistError:
            return f"rank {self.rank}: rank 0 has left, see its message"
        who = f"rank(s) {number_ranges(silent)}" if silent else "rank 0"
        return f"rank {self.rank}: no word from {who} about {name} within {seconds:g} s"


def _decision(decide: Callable[[Sequence[str]], str], message: Sequence[str]) -> str:
    try:
        return AGREED + decide(message)
    except ValueError as error:
        return REFUSED + str(error)


def meet(launch: Launch, patience_seconds: float) -> Rendezvous:
    """Wait for all ranks of the job at MASTER_ADDR:MASTER_PORT.

    Raises ValueError if the launcher gave no address, RanksNotMet with the ranks that did not come in time.
    """
    if launch.world_size == 1:
        return Rendezvous(launch, None)
    place = meeting_place(launch)
    try:
        store = _open_store(launch, place, patience_seconds)
    except dist.DistError as error:
        if launch.rank == 0 and not place.held_by_agent:
            raise RanksNotMet(
                f"rank 0 (host {socket.gethostname()}) cannot open the rendezvous at {place}: {_first_line(error)};"
                " choose a free port as MASTER_PORT, and this host as MASTER_ADDR, on all ranks"
            ) from error
        raise RanksNotMet(
            f"rank {launch.rank} (host {socket.gethostname()}) did not reach rank 0 at {place} within"
            f" {patience_seconds:g} s (parallel.init_timeout_seconds): {_first_line(error)}; rank 0 was not started or"
            " has failed, or the address cannot be reached from this node"
        ) from error
    try:
        if objection := _objection(launch, store):
            store.set("all_arrived", REFUSED + objection)
        else:
            store.set(f"arrived/{launch.rank}", socket.gethostname())
            if store.add("arrivals", 1) == launch.world_size:
                store.set("all_arrived", AGREED)
        store.wait(["all_arrived"], timedelta(seconds=patience_seconds))
        outcome = store.get("all_arrived").decode()
    except dist.DistError as error:
        raise RanksNotMet(_absent(launch, store, place, patience_seconds)) from error
    if outcome.startswith(REFUSED):
        raise ValueError(outcome.removeprefix(REFUSED))
    return Rendezvous(launch, store)


def _objection(launch: Launch, store: dist.Store) -> str:
    """Why this process cannot be one of the ranks that meet here: another has its rank, or counts other ranks."""
    host = socket.gethostname()
    if store.add(f"claimed/{launch.rank}", 1) > 1:
        return (
            f"two processes say that they are rank {launch.rank}, one of them on {host}; each needs a RANK of its own"
        )
    first = store.compare_set("world_size", "", str(launch.world_size)).decode()
    if first != str(launch.world_size):
        return (
            f"WORLD_SIZE = {launch.world_size} on rank {launch.rank} ({host}), but {first} on a rank that came before;"
            " start every rank with the same number"
        )
    return ""


def _open_store(launch: Launch, place: MeetingPlace, patience_seconds: float) -> dist.Store:
    store = dist.TCPStore(
        place.address,
        place.port,
        launch.world_size,
        is_master=launch.rank == 0 and not place.held_by_agent,
        timeout=timedelta(seconds=patience_seconds),
        wait_for_workers=False,  # its own waiting does not say who is missing
        multi_tenant=True,
    )
    return dist.PrefixStore(f"megatron_fp4/{place.attempt}", store)


def _absent(launch: Launch, store: dist.Store, place: MeetingPlace, seconds: float) -> str:
    """Who has not come, in a sentence: the first rank that gives up looks, and tells the others."""
    try:
        if store.add("absence/claimed", 1) == 1:
            store.set("absence", _absence(launch.world_size, store, place, seconds))
        store.wait(["absence"], timedelta(seconds=SPARE_SECONDS))
        return store.get("absence").decode()
    except dist.DistError:
        return f"rank {launch.rank}: rank 0 has left the rendezvous at {place}, see its message"


def _absence(world_size: int, store: dist.Store, place: MeetingPlace, seconds: float) -> str:
    came = [rank for rank in range(world_size) if store.check([f"arrived/{rank}"])]
    absent = sorted(set(range(world_size)) - set(came))
    hosts = list(dict.fromkeys(store.get(f"arrived/{rank}").decode() for rank in came))
    listed = ", ".join(hosts[:MAX_LISTED_HOSTS]) + (", ..." if len(hosts) > MAX_LISTED_HOSTS else "")
    return (
        f"the {world_size} ranks did not meet at {place} within {seconds:g} s (parallel.init_timeout_seconds):"
        f" {len(absent)} did not come, rank(s) {number_ranges(absent)}; rank(s) {number_ranges(came)} came, from"
        f" {listed}; a rank was not started or has failed, or its node cannot reach the address"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
