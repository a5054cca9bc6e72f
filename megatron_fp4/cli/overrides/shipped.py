"""The layouts that come with the recipes (configs/parallel), and which of them are for a given model.

Each was found by `plan --search` and names what it is for in its first line: `# model: NAME; ...`.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from megatron_fp4.models.config import ModelConfig

HEAD = re.compile(r"# model: (\w+); (.*)")


def shipped_layouts(model: ModelConfig, config_dir: Path) -> list[str]:
    """`parallel=NAME  what it is for`, of the layouts that were found for a model of these sizes."""
    texts = []
    for path in sorted((config_dir / "parallel").glob("*.yaml")):
        match = HEAD.match(path.read_text().split("\n")[0])
        if match is None:
            continue
        sizes = yaml.safe_load((config_dir / "model" / f"{match[1]}.yaml").read_text())
        named = [name for name in ("num_layers", "pattern", "hidden", "ffn_hidden") if name in sizes]
        if all(getattr(model, name) == sizes[name] for name in named):
            texts.append(f"parallel={path.stem:<18} {match[2]}")
    return texts
