"""The calls against a real S3 server in a process of its own, and what its refusals become."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_fp4.storage.remote import client
from megatron_fp4.storage.remote.client import AccessRefused, Conflict, Remote, StoreError, _translated
from tests.helpers.stores import BUCKET, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.mark.usefixtures("server")
def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PART_BYTES", 5 << 20)  # S3's smallest
    remote = Remote(f"s3://{BUCKET}/calls")
    version = remote.create("a", b"1")
    with pytest.raises(Conflict):
        remote.create("a", b"2")
    newer = remote.replace("a", b"3", version)
    with pytest.raises(Conflict):
        remote.replace("a", b"4", version)
    assert remote.read_version("a") == (b"3", newer)
    with pytest.raises(FileNotFoundError):
        remote.read("b")
    blocks = [bytes([number]) * (3 << 20) for number in range(4)]
    remote.send("folder/large", blocks, 12 << 20)
    assert remote.read_range("folder/large", (3 << 20) - 1, 2) == b"\0\1"
    assert [(one.key, one.num_bytes) for one in remote.entries("folder")] == [("folder/large", 12 << 20)]

    def torn() -> Iterator[bytes]:
        yield blocks[0]
        yield blocks[1]
        raise ValueError("the disk")

    with pytest.raises(ValueError, match="the disk"):
        remote.send("folder/torn", torn(), 12 << 20)
    assert [one.key for one in remote.entries()] == ["a", "folder/large"], "half an object was seen"
    remote.delete(["a", "folder/large", "absent"])
    assert remote.entries() == []
    with pytest.raises(StoreError, match="NoSuchBucket"):
        Remote("s3://nobodys/prefix").read("a")


def refusal(name: str, text: str) -> Exception:
    """An error as obstore raises it."""
    base = type("BaseError", (Exception,), {})
    return type(name, (base,), {})(text)


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (
            refusal(
                "GenericError",
                "Generic S3 error: Error performing PUT http://host/b?X-Amz-Signature=abc in 3ms - Server returned"
                " non-2xx status code: 400 Bad Request: <Error><Code>ExpiredToken</Code><Message>The provided token has"
                " expired.</Message><Token-0>SECRETTOKEN</Token-0></Error>\n\nDebug source: everything",
            ),
            AccessRefused,
            "400 Bad Request ExpiredToken The provided token has expired.",
        ),
        (
            refusal("GenericError", "x status code: 503 Service Unavailable: <Code>SlowDown</Code>"),
            StoreError,
            "503 Service Unavailable SlowDown",
        ),
        (
            refusal("PermissionDeniedError", "x https://host/c?sv=1&sig=SECRETTOKEN failed\n\nDebug"),
            AccessRefused,
            "x https://host/c?... failed",
        ),
    ],
)
def test_what_a_store_says_is_short_and_holds_no_secret(error: Exception, kind: type, expected: str) -> None:
    translated = _translated(error)
    assert type(translated) is kind
    assert str(translated) == expected
