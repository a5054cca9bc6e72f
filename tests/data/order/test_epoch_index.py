import multiprocessing
import os
import shutil
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_fp4.data.order import epoch_index
from megatron_fp4.data.order.epoch_index import IndexCache, build_index, index_bytes, open_cache
from megatron_fp4.data.order.permute import digest
from megatron_fp4.data.shards.documents import open_documents
from megatron_fp4.storage.owner import Owner
from tests.data.order.index_process import KEY, hang_while_writing, open_index
from tests.data.toy import numbered, write_shard


@pytest.fixture
def source(tmp_path):
    return open_documents("web", [write_shard(tmp_path / "s", numbered([3, 1, 4, 1, 5, 9, 2, 6]))])


def files(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_cached_index_equals_the_built_one(source, tmp_path):
    cache = IndexCache(tmp_path / "cache")
    expected = build_index(source.lengths, KEY)
    for _ in range(2):
        index = cache.get(source, KEY)
        assert np.array_equal(index.order, expected.order)
        assert np.array_equal(index.starts, expected.starts)
    assert cache.built == 1
    assert len(files(tmp_path / "cache")) == 1


@pytest.mark.parametrize("damage", ["truncate", "torn", "foreign"])
def test_half_written_or_stale_files_are_built_again(source, tmp_path, damage):
    cache = IndexCache(tmp_path / "cache")
    good = cache.get(source, KEY).order.copy()
    path = next(p for p in (tmp_path / "cache").iterdir() if p.suffix == ".epoch")
    data = path.read_bytes()
    path.unlink()  # the mapping above keeps the old file alive
    changed = {"truncate": data[:-20], "torn": data[:-8] + bytes(8), "foreign": data[:8] + bytes(32) + data[40:]}
    path.write_bytes(changed[damage])
    assert np.array_equal(cache.get(source, KEY).order, good)
    assert cache.built == 2


def test_a_folder_is_made_once_and_a_name_with_a_slash_is_one_file(source, tmp_path):
    for _ in range(2):
        cache = IndexCache(tmp_path / "node" / "cache")
    nested = open_documents("web/en", [str(tmp_path / "s")])
    assert np.array_equal(cache.get(nested, KEY).order, build_index(source.lengths, KEY).order)
    (name,) = files(tmp_path / "node" / "cache")
    assert name.startswith("web_en-")


def test_the_index_of_an_order(source):
    """Lengths 3 1 4 1 5 9 2 6 as stored; shuffled, the starts are the sums of the lengths in that order."""
    stored = build_index(source.lengths, None)
    assert stored.order.tolist() == list(range(8))
    assert stored.starts.tolist() == [0, 3, 4, 8, 9, 14, 23, 25, 31]
    shuffled = build_index(source.lengths, KEY)
    assert sorted(shuffled.order.tolist()) == list(range(8)) != shuffled.order.tolist()
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    assert shuffled.starts.tolist() == [sum(lengths[d] for d in shuffled.order[:n]) for n in range(9)]


def test_other_content_is_another_file(source, tmp_path):
    cache = IndexCache(tmp_path / "cache")
    cache.get(source, KEY)
    cache.get(open_documents("web", [write_shard(tmp_path / "t", numbered([3, 1, 4, 1, 5, 9, 2, 7]))]), KEY)
    cache.get(source, digest("other epoch"))
    assert (cache.built, len(files(tmp_path / "cache"))) == (3, 3)


def test_auto_is_a_folder_of_the_node_for_many_documents(source, tmp_path, monkeypatch):
    """A hundred million documents were 1.6 GB in each process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert open_cache("auto", [source]) is None, "eight documents need no file"
    assert open_cache("", [source]) is None
    monkeypatch.setattr(epoch_index, "IN_MEMORY_DOCUMENTS", 7)
    cache = open_cache("auto", [source])
    assert cache.folder == tmp_path / f"megatron_fp4_index_{os.getuid()}"
    assert index_bytes(8) == cache.get(source, KEY).order.nbytes + cache.get(source, KEY).starts.nbytes
    cache.get(source, digest("other epoch"))
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".epoch", ".epoch", ".lock"], "one lock for all"
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    (tmp_path / "megatron_fp4_index_4242").mkdir()
    with pytest.raises(ValueError, match="is another user's, who could change the order"):
        open_cache("auto", [source])


def test_no_room_is_refused_at_start_with_the_numbers(source, tmp_path, monkeypatch):
    free = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match=r"of 8 documents need 0\.0 GB, and .*cache has 0\.0 GB free; name a folder"):
        open_cache(str(tmp_path / "cache"), [source])
    free.free = 136
    open_cache(str(tmp_path / "cache"), [source]).get(source, KEY)
    free.free = 0
    cache = open_cache(str(tmp_path / "cache"), [source])  # a resume needs no more room
    cache.get(source, KEY)
    assert cache.built == 0


def test_a_killed_builder_leaves_neither_its_lock_nor_half_a_file(source, tmp_path):
    context = multiprocessing.get_context("spawn")
    writing, folder = context.Event(), tmp_path / "cache"
    builder = context.Process(target=hang_while_writing, args=(str(tmp_path / "s"), str(folder), writing))
    builder.start()
    assert writing.wait(60)
    live = folder / f"other.epoch.tmp-{Owner.me().tag}"
    live.write_text("another thread's of this process")
    assert len(list(folder.glob("web-*.epoch.tmp-*"))) == 1
    builder.kill()
    builder.join()
    assert np.array_equal(IndexCache(folder).get(source, KEY).order, build_index(source.lengths, KEY).order)
    assert list(folder.glob("*.tmp-*")) == [live], "a leftover of the size of an index stays, or a live one was removed"


def test_changed_data_on_a_full_disk_are_refused(source, tmp_path, monkeypatch):
    """There is an index of this name already, but of other data."""
    IndexCache(tmp_path / "cache").get(source, KEY)
    changed = open_documents("web", [write_shard(tmp_path / "t", numbered([3, 1, 4, 1, 5, 9, 2, 7]))])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    cache = open_cache(str(tmp_path / "cache"), [changed])
    with pytest.raises(ValueError, match=r"8 documents need 0\.0 GB, and .* has 0\.0 GB free"):
        cache.get(changed, KEY)


def test_four_processes_on_two_nodes_start_at_once(tmp_path):
    """Each node (a cache folder of its own) builds once; all four see the same order; no temporary file is left."""
    prefix = write_shard(tmp_path / "s", numbered([2] * 5000))
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(4), context.Queue()
    folders = [str(tmp_path / f"node{n % 2}") for n in range(4)]
    processes = [context.Process(target=open_index, args=(prefix, folder, barrier, out)) for folder in folders]
    for process in processes:
        process.start()
    results = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    for node in set(folders):
        assert sum(built for folder, _, built in results if folder == node) == 1
        assert len(files(tmp_path / node.rsplit("/", 1)[1])) == 1
    assert all(order == results[0][1] for _, order, _ in results)
