"""Checkpoints that a command line names by path or by URL: those of an object store are brought to a temporary folder.

Not here: a run, whose checkpoints are brought to its own directory (checkpoint/mirror/fetch.py).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_fp4.checkpoint.mirror.contents import look_at_mirror
from megatron_fp4.checkpoint.mirror.keep import read_kept
from megatron_fp4.checkpoint.mirror.offline import bring_to, find_mirrored
from megatron_fp4.storage.local import local_text
from megatron_fp4.storage.remote.client import Remote
from megatron_fp4.storage.remote.url import is_url, missing_extra, url_objection


def place(text: str) -> str:
    """The type of an argument that is a path or a URL of a store. Raises ArgumentTypeError for another URL."""
    if not is_url(text):
        return local_text(text)
    if objection := url_objection(text) or missing_extra():
        raise argparse.ArgumentTypeError(objection)
    return text


@contextmanager
def on_disk(places: Sequence[str], *, only_small: bool = False) -> Iterator[list[Path]]:
    """The places as paths. What lies in a store is brought to a folder, which is removed at the end.

    only_small: without tensors. Raises CorruptCheckpoint, UnreadableFile, FileNotFoundError, StoreError.
    """
    if not any(map(is_url, places)):
        yield [Path(text) for text in places]
        return
    with tempfile.TemporaryDirectory(prefix="megatron_fp4_mirrored_") as folder:
        paths = []
        for number, text in enumerate(places):
            if is_url(text):
                paths.append(bring_to(Path(folder, str(number)), *find_mirrored(text), only_small=only_small))
            else:
                paths.append(Path(text))
        yield paths


def describe_mirror(url: str) -> str:
    """A line for each checkpoint of a mirror. Raises ValueError, FileNotFoundError, StoreError."""
    remote = Remote(url)
    contents = look_at_mirror(remote)
    lines = [url]
    for name in contents.complete:
        kept, size = read_kept(remote, name), sum(contents.files[name].values())
        mark = "  <- latest" if name == contents.latest else ""
        lines.append(f"  {name}  tokens {kept.tokens}, score {kept.score}, {size / 2**20:,.1f} MiB{mark}")
    if len(lines) == 1:
        raise FileNotFoundError(f"{url} holds no complete checkpoint")
    return "\n".join(lines)
