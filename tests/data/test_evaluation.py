import numpy as np
import pytest
import torch

from megatron_fp4.data.config import DataConfig, EvaluationConfig
from megatron_fp4.data.evaluation import build_eval_loader
from tests.data.toy import EOS, numbered, write_set, write_shard


def config_of(tmp_path, documents, **options):
    sets = [
        EvaluationConfig("prose", [write_shard(tmp_path / "prose", documents)]),
        EvaluationConfig("short", [write_shard(tmp_path / "short", documents)], max_tokens=9),
    ]
    return DataConfig(seq_length=4, evaluation=sets, **options)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_every_token_is_a_target_once_whatever_the_layout(tmp_path, dp_size, micro_batch):
    config = config_of(tmp_path, numbered([7, 11, 5]))
    share = {"micro_batch": micro_batch, "dp_size": dp_size, "pad_id": EOS}
    ranks = [build_eval_loader(config, "prose", dp_rank=r, **share) for r in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1  # a rank with fewer batches would hang the others
    targets = [t for rank in ranks for batch in rank for t in batch.labels[batch.loss_mask].tolist()]
    assert sorted(targets) == list(range(2, 24))
    assert ranks[0].num_targets == 22


def test_two_calls_are_bit_equal(tmp_path):
    loader = build_eval_loader(config_of(tmp_path, numbered([9, 9])), "prose", micro_batch=2, dp_rank=0, dp_size=1)
    for a, b in zip(loader, loader, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_padding_is_by_position_even_if_pad_is_eos(tmp_path):
    """EOS is a target where it is real; the same id as padding is not."""
    loader = build_eval_loader(
        config_of(tmp_path, [[5, 6, EOS], [7, 8, EOS]]), "prose", micro_batch=3, dp_rank=0, dp_size=1, pad_id=EOS
    )
    batch = loader.batch(0)
    assert batch.labels.tolist() == [[6, EOS, 7, 8], [EOS, EOS, EOS, EOS], [EOS] * 4]
    assert batch.loss_mask.tolist() == [[True] * 4, [True, False, False, False], [False] * 4]
    assert batch.sample_ids.tolist() == [0, 1, -1]
    other = build_eval_loader(
        config_of(tmp_path, [[5, 6, EOS], [7, 8, EOS]]), "prose", micro_batch=3, dp_rank=0, dp_size=1, pad_id=9
    )
    assert other.batch(0).labels.tolist() == [[6, EOS, 7, 8], [EOS, 9, 9, 9], [9] * 4]


def test_documents_reset_in_evaluation_too(tmp_path):
    config = config_of(tmp_path, [[5, 6, EOS], [7, 8, EOS]], reset_documents=True)
    batch = build_eval_loader(config, "prose", micro_batch=2, dp_rank=0, dp_size=1).batch(0)
    assert batch.documents[0].tolist() == [0, 0, 0, 1]
    assert batch.loss_mask[0].tolist() == [True, True, False, True]
    assert batch.documents[1].tolist() == [0, 0, 1, 1]  # padding is a document of its own


def test_an_address_is_the_place_in_the_set_on_every_rank(tmp_path):
    """Noise is drawn by it: sample n begins at 4 n, whoever holds it."""
    config = config_of(tmp_path, numbered([20]))
    rank = build_eval_loader(config, "prose", micro_batch=2, dp_rank=1, dp_size=2)
    assert rank.name == "prose"
    assert rank.batch(0).address.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]


def test_two_tokens_are_one_target_and_strange_ids_are_refused(tmp_path):
    share = {"micro_batch": 1, "dp_rank": 0, "dp_size": 1}
    committed = write_set(tmp_path / "set", [[[5, 6]]], fingerprint="theirs")
    two = DataConfig(seq_length=4, evaluation=[EvaluationConfig("two", [committed])])
    loader = build_eval_loader(two, "two", vocab_size=7, tokenizer_fingerprint="theirs", **share)
    assert (loader.num_targets, len(loader), loader.batch(0).labels.tolist()) == (1, 1, [[6, 0, 0, 0]])
    with pytest.raises(ValueError, match="data source 'two' holds token id 6, but the model's vocabulary is 6"):
        build_eval_loader(two, "two", vocab_size=6, **share)
    with pytest.raises(ValueError, match="data source 'two' was tokenized with tokenizer theirs, but ours"):
        build_eval_loader(two, "two", tokenizer_fingerprint="ours", **share)


def test_max_tokens_and_names(tmp_path):
    config = config_of(tmp_path, numbered([20]))
    share = {"micro_batch": 1, "dp_rank": 0, "dp_size": 1}
    assert build_eval_loader(config, "short", **share).num_targets == 8
    alone = DataConfig(evaluation=[EvaluationConfig("one", [write_shard(tmp_path / "one", [[5]])])])
    with pytest.raises(ValueError, match=r"'one' has no target: 1 token\(s\), max_tokens=0"):
        build_eval_loader(alone, "one", **share)
    with pytest.raises(ValueError, match=r"no evaluation set 'prse'; data.evaluation has \['prose', 'short'\]"):
        build_eval_loader(config, "prse", **share)


def test_a_set_of_one_token_documents_is_refused_under_reset(tmp_path):
    share = {"micro_batch": 1, "dp_rank": 0, "dp_size": 1}
    ones = config_of(tmp_path, [[5], [6], [7, 8]], reset_documents=True)
    assert build_eval_loader(ones, "prose", **share).batch(0).loss_mask.sum() == 1
    sets = [EvaluationConfig("cut", [ones.evaluation[0].paths[0]], max_tokens=3)]
    cut = DataConfig(seq_length=4, evaluation=sets, reset_documents=True)
    with pytest.raises(ValueError, match="'cut' has no target: none of its documents has a second token within its 3"):
        build_eval_loader(cut, "cut", **share)
    build_eval_loader(DataConfig(seq_length=4, evaluation=sets), "cut", **share)  # across documents they are targets


@pytest.mark.parametrize(("token", "dtype", "limit"), [(40, "<u2", 0), (-3, "<i4", 0), (40, "<u2", 9)])
def test_ids_beyond_the_vocabulary_are_refused_at_start(tmp_path, token, dtype, limit):
    """A shard without a manifest says nothing of its ids; the first evaluation would have given a plausible loss."""
    path = write_shard(tmp_path / "foreign", [[5, 6], [7] * 7, [8, 8, 9]], dtype)
    np.memmap(f"{path}.bin", dtype, "r+")[10] = token  # another writer may store what ours refuses
    config = DataConfig(seq_length=4, evaluation=[EvaluationConfig("foreign", [path], max_tokens=limit)])
    share = {"micro_batch": 1, "dp_rank": 0, "dp_size": 1, "vocab_size": 40}
    if limit:
        build_eval_loader(config, "foreign", **share)  # what is not read is not looked at
        return
    with pytest.raises(ValueError, match=rf"'foreign' holds token id {token} in shard .*, but .* vocabulary is 40"):
        build_eval_loader(config, "foreign", **share)
