import json
import os
import resource

import pytest

from megatron_fp4.data.shards.documents import count_documents, open_documents
from megatron_fp4.data.shards.manifest import BLOCK_BYTES, MANIFEST, PROGRESS, FileDigest, digest_file, read_manifest
from tests.data.toy import write_set, write_shard


def test_set_opens_with_its_facts(tmp_path):
    source = open_documents("web", [write_set(tmp_path / "set", [[[1, 2], [3]], [[9]]])])
    assert (source.num_documents, source.num_tokens, source.max_token_id) == (3, 4, 9)
    assert source.tokenizers == ["tok"]
    assert source.place(2).shard.endswith("shard_00001")


def test_documents_are_counted_without_opening_a_shard(tmp_path):
    """By the manifest of a set, the header of a shard, and a glob."""
    paths = [write_set(tmp_path / "set", [[[1, 2], [3]], [[9]]]), write_shard(tmp_path / "a_1", [[1], [2]])]
    write_shard(tmp_path / "a_2", [[3]])
    paths[1:] = [str(tmp_path / "a_*")]
    assert count_documents(paths) == 6 == open_documents("web", paths).num_documents
    (tmp_path / "a_2.idx").write_bytes(b"short")
    with pytest.raises(ValueError, match="5 bytes, shorter than the 34-byte header"):
        count_documents(paths)


def test_uncommitted_and_foreign_folders(tmp_path):
    write_shard(tmp_path / "shard_00000", [[1]])
    with pytest.raises(ValueError, match=r"has no manifest\.json, so it is not a shard set"):
        open_documents("web", [str(tmp_path)])
    (tmp_path / PROGRESS).write_text("{}")
    with pytest.raises(ValueError, match=r"is not committed.*run the same data_tools\.tokenize command again"):
        open_documents("web", [str(tmp_path)])
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": "x"}))
    with pytest.raises(ValueError, match="format 'x'"):
        read_manifest(tmp_path)


def test_manifest_and_files_disagree(tmp_path):
    folder = write_set(tmp_path / "set", [[[1, 2, 3]]])
    os.truncate(tmp_path / "set" / "shard_00000.bin", 4)
    with pytest.raises(ValueError, match=r"shard_00000\.bin: the manifest says 6 bytes, the file has 4.*offset 4"):
        open_documents("web", [folder])
    (tmp_path / "set" / "shard_00000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00000\.bin is listed in the manifest but does not exist"):
        open_documents("web", [folder])


def test_idx_of_another_shard(tmp_path):
    """Same size of .bin and .idx, other document borders."""
    folder = write_set(tmp_path / "set", [[[1, 2, 3], [4]]])
    write_shard(tmp_path / "other", [[1], [2, 3]])
    os.replace(tmp_path / "other.idx", tmp_path / "set" / "shard_00000.idx")
    with pytest.raises(ValueError, match=r"8 bytes|6 bytes"):
        open_documents("web", [folder])


def test_globs_and_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        open_documents("web", [str(tmp_path / "a_*")])
    with pytest.raises(ValueError, match="has no paths"):
        open_documents("web", [])


def test_fingerprint_is_content(tmp_path):
    a = open_documents("a", [write_set(tmp_path / "x", [[[1, 2, 3]]])]).fingerprint
    assert open_documents("b", [write_set(tmp_path / "y", [[[1, 2, 3]]])]).fingerprint == a
    assert open_documents("a", [write_set(tmp_path / "z", [[[1, 2, 4]]])]).fingerprint != a


def test_too_many_open_files_says_what_to_do(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    prefixes = [write_shard(tmp_path / f"s{n}", [[1]]) for n in range(40)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        with pytest.raises(ValueError, match=r"too many open files at .*ulimit -n"):
            open_documents("web", prefixes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_digest_by_block(tmp_path):
    data = os.urandom(BLOCK_BYTES * 2 + 10)
    (tmp_path / "f").write_bytes(data)
    pieces = FileDigest()
    for start in range(0, len(data), 1_000_003):
        pieces.update(data[start : start + 1_000_003])
    whole = digest_file(tmp_path / "f")
    assert pieces.result() == whole
    assert (whole["bytes"], len(whole["blocks"])) == (len(data), 3)


def test_a_shard_named_twice_is_refused(tmp_path):
    """By another spelling, through a glob, a link or its folder: each epoch would read its documents twice."""
    folder = write_set(tmp_path / "set", [[[1, 2], [3]], [[9]]])
    (tmp_path / "link").symlink_to(tmp_path / "set")
    shard = f"{folder}/shard_00001"
    for other in (folder, shard, f"{shard}.bin", f"{folder}/shard_*", str(tmp_path / "link")):
        with pytest.raises(ValueError, match=r"'web' names shard .*/shard_0000. twice"):
            open_documents("web", [shard, other] if other != folder else [folder, folder])
