"""What a start asks of a file system that thousands of ranks share: each file of the data once, no file for a name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from megatron_fp4 import pretrain
from megatron_fp4.train.resume import provenance
from tests.helpers.tiny_run import ROOT, tiny_run, write_toy_shard

opened: Counter[str] | None = None
"""Files that are opened by Python, while it is one."""


def note_open(event: str, arguments: tuple[object, ...]) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        opened[os.fspath(arguments[0])] += 1


sys.addaudithook(note_open)


def test_each_shard_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in the sources and once held out: two files each; and besides a question or two by name."""
    global opened
    folder, names = tmp_path / "many", ["a", "b", "c"]
    for seed, name in enumerate(names):
        write_toy_shard(folder / name, num_documents=40, seed=seed)
    held = write_toy_shard(tmp_path / "held" / "out", num_documents=40, seed=7)
    run = tiny_run(
        tmp_path,
        f"data.sources=[{{name: many, paths: ['{folder}/*'], max_epochs: 0}}]",
        f"data.evaluation=[{{name: held, paths: ['{held}']}}]",
        "train.stop_after_steps=1",
    )
    asked: Counter[str] = Counter()
    for name in ("stat", "lstat"):
        real = getattr(os, name)

        def counted(path: object, *args: object, real: object = real, **settings: object) -> object:
            if isinstance(path, str | os.PathLike):
                asked[os.fspath(path)] += 1
            return real(path, *args, **settings)  # type: ignore[operator]

        monkeypatch.setattr(os, name, counted)
    opened = Counter()
    try:
        assert pretrain.main(list(run.overrides)) == 0
        files, opened = opened, None
    finally:
        opened = None
    for prefix in [*(folder / name for name in names), held]:
        for end in ("idx", "bin"):
            path = f"{prefix}.{end}"
            assert files[path] == 1, (
                f"{path} is opened {files[path]} times; a mapping holds a descriptor for the whole run"
            )
            assert asked[path] <= 1, f"the file system is asked {asked[path]} times what {path} is"


def test_imports_ask_for_no_real_path_of_every_module() -> None:
    """20,554 questions before, 8 or more for each module of torch; of 38,000 file operations of a start."""
    program = (
        "import os, posix\n"
        "count, real = 0, posix.lstat\n"
        "def lstat(*args, **settings):\n"
        "    global count\n"
        "    count += 1\n"
        "    return real(*args, **settings)\n"
        "os.lstat = lstat\n"
        "from megatron_fp4 import pretrain\n"
        "print(count)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert int(output) < 500


def test_the_package_path_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save stores the versions."""
    asked: list[str] = []

    def version(name: str) -> str:
        asked.append(name)
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", version)
    provenance._transformer_engine.cache_clear()
    assert provenance.versions() == provenance.versions()
    assert len(asked) <= 1
    provenance._transformer_engine.cache_clear()
