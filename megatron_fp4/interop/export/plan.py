"""What an exported file holds: each tensor of transformers, and the operand of which it holds the codes, if any.

The precision table decides, linear by linear: what trained in BF16 stays BF16, what Fprop multiplied in NVFP4 is
written as those codes. An operand is exported as it was in training, or not at all: where no file can hold it (another
format, a transform, noise, a scale a row) the linear is named, and the user says whether to quantize anew.

Not here: the arithmetic (weights.py), the names in the files (quantized.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_fp4.models.block import LinearInfo, model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters
from megatron_fp4.models.foreign.experts import BIAS
from megatron_fp4.models.foreign.families import JoinedTensor, joined_tensors
from megatron_fp4.precision.operand import AmaxScope, Format, FourOverSix, Operand
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable

BLOCK = 16
"""Elements of a row that share a block scale in every NVFP4 file."""


class Requantize(Enum):
    """Operands that the user may ask for in place of the trained one, by the name on the command line."""

    rows = "1x16"  # a scale per row and 16 columns, as the exporters of others make it
    four_over_six = "4over6"  # the same, each block's maximum at 6 or at 4, whichever has the smaller squared error

    @property
    def operand(self) -> Operand:
        mse = self is Requantize.four_over_six
        return Operand(Format.nvfp4, four_over_six=FourOverSix.mse if mse else FourOverSix.off)


@dataclass(frozen=True)
class CodedLinear:
    """A linear, or one expert of a linear of experts, whose weight is written as codes.

    linear: its name in the precision table. parts: its logical tensors, which share one global scale. trained: the
    operand of Fprop, None where no file can hold it. operand: that of the codes.
    """

    linear: str
    name: str
    parts: tuple[str, ...]
    trained: Operand | None
    operand: Operand


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor of transformers. coded: the linear that it is a part of, where it is written as codes.

    zeros: its size where it is 0 and no logical tensor.
    """

    joined: JoinedTensor
    coded: CodedLinear | None = None
    zeros: int = 0

    @property
    def module(self) -> str:
        """The module of transformers that holds it."""
        return self.joined.name.rpartition(".")[0]


def dense_tensors(config: ModelConfig) -> list[ExportedTensor]:
    """Every tensor of the model, none as codes."""
    return _exported(config, {})


def coded_tensors(
    config: ModelConfig, table: PrecisionTable, tp: int, requantize: Requantize | None
) -> list[ExportedTensor]:
    """Every tensor of the model, as codes where `table` multiplies NVFP4 (or anything, with `requantize`).

    tp: tensor-parallel size of the training. Raises ValueError, naming the linear, where no file holds the operand, and
    where nothing is left to be written as codes.
    """
    if config.tied_embeddings and table["head"].fprop.w.quantized:
        raise ValueError(
            "head multiplied the embedding's table in a quantized format, and a tied table is in the files once, in"
            " high precision; --format hf writes the model"
        )
    coded: dict[str, CodedLinear] = {}
    for info in model_linears(config):
        if table[info.name].fprop.w.quantized:
            for name, parts in _matrices(info):
                coded.update(dict.fromkeys(parts, _coded(info, name, parts, table[info.name], tp, requantize)))
    _check_experts(config, coded)
    if not coded:
        raise ValueError(
            "no linear multiplied a quantized weight, so there are no codes to export; --format hf writes the model"
        )
    return _exported(config, coded)


def unquantized_modules(config: ModelConfig, tensors: Sequence[ExportedTensor]) -> list[str]:
    """The linear modules of transformers that stay in high precision, a tied head and routers included."""
    weights = {part for info in model_linears(config) for _, parts in _matrices(info) for part in parts}
    weights |= {parameter.name for parameter in model_parameters(config) if parameter.name.endswith(".router.weight")}
    modules = [one.module for one in tensors if one.coded is None and weights.intersection(one.joined.parts)]
    return [*modules, "lm_head"] if config.tied_embeddings else modules


