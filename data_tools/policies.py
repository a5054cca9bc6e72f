"""What to do with records that are not plain documents, and the options of a command line that say so."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Policies:
    """Each record is counted whatever the choice."""

    empty: str = "skip"  # skip | keep (a document of nothing but EOS) | error
    missing_key: str = "error"  # skip | error
    invalid_json: str = "error"  # skip | error
    invalid_utf8: str = "replace"  # replace (U+FFFD) | skip | error
    too_long: str = "error"  # skip | error | keep (read whole, whatever memory it takes)
    max_document_bytes: int = 256 << 20  # of the raw record
    text_unit: str = "file"  # a plain-text document is a whole file, or a line


CHOICES = {
    "empty": ("skip", "keep", "error"),
    "missing_key": ("skip", "error"),
    "invalid_json": ("skip", "error"),
    "invalid_utf8": ("replace", "skip", "error"),
    "too_long": ("skip", "error", "keep"),
}


@dataclass
class Report:
    """Counters: `documents`, `text_bytes`, and one per reason for anything else."""

    counts: Counter[str] = field(default_factory=Counter)

    def note(self, reason: str, policy: str, where: str) -> None:
        """Count a record that is not a plain document; ValueError if the policy is `error`."""
        if policy == "error":
            raise ValueError(f"{where}: {reason}. Choose another policy: --on-{reason.replace(' ', '-')} skip")
        self.counts[f"{reason}: {policy}"] += 1


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    default = Policies()
    parser.add_argument("--text-unit", choices=("file", "line"), default=default.text_unit, help="of plain text")
    parser.add_argument("--max-document-bytes", type=int, default=default.max_document_bytes)
    for name, choices in CHOICES.items():
        parser.add_argument(f"--on-{name.replace('_', '-')}", choices=choices, default=getattr(default, name))


def policies_of(args: argparse.Namespace) -> Policies:
    if args.max_document_bytes < 1:
        raise ValueError(f"--max-document-bytes {args.max_document_bytes} must be at least 1")
    given: dict[str, Any] = {name.removeprefix("on_"): value for name, value in vars(args).items()}
    return Policies(**{field.name: given[field.name] for field in fields(Policies)})


def print_counts(counts: Counter[str] | dict[str, int]) -> None:
    """A line for every kind of record that was not a plain document."""
    for reason in sorted(set(counts) - {"documents", "text_bytes"}):
        print(f"         {counts[reason]:10,d} {reason}")
