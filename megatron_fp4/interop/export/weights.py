"""From rows of masters to rows of the files' tensors, a piece at a time: no tensor is ever whole in memory.

Codes are those of training: the master is rounded to the compute dtype first, the largest magnitude is taken over the
whole linear (so that q, k and v, or gate and up, share one global scale), and a tile's scale is repeated in its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.checkpoint.pieces.layout import dtype_of
from megatron_fp4.checkpoint.pieces.read import read_into
from megatron_fp4.checkpoint.pieces.stored import read_pieces
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.interop.export.plan import CodedLinear, Requantize
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters
from megatron_fp4.numerics import QuantizedTensor, quantize_nvfp4
from megatron_fp4.precision.operand import Operand

CHUNK_BYTES = 64 << 20
"""Bytes of masters that are read at a time; quantizing needs some ten times as much."""
ROW_MULTIPLE = 16


class Masters:
    """The master weights of a checkpoint, by rows.

    Raises ValueError for a tensor of `config` that is missing or has another shape.
    """

    def __init__(self, checkpoint: Path, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self._pieces = read_pieces(checkpoint)
        stored = {key: (shape, dtype) for key, shape, dtype, _ in self._pieces.tensors()}
        self.shapes = {parameter.name: parameter.shape for parameter in model_parameters(config)}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, shape in self.shapes.items():
            if f"master/{name}" not in stored:
                raise ValueError(f"{checkpoint} has no tensor master/{name}, of shape {shape}")
            found_shape, dtype = stored[f"master/{name}"]
            if found_shape != shape:
                raise ValueError(f"master/{name} of {checkpoint} has shape {found_shape}, its settings say {shape}")
            self._dtypes[name] = dtype_of(dtype)

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the logical tensor `name`; as many rows as fit `CHUNK_BYTES`, a multiple of 16."""
        shape, dtype = self.shapes[name], self._dtypes[name]
        row_bytes = max(1, torch.Size(shape[1:]).numel()) * dtype.itemsize
        count = max(1, CHUNK_BYTES // row_bytes // ROW_MULTIPLE) * ROW_MULTIPLE
        for first in range(0, shape[0], count):
            where = Rectangle.whole(name, shape).rows(first, min(first + count, shape[0]))
            rows = torch.empty(where.shape, dtype=dtype)
            read_into([Shard(where, {"master": rows})], self.checkpoint, self._pieces)
            yield first, rows

    def amax(self, names: Iterable[str], dtype: torch.dtype) -> Tensor:
        """The largest magnitude of some tensors after rounding to `dtype`, an FP32 scalar."""
        largest = [rows.to(dtype).abs().amax().float() for name in names for _, rows in self.chunks(name)]
        return torch.stack(largest).amax()


def quantized_rows(rows: Tensor, amax: Tensor, operand: Operand) -> QuantizedTensor:
    """Codes and scales of `rows` `[R, K]` of a weight whose largest magnitude is `amax`.

    Rows beside the tiles are padded with zeros, as training pads them. Raises ValueError for NaN and Inf.
    """
    assert operand.tile is not None
    missing = -len(rows) % operand.tile[0]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    quantized = quantize_nvfp4(
        padded,
        tile=operand.tile,
        amax=amax,
        scale_order=operand.scale_order.name,
        four_over_six=operand.four_over_six.name,
        bound=operand.scale_bound,
    )
    codes, scales = quantized.codes[: len(rows)], quantized.scales[: len(rows)]
    return QuantizedTensor(codes, scales, amax, quantized.divisor)


TRAINED = "as trained"


@dataclass
class QuantizationErrors:
    """Squared errors of several operands for the same weights, by kind of linear and operand."""

    squares: dict[str, float] = field(default_factory=dict)
    errors: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, linear: CodedLinear, rows: Tensor, amax: Tensor) -> None:
        """Quantize `rows` in every way, and add up what it costs."""
        kind = linear.linear.split(".", 2)[-1]  # without "blocks.3."
        exact = rows.double()
        self.squares[kind] = self.squares.get(kind, 0.0) + float(exact.square().sum())
        ways = {way.value: way.operand for way in Requantize}
        for way, operand in ({TRAINED: linear.trained} | ways).items():
            if operand is not None:
                error = quantized_rows(rows, amax, operand).dequantize(torch.float64) - exact
                self.errors[kind, way] = self.errors.get((kind, way), 0.0) + float(error.square().sum())

    def table(self) -> str:
        """Relative error, RMS error over RMS weight, of each kind of linear and of all of them."""
        ways = [TRAINED, *(way.value for way in Requantize)]
        lines = [f"{'relative RMS error':<22}" + "".join(f"{way:>12}" for way in ways)]
        for kind in [*self.squares, "all"]:
            kinds = list(self.squares) if kind == "all" else [kind]
            total = sum(self.squares[one] for one in kinds)
            cells = []
            for way in ways:
                known = [self.errors[one, way] for one in kinds if (one, way) in self.errors]
                complete = total and len(known) == len(kinds)
                cells.append(f"{(sum(known) / total) ** 0.5:>12.4f}" if complete else f"{'-':>12}")
            lines.append(f"{kind:<22}" + "".join(cells))
        return "\n".join(lines)
