"""The self-test and `crosscheck` on the kernels; and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.cli import crosscheck
from megatron_fp4.cli.compose import CONFIG_DIR, compose_config, to_run_config
from megatron_fp4.kernels.quantize import grid_of
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.backends import copies_of
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.backends.triton import TritonBackend
from megatron_fp4.precision.backends.triton_limits import emulated_gemms
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.selftest import trial
from megatron_fp4.precision.selftest.examine import examine
from megatron_fp4.precision.selftest.trial import self_test
from tests.helpers.tiny_run import tiny_run
from tests.kernels.interpreted.test_operands import origin
from tests.precision.test_selftest import Planting, flipped_code, scale_off_by_one

CPU, CONFIG = torch.device("cpu"), PrecisionConfig(compile=False)
RECIPES = sorted(path.stem for path in (CONFIG_DIR / "precision/recipe").glob("*.yaml") if path.stem != "bf16")
WITHOUT_KERNELS = ("fp8", "nvfp4_rht128", "nvfp4_double_scale", "nvfp4_ms_eden", "nvfp4_ms_eden_4over6")
WITHOUT_KERNELS += ("nvfp4_ms_eden_dy", "nvfp4_quartet2", "nvfp4_quartet2_4over6", "nvfp4_quartet2_4over6_all")
"""Recipes with operands that the emulation quantizes."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SIZES", {"T": 32, "N": 32, "K": 64})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_configuration_passes(name: str) -> None:
    """Operands of all copies, products, and forward and backward pass, in each recipe that a run can name."""
    config = to_run_config(compose_config([f"precision/recipe={name}"])).precision
    left = emulated_gemms(replace(config, backend=BackendName.triton))
    assert bool(left) == (name in WITHOUT_KERNELS)
    backend = make_backend(replace(CONFIG, backend=BackendName.triton, recipes=config.recipes))
    assert self_test(backend, config.recipes.values(), CPU, torch.bfloat16) == []


class Planted(Planting, TritonBackend):
    """The kernels with a fault."""

    def __init__(self, tensor: str = "", change: Any = None, product: Any = None) -> None:
        super().__init__(CONFIG, tensor=tensor, change=change, product=product)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Planted("dy", flipped_code), "dgrad.dy: codes[3, 5]: planted has"),
        (lambda: Planted("w", scale_off_by_one), "fprop.w: scales[1, 1]: planted has"),
        (lambda: Planted(product=lambda product, _: product.zero_()), "gradient of the weight) is all zero"),
        (lambda: Planted(product=lambda product, _: product.mul_(1.01)), "fprop: largest error"),
    ],
    ids=["stochastic code", "scale", "zero gradient", "product"],
)
def test_each_planted_bug_is_caught(make: Callable[[], TritonBackend], message: str) -> None:
    lines = self_test(make(), [nvfp4_paper()], CPU, torch.bfloat16)
    assert any(message in line for line in lines), lines


def test_the_kernels_are_trusted_under_the_interpreter() -> None:
    assert examine(replace(CONFIG, backend=BackendName.triton), [nvfp4_paper()], CPU) is None


def test_crosscheck_against_triton(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stochastic codes bit by bit; a planted one is named with its place."""
    sizes = ["model.num_layers=1", "model.vocab_size=32", "train.micro_batch=1", "train.global_batch=1"]
    run = tiny_run(tmp_path, *sizes, "precision.keep_bf16.last=0").overrides
    assert crosscheck.main(["--against", "triton", *run]) == 0
    text = capsys.readouterr().out
    assert text.startswith("triton 3.8.0, on cpu\n")
    assert "equal   dgrad.dy: amax, scales and codes, bit for bit" in text
    monkeypatch.setattr(crosscheck, "make_backend", lambda config: Planted("dy", flipped_code))
    assert crosscheck.main(["--against", "triton", *run]) == 1
    assert "DIFFERS dgrad.dy: codes[3, 5]" in capsys.readouterr().out


def test_more_lines_than_a_grid_has() -> None:
    assert grid_of(8, 4, 65535 * 64, 64) == (2, 65535)
    with pytest.raises(
        ValueError, match=r"take at most 4,194,240 lines along a dimension, got 4,194,241; use a smaller"
    ):
        grid_of(8, 4, 65535 * 64 + 1, 64)


def test_a_tensor_without_elements() -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"operand x of fprop has local shape \(0, 64\), which has no element"):
        TritonBackend(CONFIG).quantize(x, origin(x, "x"), copies_of(nvfp4_paper())["x"])
