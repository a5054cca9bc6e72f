"""The weights in a folder of `transformers` as rectangles of logical tensors, read when they are asked for.

Everything that can be known without values is checked first: that each tensor of the model is there in its shape, and
that nothing else is. Every rank of a run reads its own rectangles; nobody has the whole model in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.rect import Rectangle
from megatron_fp4.models.count import model_parameters
from megatron_fp4.models.foreign.families import JoinedTensor, joined_tensors
from megatron_fp4.models.foreign.read_config import ForeignModel, read_config
from megatron_fp4.models.foreign.tensor_files import DTYPES, StoredTensor, tensors_in

NO_WEIGHTS = re.compile(r".*(\._extra_state|rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached)")
"""Tensors that follow from the configuration, or from how a module was quantized."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS_AT_A_TIME = 4096
MAX_LISTED = 5


@dataclass(frozen=True)
class _Place:
    """Where a logical tensor lies: rows from `first` on of a stored one."""

    joined: JoinedTensor
    stored: StoredTensor
    first: int


class ForeignWeights:
    """The weights of a model of transformers.

    It is a `source.ForeignSource`. foreign: what its config.json says. Raises FileNotFoundError;
    ValueError for what is damaged, missing, left over, or of another shape than config.json says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.foreign: ForeignModel = read_config(folder)
        self.config, self.max_length = self.foreign.config, self.foreign.max_length
        self.format = f"transformers, {self.foreign.family.value}"
        self.notes: list[str] = []
        stored: dict[str, StoredTensor] = {}
        for name, one in tensors_in(folder).items():
            ours = "model." + name.removeprefix("backbone.") if name.startswith("backbone.") else name
            if stored.setdefault(ours, one) is not one:
                raise ValueError(f"{folder} has {stored[ours].name} and {name}, which are one tensor of the model")
        self.skipped = sorted(name for name in stored if NO_WEIGHTS.fullmatch(name))
        self._stored = {name: one for name, one in stored.items() if name not in self.skipped}
        self._places: dict[str, _Place] = {}
        self.shapes = {one.name: one.shape for one in model_parameters(self.config)}
        self._find_places()

    def _find_places(self) -> None:
        config = self.config
        joined = {one.name: one for one in joined_tensors(config, self.foreign.family)}
        surplus = self._stored.keys() - joined.keys() - ({HEAD} if config.tied_embeddings else set())
        missing = joined.keys() - self._stored.keys()
        for what, names in (("lacks", missing), ("has, and the model has no place for,", surplus)):
            if names:
                more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
                raise ValueError(f"{self.folder} {what} {', '.join(sorted(names)[:MAX_LISTED])}{more}")
        for name, one in joined.items():
            rows = [self.shapes[part][0] for part in one.parts]
            expected = (sum(rows), *((1,) if one.channel_dim else ()), *self.shapes[one.parts[0]][1:])
            stored = self._stored[name]
            if stored.shape != expected:
                raise ValueError(
                    f"{stored.path}: {name} has shape {stored.shape}, {self.folder}'s config.json says {expected}"
                )
            if stored.dtype not in DTYPES:
                raise ValueError(f"{stored.path}: {name} is {stored.dtype}; weights are {', '.join(DTYPES)}")
            for part, size, first in zip(one.parts, rows, _firsts(rows), strict=True):
                assert size == self.shapes[part][0]
                self._places[part] = _Place(one, stored, first)

    def read(self, where: Rectangle) -> Tensor:
        """The values of a rectangle, FP32. Raises ValueError, also for what is not finite; UnreadableFile."""
        place = self._places[where.name]
        first = place.first + where.offset[0]
        rows = place.stored.rows(first, first + where.shape[0])
        rows = rows[:, 0] if place.joined.channel_dim else rows
        values = rows[:, *where.slices[1:]].float()
        if not values.isfinite().all():
            raise ValueError(f"{place.stored.path}: {place.stored.name} is not finite in FP32; the file is damaged")
        return values

    def check_tied(self) -> None:
        """Raises ValueError for a head of its own where config.json says that it is the embedding. Reads both."""
        head, embedding = self._stored.get(HEAD), self._stored.get(EMBEDDING)
        if not self.config.tied_embeddings or head is None or embedding is None:
            return
        same = head.shape == embedding.shape and all(
            torch.equal(*(one.rows(row, min(row + ROWS_AT_A_TIME, head.shape[0])).float() for one in (head, embedding)))
            for row in range(0, head.shape[0], ROWS_AT_A_TIME)
        )
        if not same:
            raise ValueError(
                f"{head.path}: {HEAD} is another tensor than {EMBEDDING}, but tie_word_embeddings = true says that they"
                " are one; say false in config.json to keep both"
            )

    def files(self) -> list[Path]:
        """All files that weights are read from."""
        return sorted({place.stored.path for place in self._places.values()})

    def headers_digest(self) -> str:
        """Digest of the settings, and of names, types and places of the tensors: equal where folders are copies."""
        record: list[Any] = [repr(self.foreign)]
        record += sorted((one.path.name, name, one.dtype, one.shape, one.start) for name, one in self._stored.items())
        return hashlib.blake2b(json.dumps(record).encode(), digest_size=8).hexdigest()


def _firsts(rows: list[int]) -> list[int]:
    return [sum(rows[:index]) for index in range(len(rows))]
