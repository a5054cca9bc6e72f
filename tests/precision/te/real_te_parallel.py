"""Part of real_te_check.py: real column- and row-parallel `te.Linear` with sequence parallelism, on two gloo ranks.

Shows what `te_recipe` says of `amax_scope: shard`: it is what TE's modules do. Inputs of a column-parallel linear and
gradients of a row-parallel one are sequence shards, whose amax TE takes over the group; everything else is local. In
the emulation the former are gathered first, so that all of them are this rank's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.precision import te_cases, te_on_cpu

te_on_cpu.patch_cuda()

from megatron_fp4.comm.bootstrap import Process  # noqa: E402
from megatron_fp4.comm.local import run_local  # noqa: E402
from megatron_fp4.precision import te_recipe  # noqa: E402

NAME, RANKS = te_cases.TENSOR_PARALLEL, te_cases.RANKS


def run_tensor_parallel(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Per rank: y and dx as shards of the rows, and the gradients of its part of the two weights."""
    return run_local(_rank, RANKS, tensors)


def _rank(process: Process, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A column-parallel linear, relu^2, and a row-parallel one."""
    import transformer_engine.pytorch as te

    te_on_cpu.patch_kernels()
    group, rank = process.world.process_group, process.launch.rank
    shards = {name: value.chunk(RANKS)[rank].contiguous() for name, value in tensors.items() if name in ("x", "dy")}
    weights = {"w0": tensors["w0"].chunk(RANKS)[rank], "w1": tensors["w1"].chunk(RANKS, 1)[rank]}
    settings = {
        "bias": False,
        "params_dtype": torch.bfloat16,
        "device": "cpu",
        "sequence_parallel": True,
        "tp_group": group,
        "tp_size": RANKS,
    }
    modules = []
    for name, mode, (key, weight) in zip(
        te_cases.names(te_cases.CASES[NAME]), ("column", "row"), weights.items(), strict=True
    ):
        N, K = tensors[key].shape
        modules.append(te.Linear(K, N, parallel_mode=mode, name=name, **settings))
        modules[-1].weight.data.copy_(weight)
    with te.autocast(enabled=True, recipe=te_recipe(te_cases.plan(NAME))):
        return te_cases.forward_backward(shards, modules, [module.weight for module in modules])
