"""One prefix in an object store, and what a store answers as a few kinds of error.

Objects appear whole or not at all, also those that are sent in parts, so nothing is renamed. `create` succeeds for one
of those who try, `replace` for whoever saw the newest version; both are sent once more by the client where an answer
was lost, so a Conflict may be with one's own put: whoever needs to know looks at what is there.

The client retries what the network or a busy store (5xx, 503 SlowDown) lost, for RETRY_SECONDS; what is raised after
that is for the caller to try later. Messages hold the store's code and its sentence, and neither keys nor signatures.

Not here: what is in the objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar

from megatron_fp4.storage.remote.url import check_url

T = TypeVar("T")
RETRY_SECONDS = 45.0
MAX_RETRIES = 6
REQUEST_SECONDS = 120.0
"""Longest time of one request with its body, which is a part of a file at most."""
PART_BYTES = 16 << 20
MOST_PARTS = 9000
"""S3 takes 10,000 parts of one object."""
PARTS_AT_ONCE = 4

CODE = re.compile(r"<Code>([^<]*)</Code>")
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist")
SENTENCE = re.compile(r"<Message>([^<]*)</Message>")
STATUS = re.compile(r"status code: (\d{3}[^:,\n]*)")
EXPIRED = (
    *("ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "AuthenticationFailed"),
)


class StoreError(OSError):
    """A store did not do what it was asked; it may do it later."""


class AccessRefused(StoreError):
    """A store does not accept the credentials, or there are none."""


class Conflict(StoreError):
    """An object exists that was to be created, or is another than was to be replaced."""


class NoCondition(StoreError):
    """A store cannot replace an object only if it is as it was seen."""


@dataclass(frozen=True)
class StoredObject:
    """What a listing says. modified: by the store's clock. version: changes with the content."""

    key: str
    num_bytes: int
    version: str
    modified: datetime


class Remote:
    """The objects under `url`. Keys are relative to it. Safe to use by several threads.

    Every call raises StoreError and its kinds; FileNotFoundError where it reads what is not there.
    """

    def __init__(self, url: str) -> None:
        check_url(url, "URL")
        self.url = url.rstrip("/")
        self._store = self._call(lambda: _memory(self.url) if url.startswith("memory:") else _open(self.url))

    def put(self, key: str, data: bytes) -> str:
        """Create or overwrite; returns the version."""
        return self._put(key, data, "overwrite")

    def create(self, key: str, data: bytes) -> str:
        """Raises Conflict if it exists."""
        return self._put(key, data, "create")

    def replace(self, key: str, data: bytes, version: str) -> str:
        """Raises Conflict if it is not of `version` any more, NoCondition where a store cannot say."""
        return self._put(key, data, {"e_tag": version})

    def send(self, key: str, blocks: Iterable[bytes], num_bytes: int) -> None:
        """Create or overwrite a large object, in parts that go side by side; an error of `blocks` ends it."""
        part = max(PART_BYTES, -(-num_bytes // MOST_PARTS))

        def put() -> None:
            import obstore

            obstore.put(self._store, key, iter(blocks), chunk_size=part, max_concurrency=PARTS_AT_ONCE)

        self._call(put)

    def _put(self, key: str, data: bytes, mode: Any) -> str:
        import obstore

        result = self._call(lambda: obstore.put(self._store, key, data, mode=mode, use_multipart=False))
        return str(result["e_tag"] or "")

    def read(self, key: str) -> bytes:
        return self.read_version(key)[0]

    def read_version(self, key: str) -> tuple[bytes, str]:
        """The content, and its version."""
        import obstore

        def get() -> tuple[bytes, str]:
            result = obstore.get(self._store, key)
            return bytes(result.bytes()), str(result.meta["e_tag"] or "")

        return self._call(get)

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """Raises StoreError where fewer bytes come than were asked for."""
        import obstore

        data = self._call(lambda: bytes(obstore.get_range(self._store, key, start=start, length=num_bytes)))
        if len(data) != num_bytes:
            raise StoreError(f"{self.url}/{key}: {len(data)} bytes came from byte {start} on, expected {num_bytes}")
        return data

    def entries(self, prefix: str = "") -> list[StoredObject]:
        """All objects whose key begins with `prefix`, a folder, by key."""
        import obstore

        def listed() -> list[StoredObject]:
            pages = obstore.list(self._store, prefix or None)
            return [
                StoredObject(one["path"], one["size"], str(one["e_tag"] or ""), one["last_modified"])
                for page in pages
                for one in page
            ]

        return sorted(self._call(listed), key=lambda one: one.key)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is removed already."""
        import obstore

        names = list(keys)
        if names:
            try:
                self._call(lambda: obstore.delete(self._store, names))
            except FileNotFoundError:
                for name in names:
                    self._delete_one(name)

    def _delete_one(self, key: str) -> None:
        import obstore

        with suppress(FileNotFoundError):
            self._call(lambda: obstore.delete(self._store, key))

    def _call(self, request: Callable[[], T]) -> T:
        """`request()`, its errors as this module's. (Tests put their faults here.)"""
        try:
            return request()
        except Exception as error:
            if translated := _translated(error):
                raise translated from None  # the original holds requests and answers in full
            raise


def file_blocks(read: Callable[[int], bytes], num_bytes: int) -> Iterator[bytes]:
    """The next `num_bytes` bytes of `read(at most so many)`, in blocks."""
    while num_bytes > 0 and (block := read(min(PART_BYTES, num_bytes))):
        num_bytes -= len(block)
        yield block


def _open(url: str) -> Any:
    from obstore.store import from_url

    if url.startswith("file://"):
        return from_url(url, mkdir=True)
    client: Any = {
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=10),
        "allow_http": True,  # where AWS_ENDPOINT_URL and the like say so: a store of one's own behind a wall
    }
    retry: Any = {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    return from_url(url, client_options=client, retry_config=retry)


@lru_cache
def _memory(url: str) -> Any:
    """A process has one memory of each name."""
    from obstore.store import MemoryStore

    return MemoryStore()


def _translated(error: Exception) -> Exception | None:
    """The error of a store as one of this module's; None for others."""
    kinds = {one.__name__ for one in type(error).__mro__}
    if isinstance(error, NotImplementedError):
        return NoCondition(_short(str(error)))
    if type(error) is FileNotFoundError and error.errno is None:
        missing = StoreError if NO_BUCKET.search(str(error)) else FileNotFoundError
        return missing(_short(str(error)))
    if "BaseError" not in kinds:
        return None
    text = str(error)
    if kinds & {"AlreadyExistsError", "PreconditionError"}:
        return Conflict(_short(text))
    code = CODE.search(text)
    if kinds & {"PermissionDeniedError", "UnauthenticatedError"} or (code and code[1] in EXPIRED):
        return AccessRefused(_short(text))
    return StoreError(_short(text))


def _short(text: str) -> str:
    """What a store said, in a line without requests, keys and signatures."""
    answers = [match[1].strip() for pattern in (STATUS, CODE, SENTENCE) if (match := pattern.search(text))]
    if answers:
        return " ".join(answers)[:300]
    first = text.partition("\n")[0]
    return re.sub(r"\?[^\s\"')]*", "?...", first)[:300]