def _exported(config: ModelConfig, coded: Mapping[str, CodedLinear]) -> list[ExportedTensor]:
    """coded: by logical tensor. A bias of experts that the model has not is 0: servers load it in any case."""
    tensors = []
    for joined in joined_tensors(config):
        tensors.append(ExportedTensor(joined, coded.get(joined.parts[0])))
        if joined.name.endswith(".mixer.gate.weight") and not config.moe.expert_bias:
            bias = f"{joined.name.removesuffix('gate.weight')}{BIAS}"
            tensors.append(ExportedTensor(JoinedTensor(bias, ()), zeros=config.moe.num_experts))
    return tensors


def _matrices(info: LinearInfo) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, logical tensors) of a linear's weight; of a linear of experts, of each of them."""
    front, _, last = info.name.rpartition(".")
    for name in [f"{front}.{expert}.{last}" for expert in range(info.num_experts)] or [info.name]:
        yield name, tuple(f"{name}.{part}.weight" if part else f"{name}.weight" for part in info.outputs)


def _check_experts(config: ModelConfig, coded: Mapping[str, CodedLinear]) -> None:
    """Raise ValueError where a server's kernel for experts would meet codes in one of their two linears only."""
    names = {one.linear for one in coded.values()}
    experts = [info.name.rpartition(".")[0] for info in model_linears(config) if info.num_experts]
    for name in experts:
        linears = {info.name for info in model_linears(config) if info.name.startswith(f"{name}.")}
        if len(names & linears) not in (0, len(linears)):
            raise ValueError(
                f"{(names & linears).pop()} multiplied NVFP4 and {(linears - names).pop()} did not, and servers compute"
                " both by one kernel; --format hf writes the model"
            )


def _coded(
    info: LinearInfo,
    name: str,
    parts: tuple[str, ...],
    precision: LinearPrecision,
    tp: int,
    requantize: Requantize | None,
) -> CodedLinear:
    if info.in_features % BLOCK:
        raise ValueError(
            f"{info.name} has {info.in_features} input features, and the files hold blocks of {BLOCK}; --format hf"
            " writes the model"
        )
    objection = _objection(info, precision, tp)
    if requantize is None and objection:
        raise ValueError(
            f"{info.name} multiplied {objection}; --requantize 1x16 or 4over6 quantizes the weights anew, --format hf"
            " writes them in high precision"
        )
    trained = None if objection else precision.fprop.w
    operand = requantize.operand if requantize else precision.fprop.w
    return CodedLinear(info.name, name, parts, trained, operand)


def _objection(info: LinearInfo, precision: LinearPrecision, tp: int) -> str:
    """Why no file holds the weight as Fprop multiplied it; "" if one does."""
    operand = precision.fprop.w
    assert operand.tile is not None
    if operand.format is not Format.nvfp4:
        return f"its weight in {operand.format.name}, which is not the NVFP4 of the file"
    if operand.rht_size:
        return f"its weight behind a Hadamard transform of {operand.rht_size}, which no server makes"
    if operand.random:
        return "its weight rounded stochastically, other codes in each step"
    if operand.amax_scope in (AmaxScope.row, AmaxScope.group128):
        return f"its weight with many global scales (amax_scope={operand.amax_scope.name}), and a file has one"
    tp = 1 if info.whole else tp
    if operand.amax_scope is AmaxScope.shard and tp > 1:
        return f"its weight with a global scale on each of {tp} tensor-parallel ranks, and a file has one"
    rows, (_, columns) = info.local_outputs(tp), info.local_shape(tp)
    joined = len(rows) > 1 or tp > 1
    if columns % BLOCK or (joined and any(size % operand.tile[0] for size in rows)):
        return f"its weight padded: tiles that hold rows of two parts or ranks ({rows} x {columns} each, tp = {tp})"
    return ""
