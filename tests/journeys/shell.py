"""A fresh shell in a folder of one's own: nothing in its environment but the path to the installed commands."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path


class Shell:
    """Runs what a person types, away from the checkout. folder: where it is typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
        if "PYTHONPATH" in os.environ:  # a checkout beside the installed one is tested by it
            self.environment["PYTHONPATH"] = os.environ["PYTHONPATH"]

    def __call__(self, command: str, *, expect: int = 0) -> str:
        """What the command prints, both streams; fails with it if the exit code is another one."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == expect, f"$ {command}\nexit code {done.returncode}, expected {expect}:\n{done.stdout}"
        assert "Traceback" not in done.stdout, f"$ {command}\n{done.stdout}"
        return done.stdout

    def interrupted(self, command: str, at: str) -> str:
        """What the command prints if Ctrl-C is typed as soon as a line begins with `at`."""
        process = subprocess.Popen(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(at):
                process.send_signal(signal.SIGINT)
                break
        rest, _ = process.communicate(timeout=120)
        output = "".join(lines) + rest
        assert process.returncode == 85, f"$ {command}\nexit code {process.returncode}:\n{output}"
        assert "Traceback" not in output
        return output

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
