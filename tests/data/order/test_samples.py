from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.data.order.epoch_index import IndexCache
from megatron_fp4.data.order.permute import digest, permute
from megatron_fp4.data.order.samples import Piece, SampleStream
from megatron_fp4.data.shards.documents import ShardedDocuments, open_documents
from megatron_fp4.data.shards.shard import TokenShard
from tests.data.toy import numbered, write_shard


def stream_of(tmp_path, lengths, seq_length, seed=7, **options):
    prefix = write_shard(tmp_path / "s", numbered(lengths))
    return SampleStream(open_documents("web", [prefix]), seq_length=seq_length, seed=seed, **options)


def ids_of(stream, index):
    out = np.empty(stream.seq_length + 1, np.int64)
    stream.tokens(stream.pieces(index), out)
    return out


def targets(stream, samples):
    return Counter(token for i in samples for token in ids_of(stream, i)[1:].tolist())


def test_seventeen_tokens_accounted_one_by_one(tmp_path):
    """5 documents, 17 tokens, S = 4: epoch 0 is slots 0-4; its last sample takes 1 token here and 4 of epoch 1."""
    stream = stream_of(tmp_path, [5, 1, 4, 6, 1], 4)
    order = [ids_of(stream, i) for i in range(stream.available(3))]
    assert stream.available(1) == 4  # tail of one epoch: (17 - 1) mod 4 = 0 tokens
    assert stream.available(3) == 12  # (51 - 1) // 4, tail 2
    slots = [stream.slot(i) for i in range(12)]
    assert sorted(slots[:4]) == [0, 1, 2, 3]
    assert slots[4] == 4
    assert sorted(slots[5:8]) == [5, 6, 7]
    flat = dict(zip(slots, order, strict=True))
    whole = np.concatenate([flat[s][:-1] for s in range(12)] + [flat[11][-1:]])
    epochs = [whole[:17], whole[17:34]]
    for epoch in epochs:  # each epoch is a permutation of whole documents: every id once
        assert sorted(epoch.tolist()) == list(range(1, 18))
    assert all(np.array_equal(flat[s][-1:], flat[s + 1][:1]) for s in range(11))  # neighbours share one token


@pytest.mark.parametrize("seq_length", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("total", [16, 17, 33])
def test_every_token_is_a_target_once_per_epoch(tmp_path, seq_length, total):
    """Exact multiples of S included: a dropped or doubled token at an epoch border shows as a count of 2 or 4."""
    stream = stream_of(tmp_path, [3, total - 3], seq_length)
    epochs = 3
    count = targets(stream, range(stream.available(epochs)))
    tail = (epochs * total - 1) % seq_length
    assert sum(count.values()) == epochs * total - 1 - tail
    assert all(value <= epochs for value in count.values())
    first = ids_of(stream, [stream.slot(i) for i in range(stream.available(epochs))].index(0))[0]
    if tail == 0:
        assert {t for t, value in count.items() if value < epochs} <= {int(first)}


def test_order_does_not_depend_on_how_many_epochs_are_allowed(tmp_path):
    stream = stream_of(tmp_path, [9, 9, 9], 4)
    assert sorted(stream.slot(i) for i in range(stream.available(1))) == list(range(stream.available(1)))


def test_epochs_differ_and_seeds_differ(tmp_path):
    stream = stream_of(tmp_path, [1] * 64, 4)
    other = stream_of(tmp_path, [1] * 64, 4, seed=8)
    first = [ids_of(stream, i).tolist() for i in range(15)]
    assert first != [ids_of(stream, i + 16).tolist() for i in range(15)]
    assert first != [ids_of(other, i).tolist() for i in range(15)]


def test_the_order_of_documents_and_samples_is_named_by_seed_source_and_epoch(tmp_path):
    """Ten documents of a token each, samples of one: document 8 comes first, as test_permute.py has it, id 9."""
    stream = stream_of(tmp_path, [1] * 10, 1, seed=1234)
    slots = [stream.slot(i) for i in range(20)]
    flat = {slot: int(ids_of(stream, i)[0]) for i, slot in enumerate(slots)}
    assert [flat[slot] for slot in range(10)] == [9, 4, 1, 6, 3, 7, 8, 2, 5, 10]
    for epoch in (0, 1):
        documents = permute(digest(1234, "documents", "web", epoch), 10, np.arange(10))
        assert [flat[10 * epoch + n] for n in range(10)] == (documents + 1).tolist()
        samples = permute(digest(1234, "samples", "web", epoch), 9, np.arange(9))  # the tenth reaches into the next
        assert slots[10 * epoch : 10 * epoch + 10] == [*(10 * epoch + samples).tolist(), 10 * epoch + 9]


def test_the_order_of_documents_is_cached_where_it_may_be(tmp_path):
    cache = IndexCache(tmp_path / "cache")
    cached, computed = stream_of(tmp_path, [5, 1, 4, 6, 1], 4, cache=cache), stream_of(tmp_path, [5, 1, 4, 6, 1], 4)
    for _ in range(2):
        assert ids_of(cached, 1).tolist() == ids_of(computed, 1).tolist()
    assert cache.built == 1


def test_one_document_and_fewer_tokens_than_a_sample(tmp_path):
    stream = stream_of(tmp_path, [3], 7)
    assert stream.available(1) == 0
    assert ids_of(stream, 0).tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert ids_of(stream, 1).tolist() == [2, 3, 1, 2, 3, 1, 2, 3]


def test_pieces_name_their_epochs_and_stop_after_the_tokens_asked_for(tmp_path):
    """Three tokens an epoch, S = 7: sample 1 begins at token 7, the second of epoch 2."""
    stream = stream_of(tmp_path, [3], 7)
    assert stream.pieces(0) == [Piece(0, 0, 0, 3), Piece(1, 0, 0, 3), Piece(2, 0, 0, 2)]
    assert stream.pieces(1) == [Piece(2, 0, 1, 2), Piece(3, 0, 0, 3), Piece(4, 0, 0, 3)]
    assert stream.pieces(0, 2) == [Piece(0, 0, 0, 2)]
    assert stream.pieces(1, 3) == [Piece(2, 0, 1, 2), Piece(3, 0, 0, 1)]


class CountedCache(IndexCache):
    asked = 0

    def get(self, documents, key):
        self.asked += 1
        return super().get(documents, key)


def test_the_orders_of_the_four_epochs_last_read_stay_at_hand(tmp_path):
    """17 tokens, S = 4: samples 1, 5, 9, 13, 17 begin in epochs 0, 1, 2, 3, 4; an order built anew costs seconds."""
    cache = CountedCache(tmp_path / "cache")
    stream = stream_of(tmp_path, [5, 1, 4, 6, 1], 4, cache=cache)
    for sample, asked in [(1, 1), (5, 2), (9, 3), (13, 4), (1, 4), (5, 4), (9, 4), (13, 4)]:
        stream.pieces(sample, 1)
        assert cache.asked == asked
    for sample, asked in [(17, 5), (17, 5), (13, 5), (9, 5), (5, 5), (1, 6), (5, 6), (9, 6), (13, 6), (17, 7)]:
        stream.pieces(sample, 1)
        assert cache.asked == asked


def test_empty_documents_give_nothing(tmp_path):
    """An empty first, middle and last document."""
    prefix = write_shard(tmp_path / "s", [[], [1, 2], [], [3, 4, 5], []])
    stream = SampleStream(open_documents("web", [prefix]), seq_length=2, seed=0)
    assert sum(targets(stream, range(stream.available(1))).values()) == 4
    assert all(piece.length for i in range(2) for piece in stream.pieces(i))


def test_no_tokens_is_refused(tmp_path):
    prefix = write_shard(tmp_path / "s", [[], []])
    with pytest.raises(ValueError, match="'web' has no tokens in 2 documents"):
        SampleStream(open_documents("web", [prefix]), seq_length=2, seed=0)


def test_stored_order_when_not_shuffled(tmp_path):
    stream = stream_of(tmp_path, [4, 4, 5], 4, shuffle=False)
    assert [ids_of(stream, i).tolist() for i in range(3)] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 11, 12, 13]]


