"""What the planner counts on the meta device is, to the byte, what real layers keep on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.layers.mlp import MLP
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Decoder, Recompute, whole_model
from megatron_fp4.optim import OptimConfig
from megatron_fp4.planning import footprint
from megatron_fp4.planning.footprint import LiveBytes, stage_footprint
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision import EmulatedBackend, StepClock
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.wgrad import WgradPlan
from megatron_fp4.train.engine import TokenLoss
from tests.helpers.distributed import mesh_for, run_distributed
from tests.models.test_count import load
from tests.planning.test_memory import table_of

BATCH, LENGTH = 2, 128


def real_forward(
    config: ModelConfig,
    mesh: ParallelMesh,
    settings: RankSettings,
    *,
    defers_wgrad: bool = False,
    backend: Backend | None = None,
) -> tuple[Callable[[], Tensor], list[Tensor], LayerContext]:
    """A forward pass with its loss on the CPU, that has run once; the tensors that existed before it; its context."""
    wgrad = WgradPlan.deferred if defers_wgrad else WgradPlan.now
    backend = backend or EmulatedBackend()
    context = LayerContext.of(mesh, backend, StepClock(0), settings.dtype, torch.device("cpu"), wgrad=wgrad)
    model = Decoder(
        config,
        context,
        whole_model(config),
        keep_documents_apart=settings.keep_documents_apart,
        recompute=settings.recompute,
    )
    initialize_parameters(model, 0)
    for linear in linears_of(model).values():
        linear.precision = settings.precision(linear.name)
        linear.weight.main_grad = torch.zeros(linear.weight.shape)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    ids = torch.zeros(BATCH, LENGTH // mesh.cp.size, dtype=torch.int64)
    address = torch.arange(ids.numel()).view_as(ids)
    loss = TokenLoss(config.vocab_size, mesh.tp)

    def forward() -> Tensor:
        return loss(model(ids, address, ids, ids), ids, 1.0)

    forward()
    return forward, [*model.parameters(), ids, address], context


def settings_for(config: ModelConfig, *, quantized: bool = False, **choices: Any) -> RankSettings:
    table = table_of(config, quantized=quantized)
    return RankSettings(micro_batch=BATCH, seq_length=LENGTH, on_gpu=False, table=table, **choices)


def planned(config: ModelConfig, settings: RankSettings) -> footprint.Footprint:
    return stage_footprint(config, whole_model(config), settings)


def test_selective_recomputation_is_worth_its_name() -> None:
    """Of a squared-ReLU MLP only what enters the activation is kept, not its result too: the input of `down`."""
    config = replace(load("hybrid_tiny"), pattern="--", num_layers=2, vocab_size=1024)
    for quantized in (False, True):
        none, selective = (
            planned(config, settings_for(config, quantized=quantized, recompute=mode)).kept
            for mode in (Recompute.none, Recompute.selective)
        )
        one_per_block = len(config.blocks) * BATCH * LENGTH * config.ffn_hidden * 2
        assert none - selective == one_per_block, f"{none} -> {selective}"
    hybrid = replace(load("hybrid_tiny"), vocab_size=1024)
    none, selective = (
        planned(hybrid, settings_for(hybrid, recompute=mode)).kept for mode in (Recompute.none, Recompute.selective)
    )
    assert selective < 0.95 * none


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("kind", ["bf16", "nvfp4", "fp32"])
@pytest.mark.parametrize("recompute", list(Recompute), ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ["gpt_tiny", "hybrid_tiny"])
def test_kept_to_the_byte(
    name: str, recompute: Recompute, kind: str, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is alive after a real forward pass; and by what autograd says that it saves, each storage once.

    It does not say that recomputation keeps the tables of its tokens.
    """
    config = replace(load(name), vocab_size=1024, dropout=0.1)
    settings = settings_for(
        config,
        quantized=kind == "nvfp4",
        recompute=recompute,
        keep_documents_apart=documents,
        dtype=torch.float32 if kind == "fp32" else torch.bfloat16,
    )
    forward, earlier, _ = real_forward(config, ParallelMesh.single_process(), settings)
    with LiveBytes() as live:
        graph = forward().grad_fn
        alive = live.now
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def once(tokens: Tokens, key: Hashable, make: Callable[[], Any]) -> Any:
        table = make_once(tokens, key, make)
        saved.update((storage._cdata, storage) for storage in footprint._storages(table))
        return table

    make_once = Tokens.once
    with saved_tensors_hooks(pack, lambda tensor: tensor), monkeypatch.context() as patched:
        patched.setattr(Tokens, "once", once)
        loss = forward()
    for tensor in earlier:
        saved.pop(tensor.untyped_storage()._cdata, None)
    assert planned(config, settings).kept == alive
    if recompute is not Recompute.selective:  # which has hooks of its own, of which torch tells ours nothing
        assert alive == sum(storage.nbytes() for storage in saved.values())
    del graph, loss


def kept_on_rank(rank: int, world_size: int, config: ModelConfig, settings: RankSettings) -> int:
    forward, _, _ = real_forward(config, mesh_for(rank, world_size, tp=2, cp=2), settings)
    with LiveBytes() as live:
        graph = forward().grad_fn
        alive = live.now
    del graph
    return alive


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_kept_under_a_layout(documents: bool) -> None:
    """On the first rank of a real mesh, whose collectives return what the drawn ones say."""
    config = replace(load("hybrid_tiny"), vocab_size=1023, tied_embeddings=True)
    settings = settings_for(config, quantized=True, tp=2, cp=2, keep_documents_apart=documents)
    ranks = run_distributed(kept_on_rank, 4, config, settings)
    assert planned(config, settings).kept == ranks[0]


