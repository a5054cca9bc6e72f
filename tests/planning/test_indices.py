"""What a plan says of the indices of the data, with the shards at hand and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_fp4.data.config import DataConfig, SourceConfig
from megatron_fp4.data.order.index_need import IndexNeed
from megatron_fp4.planning.indices import index_section, index_text
from tests.data.toy import numbered, write_set, write_shard


def test_sizes_are_those_of_all_sources_and_places_those_of_the_setting(tmp_path: Path) -> None:
    web = write_set(tmp_path / "web", [numbered([3, 4]), numbered([5])])
    code = write_shard(tmp_path / "code", numbered([1] * 7))
    config = DataConfig([SourceConfig("web", [web]), SourceConfig("code", [code])], index_cache="/local/index")
    section = index_section(config, 10**9, 1000.0)
    assert (section["documents"], section["bytes"], section["folder"]) == (10, 168, "/local/index")
    assert index_text(section) == "0.0 MB for 10 documents, in /local/index of each node"
    automatic = index_section(replace(config, index_cache="auto"), 10**9, 1000.0)
    assert index_text(automatic).endswith("in the memory of each process")
    (tmp_path / "code.idx").unlink()
    absent = index_section(config, 10**9, 1000.0)
    assert (absent["documents"], absent["bytes"], absent["counted"]) == (10**6, 16 * 10**6 + 8, False)
    assert "16.0 MB for about 1e+06 documents, if the run is one epoch" in index_text(absent), "a plan needs no data"
    assert index_section(DataConfig(), 10**9, 1000.0)["bytes"] == absent["bytes"], "nor sources"
    assert IndexNeed.of(config, 10).num_bytes == section["bytes"], "what preflight says"
