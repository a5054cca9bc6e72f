"""The weights in a `torch_dist` checkpoint of Megatron-LM as rectangles of logical tensors, read when asked for.

Everything that can be known without values is checked first: that each tensor of the model is there in its shape, and
that no other weights are. The optimizer's state is left behind.

Not here: what the arguments say (megatron_args.py), and the names (megatron_names.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.checkpoint.pieces.read import read_into
from megatron_fp4.checkpoint.pieces.torch_dist import KIND, TorchDistCheckpoint, read_torch_dist
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters
from megatron_fp4.models.foreign.megatron_args import NoArguments, parse_arguments, read_arguments
from megatron_fp4.models.foreign.megatron_names import EMBEDDING, StoredRows, stored_rows
from megatron_fp4.storage.patience import read_json

DESCRIPTION = "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
DTYPES = ("float64", "float32", "float16", "bfloat16")
MAX_LISTED = 5
UNKNOWN_LENGTH = 2048
"""Tokens of a sample, where no arguments say them."""


def megatron_directory(folder: Path) -> Path | None:
    """The checkpoint of Megatron-LM that `folder` is, or the newest one in it; None if it is none."""
    if (folder / DESCRIPTION).is_file():
        return folder
    if not (folder / TRACKER).is_file():
        return None
    newest = (folder / TRACKER).read_text().strip()
    return folder / (f"iter_{int(newest):07d}" if newest.isdecimal() else "release")


@dataclass(frozen=True)
class _Place:
    """A logical tensor in a stored one. name: the stored one's. shape: its own. layer: its number in a stack."""

    rows: StoredRows
    name: str
    shape: tuple[int, ...]
    layer: int | None


