import json
import os

import pytest
import torch

from megatron_fp4.data.config import DataConfig, PhaseConfig
from megatron_fp4.data.ledger import (
    LEDGER,
    LedgerWriter,
    combine_hashes,
    last_start,
    ledger,
    read_step,
    reopen,
    replay,
    step_hash,
)
from tests.data.toy import loader_of, numbered, source, write_shard


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        sources=[source(tmp_path, "web", numbered([5, 9, 30]), 0), source(tmp_path, "code", numbered([40], 500), 0)],
        phases=[PhaseConfig("one", 0, {"web": 2.0, "code": 1.0})],
        seq_length=8,
    )


def run(folder, loader, steps, first_step=0):
    writer = LedgerWriter(folder, loader, step=first_step, first_sample=first_step * 4)
    for step in steps:
        writer.add(step, step * 4, 4, step_hash(loader.batch(step * 4, 4)))


def test_hash_is_the_same_for_every_layout(config):
    whole = step_hash(loader_of(config).batch(0, 8))
    parts = [step_hash(loader_of(config, micro_batch=2, dp=(r, 2)).batch(0, 8)) for r in (1, 0)]
    assert combine_hashes(parts) == whole


def test_hash_sees_one_changed_token_and_one_changed_sample(config):
    batch = loader_of(config).batch(0, 8)
    tokens = batch.tokens.clone()
    tokens[3, 4] += 1
    assert step_hash(batch._replace(tokens=tokens)) != step_hash(batch)
    assert step_hash(batch._replace(sample_ids=batch.sample_ids + 1)) != step_hash(batch)


def test_recomputed_and_replayed(config, tmp_path, monkeypatch):
    loader = loader_of(config)
    run(tmp_path, loader, range(5))
    monkeypatch.chdir("/")  # relative paths of the run must not matter
    logged = read_step(tmp_path, 3)
    reopened = reopen(logged.start)
    assert torch.equal(replay(reopened, logged).tokens, loader.batch(12, 4).tokens)
    rows = ledger(reopened, 12, 4)
    assert {row["sample_id"] for row in rows} == {12, 13, 14, 15}
    assert all(sum(r["length"] for r in rows if r["sample_id"] == i) == 9 for i in range(12, 16))
    row = rows[0]
    shard = reopened.streams[row["source"]].documents.shards[0]
    ids = shard.document(row["document"])[row["offset"] : row["offset"] + row["length"]]
    assert ids.tolist() == loader.batch(12, 4).tokens[0].tolist()[: row["length"]]


def test_a_restart_voids_what_it_repeats(config, tmp_path):
    run(tmp_path, loader_of(config), range(5))
    changed = DataConfig(**{**config.__dict__, "phases": [PhaseConfig("new", 0, {"code": 1.0})]})
    resumed = loader_of(changed, state=loader_of(config).state_dict(12))
    run(tmp_path, resumed, [3], first_step=3)
    logged = read_step(tmp_path, 3)
    assert {row["source"] for row in ledger(reopen(logged.start), 12, 4)} == {"code"}
    replay(reopen(logged.start), logged)
    with pytest.raises(ValueError, match="no step 4; its last step is 3"):
        read_step(tmp_path, 4)
    assert read_step(tmp_path, 2).start != last_start(tmp_path)


def test_half_a_line_of_a_killed_run(config, tmp_path):
    loader = loader_of(config)
    run(tmp_path, loader, range(3))
    os.truncate(tmp_path / LEDGER, (tmp_path / LEDGER).stat().st_size - 5)
    with pytest.raises(ValueError, match="no step 2"):
        read_step(tmp_path, 2)
    run(tmp_path, loader, [2], first_step=2)
    assert read_step(tmp_path, 2).first_sample == 8


def test_zeros_of_a_power_cut(config, tmp_path):
    loader = loader_of(config)
    run(tmp_path, loader, range(4))
    path = tmp_path / LEDGER
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b"\0" * 4096 + b'{"step": 2'))
    assert read_step(tmp_path, 2).first_sample == 8
    assert last_start(tmp_path)["config"]["seq_length"] == 8


def test_other_data_is_refused(config, tmp_path):
    run(tmp_path, loader_of(config), range(3))
    logged = read_step(tmp_path, 1)
    with pytest.raises(ValueError, match=rf"logged hash 5, the shards give {logged.hash}"):
        replay(reopen(logged.start), logged._replace(hash=5))
    write_shard(tmp_path / "web", numbered([5, 9, 30], start=2))
    with pytest.raises(ValueError, match="'web' changed since the run"):
        reopen(logged.start)


def test_no_ledger(tmp_path):
    with pytest.raises(FileNotFoundError, match=LEDGER):
        read_step(tmp_path, 0)
    (tmp_path / LEDGER).write_text("")
    with pytest.raises(ValueError, match="has not started"):
        last_start(tmp_path)


def test_lines_are_json(config, tmp_path):
    run(tmp_path, loader_of(config), range(2))
    assert [json.loads(line)["step"] for line in (tmp_path / LEDGER).read_text().splitlines()] == [0, 0, 1]