def test_deferred_weight_gradients() -> None:
    """What a queue holds after the backward pass: the operands of every linear, and nothing else."""
    config = replace(load("gpt_tiny"), vocab_size=1024)
    settings = settings_for(config, defers_wgrad=True)
    forward, _, context = real_forward(config, ParallelMesh.single_process(), settings, defers_wgrad=True)
    with LiveBytes() as live:
        forward().backward()
        waiting = live.now
        assert context.queue is not None
        context.queue.drain()
        assert live.now == 0
    assert planned(config, settings).deferred == waiting > 0
    assert planned(config, replace(settings, defers_wgrad=False)).deferred == 0


class Stash(torch.autograd.Function):
    """Keeps a tensor where autograd does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.stash = x.clone()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy * ctx.stash


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_masks_and_angles_are_kept_once_for_all_layers(recompute: Recompute) -> None:
    """A mask is as many numbers of the compute dtype as queries times keys; it was kept anew in every layer."""
    config = replace(load("gpt_tiny"), vocab_size=1024)
    deep = replace(config, pattern=3 * config.pattern, num_layers=3 * config.num_layers)
    masks, angles = BATCH * LENGTH**2 * 2, BATCH * LENGTH * config.rotary_dim * 4
    for model in (config, deep):
        apart, together = (
            planned(model, settings_for(model, recompute=recompute, keep_documents_apart=choice))
            for choice in (True, False)
        )
        assert sum(together.tables.values()) == angles
        assert sum(apart.tables.values()) == masks + angles
        assert apart.kept - together.kept == masks


def test_a_stash_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that a Function keeps on its context without `save_for_backward`."""
    config = replace(load("gpt_tiny"), vocab_size=1024)
    settings = settings_for(config)
    before = planned(config, settings).kept
    activate = MLP._activate
    monkeypatch.setattr(MLP, "_activate", lambda self, h_TF: activate(self, Stash.apply(h_TF)))
    footprint._footprint.cache_clear()
    try:
        stashed = planned(config, settings).kept - before
    finally:
        footprint._footprint.cache_clear()
    assert stashed == len(config.blocks) * BATCH * LENGTH * config.ffn_hidden * 2


def test_what_a_gpu_keeps() -> None:
    """A fused norm keeps its FP32 input, those of packages the BF16 one; Transformer Engine its operands' codes."""
    config = replace(load("gpt_tiny"), vocab_size=1024)
    tokens, hidden, norms = BATCH * LENGTH, config.hidden, 2 * len(config.blocks) + 1
    on_cpu = settings_for(config, quantized=True)
    on_gpu = replace(on_cpu, on_gpu=True)
    kept = planned(config, on_gpu).kept
    assert planned(config, on_cpu).kept - kept == norms * tokens * hidden * 4, "the normalised input"
    by_te = replace(config, norm_impl=NormImpl.te)
    weights = norms * hidden * 4  # ours are multiplied as FP32 copies
    assert kept - planned(by_te, on_gpu).kept == norms * tokens * hidden * (4 - 2) + weights
    fused = replace(config, loss_impl=LossImpl.te)
    ours = tokens * (4 + 4 + 8 + 1 + 1)  # the largest logit, the sum of exponentials, int64 labels and two masks
    assert kept - planned(fused, on_gpu).kept == ours, "both keep the logits in BF16, ours and theirs a copy"
    coded = replace(on_gpu, backend=BackendName.transformer_engine)
    linears = [info for info in model_linears(config) if info.name != "head"]
    inputs = sum(info.in_features for info in linears) * tokens
    amaxes = 4 * len(linears)  # of the dequantized copies; those of codes are not counted
    shared = len(config.blocks) * tokens * hidden * 2  # attention keeps its output for itself
    assert kept - planned(config, coded).kept == inputs * (2 - 0.5625) + amaxes - shared


def test_kinds_of_blocks_are_counted_once() -> None:
    """62 blocks of the 12B in seconds: a run for each letter and precision, none for another layout of equal sizes."""
    config = load("nemotron_h_12b")
    settings = RankSettings(tp=8, table=table_of(config, quantized=True))
    footprint._footprint.cache_clear()
    whole = planned(config, settings)
    assert footprint._footprint.cache_info().misses == 5, "M, * and -, embedding, head"
    other = planned(config, replace(settings, dp=64, num_microbatches=8, optim=OptimConfig(bucket_mib=4.0)))
    assert (other.kept, other.peak) == (whole.kept, whole.peak)
    assert other.last > whole.last == whole.peak, "sums of gradients arrive"
    assert footprint._footprint.cache_info().misses == 5


def test_live_bytes() -> None:
    """Views count nothing, neither of earlier tensors nor of new ones; what dies is taken off, the peak stays."""
    earlier = torch.zeros(8, 8)
    with LiveBytes() as live:
        view = earlier.T
        assert live.now == 0
        new = view + 1.0
        rows = new[:4]
        earlier.add_(1.0)
        assert live.now == 256
        del new, rows
        assert (live.now, live.peak) == (0, 256)
