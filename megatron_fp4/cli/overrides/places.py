"""Where YAML files are looked for: configs/, then the folders of `--config-dir` and hydra.searchpath.

A folder of a user's own is laid out like configs/ (`experiment/mine.yaml`, `model/big.yaml`) and is added: hydra takes
the first file of a name, so one that stands in configs/ too would never be read. `Places.shadowed` finds those that
differ. A file in any place is named by its path: `experiment=runs/mine.yaml`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

import megatron_fp4
from megatron_fp4.cli.overrides.mistakes import ConfigError

CONFIG_DIR = (Path(megatron_fp4.__file__).parent / "configs").resolve()
SEARCHPATH = "hydra.searchpath"


@dataclass(frozen=True)
class Places:
    """Folders in the order in which hydra looks; the first is configs/."""

    folders: tuple[Path, ...] = (CONFIG_DIR,)

    @classmethod
    def of(cls, overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Places:
        """The folders of `--config-dir`, then those of the override hydra.searchpath=[...]. Raises ConfigError."""
        added = [_folder(str(path), "--config-dir") for path in config_dirs]
        added += [_folder(entry, SEARCHPATH) for entry in _entries(overrides)]
        return cls(tuple(dict.fromkeys([CONFIG_DIR, *added])))

    def __contains__(self, key: object) -> bool:
        """Whether the key is a group, whose value is the name of an option."""
        return any((folder / str(key)).is_dir() for folder in self.folders)

    def options(self, group: str) -> list[str]:
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def groups(self) -> list[str]:
        """The groups of configs/; a folder of a user's own may hold anything."""
        return sorted(path.relative_to(CONFIG_DIR).as_posix() for path in CONFIG_DIR.rglob("*") if path.is_dir())

    def files(self, option: str) -> list[Path]:
        """The files of an option, such as "model/gpt_tiny"; hydra reads the first."""
        return [
            file for folder in self.folders if (file := Path(os.path.realpath(folder / f"{option}.yaml"))).is_file()
        ]

    def shadowed(self, option: str) -> Path | None:
        """A file of this name that says something else and is not read."""
        files = self.files(option)
        return next((file for file in files[1:] if file.read_bytes() != files[0].read_bytes()), None)

    def searchpath(self) -> list[str]:
        """The override that makes hydra look in the added folders."""
        added = ",".join(QuotedString(str(folder), Quote.single).with_quotes() for folder in self.folders[1:])
        return [f"{SEARCHPATH}=[{added}]"] if added else []

    def option(self, group: str, value: str) -> str:
        """The option that a value of a group names: itself, or what leads hydra to the file whose path it is."""
        path = Path(value)
        if path.suffix not in (".yaml", ".yml"):
            return value
        if not path.is_file() and self.files(f"{group}/{path.with_suffix('')}"):
            return str(path.with_suffix(""))
        if not path.is_file() or path.suffix == ".yml":
            wrong = (
                "hydra reads files that end in .yaml" if path.is_file() else f"there is no such file in {Path.cwd()}"
            )
            raise ConfigError(f"{group}={value}: {wrong}")
        return os.path.relpath(os.path.realpath(path), CONFIG_DIR / group).removesuffix(".yaml")


def _entries(overrides: Sequence[str]) -> Iterator[str]:
    for override in overrides:
        if override.partition("=")[0].lstrip("+") == SEARCHPATH:
            try:
                value = OverridesParser.create().parse_override(override).value()
            except HydraException:
                value = None
            if not isinstance(value, list):
                raise ConfigError(f"{override}: a list of folders is expected, {SEARCHPATH}=[DIR,DIR]")
            yield from (str(entry) for entry in value)


def _folder(entry: str, given_by: str) -> Path:
    """The folder of a path, a file:// URL or a pkg:// package. Raises ConfigError."""
    if entry.startswith("pkg://"):
        try:
            module = importlib.import_module(entry.removeprefix("pkg://").replace("/", "."))
            folder = Path(next(iter(module.__path__)))
        except (ImportError, AttributeError):
            raise ConfigError(f"{given_by} {entry}: there is no such package") from None
    else:
        folder = Path(entry.removeprefix("file://"))
    if not folder.is_dir():
        raise ConfigError(f"{given_by} {entry}: there is no such folder (looked for from {Path.cwd()})")
    return folder.resolve()