class MegatronWeights:
    """The weights of a GPT of Megatron-LM, as a `source.ForeignSource`.

    model: what it is, where its arguments do not say; `vocab_size` alone, where they leave that to a tokenizer.
    Raises FileNotFoundError; ValueError for what is damaged, missing, left over, of
    another shape, or computed by something that this model has not.
    """

    format = "megatron"

    def __init__(self, folder: Path, model: ModelConfig | None = None, vocab_size: int | None = None) -> None:
        self.folder = _checked_directory(folder)
        self._stored: TorchDistCheckpoint = read_torch_dist(self.folder, lambda name: not OPTIMIZER.match(name))
        self._shapes, self._dtypes = self._stored.shapes(), self._stored.dtypes()
        self.notes: list[str] = []
        self.skipped = sorted(name for name in self._stored.others if not OPTIMIZER.match(name))
        self.config, self.max_length = self._model(model, vocab_size)
        self.shapes = {one.name: one.shape for one in model_parameters(self.config)}
        self._places = {name: self._place(name, where) for name, where in stored_rows(self.config)}
        assert self._places.keys() == self.shapes.keys()
        self._check_rest()

    def _model(self, model: ModelConfig | None, vocab_size: int | None) -> tuple[ModelConfig, int]:
        arguments = read_arguments(self.folder)
        padded = self._shapes.get(EMBEDDING, (0,))[0]
        if isinstance(arguments, NoArguments):
            if model is None:
                raise ValueError(
                    f"{arguments.reason}, so what model it is must be said: checkpoint import --from megatron"
                    f" {self.folder} --to DIRECTORY model=... model.KEY=VALUE ..."
                )
            self.notes.append(f"the model is the given one: {arguments.reason}")
            return replace(model, vocab_size=model.vocab_size or padded), UNKNOWN_LENGTH
        if model is not None:
            raise ValueError(f"{self.folder}: its arguments say what model it is; give none but model.vocab_size")
        source = f"{self.folder}, args of common.pt"
        described = parse_arguments(arguments, source)
        if vocab_size is None and described.vocab_size is None:
            self.notes.append(
                f"its arguments do not say how many of the {padded} rows of the vocabulary are tokens, so all are"
                " taken; model.vocab_size=N drops the others"
            )
        tokens = vocab_size or described.vocab_size or padded
        try:
            return described.config(tokens), described.max_length
        except ValueError as error:
            raise ValueError(f"{source} describe a model that this one cannot be: {error}") from None

    def _place(self, name: str, candidates: Sequence[StoredRows]) -> _Place:
        """Raises ValueError where none of the candidates is there, or it has another shape."""
        for rows in candidates:
            for stored, layer in self._names(rows):
                if stored in self._shapes:
                    return self._fitting(name, rows, stored, layer)
        wanted = " or ".join(stored for rows in candidates for stored, _ in self._names(rows))
        raise ValueError(f"{self.folder} lacks {name}: it has no {wanted}")

    def _names(self, rows: StoredRows) -> list[tuple[str, int | None]]:
        if rows.block is None:
            return [(rows.name, None)]
        return [(f"decoder.layers.{rows.name}", rows.block), (f"decoder.layers.{rows.block}.{rows.name}", None)]

    def _fitting(self, name: str, rows: StoredRows, stored: str, layer: int | None) -> _Place:
        shape = self._shapes[stored]
        stack = () if layer is None else (self.config.num_layers,)
        expected = (*stack, rows.rows, *self.shapes[name][1:])
        fits = shape == expected
        if rows.padded and shape[1:] == expected[1:]:
            fits = shape[0] >= expected[0]
            if fits and shape[0] > rows.rows:
                self.notes.append(f"{shape[0] - rows.rows} rows of padding of {stored} are dropped")
        if self._dtypes[stored] not in DTYPES:
            raise ValueError(f"{self.folder}: {stored} is {self._dtypes[stored]}; weights are {', '.join(DTYPES)}")
        if not fits:
            raise ValueError(f"{self.folder}: {stored} has shape {shape}, a model of these settings has {expected}")
        return _Place(rows, stored, shape, layer)

    def _check_rest(self) -> None:
        surplus = self._shapes.keys() - {place.name for place in self._places.values()}
        if surplus:
            more = f" and {len(surplus) - MAX_LISTED} more" if len(surplus) > MAX_LISTED else ""
            listed = ", ".join(sorted(surplus)[:MAX_LISTED])
            raise ValueError(f"{self.folder} has, and the model has no place for, {listed}{more}")
        if left := [name for name in self._stored.others if OPTIMIZER.match(name)]:
            self.notes.append(f"the optimizer's state ({len(left)} tensors) is left behind")

    def read(self, where: Rectangle) -> Tensor:
        """The values of a rectangle, FP32. Raises ValueError, also for what is not finite; UnreadableFile."""
        place = self._places[where.name]
        if not where.numel:
            return torch.empty(where.shape)
        rows = place.rows.at(where.offset[0], where.offset[0] + where.shape[0])
        first, stop = int(rows[0]), int(rows[-1]) + 1
        stack = () if place.layer is None else (place.layer,)
        target = torch.empty(stop - first, *where.shape[1:])
        offset, shape = (*stack, first, *where.offset[1:]), (*(1 for _ in stack), *target.shape)
        within = Rectangle(place.name, place.shape, offset, shape)
        read_into([Shard(within, {KIND: target.view(shape)})], self.folder, self._stored.pieces)
        values = target[rows - first] if len(target) > len(rows) else target
        if not values.isfinite().all():
            raise ValueError(f"{self.folder}: {place.name} is not finite in FP32; the file is damaged")
        return values

    def check_tied(self) -> None:
        """A checkpoint of tied embeddings stores one tensor; another one has no place and was refused."""

    def files(self) -> list[Path]:
        """All files that weights are read from."""
        return sorted(self.folder / name for name in self._stored.pieces.files)

    def headers_digest(self) -> str:
        """Digest of the settings and of the description: equal where directories are copies."""
        record = repr(self.config).encode() + self._stored.description
        return hashlib.blake2b(record, digest_size=8).hexdigest()


def _checked_directory(folder: Path) -> Path:
    directory = megatron_directory(folder) or folder
    remedy = "; Megatron-LM converts with --ckpt-convert-format torch_dist"
    if not (directory / DESCRIPTION).is_file():
        legacy = sorted(path.name for path in directory.glob("mp_rank_*"))
        reason = f": {legacy[0]} is of an older one" if legacy else ""
        raise FileNotFoundError(
            f"{directory} is no checkpoint of Megatron-LM in its torch_dist format{reason}; it has no {DESCRIPTION}"
            + (remedy if legacy else "")
        )
    described = read_json(directory / DESCRIPTION)
    backend = described.get("sharded_backend") if isinstance(described, Mapping) else None
    if backend != "torch_dist":
        raise ValueError(f"{directory} is stored as {backend!r}, not as torch_dist{remedy}")
    return directory
