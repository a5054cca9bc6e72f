"""A checkpoint of an object store without a run: find it, bring it to a folder.

A URL names one checkpoint (.../step_00000040.eb0876f45567b599) or a mirror, of which it is then the newest one.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from megatron_fp4.checkpoint.commit import SavePlaces
from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import step_name
from megatron_fp4.checkpoint.load import CheckpointReader
from megatron_fp4.checkpoint.mirror.contents import MirroredName, look_at_mirror
from megatron_fp4.checkpoint.mirror.fetch import MirrorFetcher
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.remote.client import Remote


def find_mirrored(url: str) -> tuple[Remote, MirroredName]:
    """The mirror and the checkpoint that `url` names.

    Raises ValueError for another URL, FileNotFoundError where there is no complete checkpoint, StoreError.
    """
    above, _, last = url.rstrip("/").rpartition("/")
    name = MirroredName.parse(last)
    remote = Remote(above if name else url)
    contents = look_at_mirror(remote)
    if name in contents.complete:
        assert name is not None
        return remote, name
    if name is not None or not contents.complete:
        raise FileNotFoundError(f"{url} is neither a complete checkpoint nor a mirror with some")
    return remote, contents.order()[0]


def bring_to(root: Path, remote: Remote, name: MirroredName, *, only_small: bool = False) -> Path:
    """The checkpoint as a directory under `root`, every byte checked as it arrives.

    only_small: without the files of tensors, which a list of them does not need. Raises CorruptCheckpoint,
    UnreadableFile.
    """
    group = Group.single("world")
    reader = CheckpointReader(root, group, CheckpointConfig(), beat=lambda: None)
    places = SavePlaces(root, group, Owner.me(), uuid.uuid4().hex)
    MirrorFetcher(remote, reader, places).fetch(name, only_small=only_small)
    return root / step_name(name.step)
