"""Small models that set their own placements, and gradients that sum exactly in FP32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle

SHAPES = {
    "embedding.weight": (130, 24),
    "blocks.0.attention.qkv.weight": (96, 16),
    "blocks.0.norm.weight": (333,),
    "blocks.0.mlp.weight": (37, 32),
    "blocks.1.odd.weight": (7, 5),
    "blocks.1.conv.weight": (48, 1, 4),
    "blocks.1.norm.weight": (9,),
    "head.weight": (130, 24),
}
QKV_ROWS = {"q": 48, "k": 24, "v": 24}


def placement_of(name: str, shape: tuple[int, ...], **flags: bool) -> Placement:
    """One rectangle, or q|k|v for the fused weight; matrices decay."""
    decay = len(shape) > 1
    if not name.endswith("qkv.weight"):
        return Placement((Rectangle.whole(name, shape),), decay=decay, **flags)
    parts = (Rectangle.whole(name.replace("qkv", part), (rows, shape[1])) for part, rows in QKV_ROWS.items())
    return Placement(tuple(parts), decay=decay, **flags)


def make_parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, LogicalParameter]:
    """The parameters of SHAPES, with placements, the same values every time."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in SHAPES.items():
        data = torch.randn(shape, generator=generator).to(dtype)
        parameters[name] = LogicalParameter(data, placement_of(name, shape))
    return parameters


def exact_gradient(name: str, shape: tuple[int, ...], step: int, part: int) -> Tensor:
    """Multiples of 1/64 below 2: sums of many of them are exact in FP32, in any order."""
    generator = torch.Generator().manual_seed(hash_of(name) + 1000 * step + part)
    return torch.randint(-127, 128, shape, generator=generator).float() / 64


def hash_of(name: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(name))


def contribute(parameter: LogicalParameter, gradient: Tensor) -> None:
    """What the backward of a linear layer does with its weight gradient."""
    assert parameter.main_grad is not None
    assert parameter.grad_ready is not None
    parameter.main_grad.add_(gradient)
    parameter.grad_ready()


class SelfAccumulating(torch.autograd.Function):
    """`x @ w.T`, whose backward adds dw to `w.main_grad` and returns None for it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        if weight.main_grad is None:
            return dy @ weight, dy.T @ x
        contribute(weight, dy.T @ x)
        return dy @ weight, None


class Toy(nn.Module):
    """Embedding (autograd gradient), norm, a linear that accumulates by itself, one used twice, one never used."""

    def __init__(self, vocab: int = 40, width: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def parameter(name: str, *shape: int) -> LogicalParameter:
            data = (torch.randn(shape, generator=generator) / 4).to(dtype)
            return LogicalParameter(data, placement_of(name, shape))

        self.table = parameter("table", vocab, width)
        self.norm = parameter("norm", width)
        self.up = parameter("up", 33, width)
        self.unused = parameter("unused", 21, width)
        self.down = parameter("down", width, 33)
        self.twice = parameter("twice", width, width)
        self.head = parameter("head", vocab, width)

    def forward(self, tokens: Tensor, *, skip_twice: bool = False) -> Tensor:
        """Sum of the token losses of `tokens [T]`, each predicting the token plus one."""
        x = self.table[tokens] * self.norm
        x = x + SelfAccumulating.apply(torch.relu(SelfAccumulating.apply(x, self.up)), self.down)
        for _ in range(0 if skip_twice else 2):
            x = x + SelfAccumulating.apply(x, self.twice)
        logits = SelfAccumulating.apply(x, self.head)
        targets = (tokens + 1) % self.head.shape[0]
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def tokens_of(step: int, part: int, count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(977 * step + part)
    return torch.randint(0, 40, (count,), generator=generator)
