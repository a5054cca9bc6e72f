"""Routers that send tokens where their addresses say: a BF16 proof of everything else.

A token whose next expert is within a rounding of its last one goes to the other as soon as a layout adds up in another
order, and then the gradients of both experts differ by as much as they are: nothing sharp could be said of a right
layout. Drawn choices leave scores, weights, losses, dispatch and experts as they are. That the choice itself does not
depend on the layout is shown in FP32 compute, where sums are made in FP64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron_fp4.layers.moe.config import Drop
from megatron_fp4.layers.moe.router import Router
from megatron_fp4.numerics.random import key_of, uniform
from megatron_fp4.precision.config import ComputeDtype
from megatron_fp4.proofs.parity import Case


def draw_choices(stages: Iterable[nn.Module], seed: int) -> None:
    """Let the routers of `stages` rank experts by a draw for each (router, token, round) instead of by their scores."""
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, Router):
                key = key_of(seed, "drawn choice", module.name)
                module.ranking = partial(drawn_ranking, key, module.config.num_experts)


def drawn_ranking(key: int, num_experts: int, address_T: Tensor) -> Tensor:
    """FP32 `[T, E]`, uniform in [0, 1)."""
    return uniform(key, address_T, torch.arange(num_experts, device=address_T.device))


def with_drawn_choices(case: Case) -> Case:
    """The case, if it is in BF16 and has experts with their choices drawn; full experts then give up the latest tokens,
    for which weight is the smallest is a matter of rounding too."""
    config, moe = case.config, case.config.model.moe
    if config.precision.compute_dtype is not ComputeDtype.bf16 or not moe.num_experts:
        return case
    if moe.capacity_factor:
        config = replace(config, model=replace(config.model, moe=replace(moe, drop=Drop.address)))
    return replace(case, config=config, prepare=draw_choices)
