"""Experts in 4-bit files: each with a scale of its own, and what stays in high precision is listed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp4.checkpoint import edit
from megatron_fp4.interop.export.calibrate import check_inputs
from megatron_fp4.interop.export.folder import Export, write_folder
from megatron_fp4.interop.export.plan import ExportedTensor, coded_tensors, unquantized_modules
from megatron_fp4.interop.export.quantized import ExportFormat
from megatron_fp4.interop.export.weights import Masters, QuantizationErrors
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters
from megatron_fp4.numerics import quantize_nvfp4
from megatron_fp4.precision import LinearPrecision, nvfp4_paper
from megatron_fp4.precision.table import PrecisionTable, Row
from tests.interop.test_experts import EXPERTS
from tests.models.test_count import ODD_HYBRID

CONFIG = replace(
    ODD_HYBRID, pattern="E*E", num_layers=3, hidden=48,
    moe=replace(EXPERTS, num_experts=3, top_k=2, ffn_hidden=32, shared_ffn_hidden=64, latent=16, num_groups=1,
                top_groups=1, expert_bias=False),
)  # fmt: skip
CODED = ("experts.up", "experts.down", "shared.up", "shared.down")


def tensors_of(config: ModelConfig, *coded: str) -> list[ExportedTensor]:
    """Those of a model whose first block computed the linears `coded` in NVFP4."""
    precisions = {f"blocks.0.moe.{name}": nvfp4_paper() for name in coded}
    rows = [Row(info.name, precisions.get(info.name, LinearPrecision()), "") for info in model_linears(config)]
    return coded_tensors(config, PrecisionTable(tuple(rows)), 2, None)


def write(folder: Path, form: ExportFormat, errors: QuantizationErrors | None = None) -> dict[str, Tensor]:
    """An export; returns the masters, which are of very different sizes."""
    torch.manual_seed(5)
    held = {p.name: torch.randn(p.shape) * 2.0 ** (n % 9) for n, p in enumerate(model_parameters(CONFIG))}
    masters = Masters(edit.write_tensors(
        folder / "c", 1, {f"master/{name}": tensor for name, tensor in held.items()},
        lambda key: held[key.removeprefix("master/")], {"config": {}},
    ), CONFIG)  # fmt: skip
    export = Export(form, tensors_of(CONFIG, *CODED), masters, torch.bfloat16, torch.bfloat16, {}, 1 << 30, errors)
    write_folder(export, folder / "m", force=False, last=("README.md", lambda: b""))
    return held


def test_every_expert_has_codes_and_a_scale_of_its_own(tmp_path: Path) -> None:
    errors = QuantizationErrors()
    held = write(tmp_path, ExportFormat.compressed_tensors, errors)
    state = load_file(tmp_path / "m" / "model.safetensors")
    scales = set()
    for expert in range(3):
        module = f"model.layers.0.mixer.experts.{expert}.up_proj"
        weight = held[f"blocks.0.moe.experts.{expert}.up.weight"].bfloat16()
        expected = quantize_nvfp4(weight, tile=(16, 16))
        assert torch.equal(state[f"{module}.weight_packed"], expected.codes)
        assert torch.equal(state[f"{module}.weight_scale"].view(torch.uint8), expected.scales.view(torch.uint8))
        assert state[f"{module}.weight_global_scale"] == torch.full_like(expected.amax, 2688) / expected.amax
        scales.add(state[f"{module}.weight_global_scale"].item())
    assert len(scales) == 3
    assert state["model.layers.2.mixer.experts.1.up_proj.weight"].dtype == torch.bfloat16, "block 2 trained in BF16"
    bias = state["model.layers.0.mixer.gate.e_score_correction_bias"]
    assert torch.equal(bias, torch.zeros(3)), "servers load one in any case"
    assert "moe.experts.up" in errors.squares, "one line for all experts of all layers"


def test_what_stays_in_high_precision_is_listed() -> None:
    ignored = unquantized_modules(CONFIG, tensors_of(CONFIG, *CODED))
    first = [name for name in ignored if ".layers.0." in name]
    assert [name.rpartition("mixer.")[2] for name in first] == ["gate", "fc1_latent_proj", "fc2_latent_proj"]
    third = {name.rpartition("mixer.")[2] for name in ignored if ".layers.2." in name}
    experts = {f"experts.{expert}.{name}_proj" for expert in range(3) for name in ("up", "down")}
    shared = {"shared_experts.up_proj", "shared_experts.down_proj"}
    assert third == {"gate", "fc1_latent_proj", "fc2_latent_proj"} | experts | shared


def test_half_an_expert_as_codes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.experts\.up multiplied NVFP4 and .*down did not, and serv"):
        tensors_of(CONFIG, "experts.up")


def test_activations_of_experts_are_refused() -> None:
    names = {"blocks.0.moe.experts.down"}
    with pytest.raises(ValueError, match=r"--activations: training weighs what enters blocks\.0\.moe\.experts\.down"):
        check_inputs(dict.fromkeys(names, torch.ones(())), names)
