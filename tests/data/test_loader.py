import json

import numpy as np
import pytest
import torch

from megatron_fp4.data.config import DataConfig, PhaseConfig, SourceConfig
from megatron_fp4.data.loader import build_loader
from tests.data.toy import EOS, loader_of, numbered, source, write_set, write_shard


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        sources=[
            source(tmp_path, "web", numbered([5, 9, 2, 30, 11, 40]), max_epochs=0),
            source(tmp_path, "code", numbered([7, 7, 7, 20], start=1000), max_epochs=0),
        ],
        phases=[PhaseConfig("one", 8 * 12, {"web": 0.75, "code": 0.25}), PhaseConfig("two", 0, {"code": 1.0})],
        seq_length=8,
        seed=3,
    )


def rows(loader, first, number):
    batch = loader.batch(first, number)
    return {int(i): row.tolist() for i, row in zip(batch.sample_ids, batch.tokens, strict=True)}


def test_labels_are_the_next_tokens(config):
    batch = loader_of(config).batch(0, 8)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.loss_mask.all()
    assert torch.equal(batch.positions, torch.arange(8).expand(8, 8))
    assert not batch.documents.any()


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_global_order_is_the_same_for_every_layout(config, micro_batch, dp_size):
    """DP 2->4, 4->1 and any micro batch: the union of the ranks' rows is the same, address included."""
    expected = loader_of(config).batch(16, 16)
    parts = [loader_of(config, micro_batch=micro_batch, dp=(r, dp_size)).batch(16, 16) for r in range(dp_size)]
    address = torch.cat([part.address for part in parts])
    order = address[:, 0].argsort()
    assert torch.equal(address[order], expected.address)
    for name in ("tokens", "labels", "loss_mask", "positions", "documents", "sample_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts])[order], getattr(expected, name)), name
    first = parts[-1]
    want = [16 + (m * dp_size + dp_size - 1) * micro_batch for m in range(16 // (micro_batch * dp_size))]
    assert first.sample_ids[::micro_batch].tolist() == want  # the contract's interleaving of ranks


def test_batch_size_ramp_keeps_the_order(config):
    whole = rows(loader_of(config), 0, 24)
    ramped = rows(loader_of(config), 0, 4) | rows(loader_of(config), 4, 8) | rows(loader_of(config), 12, 12)
    assert ramped == whole


@pytest.mark.parametrize("at", [1, 5, 11, 12, 13, 17, 30])
def test_resume_continues_exactly(config, at):
    """Inside, at and just after epoch and phase boundaries (phase two begins at sample 12; web has 12 samples)."""
    loader = loader_of(config)
    state = json.loads(json.dumps(loader.state_dict(at)))
    assert state["consumed_samples"] == at
    resumed = loader_of(config, dp=(0, 1), state=state)
    assert rows(resumed, at, 40) == rows(loader, at, 40)


def test_reset_documents(tmp_path):
    """Positions and documents restart; the only positions that are no target are those whose label opens a document."""
    documents = [[11, 12, 13, EOS], [21, EOS], [31, 32, 33, 34, 35, EOS]]
    base = {"sources": [source(tmp_path, "web", documents)], "seq_length": 11}
    batch = loader_of(DataConfig(**base, reset_documents=True)).batch(0, 1)
    stream = [*batch.tokens[0].tolist(), batch.labels[0, -1].item()]
    document, position = -1, 0
    for i in range(11):
        opens = i == 0 or stream[i - 1] == EOS
        document, position = (document + 1, 0) if opens else (document, position + 1)
        assert (batch.documents[0, i].item(), batch.positions[0, i].item()) == (document, position)
        assert batch.loss_mask[0, i].item() == (stream[i] != EOS)  # EOS itself is a target: position before it counts
    assert loader_of(DataConfig(**base)).batch(0, 1).loss_mask.all()


def test_a_one_document_source_has_a_boundary_between_epochs(tmp_path):
    config = DataConfig([source(tmp_path, "web", [[1, 2, 3]], 0)], seq_length=5, reset_documents=True)
    batch = loader_of(config).batch(0, 1)
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.loss_mask.tolist() == [[True, True, False, True, True]]


def test_skip_survives_resume_and_layout_change(config):
    skipping = DataConfig(**{**config.__dict__, "skip": [[3, 6], [9, 10]]})
    loader = loader_of(skipping)
    assert loader.batch(0, 8).sample_ids.tolist() == [0, 1, 2, 6, 7, 8, 10, 11]
    whole = rows(loader_of(config), 0, 16)
    assert rows(loader, 0, 8) == {i: whole[i] for i in (0, 1, 2, 6, 7, 8, 10, 11)}
    resumed = build_loader(skipping, global_batch=4, micro_batch=2, dp_rank=1, dp_size=2, state=loader.state_dict(4))
    assert resumed.batch(4, 4).sample_ids.tolist() == [10, 11]


def test_blend_change_at_resume_uses_the_cursors(config):
    loader = loader_of(config)
    state = loader.state_dict(8)
    assert {name: s["cursor"] for name, s in state["sources"].items()} == {"web": 6, "code": 2}
    changed = DataConfig(**{**config.__dict__, "phases": [PhaseConfig("new", 0, {"web": 1.0})]})
    origins = loader_of(changed, state=state).origins(8, 4)
    assert [(o.source, o.source_sample) for o in origins] == [("web", n) for n in (6, 7, 8, 9)]


def test_too_little_data_is_refused_unless_epochs_are_allowed(tmp_path):
    one = DataConfig([source(tmp_path, "web", numbered([33]))], seq_length=8)
    assert loader_of(one, total_samples=4).batch(0, 4).tokens.shape == (4, 8)
    with pytest.raises(ValueError, match=r"'web' is too small: 5 samples needs 5 .* 1 epoch\(s\) give 4"):
        loader_of(one, total_samples=5)
    with pytest.raises(ValueError, match="sample 4 needs 5"):
        loader_of(one).batch(4, 1)
    more = DataConfig([SourceConfig("web", one.sources[0].paths, max_epochs=2)], seq_length=8)
    assert loader_of(more, total_samples=8).batch(0, 8).tokens.shape == (8, 8)
    with pytest.raises(ValueError, match=r"2 epoch\(s\) give 8"):
        loader_of(more, total_samples=9)


def test_a_long_run_of_a_large_blend_opens_without_its_schedule(tmp_path):
    """Opening must not walk through a period of millions of places; where it is tight, the exact numbers decide."""
    sources = [source(tmp_path, "a", numbered([100]), 0), source(tmp_path, "b", numbered([66]), 2)]
    blend = DataConfig(sources, [PhaseConfig("all", 0, {"a": 999_983.0, "b": 64.0})], seq_length=1)
    loader = loader_of(blend, total_samples=2_000_000)
    assert len(loader.plan.segments[0].schedule._sources) == 0
    with pytest.raises(ValueError, match=r"'b' is too small: 2100000 samples needs 13[45] .* give 131"):
        loader_of(blend, total_samples=2_100_000)


def test_changed_data_is_refused_by_content_not_by_path(config, tmp_path):
    state = loader_of(config).state_dict(4)
    moved = write_shard(tmp_path / "moved", numbered([5, 9, 2, 30, 11, 40]))
    sources = [SourceConfig("web", [moved], 0), config.sources[1]]
    loader_of(DataConfig(**{**config.__dict__, "sources": sources}), state=state)
    write_shard(tmp_path / "web", numbered([5, 9, 2, 30, 11, 40], start=2))
    with pytest.raises(ValueError, match=r"'web' changed since the checkpoint: its content was \w+, now it is \w+"):
        loader_of(config, state=state)


@pytest.mark.parametrize(("field", "value"), [("seq_length", 4), ("seed", 4)])
def test_order_settings_of_the_checkpoint(config, field, value):
    state = loader_of(config).state_dict(4)
    other = DataConfig(**{**config.__dict__, field: value})
    with pytest.raises(ValueError, match=rf"data.{field}={getattr(config, field)}, this run has {value}"):
        loader_of(other, state=state)


def test_tokenizer_and_vocabulary_are_checked_against_the_manifest(tmp_path):
    config = DataConfig([SourceConfig("web", [write_set(tmp_path / "set", [[[5, 9, 3, 1, 2]]])])], seq_length=2)
    assert loader_of(config, vocab_size=10, tokenizer_fingerprint="tok").batch(0, 1).tokens.shape == (1, 2)
    with pytest.raises(ValueError, match="with tokenizer tok, but other is used here"):
        loader_of(config, tokenizer_fingerprint="other")
    with pytest.raises(ValueError, match="token id 9, but the model's vocabulary is 9; it must be at least 10"):
        loader_of(config, vocab_size=9)


def test_id_beyond_the_vocabulary_in_a_plain_shard_names_its_document(tmp_path):
    config = DataConfig([source(tmp_path, "web", [[1, 2, 3], [4, 77, 5, 6]])], seq_length=6)
    with pytest.raises(ValueError, match=r"token id 77 is beyond the vocabulary of 50.*shard .*web, document 1"):
        loader_of(config, vocab_size=50).batch(0, 1)


def test_a_negative_id_is_named_too(tmp_path):
    config = DataConfig([SourceConfig("web", [write_shard(tmp_path / "w", [[1, 2], [4, 5, 6]], "<i4")])], seq_length=4)
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[12:16] = b"\xff" * 4
    (tmp_path / "w.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"token id -1 is beyond the vocabulary of 50.*document 1"):
        loader_of(config, vocab_size=50).batch(0, 1)


def test_phases_must_last_for_the_run(config):
    """A length of the last phase that the run exceeds would have no effect."""
    closed = DataConfig(**{**config.__dict__, "phases": [config.phases[0], PhaseConfig("two", 32, {"code": 1.0})]})
    assert loader_of(closed, total_samples=16).batch(15, 1).sample_ids.tolist() == [15]
    with pytest.raises(ValueError, match=r"data.phases end at token 128, but the run reads 136 .*'two'"):
        loader_of(closed, total_samples=17)


def test_an_index_cache_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.index_cache: .*file"):
        loader_of(DataConfig(**{**config.__dict__, "index_cache": str(tmp_path / "file" / "cache")}))
    sources = [SourceConfig("a/b", config.sources[0].paths, 0)]
    cached = DataConfig(sources=sources, seq_length=8, index_cache=str(tmp_path / "cache"))
    assert loader_of(cached).batch(0, 1).tokens.shape == (1, 8), "a name with a slash is no folder"


def test_sizes_that_do_not_divide(config):
    with pytest.raises(ValueError, match=r"global batch 6 .* micro batch 2 x data parallel 2"):
        build_loader(config, global_batch=6, micro_batch=2, dp_rank=0, dp_size=2)
    with pytest.raises(ValueError, match="step of 3 samples"):
        loader_of(config, micro_batch=2).batch(0, 3)


def test_removed_source_keeps_its_past_but_cannot_be_read(config):
    state = loader_of(config).state_dict(4)
    alone = DataConfig([config.sources[0]], seq_length=8, seed=3)
    loader = loader_of(alone, state=state)
    assert loader.origins(4, 2)[0].source_sample == 3
    with pytest.raises(ValueError, match="source 'code', which the config no longer lists"):
        loader.batch(0, 4)


def test_a_hundred_shards(tmp_path):
    for n in range(100):
        write_shard(tmp_path / f"s_{n:03d}", [list(range(50))] * 20)
    config = DataConfig([SourceConfig("web", [str(tmp_path / "s_*")])], seq_length=64)
    assert len(loader_of(config).streams["web"].documents.shards) == 100
    assert loader_of(config).batch(0, 4).tokens.shape == (4, 64)


def test_micro_batches_are_views(config):
    batch = loader_of(config, micro_batch=2).batch(0, 8)
    assert torch.equal(batch.micro(1, 2).tokens, batch.tokens[2:4])
    assert np.shares_memory(batch.micro(1, 2).tokens.numpy(), batch.tokens.numpy())
