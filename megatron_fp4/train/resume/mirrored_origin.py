"""A `train.init_from` that lies in an object store, as a folder of the run directory for as long as it is read.

Not here: what is taken from it (origin.py).
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_fp4.checkpoint.commit import SavePlaces
from megatron_fp4.checkpoint.directory import step_name
from megatron_fp4.checkpoint.load import CheckpointReader
from megatron_fp4.checkpoint.mirror.contents import MirroredName
from megatron_fp4.checkpoint.mirror.fetch import MirrorFetcher, read_store
from megatron_fp4.checkpoint.mirror.offline import find_mirrored
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.remote.client import Remote
from megatron_fp4.storage.remote.url import is_url
from megatron_fp4.train.config import RunConfig

FOLDER = "init_from"


@contextmanager
def origin_folder(config: RunConfig, world: Group, beat: Callable[[], None]) -> Iterator[tuple[Path, str]]:
    """The folder of the weights with which a run begins, and what to store of where they came from ("": the folder).

    Collective. Raises ValueError on all ranks where the store has none, or does not answer, or they are damaged.
    """
    text = config.train.init_from
    if not is_url(text):
        yield Path(text), ""
        return
    root = Path(config.train.run_dir) / FOLDER

    def find() -> tuple[str, MirroredName, Owner, str]:
        shutil.rmtree(root, ignore_errors=True)  # of a launch that was killed
        remote, name = read_store(lambda: find_mirrored(text), text)
        return remote.url, name, Owner.me(), uuid.uuid4().hex

    url, name, owner, tag = decided_by_rank0(find, world)
    reader = CheckpointReader(root, world, config.checkpoint, beat)
    MirrorFetcher(Remote(url), reader, SavePlaces(root, world, owner, tag)).fetch(name)
    try:
        yield root / step_name(name.step), f"{url}/{name}"
    finally:
        if world.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
