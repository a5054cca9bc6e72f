"""`model.norm_impl` and `model.loss_impl` reach every norm and the loss, and change no parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.fused.pointwise import PointwiseImpl
from megatron_fp4.layers.mamba.kernels import MambaKernel
from megatron_fp4.layers.norm import RMSNorm
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.optim.config import Impl
from megatron_fp4.precision import EmulatedBackend, Format, LinearPrecision, Operand, Rounding, nvfp4_paper
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.proofs.parity import synthetic_inputs
from megatron_fp4.settings import to_json_values
from megatron_fp4.train.refusals.requirements import by_torch, check_choices
from megatron_fp4.train.resume.differences import as_table, compare_settings, refuse_forbidden
from megatron_fp4.train.trainable import build_trainable
from tests.helpers.parity import parity_case
from tests.layers.fused import fused_standins


def train(norm_impl: NormImpl, loss_impl: LossImpl) -> tuple[list[float], list[str], set[str]]:
    """(losses and gradient norms of three steps, names of parameters, kinds of fused norms)"""
    case = parity_case(PrecisionConfig(), norm_impl=norm_impl, loss_impl=loss_impl, train={"recompute": Recompute.full})
    mesh, device = ParallelMesh.single_process(), torch.device("cpu")
    trainable = build_trainable(case.config, case.table, EmulatedBackend(), mesh, device)
    optimizer, numbers = trainable.optimizer, []
    for step in range(case.num_steps):
        trainable.clock.step = step
        inputs, num_targets = synthetic_inputs(case, mesh, step, device)
        optimizer.zero_grad()
        loss = trainable.engine.train(inputs.split(1), 1.0 / num_targets, optimizer.begin_last_microbatch)
        norm = optimizer.finish_grads()
        numbers += [loss.item(), norm]
        optimizer.step(norm, lr=1e-3, max_norm=1.0)
    (model,) = trainable.engine.stages
    kinds = {type(module._fused).__name__ for module in model.modules() if isinstance(module, RMSNorm)}
    return numbers, [shard.name for shard in optimizer.state_shards()], kinds


def test_training_with_fused_kernels_is_training(monkeypatch: pytest.MonkeyPatch) -> None:
    fused_standins.install(monkeypatch)
    numbers, names, _ = train(NormImpl.torch, LossImpl.torch)
    for norm_impl, kind in ((NormImpl.te, "TeRMSNorm"), (NormImpl.apex, "ApexRMSNorm")):
        fused_numbers, fused_names, kinds = train(norm_impl, LossImpl.te)
        assert kinds == {kind}, "a norm of the model is computed by another implementation"
        assert fused_names == names, "checkpoints would depend on the implementation"
        assert fused_numbers[0] == pytest.approx(numbers[0], rel=1e-5), "the first loss, before any rounded gradient"
        assert fused_numbers == pytest.approx(numbers, rel=2**-7), "the gradient of a logit is rounded to BF16 twice"


def test_a_command_on_a_cpu_computes_by_torch() -> None:
    wanted = ["model.norm_impl=te", "model.loss_impl=te", "optim.impl=apex", "model.mamba_kernel=mamba_ssm"]
    run = to_run_config(compose_config([*wanted, "precision.backend=transformer_engine", "model.vocab_size=96"]))
    config = by_torch(run)
    assert (config.model.norm_impl, config.model.loss_impl) == (NormImpl.torch, LossImpl.torch)
    assert (config.model.mamba_kernel, config.optim.impl) == (MambaKernel.torch, Impl.torch)
    assert config.model.pointwise_impl is PointwiseImpl.torch
    assert config.precision.backend is BackendName.emulated


def test_a_resumed_run_may_choose_others() -> None:
    saved = to_json_values(to_run_config(compose_config([])))
    chosen = to_json_values(
        to_run_config(compose_config(["model.norm_impl=te", "model.loss_impl=te", "optim.impl=te"]))
    )
    changes = compare_settings(saved, chosen)
    refuse_forbidden(changes)
    assert "model.norm_impl" in as_table(changes)
    older = {name: value for name, value in saved["model"].items() if not name.endswith("_impl")}
    refuse_forbidden(
        compare_settings({**saved, "model": older}, saved)
    )  # a checkpoint from before these settings existed


@pytest.mark.parametrize("tensor", ["x", "w"])
def test_te_with_a_stochastic_forward_pass_that_runs_twice_is_refused(tensor: str) -> None:
    """Its noise has no address: the second forward pass would be another one."""
    case = parity_case(PrecisionConfig(), train={"recompute": Recompute.full})
    stochastic = Operand(Format.nvfp4, rounding=Rounding.sr)
    recipe = LinearPrecision(replace(nvfp4_paper().fprop, **{tensor: stochastic}))
    by_te = PrecisionConfig(BackendName.transformer_engine, recipes={"sr_forward": recipe}, use="sr_forward")
    config = replace(case.config, precision=by_te)
    with pytest.raises(
        ValueError, match=r"train\.recompute=full .* recipe sr_forward, whose Fprop rounds stochastically"
    ):
        check_choices(config)
    for mode in (Recompute.none, Recompute.selective):
        check_choices(replace(config, train=replace(config.train, recompute=mode)))
    check_choices(replace(config, precision=replace(by_te, backend=BackendName.emulated)))
    check_choices(replace(config, precision=replace(by_te, recipes={"nvfp4": nvfp4_paper()})))
