"""Epochs that come are put in order by another thread than the one that reads."""

import threading

import numpy as np
import pytest

from megatron_fp4.data.order import samples
from megatron_fp4.data.order.ahead import IndexBuilder
from megatron_fp4.data.order.epoch_index import build_index
from megatron_fp4.data.order.samples import SampleStream
from megatron_fp4.data.shards.documents import open_documents
from tests.data.toy import numbered, write_shard


class Recorder:
    """Makes indices as told, and remembers of which epochs and in which threads."""

    def __init__(self):
        self.threads = {}
        self.open = threading.Event()

    def make(self, epoch):
        self.threads[epoch] = threading.current_thread().name
        if epoch == 1:
            assert self.open.wait(30)
        if epoch == 2:
            raise OSError("the disk is full")
        return build_index(np.array([epoch]), None)


def test_the_next_epoch_is_built_ahead_up_to_the_last_one():
    recorder = Recorder()
    builder = IndexBuilder(recorder.make)
    builder.last_epoch = 2
    main = threading.current_thread().name
    builder.take(0)
    taken = []
    waiter = threading.Thread(target=lambda: taken.append(builder.take(1)))
    waiter.start()
    while not builder.awaited:
        pass
    assert taken == [], "it was built a second time instead of being waited for"
    recorder.open.set()
    waiter.join()
    assert not builder.awaited
    assert taken[0].starts.tolist() == [0, 1]
    with pytest.raises(OSError, match="disk is full"):
        builder.take(2)
    recorder.make = None
    assert recorder.threads == {0: main, 1: "index-1", 2: "index-2"}


def test_a_stream_reads_on_without_building(tmp_path, monkeypatch):
    """31 tokens, S = 8: twelve samples are 96 tokens and end in epoch 3, so epochs 0 to 3 are built and no other."""
    threads = []
    monkeypatch.setattr(
        samples,
        "build_index",
        lambda *arguments: threads.append(threading.current_thread().name) or build_index(*arguments),
    )
    prefix = write_shard(tmp_path / "s", numbered([3, 1, 4, 1, 5, 9, 2, 6]))
    stream, other = (SampleStream(open_documents("web", [prefix]), seq_length=8, seed=1) for _ in range(2))
    stream.read_ahead(12)
    ahead = [stream.pieces(index) for index in range(11)]
    of_readers = [name for name in threads if not name.startswith("index-")]
    assert len(of_readers) == 1, "a sample of a later epoch had to build its order"
    assert sorted(threads) == sorted([*of_readers, "index-1", "index-2", "index-3"])
    assert ahead == [other.pieces(index) for index in range(11)], "another order"
