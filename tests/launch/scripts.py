"""Run a launch script with stand-ins for the programs it would start, and see the command lines they got.

What a launch script decides is the command line and the environment of the next program. The stand-ins on
PATH record both as JSON, so a test compares lists of arguments, not text.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

RECORDER = """#!/usr/bin/env python3
import json, os, sys
with open({record!r}, "a") as file:
    file.write(json.dumps(dict(name={name!r}, arguments=sys.argv[1:], environment=dict(os.environ))) + "\\n")
print({output!r}, end="")
sys.exit({code})
"""


class Programs:
    """A folder of stand-in programs, put in front of PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "programs"
        self.folder.mkdir()
        self.record = folder / "calls.jsonl"

    def add(self, name: str, *, output: str = "", code: int = 0) -> Path:
        """A program that records its call, prints `output` and leaves with `code`."""
        path = self.folder / name
        path.write_text(RECORDER.format(record=str(self.record), name=name, output=output, code=code))
        path.chmod(0o755)
        return path

    def add_quick(self, name: str, *, output: str = "") -> None:
        """A program for scripts that call it many times: prints `output`, records nothing."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\nprintf '%s' '{output}'\n")
        path.chmod(0o755)

    def calls(self, name: str) -> list[dict[str, Any]]:
        if not self.record.exists():
            return []
        calls = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [call for call in calls if call["name"] == name]

    def run(
        self,
        script: str,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        *,
        cwd: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a bash script of the repository with only `variables` and what every shell has."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        environment = {**kept, "PATH": f"{self.folder}:{os.environ['PATH']}", **(variables or {})}
        return subprocess.run(
            ["bash", str(ROOT / script), *arguments],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
