"""Before a run: what each phase takes from each source, in tokens and epochs, and whether there is enough."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from megatron_fp4.data.checks import check_enough_data
from megatron_fp4.data.config import DataConfig, config_from_dict
from megatron_fp4.data.loader import open_streams
from megatron_fp4.data.order.plan import Plan
from megatron_fp4.data.order.samples import SampleStream
from megatron_fp4.storage.local import local_path


def plan_rows(plan: Plan, streams: dict[str, SampleStream], total_samples: int) -> list[dict[str, Any]]:
    """One row per phase and source: weight, tokens of the phase, epochs of the source when the phase ends."""
    ends = [segment.first for segment in plan.segments[1:]] + [total_samples]
    rows = []
    for segment, end in zip(plan.segments, ends, strict=True):
        last = max(segment.first, min(end, total_samples))
        after = segment.cursors_at(last)
        for name, weight in zip(segment.sources, segment.weights, strict=True):
            stream = streams[name]
            rows.append(
                {
                    "phase": segment.phase,
                    "source": name,
                    "weight": weight / sum(segment.weights),
                    "tokens": (after[name] - segment.cursors[name]) * stream.seq_length,
                    "epochs": after[name] * stream.seq_length / stream.documents.num_tokens,
                }
            )
    return rows


def read_config(path: Path) -> DataConfig:
    """A YAML file with the fields of DataConfig, or with them under `data:`."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    return config_from_dict(value["data"] if isinstance(value, dict) and "data" in value else value)


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("blend", __doc__)
    parser.add_argument("--plan", type=local_path, required=True, metavar="YAML", help="the run's data settings")
    parser.add_argument("--tokens", type=float, required=True, help="training tokens of the run, e.g. 1e12")
    args = parser.parse_args(argv)
    if not 1 <= args.tokens < float("inf"):
        parser.error("--tokens must be at least 1")
    config = read_config(args.plan)
    streams = open_streams(config)
    sizes = {name: stream.available(1) for name, stream in streams.items()}
    plan = Plan.from_config(config.phases, sizes, config.seq_length, config.skip)
    total = -(-int(args.tokens) // config.seq_length)
    print(f"{total} samples of {config.seq_length} tokens")
    print(f"{'phase':16} {'source':16} {'weight':>10} {'tokens':>16} {'epochs, so far':>15}")
    for row in plan_rows(plan, streams, total):
        print(f"{row['phase']:16} {row['source']:16} {row['weight']:10.6f} {row['tokens']:16,d} {row['epochs']:15.3f}")
    check_enough_data(config, streams, plan, total)
    print("enough data: every source stays within its max_epochs")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("blend", None))
