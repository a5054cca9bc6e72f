"""Who comes to the rendezvous, and what is said to who does not belong there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

import pytest

from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.local import free_port
from megatron_fp4.comm.rendezvous import RankFailed, RanksNotMet, Rendezvous, meet


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> int:
    """The port at which they meet."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def come(launches: Sequence[Launch]) -> list[Rendezvous | Exception]:
    """What `meet` gives to each, one thread each, in this process."""
    outcomes: dict[int, Rendezvous | Exception] = {}

    def be(index: int) -> None:
        try:
            outcomes[index] = meet(launches[index], 20.0)
        except (ValueError, RanksNotMet) as error:
            outcomes[index] = error

    threads = [threading.Thread(target=be, args=(index,)) for index in range(len(launches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40.0)
    return [outcomes[index] for index in range(len(launches))]


def test_other_world_sizes_are_refused_by_all() -> None:
    """They waited for each other, and were told that 0 ranks did not come."""
    outcomes = come([Launch(0, 2, 0, 1), Launch(1, 3, 0, 1)])
    assert [type(outcome) for outcome in outcomes] == [ValueError, ValueError]
    assert str(outcomes[0]) == str(outcomes[1])
    assert "WORLD_SIZE = " in str(outcomes[0])
    assert "start every rank with the same number" in str(outcomes[0])


def test_two_processes_of_one_rank_are_refused_by_all() -> None:
    outcomes = come([Launch(0, 3, 0, 1), Launch(1, 3, 0, 1), Launch(1, 3, 0, 1)])
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    assert "two processes say that they are rank 1" in str(outcomes[0])


def test_ranks_that_torchrun_starts_anew_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store still holds what the ranks of the attempt before have said."""
    launches = [Launch(0, 2, 0, 1), Launch(1, 2, 0, 1)]
    before = come(launches)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    after = come(launches)
    for outcome in [*before, *after]:
        assert isinstance(outcome, Rendezvous), outcome


def test_what_fails_on_one_rank_fails_on_all_at_once() -> None:
    """Ranks that were done waited for an hour for one that had left; one that comes late hears of it too."""
    ranks = [one for one in come([Launch(rank, 3, 0, 1) for rank in range(3)]) if isinstance(one, Rendezvous)]
    heard: dict[int, str] = {}

    def work(rendezvous: Rendezvous) -> None:
        try:
            with rendezvous.together("its indices", 60.0):
                if rendezvous.rank == 1:
                    raise OSError("no space left")
                if rendezvous.rank == 2:
                    failed.wait(20.0)
        except RankFailed as error:
            heard[rendezvous.rank] = str(error)
        if rendezvous.rank == 0:
            failed.set()  # it waited for rank 2, which was not done

    failed = threading.Event()
    threads = [threading.Thread(target=work, args=(one,)) for one in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40.0)
    assert heard == dict.fromkeys(range(3), "rank 1: OSError: no space left")


def test_ranks_that_are_done_go_on_together() -> None:
    ranks = [one for one in come([Launch(rank, 2, 0, 1) for rank in range(2)]) if isinstance(one, Rendezvous)]
    order: list[str] = []

    def work(rendezvous: Rendezvous) -> None:
        with rendezvous.together("its indices", 20.0):
            time.sleep(0.2 * rendezvous.rank)
            order.append("done")
        order.append("on")

    threads = [threading.Thread(target=work, args=(one,)) for one in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40.0)
    assert order == ["done", "done", "on", "on"]


def test_a_port_in_use_is_said_as_such(place: int) -> None:
    with socket.socket() as taken:
        taken.bind(("", place))
        taken.listen()
        with pytest.raises(RanksNotMet, match=r"rank 0 \(host .*\) cannot open the rendezvous at .*choose a free port"):
            meet(Launch(0, 2, 0, 1), 20.0)
