"""Weight gradients beside the sends of tensor parallelism: the same bits, and really beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm import collectives
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import Overlap, ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import build_mesh
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.pipeline.schedules import stages_per_rank
from megatron_fp4.precision import EmulatedBackend
from megatron_fp4.precision.backends.centred import CentredBackend, CentredOperand
from megatron_fp4.precision.config import ComputeDtype, PrecisionConfig, Rule
from megatron_fp4.proofs.parity import Case, Record, run_case
from tests.helpers.parity import parity_case

RECIPES = sorted(path.stem for path in Path("configs/precision/recipe").glob("*.yaml"))
BLOCKS, STEPS, MICROBATCHES = 2, 1, 2
SIZES = {"hidden": 128, "ffn_hidden": 256, "num_heads": 2, "num_kv_heads": 2, "head_dim": 128}  # 128: tiles of FP8


def case_of(recipe: str) -> Case:
    """Every linear but the head in the recipe's main precision, in BF16 compute."""
    precision = to_run_config(compose_config([f"precision/recipe={recipe}", "model.vocab_size=101"])).precision
    rules = [Rule("head"), Rule(use=next(iter(precision.recipes), "bf16"))]
    wanted = PrecisionConfig(compute_dtype=ComputeDtype.bf16, recipes=precision.recipes, rules=rules)
    return parity_case(
        wanted, name=recipe, steps=STEPS, pattern="*-", seq_length=128, **SIZES, train={"global_batch": MICROBATCHES}
    )


class Log:
    """What happens while the rows of a reduce-scatter travel: weight gradients, counted per reduce-scatter."""

    def __init__(self) -> None:
        self.beside: list[int] = []
        self.total = 0
        self._travelling = False
        self._scatter, self._matmul = collectives.reduce_scatter_rows, EmulatedBackend.matmul
        collectives.reduce_scatter_rows = self.scatter
        self._centred = CentredBackend.matmul
        log = self

        def matmul(backend: Any, *args: Any, **kwargs: Any) -> Any:
            log.count(kwargs)
            return log._matmul(backend, *args, **kwargs)

        def centred(backend: Any, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(operand, CentredOperand) for operand in args):  # others go to the wrapped backend
                log.count(kwargs)
            return log._centred(backend, *args, **kwargs)

        EmulatedBackend.matmul = matmul  # type: ignore[method-assign]
        CentredBackend.matmul = centred  # type: ignore[method-assign]

    def count(self, arguments: dict[str, Any]) -> None:
        """Count a product if it is a weight gradient."""
        if arguments.get("accumulate_into") is not None:
            self.total += 1
            if self._travelling:
                self.beside[-1] += 1

    def scatter(self, x: torch.Tensor, group: Any, row_counts: Any = None, while_sending: Any = None) -> torch.Tensor:
        def during() -> None:
            self.beside.append(0)
            self._travelling = True
            while_sending()
            self._travelling = False

        return self._scatter(x, group, row_counts, *([during] if while_sending else []))

    def stop(self) -> None:
        collectives.reduce_scatter_rows, EmulatedBackend.matmul = self._scatter, self._matmul  # type: ignore
        CentredBackend.matmul = self._centred  # type: ignore[method-assign]


def run_both(process: Process, cases: list[tuple[Case, ParallelConfig]]) -> list[tuple[Record, list[int], int]]:
    results = []
    for case, parallel in cases:
        log = Log()
        record = run_case(process, case, parallel, build_mesh(parallel, process.world))
        log.stop()
        results.append((record, log.beside, log.total))
    return results


def layout(overlap: Overlap, **axes: Any) -> ParallelConfig:
    return ParallelConfig(tp=2, overlap_tensor=overlap, **axes)


def assert_equal(on: Record, off: Record, what: str) -> None:
    assert (on.losses, on.norms) == (off.losses, off.norms), f"{what}: other losses or norms"
    pairs = zip([*on.grads, *on.masters[STEPS], *on.live], [*off.grads, *off.masters[STEPS], *off.live], strict=True)
    for ours, theirs in pairs:
        for kind, tensor in ours.tensors.items():
            assert torch.equal(tensor, theirs.tensors[kind]), f"{what}: {kind} {ours.name} differs"


def test_overlap_changes_no_bit_in_any_recipe() -> None:
    """And every weight gradient of a column-parallel linear (qkv, up, head) is computed while its dx travels."""
    cases = [(case_of(name), layout(o)) for name in RECIPES for o in (Overlap.always, Overlap.never)]
    per_rank = run_local(run_both, 2, cases)
    assert len(RECIPES) >= 15
    for results in per_rank:
        for number, name in enumerate(RECIPES):
            (on, beside, total), (off, beside_off, total_off) = results[2 * number : 2 * number + 2]
            assert_equal(on, off, name)
            assert sum(beside) == STEPS * MICROBATCHES * (BLOCKS + 1), f"{name}: {beside}"
            assert max(beside) == 1, f"{name}: another linear's weight gradient ran there too"
            assert total == total_off == STEPS * MICROBATCHES * (2 * BLOCKS + 1), f"{name}: lost or computed twice"
            assert sum(beside_off) == 0, f"{name}: overlapped though told not to"


def test_overlap_with_recomputation_and_stages() -> None:
    """A recomputed linear has a queue of its own in each pass; zero-bubble schedules keep theirs."""
    keeping = case_of("nvfp4")
    full = replace(
        keeping, config=replace(keeping.config, train=replace(keeping.config.train, recompute=Recompute.full))
    )
    runs = [(case, layout(o, pp=2)) for case in (keeping, full) for o in (Overlap.always, Overlap.never)]
    deferred = layout(Overlap.auto, pp=2, schedule="interleaved_zero_bubble", virtual_stages=1)
    for results in run_local(run_both, 4, [*runs, (keeping, deferred)]):
        for (on, beside, total), (off, _, total_off) in (results[0:2], results[2:4]):
            assert_equal(on, off, "pp2")
            assert sum(beside) > 0
            assert total == total_off
        zero_bubble, beside, total = results[4]
        assert_equal(zero_bubble, results[1][0], "zero bubble")
        assert sum(beside) == 0, "the pipeline's deferred weight gradients were taken by a linear"
        assert total == results[1][2]


def test_overlap_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no effect with parallel\.tp = 1"):
        ParallelConfig(overlap_tensor=Overlap.always)
    with pytest.raises(ValueError, match="no effect with schedule zbv"):
        stages_per_rank(layout(Overlap.always, pp=2, schedule="zbv"))
    assert Overlap.auto.enabled("cuda")
    assert not Overlap.auto.enabled("cpu")
