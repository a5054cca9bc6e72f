"""Formats of optimizer state that the implementation or the layout cannot have, or that nothing has.

Beside them, patterns of parameters that fit no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatron_fp4.models.count import logical_shapes, model_parameters
from megatron_fp4.optim.config import Algorithm, Impl, MainGradFormat
from megatron_fp4.optim.kept.choice import check_whole_blocks, moment_formats
from megatron_fp4.optim.kept.config import BLOCK, MasterFormat, MomentFormat
from megatron_fp4.optim.muon.choice import check_patterns
from megatron_fp4.train.config import RunConfig

LEAST_SCALE = 0.5
"""Of a loss beside another whose gradients are added in BF16 in the same tensor: one of its 8 bits is lost."""


def check_optimizer_state(config: RunConfig) -> None:
    """Raises ValueError for state that is not FP32 with another implementation than torch's, for cut blocks, and for a
    first moment too coarse for the second one."""
    optim = config.optim
    compact = {"optim.master": optim.master.name} if optim.master is not MasterFormat.fp32 else {}
    adamws = {"optim.moments.first": optim.moments.first, "optim.moments.second": optim.moments.second}
    compact |= {key: format.name for key, format in adamws.items() if format is not MomentFormat.fp32}
    if optim.impl is not Impl.torch and compact:
        key, value = next(iter(compact.items()))
        raise ValueError(
            f"{key}={value} with optim.impl={optim.impl.name}, whose kernel updates FP32 masters and moments in place;"
            f" set optim.impl=torch, or {key}=fp32"
        )
    first, second = optim.moments.first, optim.moments.second
    if first is MomentFormat.int8 and second is not MomentFormat.int8:
        raise ValueError(
            f"optim.moments.first=int8 with optim.moments.second={second.name}: a mean far below the largest of its"
            f" {BLOCK} elements is kept as 0 or as 1/127 of that, and divided by the root of a second moment that is"
            " finer, so that steps become many learning rates long; set optim.moments.first=fp8, which takes as many"
            " bytes, or optim.moments.second=int8"
        )
    for parameter in model_parameters(config.model):
        formats = moment_formats(parameter.name, parameter.shape, optim).values()
        if parameter.sharded == 1 and any(format.in_blocks for format in formats):
            check_whole_blocks(parameter.name, parameter.shape[1], config.parallel.tp)


def check_main_grads(config: RunConfig) -> None:
    """Raises ValueError for BF16 sums of gradients of very different losses, each of which is added for itself."""
    mtp, model = config.model.mtp, config.model
    if config.optim.main_grads is MainGradFormat.fp32 or not mtp.depth:
        return
    scale, distillation = mtp.loss_scale / mtp.depth, config.train.distillation
    own = 1.0 - distillation.weight if distillation.teacher else 1.0  # a divergence vanishes where two models agree
    if LEAST_SCALE * own <= scale <= own / LEAST_SCALE:
        return
    tables = "embedding.weight" if model.tied_embeddings else "embedding.weight and head.weight"
    teacher = " beside the divergence from a teacher, which may vanish (1 - train.distillation.weight)"
    lost = f"{abs(math.log2(scale / own)):.1f}" if own and scale else "all"
    raise ValueError(
        f"optim.main_grads=bf16: {tables} get gradients of the next token's loss, of scale {own:g}"
        f"{teacher if distillation.teacher else ''}, and of {mtp.depth} further loss(es), of scale {scale:.3g}"
        f" (model.mtp.loss_scale / depth), one added to the other; of the 8 bits of BF16 the smaller lose {lost};"
        " set optim.main_grads=fp32, or model.mtp.depth=0"
    )


def check_muon(config: RunConfig) -> None:
    """Raises ValueError for a pattern of `optim.muon.adamw_for` that fits no weight."""
    check_patterns(logical_shapes(config.model), config.optim)


def idle_formats(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Formats of optimizer state that no tensor has."""
    if config.precision.compute_dtype.torch_dtype == torch.float32:
        yield "optim.main_grads", "precision.compute_dtype=fp32: gradients are summed in FP64"
        yield "optim.master", "precision.compute_dtype=fp32: the weights are the masters"
    kept = [moment_formats(name, shape, config.optim) for name, shape in logical_shapes(config.model).items()]
    settings = {"exp_avg": "first", "exp_avg_sq": "second", "momentum": "muon"}
    for kind, format in config.optim.moments.by_kind.items():
        if kind == "momentum" and config.optim.algorithm is not Algorithm.muon:
            yield "optim.moments.muon", f"optim.algorithm={config.optim.algorithm.name}"
        elif format.in_blocks and not any(formats.get(kind) is format for formats in kept):
            reason = f"no matrix with such a moment has rows of a multiple of {BLOCK}, which {format.name} takes"
            yield f"optim.moments.{settings[kind]}", reason
