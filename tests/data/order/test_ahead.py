"""Epochs that come are put in order by another thread than the one that reads."""

import threading

import numpy as np
import pytest

from megatron_fp4.data.order import epoch_index, samples
from megatron_fp4.data.order.ahead import IndexBuilder
from megatron_fp4.data.order.epoch_index import IndexCache, build_index
from megatron_fp4.data.order.samples import SampleStream
from megatron_fp4.data.shards.documents import open_documents
from tests.data.toy import numbered, write_shard


class Recorder:
    """Makes indices as told, and remembers of which epochs and in which threads."""

    def __init__(self):
        self.threads = {}
        self.open = threading.Event()
        self.awaited = []
        self.builder = None

    def make(self, epoch):
        self.threads[epoch] = threading.current_thread().name
        self.awaited.append(self.builder.awaited if self.builder else None)
        if epoch == 1:
            assert self.open.wait(30)
        if epoch == 2:
            raise OSError("the disk is full")
        return build_index(np.array([epoch]), None)


def test_the_next_epoch_is_built_ahead_up_to_the_last_one():
    recorder = Recorder()
    builder = IndexBuilder(recorder.make)
    recorder.builder, builder.last_epoch = builder, 2
    main = threading.current_thread().name
    builder.take(0)
    assert recorder.awaited[0], "who builds what nobody built ahead waits, too"
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


@pytest.mark.parametrize("first", [0, 8])
def test_the_order_is_the_same_with_a_folder_and_without_also_from_a_later_epoch_on(tmp_path, first):
    prefix = write_shard(tmp_path / "s", numbered([3, 1, 4, 1, 5, 9, 2, 6]))
    cache = IndexCache(tmp_path / "cache")
    documents = open_documents("web", [prefix])
    memory, file = (SampleStream(documents, seq_length=8, seed=1, cache=one) for one in (None, cache))
    file.read_ahead(16)
    assert [file.pieces(index) for index in range(first, 16)] == [memory.pieces(index) for index in range(first, 16)]
    assert cache.built == 5 - first * 8 // 31, "an epoch that is past was built, or one of those to come was not"


def test_a_folder_that_fails_is_refused_at_first_and_later_said_aloud(tmp_path, monkeypatch, caplog):
    prefix = write_shard(tmp_path / "s", numbered([3, 1, 4, 1, 5, 9, 2, 6]))
    documents = open_documents("web", [prefix])
    streams = [SampleStream(documents, seq_length=8, seed=1, cache=IndexCache(tmp_path / "cache")) for _ in range(2)]
    memory = SampleStream(documents, seq_length=8, seed=1)
    streams[0].pieces(0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(epoch_index, "write_durably", full)
    assert streams[0].pieces(5) == memory.pieces(5)
    (line,) = caplog.messages
    assert line == (
        "data.index_cache: [Errno 28] No space left on device; make room there, or name another folder."
        " Epoch 1 of source web goes on with 0.0 GB in the memory of EACH process"
    )
    with pytest.raises(ValueError, match=r"data\.index_cache: .*No space left"):
        streams[1].pieces(5)
