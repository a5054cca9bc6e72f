"""Small shards for the data tests: documents with known ids, plain or as a committed set."""

import itertools
from pathlib import Path

import numpy as np

from megatron_fp4.data.config import DataConfig, SourceConfig
from megatron_fp4.data.loader import Loader, build_loader
from megatron_fp4.data.shards.manifest import FileDigest, commit, digest_file
from megatron_fp4.data.shards.writer import ShardWriter

EOS = 0


def write_shard(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> str:
    writer = ShardWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.add_document(np.array(document, np.int64))
    writer.close()
    return str(prefix)


def write_set(folder: Path, shards: list[list[list[int]]], fingerprint: str = "tok", **facts: object) -> str:
    """A committed shard set; `shards` is a list of lists of documents."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, documents in enumerate(shards):
        digest = FileDigest()
        writer = ShardWriter(folder / f"shard_{number:05d}", np.dtype("<u2"), digest.update)
        for document in documents:
            writer.add_document(np.array(document, np.int64))
        writer.close()
        entries.append(
            {
                "name": writer.prefix.name,
                "num_documents": writer.num_documents,
                "num_tokens": writer.num_tokens,
                "max_token_id": writer.max_token_id,
                "files": {"bin": digest.result(), "idx": digest_file(Path(f"{writer.prefix}.idx"))},
            }
        )
    commit(folder, entries, dtype="uint16", tokenizer={"fingerprint": fingerprint, "vocab_size": 100}, **facts)
    return str(folder)


def numbered(lengths: list[int], start: int = 1) -> list[list[int]]:
    """Documents of the given lengths whose ids are all different: start, start + 1, ..."""
    ends = np.cumsum([0, *lengths]) + start
    return [list(range(int(a), int(b))) for a, b in itertools.pairwise(ends)]


def source(tmp_path: Path, name: str, documents: list[list[int]], max_epochs: int = 1) -> SourceConfig:
    return SourceConfig(name=name, paths=[write_shard(tmp_path / name, documents)], max_epochs=max_epochs)


def loader_of(config: DataConfig, *, micro_batch: int = 1, dp: tuple[int, int] = (0, 1), **options) -> Loader:
    rank, size = dp
    return build_loader(
        config,
        global_batch=micro_batch * size,
        micro_batch=micro_batch,
        dp_rank=rank,
        dp_size=size,
        **options,
    )
