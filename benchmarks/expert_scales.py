"""What an expert's scale is taken over, and what expert parallelism then changes: between real ranks.

`python -m benchmarks.expert_scales` runs one mixture of experts, forward and backward, on 4 ranks with a microbatch
each, with ep = 1, 2 and 4. The rules of an FP32 scale are those of docs/experts.md:

    b    one per source microbatch and expert            amax_scope=tensor, the default
    a    one per expert and call, as Transformer Engine  amax_scope=expert_call
    ap   the same, and a power of two                    beside it amax_rounding=power_of_two

Printed are the share of an operand's elements whose quantized values differ from those with ep = 1, and in brackets
the size of the difference as a multiple of the quantization error; for gradients of weights this multiple alone. The
tensors that are quantized are the same in all layouts, because products but Wgrad are computed in BF16 here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import build_mesh
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.moe.layer import MixtureOfExperts
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import AmaxScope, LinearPrecision, Operand, StepClock, nvfp4_paper
from megatron_fp4.precision.backends import Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.grouped import Segments
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend
from megatron_fp4.precision.operand import AmaxRounding

RANKS = 4
OPERANDS = {("up", "x"): "x", ("down", "x"): "z", ("down", "dy"): "dy", ("up", "dy"): "dh"}
WEIGHTS = {"up": "dW1", "down": "dW2"}


def rules() -> dict[str, LinearPrecision]:
    """The paper's recipe with the scales of each rule; "exact" quantizes nothing."""
    paper = nvfp4_paper()

    def of(scope: AmaxScope, rounding: AmaxRounding) -> LinearPrecision:
        def change(operand: Operand) -> Operand:
            return replace(operand, amax_scope=scope, amax_rounding=rounding)

        fprop, dgrad = paper.fprop, paper.dgrad
        return LinearPrecision(
            replace(fprop, x=change(fprop.x)),
            replace(dgrad, dy=change(dgrad.dy)),
            paper.wgrad.with_operands(change),
        )

    return {
        "exact": LinearPrecision(),
        "b": paper,
        "a": of(AmaxScope.expert_call, AmaxRounding.none),
        "ap": of(AmaxScope.expert_call, AmaxRounding.power_of_two),
    }


@dataclass(frozen=True, eq=False)
class Rows:
    """An operand of one rank. keys: int64 `[R]`, expert and address of each row."""

    keys: Tensor
    exact: Tensor
    quantized: Tensor

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """All ranks', by key."""
        keys, exact, quantized = (torch.cat([getattr(one, field) for one in parts]) for field in vars(parts[0]))
        order = keys.argsort()
        return Rows(keys[order], exact[order], quantized[order])


class Recorder(SegmentedEmulatedBackend):
    """Quantizes operands and keeps them, but multiplies those of Fprop and Dgrad as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[str, str], Rows] = {}

    def quantize_segments(
        self, x: Tensor, origin: OperandOrigin, segments: Segments, first_expert: int, copies: Sequence[Copy]
    ) -> tuple[QuantizedOperand, ...]:
        """See `SegmentBackend`."""
        result = []
        for copy in copies:
            (operand,) = super().quantize_segments(x, origin, segments, first_expert, [copy])
            if copy.gemm != "wgrad" and copy.operand.quantized:
                if origin.operand != "w" and segments.parts:
                    self._keep(x, origin, segments, operand)
                high = replace(copy, operand=Operand())
                (operand,) = super().quantize_segments(x, origin, segments, first_expert, [high])
            result.append(operand)
        return tuple(result)

    def _keep(self, x: Tensor, origin: OperandOrigin, segments: Segments, operand: QuantizedOperand) -> None:
        parts = [self._complete(operand, x.dtype).part(i) for i in range(len(segments.parts))]
        values = [one.values.double() * (one.scale.amax.double() / one.scale.divisor) for one in parts if one.scale]
        own = origin.rows >= 0  # the others are zeros behind a segment
        kept = Rows(origin.rows[own], x.double()[own], torch.cat(values)[own])
        self.rows[origin.name.rpartition(".")[2], origin.operand] = kept


@dataclass(frozen=True, eq=False)
class Result:
    """One rank's operands, and its part of the weight gradients by logical name."""

    rows: dict[tuple[str, str], Rows]
    gradients: dict[str, Tensor]


