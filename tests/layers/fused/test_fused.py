"""Norm and cross-entropy of Transformer Engine and Apex, on stand-ins: what they are given, and what comes back."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers import lab
from megatron_fp4.layers.fused.loss import LossImpl, choose_cross_entropy
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.loss import IGNORE
from megatron_fp4.layers.norm import RMSNorm
from megatron_fp4.layers.parameter import initialize_parameters
from tests.helpers.distributed import run_distributed, world_group
from tests.layers.fused import fused_standins

HIDDEN, TOKENS, VOCABULARY = 48, 10, 32


def norm(impl: NormImpl) -> RMSNorm:
    return RMSNorm("some_norm", HIDDEN, lab(seed=1, dtype=torch.bfloat16), eps=1e-3, impl=impl)


def through(module: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw of a norm whose weight is not all ones, with a large eps."""
    random = torch.Generator().manual_seed(3)
    x = (torch.randn(TOKENS, HIDDEN, generator=random) * 0.05).bfloat16().requires_grad_()
    initialize_parameters(module, seed=1)
    with torch.no_grad():
        module.weight.copy_(torch.rand(HIDDEN, generator=random) + 0.5)
    y = module(x)
    y.backward(torch.randn(TOKENS, HIDDEN, generator=random).bfloat16())
    assert x.grad is not None
    assert module.weight.grad is not None, "the gradient went to another weight"
    return y.detach(), x.grad, module.weight.grad


@pytest.mark.parametrize("impl", [NormImpl.te, NormImpl.apex])
def test_a_fused_norm_computes_on_our_weight(impl: NormImpl, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_standins.install(monkeypatch)
    module = norm(impl)
    assert [name for name, _ in module.named_parameters()] == ["weight"], "a second weight would be trained and saved"
    for name, fused, own in zip(("y", "dx", "dw"), through(module), through(norm(NormImpl.torch)), strict=True):
        assert torch.equal(fused, own), f"{name}: another weight or eps"
        assert fused.dtype == torch.bfloat16


LABELS = torch.tensor([0, 31, 15, 16, IGNORE, 7, 8, 23, 24, IGNORE])


def _losses(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient of this rank's logits), by Transformer Engine's stand-in and by torch."""
    tp, losses = world_group(rank, world_size), []
    whole = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4
    weights = torch.arange(1.0, TOKENS + 1)
    with pytest.MonkeyPatch.context() as patch:
        fused_standins.install(patch)
        for impl in (LossImpl.te, LossImpl.torch):
            compute = choose_cross_entropy(impl, VOCABULARY, tp)
            local = whole.chunk(world_size, 1)[rank].clone().requires_grad_()
            loss = compute(local * 1.0, LABELS)  # a result, as logits are: TE 2.10 writes over it
            (loss.sum() * 0.5 + (loss * weights).sum()).backward()
            assert local.grad is not None
            losses.append((loss.detach(), local.grad))
            second = local.detach().clone().requires_grad_()
            compute(second * 1.0, LABELS).sum().backward()  # the gradient of a sum is an expanded scalar
    return losses


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_fused_loss_is_the_loss(world_size: int) -> None:
    ranks = [_losses(0, 1)] if world_size == 1 else run_distributed(_losses, world_size)
    for (fused_loss, fused_gradient), (loss, gradient) in ranks:
        torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused_gradient, gradient, rtol=1e-5, atol=1e-6)
        assert fused_loss.shape == (TOKENS,)
        assert fused_loss.dtype == torch.float32


def test_absent_packages_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("transformer_engine", "apex", "transformer_engine.pytorch", "apex.normalization"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"norm_impl=te.*install transformer-engine.*norm_impl=torch"):
        norm(NormImpl.te)
    with pytest.raises(ValueError, match=r"norm_impl=apex.*build NVIDIA Apex.*norm_impl=torch"):
        norm(NormImpl.apex)
    with pytest.raises(ValueError, match=r"loss_impl=te.*install transformer-engine.*loss_impl=torch"):
        choose_cross_entropy(LossImpl.te, VOCABULARY, Group.single())
