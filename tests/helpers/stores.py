"""Object stores for tests: moto's S3 server as a process of its own, and a client whose requests fail on demand.

What moto does not model: throttling, expired credentials (it takes any), delays between a write and a read, lost
answers, quotas, lifecycle rules. Those are put between the program and the store by `FaultyRemote`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from megatron_fp4.storage.remote.client import Remote

T = TypeVar("T")
BUCKET = "weights"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "secret/of/the/tests"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server with a bucket; yields the environment variables with which a program reaches it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
                request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise RuntimeError("moto's server does not answer")
        yield {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
    finally:
        server.terminate()
        server.wait()


class FaultyRemote(Remote):
    """A client that calls `before(number)` before its request `number`, which may raise."""

    def __init__(self, url: str, before: Callable[[int], None] = lambda number: None) -> None:
        self.requests, self.before = 0, lambda number: None
        super().__init__(url)
        self.requests, self.before = 0, before

    def _call(self, request: Callable[[], T]) -> T:
        self.requests += 1
        self.before(self.requests)
        return super()._call(request)
