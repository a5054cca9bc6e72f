"""The Mamba-2 mixer: layouts against one process, documents, initial values."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.layers.context_parallel import zigzag_index
from megatron_fp4.layers.fused.pointwise import PointwiseImpl
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.layers.mamba.convolution import causal_conv
from megatron_fp4.layers.mamba.kernels import FusedMamba, MambaKernel
from megatron_fp4.layers.mamba.mixer import Mamba2
from megatron_fp4.layers.mamba.ssd import document_starts, scan_masks, ssd_scan
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.precision import EmulatedBackend, StepClock, nvfp4_paper
from tests.helpers.distributed import mesh_for, run_distributed

B, S, HIDDEN = 2, 32, 32


@dataclass(frozen=True)
class Sizes:
    hidden: int = HIDDEN
    norm_eps: float = 1e-5
    mamba_num_heads: int = 32
    mamba_head_dim: int = 2
    mamba_num_groups: int = 2
    mamba_state: int = 16
    mamba_conv: int = 4
    mamba_chunk: int = 5
    pointwise_impl: PointwiseImpl = PointwiseImpl.torch


def make_mixer(
    mesh: ParallelMesh,
    sizes: Sizes = Sizes(),
    *,
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Mamba2:
    context = LayerContext.of(mesh, EmulatedBackend(), StepClock(seed=3), dtype, torch.device("cpu"))
    mixer = Mamba2("blocks.0.mamba", sizes, context, keep_documents_apart=packed, std=0.2, out_std=0.2, **options)
    initialize_parameters(mixer, seed=3)
    return mixer


def batch() -> tuple[Tensor, Tokens]:
    """x `[B * S, D]` and tokens; documents end inside, at the end of, and one token into a context-parallel chunk."""
    torch.manual_seed(1)
    documents = torch.tensor([[0] * 5 + [1] * 3 + [2] * 9 + [3] * 15, [7] * 16 + [8] * 1 + [9] * 15])
    columns = torch.arange(S).expand(B, S)
    tokens = Tokens(torch.arange(B * S).view(B, S), columns, documents)
    return torch.randn(B * S, HIDDEN), tokens


def run_layout(rank: int, world_size: int, tp: int, cp: int, packed: bool, quantized: bool) -> dict[str, Tensor]:
    """Output rows and gradients of this rank; gradients summed over cp as the optimizer would."""
    mesh = mesh_for(rank, world_size, tp=tp, cp=cp) if world_size > 1 else ParallelMesh.single_process()
    mixer = make_mixer(mesh, packed=packed)
    for linear in linears_of(mixer).values():
        linear.precision = nvfp4_paper() if quantized else linear.precision
    x_TD, tokens = batch()
    columns = zigzag_index(S, mesh.cp)
    local_tokens = Tokens(*(part[:, columns] for part in (tokens.address, tokens.positions, tokens.documents)))
    rows = x_TD.view(B, S, -1)[:, columns].reshape(-1, HIDDEN).chunk(tp)[mesh.tp.rank].clone().requires_grad_()
    y_TD = mixer(rows, local_tokens)
    weights = torch.sin(torch.arange(B * S * HIDDEN).float()).view(B, S, HIDDEN)[:, columns].reshape(-1, HIDDEN)
    (y_TD * weights.chunk(tp)[mesh.tp.rank]).sum().backward()
    assert rows.grad is not None
    slices = {"y": y_TD.detach(), "dx": rows.grad}
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        gradient = all_reduce_sum(parameter.grad, mesh.cp)
        for local_rows, where in parameter.placement.pieces():
            assert name.split(".")[0].split("_")[0] in where.name
            slices[where.name] = gradient[local_rows].clone()
    return slices


Layout = tuple[int, int, bool, bool]
"""tp, cp, packed, quantized."""
TWO_RANKS: list[Layout] = [(2, 1, True, False), (1, 2, True, False), (1, 2, False, False), (2, 1, True, True)]
FOUR_RANKS: list[Layout] = [(2, 2, True, False)]


def run_layouts(rank: int, world_size: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    """Results by value (a tensor's shared memory may go with its process before the parent has opened it)."""
    results = [run_layout(rank, world_size, *layout) for layout in layouts]
    return [{name: value.numpy() for name, value in result.items()} for result in results]


def compare(layout: Layout, results: list[dict[str, Any]], atol: float) -> None:
    tp, cp, packed, quantized = layout
    expected = run_layout(0, 1, 1, 1, packed, quantized)
    for rank, arrays in enumerate(results):
        slices = {name: torch.from_numpy(value) for name, value in arrays.items()}
        tp_rank, cp_rank = rank % tp, rank // tp
        columns = zigzag_index(S, Group("cp", tuple(range(cp)), cp_rank, None if cp == 1 else object()))  # type: ignore[arg-type]
        for name, whole in expected.items():
            if name in ("y", "dx"):
                part = whole.view(B, S, -1)[:, columns].reshape(-1, HIDDEN).chunk(tp)[tp_rank]
            else:
                part = whole.chunk(tp, dim=1 if name.endswith("out_proj.weight") else 0)[tp_rank]
            difference = (slices[name] - part).abs().max().item()
            assert difference <= atol * max(1.0, whole.abs().max().item()), f"{name}, {layout}, rank {rank}"
    assert set(results[0]) == set(expected)


def test_two_ranks_equal_one_process() -> None:
    """A wrong slice of heads or groups, a lost state or convolution tail between cp ranks, a gradient counted twice.

    Quantized (the last layout), a noise address or amax group that depends on the layout would be off by 0.1.
    """
    results = run_distributed(run_layouts, 2, TWO_RANKS)
    for number, layout in enumerate(TWO_RANKS):
        compare(layout, [result[number] for result in results], atol=1e-3 if layout[3] else 2e-6)
    high, low = (run_layout(0, 1, 1, 1, True, quantized)["y"] for quantized in (False, True))
    assert (high - low).abs().max() > 0.05  # the projections really are quantized


def test_four_ranks_equal_one_process() -> None:
    """Both axes at once: states must travel between ranks that hold the same heads."""
    results = run_distributed(run_layouts, 4, FOUR_RANKS)
    compare(FOUR_RANKS[0], [result[0] for result in results], atol=2e-6)


def test_documents_do_not_see_each_other() -> None:
    """Changing the first document must not change the others: neither through the state nor the convolution."""
    mixer = make_mixer(ParallelMesh.single_process())
    x_TD, tokens = batch()
    changed = x_TD.view(B, S, -1).clone()
    changed[0, :5] += 1.0
    before, after = (mixer(part.reshape(-1, HIDDEN), tokens).view(B, S, -1) for part in (x_TD, changed))
    assert (before[0, :5] != after[0, :5]).any()
    torch.testing.assert_close(before[0, 5:], after[0, 5:], rtol=0, atol=0)
    leaky = make_mixer(ParallelMesh.single_process(), packed=False)
    before, after = (leaky(part.reshape(-1, HIDDEN), tokens).view(B, S, -1) for part in (x_TD, changed))
    assert (before[0, 5] != after[0, 5]).any()  # with documents together the sample is one sequence


def test_initial_values() -> None:
    """Decay rates and steps are in Mamba-2's ranges however many heads there are; only matrices decay."""
    mixer = make_mixer(ParallelMesh.single_process(), replace(Sizes(), mamba_num_heads=128))
    rates = mixer.A_log.exp()
    assert rates.min() >= 0.999
    assert rates.max() <= 16.001, "a head of a large layer forgets faster than any of Mamba-2's"
    assert abs(rates.mean() - 8.5) < 1.2, "uniform: the mean of 128 draws is 8.5 +- 0.4"
    assert abs(rates.std() - 15 / 12**0.5) < 0.6
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert steps.log().std() > 0.8  # log-uniform over two decades has 1.33
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    assert mixer.conv_weight.abs().max() <= 0.5
    decays = {name for name, p in mixer.named_parameters() if p.placement.decay}
    assert decays == {"in_proj.weight", "out_proj.weight", "conv_weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_numbers_of_a_head_are_kept_in_fp32(dtype: torch.dtype) -> None:
    """In BF16 the step sizes would be off by up to 1.6 %, and small updates would be lost in the forward pass."""
    mixer = make_mixer(ParallelMesh.single_process(), dtype=dtype)
    kept = {name for name, parameter in mixer.named_parameters() if parameter.dtype == torch.float32}
    assert kept >= {"A_log", "dt_bias", "D"}
    assert (len(kept) == 3) == (dtype == torch.bfloat16), "the others are in the compute dtype"
    x_TD, tokens = batch()
    exact = make_mixer(ParallelMesh.single_process(), dtype=torch.float32)
    for name in ("A_log", "dt_bias", "D"):
        assert torch.equal(getattr(mixer, name), getattr(exact, name)), f"{name} is rounded"
    y_TD = mixer(x_TD.to(dtype).requires_grad_(), tokens)
    assert y_TD.dtype == dtype
    y_TD.float().square().sum().backward()
    assert mixer.dt_bias.grad is not None
    assert mixer.dt_bias.grad.dtype == torch.float32


def test_groups_that_do_not_divide_are_refused_with_the_numbers() -> None:
    tp = Group("tp", (0, 1, 2, 3), 0, object())  # type: ignore[arg-type]
    mesh = replace(ParallelMesh.single_process(), tp=tp, tp_cp=tp)
    with pytest.raises(ValueError, match=re.escape("model.mamba_num_groups = 2 is not divisible by tp = 4")):
        make_mixer(mesh)


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_get_what_they_expect(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of the packages: shapes, order, document numbers, and no projection weight."""

    def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, activation: str) -> Tensor:
        assert activation == "silu"
        before = x.new_zeros(x.shape[0], 3, x.shape[1])
        numbers = None if seq_idx is None else torch.cat([seq_idx[:, :1].expand(-1, 3), seq_idx], dim=1)
        return causal_conv(x.transpose(1, 2), before, weight, bias, numbers).transpose(1, 2)

    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, seq_idx: Tensor | None
    ) -> Tensor:
        assert seq_idx is None or seq_idx.dtype == torch.int32
        starts = None if seq_idx is None else document_starts(seq_idx)
        return ssd_scan(x, dt, A, B, C, chunk=chunk_size, masks=scan_masks(starts, chunk_size, x.device))[0]

    conv, scan = ModuleType("causal_conv1d"), ModuleType("mamba_ssm.ops.triton.ssd_combined")
    conv.causal_conv1d_fn, scan.mamba_chunk_scan_combined = causal_conv1d_fn, mamba_chunk_scan_combined  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, conv.__name__, conv)
    monkeypatch.setitem(sys.modules, scan.__name__, scan)
    x_TD, tokens = batch()
    expected = make_mixer(ParallelMesh.single_process(), packed=packed)(x_TD, tokens)
    mixer = make_mixer(ParallelMesh.single_process(), packed=packed)
    mixer._fused = FusedMamba(torch.device("cuda"), cp_size=1)
    torch.testing.assert_close(mixer(x_TD, tokens), expected, rtol=0, atol=1e-6)


def test_absent_kernels_are_an_error_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="mamba_kernel=torch"):
        make_mixer(ParallelMesh.single_process(), kernel=MambaKernel.mamba_ssm)