class FakeSource(ShardedDocuments):
    """Lengths without files: more than 2^31 tokens per document."""

    def __init__(self, lengths):
        self.name, self._lengths = "fake", np.array(lengths, np.int64)
        self.num_tokens, self.num_documents = int(self._lengths.sum()), len(lengths)
        self.fingerprint = "fake"

    @property
    def lengths(self):
        return self._lengths


def test_positions_beyond_two_to_the_40(tmp_path):
    stream = SampleStream(FakeSource([2**41, 2**40, 5]), seq_length=8192, seed=1, shuffle=False)
    last = stream.available(1) - 1
    pieces = stream.pieces(last)
    assert sum(piece.length for piece in pieces) == 8193
    assert pieces[0].document == 1
    assert pieces[0].offset == last * 8192 - 2**41


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 99))
def test_fuzz_samples_tile_the_stream(lengths, seq_length, seed):
    """1000 random (documents, lengths, S): slots are a permutation and pieces concatenate to whole epochs."""
    if not sum(lengths):
        return
    stream = SampleStream(FakeSource(lengths), seq_length=seq_length, seed=seed)
    epochs = 2
    number = stream.available(epochs)
    assert sorted(stream.slot(i) for i in range(number)) == list(range(number))
    seen = Counter()
    for i in range(number):
        pieces = stream.pieces(i)
        assert sum(piece.length for piece in pieces) == seq_length + 1
        skip_first = 1
        for piece in pieces:  # tokens as targets: all but the sample's first
            for offset in range(piece.offset + skip_first, piece.offset + piece.length):
                seen[piece.epoch, piece.document, offset] += 1
            skip_first = 0
    assert set(seen.values()) <= {1}
    assert len(seen) == number * seq_length


def test_shards_are_one_list_of_documents(tmp_path):
    whole = numbered([2, 3, 4, 5])
    a, b = write_shard(tmp_path / "p_0", whole[:1]), write_shard(tmp_path / "p_1", whole[1:])
    source = open_documents("web", [str(tmp_path / "p_*")])
    assert [shard.prefix.name for shard in source.shards] == ["p_0", "p_1"]
    assert [source.read(d, 1, 1).tolist() for d in range(4)] == [[2], [4], [7], [11]]
    assert source.place(3).document == 2
    assert source.fingerprint == open_documents("other name", [a, b]).fingerprint
    assert isinstance(source.shards[0], TokenShard)
