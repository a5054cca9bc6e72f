"""The update kernels: torch's against its own optimizer, and the adapters for Apex and Transformer Engine."""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_fp4.optim.adam import TorchAdamW, choose_adamw
from megatron_fp4.optim.config import Impl, OptimConfig
from megatron_fp4.optim.groups import AdamTensors, UpdateGroup
from megatron_fp4.optim.layout import ALIGN


def state_of(numel: int) -> tuple[Tensor, ...]:
    """(master, gradient, exp_avg, exp_avg_sq)"""
    generator = torch.Generator().manual_seed(numel)
    master, grad, exp_avg = (torch.randn(numel, generator=generator) for _ in range(3))
    return master, grad, exp_avg, torch.rand(numel, generator=generator)


def group_of(state: tuple[Tensor, ...], cuts: list[int]) -> UpdateGroup:
    whole = AdamTensors(*state)
    return UpdateGroup(0.1, [whole.narrow(low, high - low) for low, high in pairwise(cuts)])


@pytest.mark.parametrize("numel", [64, 1003, 100_003])
def test_cuts_at_aligned_elements_change_no_bit(numel: int) -> None:
    whole, cut = state_of(numel), state_of(numel)
    TorchAdamW([group_of(whole, [0, numel])], OptimConfig()).update(1e-3, 7)
    cuts = sorted({0, *range(ALIGN, numel, 17 * ALIGN), *range(ALIGN, min(numel, 5 * ALIGN), ALIGN), numel})
    TorchAdamW([group_of(cut, cuts)], OptimConfig()).update(1e-3, 7)
    for name, a, b in zip(("master", "grad", "exp_avg", "exp_avg_sq"), whole, cut, strict=True):
        assert torch.equal(a, b), f"{name}: sharding changes the update"


@pytest.mark.parametrize("impl", [Impl.torch, Impl.apex])
def test_cautious_decay_is_taken_where_the_update_and_the_weight_agree(
    impl: Impl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against AdamW without decay from weights of which the decay was taken by hand."""
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam=FakeFusedAdam))
    config = OptimConfig(impl=impl, cautious_decay=True)
    state, plain, by_hand = state_of(512), state_of(512), state_of(512)
    for tensors in (state, plain, by_hand):
        tensors[2][:8], tensors[1][:8] = 0.0, 0.0  # no update: these decay
        tensors[0][8:16] = 0.0
    master, grad, exp_avg, _ = by_hand
    mean = 0.9 * exp_avg + 0.1 * grad
    agree = mean * master >= 0
    assert 150 < int(agree.sum()) < 350
    master[agree] *= 1 - 1e-2 * 0.1
    choose_adamw([group_of(state, [0, 128, 512])], config).update(1e-2, 7)
    TorchAdamW([UpdateGroup(0.0, group_of(by_hand, [0, 512]).members)], OptimConfig()).update(1e-2, 7)
    TorchAdamW([group_of(plain, [0, 512])], OptimConfig()).update(1e-2, 7)
    for name, ours, expected in zip(("master", "grad", "exp_avg", "exp_avg_sq"), state, by_hand, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.allclose(state[0], plain[0], rtol=1e-5)


class FakeFusedAdam(torch.optim.AdamW):
    """The interface that Apex and Transformer Engine share: a step number per group, two moments per parameter."""

    def __init__(self, params: list[Tensor], *, adam_w_mode: bool, **options: object) -> None:
        assert adam_w_mode
        super().__init__(params, fused=True, **options)  # type: ignore[arg-type]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        group["step"] = group.get("step", 0) + 1
        for parameter in group["params"]:
            assert set(self.state[parameter]) >= {"exp_avg", "exp_avg_sq"}, "it would make moments of its own"
            self.state[parameter]["step"] = torch.tensor(float(group["step"] - 1))
        super().step()


@pytest.mark.parametrize(
    ("impl", "module"), [(Impl.apex, "apex.optimizers"), (Impl.te, "transformer_engine.pytorch.optimizers")]
)
def test_adapters_update_our_own_state(impl: Impl, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType(module)
    fake.FusedAdam = FakeFusedAdam  # type: ignore[attr-defined]
    parents = [module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)]
    for parent in parents:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, fake)
    reference, adapted = state_of(256), state_of(256)
    config = OptimConfig(impl=impl)
    empty = UpdateGroup(0.0)
    adamw = choose_adamw([group_of(adapted, [0, 64, 256]), empty], config)
    torch_adamw = TorchAdamW([group_of(reference, [0, 64, 256]), empty], config)
    for step, lr in ((5, 1e-3), (6, 2e-3)):
        adamw.update(lr, step)
        torch_adamw.update(lr, step)
    for name, a, b in zip(("master", "grad", "exp_avg", "exp_avg_sq"), reference, adapted, strict=True):
        assert torch.equal(a, b), f"{name}: wrong step number, rate or state"


@pytest.mark.parametrize(
    ("impl", "remedy"), [(Impl.apex, "build NVIDIA Apex"), (Impl.te, "install transformer-engine")]
)
def test_absent_package_is_refused_with_the_remedy(impl: Impl, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("apex.optimizers", "transformer_engine.pytorch.optimizers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"optim\.impl={impl.name}.*{remedy}.*optim\.impl=torch"):
        choose_adamw([group_of(state_of(64), [0, 64])], OptimConfig(impl=impl))
