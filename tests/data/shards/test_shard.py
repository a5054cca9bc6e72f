import struct

import numpy as np
import pytest

from megatron_fp4.data.shards.shard import HEADER, TokenShard, token_dtype
from megatron_fp4.data.shards.writer import ShardWriter
from tests.data.toy import write_shard


def test_bytes_are_megatrons(tmp_path):
    """Against the format's description, byte by byte: a shard another reader cannot open shows here."""
    write_shard(tmp_path / "s", [[1, 2, 3], [], [65000]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 3, 0, 1) + struct.pack("<3q", 0, 6, 6) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "s.idx").read_bytes() == expected
    assert (tmp_path / "s.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 65000)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", "u1"])
def test_round_trip(tmp_path, dtype):
    documents = [[], [5], [1, 2, 3], [], [9] * 50]
    shard = TokenShard(write_shard(tmp_path / "s", documents, dtype))
    assert [shard.document(d).tolist() for d in range(5)] == documents
    assert (shard.num_documents, shard.num_tokens, shard.dtype) == (5, 54, np.dtype(dtype))
    shard.check_index()


def test_megatron_core_reads_ours_and_we_read_theirs(tmp_path):
    """Independent reader: the wheel megatron-core (pip install --no-deps megatron-core)."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    documents = [[7, 8, 9], [1], [4] * 100]
    theirs = megatron.IndexedDataset(write_shard(tmp_path / "ours", documents))
    assert [theirs[d].tolist() for d in range(3)] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4]), [1, 3])  # two sentences, one document
    builder.add_document(torch.tensor([5]), [1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = TokenShard(tmp_path / "theirs")
    assert [ours.document(d).tolist() for d in range(2)] == [[1, 2, 3, 4], [5]]
    assert (ours.num_sequences, ours.num_documents) == (3, 2)


def test_truncated_bin_names_file_offset_and_both_sizes(tmp_path):
    prefix = write_shard(tmp_path / "s", [[1, 2, 3]])
    data = (tmp_path / "s.bin").read_bytes()
    (tmp_path / "s.bin").write_bytes(data[:-2])
    with pytest.raises(ValueError, match=r"s\.bin.* 6 bytes .*has 4 bytes.*offset 4"):
        TokenShard(prefix)


def test_truncated_idx(tmp_path):
    prefix = write_shard(tmp_path / "s", [[1, 2, 3]])
    data = (tmp_path / "s.idx").read_bytes()
    (tmp_path / "s.idx").write_bytes(data[:-3])
    with pytest.raises(ValueError, match=r"s\.idx: 59 bytes.*needs 62"):
        TokenShard(prefix)
    (tmp_path / "s.idx").write_bytes(data[:10])
    with pytest.raises(ValueError, match="shorter than the 34-byte header"):
        TokenShard(prefix)
    (tmp_path / "s.idx").write_bytes(b"NOTMEGATR" + data[9:])
    with pytest.raises(ValueError, match="starts with"):
        TokenShard(prefix)


def test_check_index_names_the_first_bad_entry(tmp_path):
    prefix = write_shard(tmp_path / "s", [[1, 2], [3], [4]])
    data = bytearray((tmp_path / "s.idx").read_bytes())
    data[HEADER.size + 3 * 4 + 8] += 2  # byte offset of sequence 1
    (tmp_path / "s.idx").write_bytes(data)
    with pytest.raises(ValueError, match="byte offset of sequence 1 is 6, expected 4"):
        TokenShard(prefix).check_index()


def test_missing_shard(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.idx does not exist"):
        TokenShard(tmp_path / "nothing")


def test_beyond_two_to_the_32_bytes(tmp_path):
    """A sparse .bin of 3 x 2^31 - 3 tokens: an int32 anywhere in the offsets reads the wrong place."""
    length = 2**31 - 1
    with open(tmp_path / "big.idx", "wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 3, 4))
        file.write(np.full(3, length, "<i4").tobytes())
        file.write((np.arange(3) * length * 2).astype("<i8").tobytes() + np.arange(4, dtype="<i8").tobytes())
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(3 * length * 2)
        file.seek(2 * length * 2)
        file.write(np.array([11, 12], "<u2").tobytes())
    shard = TokenShard(tmp_path / "big")
    assert [shard.start_of(d) for d in range(4)] == [0, length, 2 * length, 3 * length]
    assert shard.document(2)[:2].tolist() == [11, 12]


def test_more_than_two_to_the_31_documents(tmp_path):
    """A sparse .idx of 2^31 + 5 documents, all empty but the last two: counted and read without copying the index."""
    number = 2**31 + 5
    with open(tmp_path / "many.idx", "wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, number, number + 1))
        for end, last in (
            (HEADER.size + 4 * number, np.array([3, 2], "<i4")),
            (HEADER.size + 12 * number, np.array([0, 6], "<i8")),
            (HEADER.size + 20 * number + 8, np.array([number - 2, number - 1, number], "<i8")),
        ):
            file.seek(end - last.nbytes)
            file.write(last.tobytes())
    (tmp_path / "many.bin").write_bytes(np.arange(5, dtype="<u2").tobytes())
    shard = TokenShard(tmp_path / "many")
    assert shard.num_documents == number
    assert shard.document(number - 2).tolist() == [0, 1, 2]
    assert shard.document(number - 1).tolist() == [3, 4]


def test_writer_refuses_ids_that_do_not_fit(tmp_path):
    writer = ShardWriter(tmp_path / "s", np.dtype("<u2"))
    with pytest.raises(ValueError, match=r"0\.\.70000 do not fit uint16"):
        writer.add_document(np.array([0, 70000]))
    writer.abort()
    assert list(tmp_path.iterdir()) == []  # nothing that looks like a shard is left


def test_token_dtype_is_megatrons_rule():
    assert (token_dtype(65499), token_dtype(65500)) == (np.dtype("<u2"), np.dtype("<i4"))
