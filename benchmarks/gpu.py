"""Everything that one GPU can show, once, in under eight minutes, as a table with card and date: benchmarks/gpu.sh.

`python -m benchmarks.gpu --out FOLDER` writes gpu_CARD_DATE.json and .md there: operands of every recipe against
those of a CPU, kernels and training steps as multiples of BF16, memory, collectives. Each section is a process with a
limit of its own that says one row at a time (gpu_sections.py): what hangs or breaks costs its own rows, and is said.

Exit codes: 0 nothing failed, 1 a row failed or was not reached. Not here: several GPUs (`megatron-fp4 preflight`).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.storage.local import local_path

SECONDS = {"operands": 150, "kernels": 80, "training": 130, "collectives": 40}
"""What each section may take, in order: 400 in all, and half a minute for starting processes."""
ROW = "row: "
Row = dict[str, Any]


def row(section: str, what: str, result: str, passed: bool | None, **figures: float) -> Row:
    """passed: None for a figure that cannot fail, or what cannot be tried here."""
    return {"section": section, "what": what, "result": result, "passed": passed, **figures}


def run_section(section: str, seconds: float, *arguments: str) -> list[Row]:
    """The rows of a section from a process of its own, and one more if it did not end well."""
    command = [sys.executable, "-m", "benchmarks.gpu_sections", section, *arguments]
    begun = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    late = threading.Timer(seconds, child.kill)
    late.start()
    try:
        output, errors = child.communicate()
    finally:
        late.cancel()
    rows: list[Row] = [json.loads(line.removeprefix(ROW)) for line in output.splitlines() if line.startswith(ROW)]
    if child.returncode:
        last = next(iter(reversed(errors.strip().splitlines())), "it said nothing")
        spent = time.monotonic() - begun
        why = f"stopped after {spent:.0f} s" if spent >= seconds else f"ended with code {child.returncode}: {last}"
        rows.append(row(section, "the rest", f"not reached: {why}", passed=False))
    return rows


def machine() -> dict[str, str]:
    """Card, versions and date."""
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "card": "cpu"}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts["card"] = f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 1e9:.0f} GB"
    packages = {name: _version(name) for name in ("torch", "triton", "transformer-engine")}
    return {**facts, "python": platform.python_version(), "cuda": str(torch.version.cuda), **packages}


def as_markdown(facts: dict[str, str], rows: Sequence[Row]) -> str:
    """The table for docs/performance.md."""
    words = {True: "ok", False: "FAILED", None: "-"}
    lines = [f"# {facts['card']}", "", ", ".join(f"{name} {value}" for name, value in facts.items() if name != "card")]
    lines += ["", "| section | what | result | |", "|---|---|---|---|"]
    lines += [f"| {one['section']} | {one['what']} | {one['result']} | {words[one['passed']]} |" for one in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every section and write the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=local_path, default=Path("runs/gpu"), help="folder of the table (default: runs/gpu)"
    )
    parser.add_argument("--only", choices=SECONDS, action="append", help="this section (several times)")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for a CPU with TRITON_INTERPRET=1: to try the script"
    )
    args = parser.parse_args(arguments)
    facts, rows = machine(), list[Row]()
    for section in args.only or SECONDS:
        rows += run_section(section, SECONDS[section], *(["--tiny"] if args.tiny else []))
    args.out.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"\W+", "_", facts["card"].partition(",")[0]).lower()
    name = args.out / f"gpu_{card}_{facts['date'][:10]}"
    text = as_markdown(facts, rows)
    name.with_suffix(".md").write_text(text)
    name.with_suffix(".json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
    print(text)
    print(f"written: {name}.md and .json")
    return 1 if any(one["passed"] is False for one in rows) else 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    sys.exit(main())