def heavy(name: str, rows: Tensor, width: int, spread: float) -> Tensor:
    """Normal numbers with log-normal sizes of rows and of columns, BF16 `[T, width]`."""
    columns, one = torch.arange(width), torch.zeros(1, dtype=torch.int64)
    sizes = normal(key_of(name, "rows"), rows, one) + normal(key_of(name, "columns"), one, columns)
    return (normal(key_of(name), rows, columns) * (spread * sizes).exp()).bfloat16()


def run_layout(process: Process, ep: int, precision: LinearPrecision, args: argparse.Namespace) -> Result:
    """One microbatch of this rank, forward and backward."""
    mesh = build_mesh(ParallelConfig(dp=RANKS, ep=ep), process.world)
    backend = Recorder()
    context = LayerContext.of(mesh, backend, StepClock(seed=1), torch.bfloat16, process.device)
    moe = MoeConfig(num_experts=args.experts, top_k=args.top_k, ffn_hidden=args.ffn)
    layer = MixtureOfExperts("moe", moe, args.width, Activation.squared_relu, context, std=0.05, out_std=0.05)
    initialize_parameters(layer, seed=1)
    for linear in linears_of(layer).values():
        linear.precision = precision
    for parameter in logical_parameters(layer):
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    address = torch.arange(args.tokens) + mesh.dp.rank * args.tokens
    tokens = Tokens(address[None], address[None] * 0, address[None] * 0)
    x = heavy("x", address, args.width, args.spread).requires_grad_()
    layer(x, tokens).backward(heavy("dy", address, args.width, args.spread) * 1e-4)
    gradients = {
        where.name: parameter.main_grad[rows]
        for parameter in logical_parameters(layer)
        for rows, where in parameter.placement.pieces()
        if ".experts." in where.name and parameter.main_grad is not None
    }
    return Result(backend.rows, gradients)


def run_rank(process: Process, args: argparse.Namespace) -> dict[tuple[str, int], Result]:
    """Every rule in every layout."""
    torch.set_num_threads(1)
    return {(name, ep): run_layout(process, ep, rule, args) for name, rule in rules().items() for ep in args.ep}


def summed(results: Sequence[Result], role: str) -> Tensor:
    """The gradient of all experts' weights, FP64, added over the ranks that hold them."""
    total: dict[str, Tensor] = {}
    for result in results:
        for name, gradient in result.gradients.items():
            if name.split(".")[-2] == role:
                total[name] = total.get(name, 0.0) + gradient.double()
    return torch.stack([total[name] for name in sorted(total)])


def line(name: str, ep: int, ranks: Sequence[dict[tuple[str, int], Result]]) -> str:
    """A row of the table."""
    cells = [name, f"ep={ep}"]
    first, other = ([rank[name, one] for rank in ranks] for one in (1, ep))
    for key in OPERANDS:
        base, changed = (Rows.joined([result.rows[key] for result in results]) for results in (first, other))
        assert torch.equal(base.keys, changed.keys), "other rows came to the experts"
        assert torch.equal(base.exact, changed.exact), "the tensors that are quantized differ"
        differs = (base.quantized != changed.quantized).double().mean()
        size = (base.quantized - changed.quantized).norm() / (base.quantized - base.exact).norm()
        cells.append("0" if differs == 0 else f"{differs:.2%} ({size:.3f})")
    for role in WEIGHTS:
        exact = summed([rank["exact", 1] for rank in ranks], role)
        gradient = summed(first, role)
        cells.append(f"{(gradient - summed(other, role)).norm() / (gradient - exact).norm():.5f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="in each rank's microbatch")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--spread", type=float, default=0.5, help="of the logarithms of the sizes of rows and columns")
    args = parser.parse_args()
    args.ep = (1, 2, 4)
    ranks = run_local(run_rank, RANKS, args)
    header = ["rule", "against ep=1", *OPERANDS.values(), *(f"{name} diff/qerr" for name in WEIGHTS.values())]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name in ("a", "ap", "b"):
        for ep in args.ep[1:]:
            print(line(name, ep, ranks))


if __name__ == "__main__":
    main()
