import threading
import time

import pytest
import torch

from megatron_fp4.data import prefetch
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.prefetch import Prefetcher
from tests.data.toy import loader_of, numbered, source


@pytest.fixture
def loader(tmp_path):
    return loader_of(DataConfig([source(tmp_path, "web", numbered([400]))], seq_length=8))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_same_batches_in_order(loader, depth):
    steps = [(0, 2), (2, 4), (6, 8)]
    with Prefetcher(loader, steps, depth=depth) as batches:
        items = list(batches)
    assert [(m.first_sample, m.num_samples) for m in items] == steps
    assert all(torch.equal(m.batch.tokens, loader.batch(*s).tokens) for m, s in zip(items, steps, strict=True))


def test_a_stall_is_measured_and_readiness_is_not_a_stall(loader):
    second_made = threading.Event()

    class Slow:
        def batch(self, first, number):
            if first == 0:
                time.sleep(0.5)
            else:
                second_made.set()
            return loader.batch(first, number)

    with Prefetcher(Slow(), [(0, 1), (1, 1)], depth=2) as batches:
        stalled = next(batches).data_wait_seconds
        assert second_made.wait(60)
        time.sleep(0.1)
        assert next(batches).data_wait_seconds < stalled


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_where_its_batch_was_due(loader, depth):
    with Prefetcher(loader, [(0, 1), (48, 8)], depth=depth) as batches:
        next(batches)
        with pytest.raises(ValueError, match="too small"):
            next(batches)


def test_close_ends_a_thread_that_waits_on_a_full_queue(loader):
    prefetcher = Prefetcher(loader, [(i, 1) for i in range(40)], depth=1)
    next(prefetcher)
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


def test_who_waits_is_asked_for_why(loader, monkeypatch):
    """A wait for an index is no stall of the data, and may take longer."""
    monkeypatch.setattr(prefetch, "LOOK_SECONDS", 0.01)
    asked = threading.Event()

    class Slow:
        def batch(self, first, number):
            assert asked.wait(30)
            return loader.batch(first, number)

    with Prefetcher(Slow(), [(0, 1)], depth=1, while_waiting=asked.set) as batches:
        assert next(batches).first_sample == 0
