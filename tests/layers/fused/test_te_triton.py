"""The real cross-entropy of five versions of Transformer Engine under our adapter, without a GPU.

Its Triton kernels are interpreted on the CPU, its Python sources come from the wheels. Triton comes with CUDA builds of
torch only, so on a CPU build this is skipped. In FP32: Triton's interpreter cannot fill a BF16 block.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_fp4.layers.fused.loss import LossImpl, choose_cross_entropy
from megatron_fp4.layers.loss import IGNORE
from tests.helpers.distributed import run_distributed, world_group
from tests.precision.te.te_wheels import WHEELS, wheel

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

TOKENS, VOCABULARY = 12, 96
LABELS = torch.tensor([0, 95, 47, IGNORE, 48, 12, 90, IGNORE, 3, 4, 70, 71])


def _modules(root: str) -> dict[str, types.ModuleType]:
    """Packages of Transformer Engine whose own `__init__`, which loads its library, is not run."""
    modules = {}
    for name in ("", "pytorch", "pytorch.triton", "common", "common.triton"):
        full = ".".join(["transformer_engine", name]).strip(".")
        modules[full] = types.ModuleType(full)
        modules[full].__path__ = [f"{root}/{full.replace('.', '/')}"]
    jit = modules["transformer_engine.pytorch.jit"] = types.ModuleType("transformer_engine.pytorch.jit")
    jit.no_torch_dynamo = lambda *_, **__: lambda function: function  # type: ignore[attr-defined]
    return modules


def _losses(rank: int, world_size: int, root: str) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient of this rank's logits), by torch and by Transformer Engine."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, in this process
    sys.modules.update(_modules(root))
    whole = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4
    tp, losses = world_group(rank, world_size), []
    for impl in (LossImpl.torch, LossImpl.te):
        local = whole.chunk(world_size, 1)[rank].clone().requires_grad_()
        logits = local * 1.0
        with pytest.MonkeyPatch.context() as patch:
            if impl is LossImpl.te:
                patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
            loss = choose_cross_entropy(impl, VOCABULARY, tp)(logits, LABELS)
            (loss.sum() * 0.125).backward()
        assert local.grad is not None
        losses.append((loss.detach(), local.grad))
    return losses


@pytest.mark.parametrize("version", WHEELS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_real_function_computes_our_loss(version: str, world_size: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel(version)) as archive:
        archive.extractall(tmp_path)
    for (loss, gradient), (fused_loss, fused_gradient) in run_distributed(_losses, world_size, str(tmp_path)):
        torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused_gradient, gradient, rtol=1e-4, atol=1e-7)
