"""What must be equal on all ranks is compared before they train, and refused with both values.

One stale command line, checkout or environment variable on one node gives a run that no one asked for: two learning
rates, two recipes, two seeds train to the end. Every rank says a digest of each part (a few bytes) to rank 0; values
travel only where digests differ, from one rank of each kind.

What a node may have of its own is left out: where caches, tokenizer and shards lie (their content is compared).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_fp4.comm.agree import number_ranges
from megatron_fp4.comm.launch import environment
from megatron_fp4.comm.rendezvous import Rendezvous
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.opened import OpenedData
from megatron_fp4.train.resume.differences import around_first_difference
from megatron_fp4.train.resume.provenance import git_state, source_digest, versions

Part = dict[str, str]
"""Name -> value, as text; what is compared as one."""

PER_NODE = re.compile(r"data\.(index_cache|tokenizer|(sources|evaluation)\[\d+\]\.paths.*|tasks\[\d+\]\.path)")
NUMERIC_VARIABLES = ("NVTE_", "NVIDIA_TF32_OVERRIDE", "CUBLAS", "TORCH_ALLOW_TF32")
"""Prefixes of variables that change what libraries compute."""
REMEDY = "start every rank with the same command, checkout, environment and data"
REFUSAL = "refusal"
MAX_KEYS, MAX_KINDS = 6, 3
MAX_CHARACTERS, CONTEXT = 80, 20


def parts_of_start(written: Mapping[str, Any]) -> dict[str, Part]:
    """What a rank has before anything was checked. written: the settings, with interpolations as they were written."""
    settings = {key: value for key, value in _leaves(written) if not PER_NODE.fullmatch(key)}
    run_dir = settings.get("train.run_dir", "")
    if "${" not in run_dir:  # a relative one is another directory where the rank was started in another
        settings["train.run_dir"] = os.path.abspath(run_dir)
    return {
        "settings": settings,
        "program": {"source": source_digest()},
        "versions": versions(),
        "environment": environment(*NUMERIC_VARIABLES),
    }


def parts_of_run(checked: CheckedConfig, data: OpenedData, device_type: str) -> dict[str, Part]:
    """What a rank makes of the settings: precision table, tokenizer, data by content, and device."""
    documents = [stream.documents for stream in data.loader.streams.values()]
    documents += [item.documents for item in data.evaluations]
    return {
        "precision table": dict.fromkeys(checked.plan.describe().splitlines(), ""),
        "data": {item.name: f"{item.fingerprint} ({item.num_tokens} tokens)" for item in documents},
        "tasks": {task.name: task.fingerprint for task in data.tasks},
        "tokenizer": {"fingerprint": checked.tokenizer.fingerprint if checked.tokenizer else "none"},
        "device": {"device": device_type},
    }


def agree_on(
    parts: Mapping[str, Part], rendezvous: Rendezvous, timeout_seconds: float, refusal: str | None = None
) -> None:
    """Raise ValueError on all ranks if one has other parts than the rest, or says why it refuses to start.

    A rank that refuses may lack parts; those that it has are compared. Every rank calls it.
    """
    comparison = _Comparison()
    digests = {name: _digest(part) for name, part in parts.items()}
    if refusal:
        digests[REFUSAL] = _digest({REFUSAL: refusal})
    wanted = rendezvous.decided_by_rank0("the start", json.dumps(digests), comparison.speakers, timeout_seconds)
    speakers: dict[str, list[int]] = json.loads(wanted)
    if not speakers:
        return
    answer = {name: parts.get(name, {}) for name, ranks in speakers.items() if rendezvous.rank in ranks}
    if "program" in answer:  # git is asked only where it is news
        answer["program"] = {**answer["program"], "commit": git_state() or "none"}
    if REFUSAL in answer:
        answer[REFUSAL] = {REFUSAL: refusal or ""}
    text = json.dumps({"host": socket.gethostname(), "parts": answer})
    rendezvous.decided_by_rank0("what differs", text, comparison.refuse, timeout_seconds)


class _Comparison:
    """What rank 0 sees. kinds: for each part that differs, the ranks that have the same of it, most of them first."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[list[int]]] = {}
        self.world_size = 0

    def speakers(self, message: Sequence[str]) -> str:
        """The first rank of some kinds of each part that differs: these are to say what they have."""
        self.world_size = len(message)
        ranks: dict[str, dict[str, list[int]]] = {}
        for rank, text in enumerate(message):
            for name, digest in json.loads(text).items():
                ranks.setdefault(name, {}).setdefault(digest, []).append(rank)
        for name, kinds in ranks.items():
            if len(kinds) > 1 or name == REFUSAL:
                self.kinds[name] = sorted(kinds.values(), key=lambda kind: (-len(kind), kind))[:MAX_KINDS]
        return json.dumps({name: [kind[0] for kind in kinds] for name, kinds in self.kinds.items()})

    def refuse(self, answers: Sequence[str]) -> str:
        """Raises ValueError with each part's different values and whose they are."""
        heard = [json.loads(answer) for answer in answers]
        differences, refusals = [], []
        for name, kinds in self.kinds.items():
            values = [heard[kind[0]]["parts"][name] for kind in kinds]
            owners = [_who(kind, heard[kind[0]]["host"]) for kind in kinds]
            if name != REFUSAL:
                differences.append(f"{name}: {_compared(values, owners)}")
            elif len(kinds[0]) == self.world_size:
                refusals.append(values[0][REFUSAL])
            else:
                refusals += [f"{owner}: {value[REFUSAL]}" for owner, value in zip(owners, values, strict=True)]
        message = [f"the ranks differ in {'; '.join(differences)}; {REMEDY}"] if differences else []
        raise ValueError("; ".join(message + refusals))


def _compared(parts: Sequence[Part], owners: Sequence[str]) -> str:
    """The keys whose values are not the same in all `parts`, with the values and who has them."""
    keys = dict.fromkeys(key for part in parts for key in part)
    differing = [key for key in keys if len({part.get(key) for part in parts}) > 1]
    texts = []
    for key in differing[:MAX_KEYS]:
        shown = around_first_difference([part.get(key, "absent") for part in parts], MAX_CHARACTERS, CONTEXT)
        values = [f"{text} on {who}" for text, who in zip(shown, owners, strict=True)]
        texts.append(f"{_short(key)} = {', '.join(values)}")
    more = len(differing) - MAX_KEYS
    return ", ".join(texts) + (f", and {more} more" if more > 0 else "")


def _who(ranks: Sequence[int], host: str) -> str:
    return f"rank {ranks[0]} ({host})" if len(ranks) == 1 else f"ranks {number_ranges(ranks)} ({host}...)"


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."


def _digest(part: Part) -> str:
    return hashlib.blake2b(json.dumps(part, sort_keys=True).encode(), digest_size=8).hexdigest()


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of nested settings and their values as text: `data.sources[0].name`."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, str(value)
