"""Paths on a command line -> shards, with the manifest entry of those that have one."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, NamedTuple

from megatron_fp4.data.shards.manifest import read_manifest


class Listed(NamedTuple):
    prefix: Path
    entry: dict[str, Any] | None  # of the manifest; None for a plain Megatron shard


def list_shards(paths: list[str]) -> list[Listed]:
    """Shard-set directories, prefixes (with or without .bin/.idx) and globs. ValueError if one names nothing."""
    listed: list[Listed] = []
    for path in paths:
        if Path(path).is_dir():
            entries = read_manifest(path)["shards"]
            listed += [Listed(Path(path) / entry["name"], entry) for entry in entries]
            continue
        bare = path.removesuffix(".bin").removesuffix(".idx")
        matches = sorted(glob.glob(f"{bare}.idx")) if glob.has_magic(bare) else [f"{bare}.idx"]
        if not matches:
            raise ValueError(f"no shard matches {bare}.idx")
        listed += [Listed(Path(match.removesuffix(".idx")), None) for match in matches]
    return listed
