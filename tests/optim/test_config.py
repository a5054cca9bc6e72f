"""Wrong values are refused with their numbers; the schema is one that omegaconf can read."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_fp4.optim.config import DecayStyle, Impl, OptimConfig, Overlap, Schedule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, r"optim\.lr = 0\.0, must be in \(0, 1000\]"),
        ({"lr": float("nan")}, r"optim\.lr = nan"),
        ({"lr": 1e-3, "min_lr": 2e-3}, r"min_lr = 0\.002.*optim\.lr = 0\.001"),
        ({"schedule": Schedule.constant, "min_lr": 1e-5}, r"no effect.*constant.*min_lr=0"),
        ({"warmup_tokens": -1}, r"warmup_tokens = -1"),
        ({"decay_fraction": 1.5}, r"decay_fraction = 1\.5"),
        ({"beta2": 1.0}, r"beta2 = 1\.0"),
        ({"eps": 0.0}, r"eps = 0\.0"),
        ({"weight_decay": -0.1}, r"weight_decay = -0\.1"),
        ({"clip_norm": -1.0}, r"clip_norm = -1\.0"),
        ({"bucket_mib": 0.0}, r"bucket_mib = 0\.0"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**fields)


def test_omegaconf_reads_the_schema_and_member_names() -> None:
    schema = OmegaConf.structured(OptimConfig)
    written = OmegaConf.create("{lr: 1e-3, schedule: cosine, overlap_reduce: never, bucket_mib: 4}")  # as YAML
    merged = OmegaConf.merge(schema, written)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, OptimConfig)
    config = replace(config, muon=OptimConfig().muon)  # omegaconf makes lists of tuples
    assert config == OptimConfig(lr=1e-3, schedule=Schedule.cosine, overlap_reduce=Overlap.never, bucket_mib=4.0)


@pytest.mark.parametrize("kind", [Schedule, DecayStyle, Impl, Overlap])
def test_members_are_lower_case_and_equal_their_values(kind: type[Enum]) -> None:
    assert all(member.name == member.value == member.name.lower() for member in kind), "omegaconf matches by name"


def test_overlap_auto_is_for_cuda() -> None:
    assert [Overlap.auto.enabled(device) for device in ("cpu", "cuda")] == [False, True]
    assert [Overlap.always.enabled("cpu"), Overlap.never.enabled("cuda")] == [True, False]
