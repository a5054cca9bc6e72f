"""Whether what a configuration names can run on this machine: refused before any rank does work.

The check is the smallest instance. The backend, the optimizer, a norm and a loss are made as the run will make them, on
one small tensor, so a missing package, a version without a feature or a GPU of another kind says at start what it would
have said in `build`. What needs no machine (`check_choices`) is refused by `plan` too.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.fused.loss import LossImpl, choose_cross_entropy
from megatron_fp4.layers.fused.norm import fused_norm
from megatron_fp4.layers.fused.pointwise import check_pointwise
from megatron_fp4.layers.mamba.kernels import FusedMamba, MambaKernel
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.optim.adam import choose_adamw
from megatron_fp4.optim.config import Impl
from megatron_fp4.optim.groups import AdamTensors, UpdateGroup
from megatron_fp4.precision.backends.choose import check_backend_device, make_backend
from megatron_fp4.precision.config import BackendName, ComputeDtype
from megatron_fp4.train.config import RunConfig


def check_choices(config: RunConfig) -> None:
    """Raises ValueError for a fused kernel that has no meaning in this configuration, on whatever machine."""
    if config.train.label_smoothing and config.model.loss_impl is LossImpl.te:
        raise ValueError(
            f"train.label_smoothing = {config.train.label_smoothing} with model.loss_impl=te, whose smoothing over"
            " vocabulary parts was never compared with ours; set model.loss_impl=torch, or train.label_smoothing=0"
        )
    recipes = config.precision.recipes.items()
    redrawn = [name for name, recipe in recipes if any(operand.stochastic for operand in recipe.fprop.operands)]
    by_te = config.precision.backend is BackendName.transformer_engine
    if by_te and redrawn and config.train.recompute is Recompute.full:
        raise ValueError(
            f"train.recompute=full with precision.backend=transformer_engine and precision recipe {redrawn[0]}, whose"
            " Fprop rounds stochastically: Transformer Engine draws other bits when a block is computed again, so the"
            " backward pass would be that of other activations; set train.recompute=selective, round fprop to nearest,"
            " or use precision.backend=emulated, whose noise has an address"
        )
    if config.precision.compute_dtype is ComputeDtype.fp32:
        for name, impl in _implementations(config).items():
            if name.startswith("model.") and impl != "torch":
                raise ValueError(
                    f"{name}={impl} with precision.compute_dtype=fp32, the proof mode, whose sums are made in FP64 and"
                    f" rounded once: its kernel does not; set {name}=torch, or precision.compute_dtype=bf16"
                )


def check_machine(config: RunConfig, device: torch.device) -> None:
    """Raises ValueError with the remedy for packages, their versions, this rank's GPU. Makes nothing lasting."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if config.precision.backend is not BackendName.auto:  # whose backends are tried when the ranks have met
            make_backend(config.precision)
        check_kernels(config, device)


def check_kernels(config: RunConfig, device: torch.device) -> None:
    """Raises ValueError with the remedy if a fused kernel that is named cannot run on `device`, this rank's."""
    for name, impl in _implementations(config).items():
        if impl != "torch" and device.type != "cuda":
            raise ValueError(f"{name}={impl} has CUDA kernels only, but this run is on {device}; set {name}=torch")
    check_pointwise(config.model.pointwise_impl, device)
    check_backend_device(config.precision.backend, device)
    model = config.model
    elements = AdamTensors.start(torch.zeros(64, device=device), torch.zeros(64, device=device))
    choose_adamw([UpdateGroup(0.0, [elements])], config.optim)
    weight = nn.Parameter(torch.ones(64, device=device, dtype=config.precision.compute_dtype.torch_dtype))
    fused_norm(model.norm_impl, weight, model.norm_eps)
    choose_cross_entropy(model.loss_impl, model.vocab_size, Group.single(), config.train.label_smoothing)
    if "M" in model.letters and model.mamba_kernel is not MambaKernel.torch:
        FusedMamba(device, config.parallel.cp)


def by_torch(config: RunConfig) -> RunConfig:
    """The same run, all of it computed by torch: for commands that work on a CPU whatever the run itself uses.

    The emulated backend makes the operands that the other backends make (docs/transformer_engine.md).
    """
    optim, precision = replace(config.optim, impl=Impl.torch), config.precision
    if precision.backend is not BackendName.reference:
        precision = replace(precision, backend=BackendName.emulated)
    return replace(config, model=config.model.by_torch(), optim=optim, precision=precision)


def _implementations(config: RunConfig) -> dict[str, str]:
    chosen = {
        "optim.impl": config.optim.impl,
        "model.norm_impl": config.model.norm_impl,
        "model.loss_impl": config.model.loss_impl,
    }
    return {name: impl.name for name, impl in chosen.items()}
