"""Which URLs are taken: a secret in one is refused and never repeated; without the extra the remedy is named."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_fp4.checkpoint import CheckpointConfig
from megatron_fp4.storage.remote.url import check_url, url_objection

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url", ["s3://bucket/a/b", "gs://bucket/a", "az://container/a", "file:///folder", "memory:///name", "s3://b/a/"]
)
def test_places(url: str) -> None:
    assert url_objection(url) == ""


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", "must look like s3://BUCKET/PREFIX"),
        ("s3:///prefix", "must look like s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "must look like"),
        ("file://folder/a", "must look like file:///FOLDER"),
        ("s3://bucket/../other", "no parts"),
        ("https://host/a", "no object store is reached by this"),
        ("S3://bucket/a", "no object store"),
        ("runs/mirror", "no object store"),
        (f"s3://key:{SECRET}@bucket/a", "a URL holds no credentials"),
        (f"az://container/a?sig={SECRET}", "a URL holds no credentials"),
    ],
)
def test_refused(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.mirror = ") as refusal:
        CheckpointConfig(mirror=url)
    assert expected in str(refusal.value)
    assert SECRET not in str(refusal.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-fp4\[store\]'"):
        check_url("s3://bucket/a", "checkpoint.mirror")
