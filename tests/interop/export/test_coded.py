"""4-bit exports: other libraries decode them to the operand that Fprop multiplied, and compute its logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_fp4.checkpoint import edit
from megatron_fp4.cli.checkpoint import main
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.inference.precisions import table_of
from megatron_fp4.interop.export.calibrate import input_amax
from megatron_fp4.interop.export.folder import Export, write_folder
from megatron_fp4.interop.export.plan import coded_tensors
from megatron_fp4.interop.export.quantized import ExportFormat, coded_rows, global_scale
from megatron_fp4.interop.export.weights import Masters
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.count import model_parameters
from megatron_fp4.numerics import QuantizedTensor, quantize_nvfp4
from megatron_fp4.precision import EmulatedBackend, LinearPrecision, nvfp4_paper
from megatron_fp4.precision.backends.protocol import Copy
from megatron_fp4.precision.config import ComputeDtype
from megatron_fp4.precision.table import PrecisionTable, Row
from megatron_fp4.train.open import TrainedModel, open_trained
from tests.helpers.tiny_run import TinyRun
from tests.models.test_count import ODD_HYBRID

FORMATS = ("compressed-tensors", "modelopt")
TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 448
MODULES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def folders(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export in each 4-bit format; what is not coded is FP32, so that only the codes can differ."""
    folders = {name: tmp_path_factory.mktemp("coded") / name for name in FORMATS}
    for name, folder in folders.items():
        assert main(["export", str(run.run_dir), "--to", str(folder), "--format", name, "--dtype", "fp32"]) == 0
    return folders


@pytest.fixture(scope="module")
def trained(run: TinyRun) -> TrainedModel:
    return open_trained(load_run_config(run.run_dir))


def model_of(trained: TrainedModel) -> nn.Module:
    return trained.engine.stages[0]


def fprop_operand(trained: TrainedModel, name: str) -> tuple[Tensor, Tensor]:
    """code * block scale as the backend multiplies it, BF16 `[N, K]`, and the largest magnitude, an FP32 scalar."""
    linear = linears_of(model_of(trained))[name]
    operand = trained.checked.plan.table()[name].fprop.w
    origin = linear.sharding.w(seed=1, step=0)
    (quantized,) = EmulatedBackend().quantize(linear.weight.detach(), origin, [Copy("fprop", operand, along=1)])
    values, amax = quantized.tensors
    return values, amax


def modules_of(name: str) -> list[str]:
    return [f"model.layers.0.{module}" for module in MODULES[name]]


@pytest.mark.parametrize("name", MODULES)
def test_their_decompressor_gives_our_operand(name: str, trained: TrainedModel, folders: dict[str, Path]) -> None:
    """Bit for bit where the global scale is left out, as the tensor cores multiply; with it, one rounding to BF16."""
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    scheme = scheme_of(folders["compressed-tensors"])
    state = load_file(folders["compressed-tensors"] / "model.safetensors")
    operand, amax = fprop_operand(trained, f"blocks.0.{name}")
    stored = [{key: state[f"{module}.{key}"] for key in KEYS} for module in modules_of(name)]
    for one in stored:
        assert torch.equal(one["weight_global_scale"], (torch.full_like(amax, 2688) / amax).view(1)), "one for all"
    decode = nvfp4.NVFP4PackedCompressor.decompress
    alone = [decode({**one, "weight_global_scale": torch.ones(1)}, scheme)["weight"] for one in stored]
    assert torch.equal(torch.cat(alone), operand)
    assert operand.dtype == torch.bfloat16
    whole = torch.cat([decode(one, scheme)["weight"] for one in stored])
    exact = operand.double() * amax.double() / 2688
    assert ((whole.double() - exact).abs() <= exact.abs() * 2.0**-8).all()
    tie = (whole != exact.bfloat16()).double().mean()
    assert tie < 1e-3, "what lies within FP32's rounding of a tie may fall to its other side, and nothing else"


KEYS = ("weight_packed", "weight_scale", "weight_global_scale")


def scheme_of(folder: Path) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(section)
    return config.config_groups["group_0"]


def modelopt_decoded(state: dict[str, Tensor], module: str) -> Tensor:
    """ModelOpt's own dequantization of a module's weight, in FP32."""
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed = state[f"{module}.weight"]
    tensor = NVFP4QTensor((packed.shape[0], packed.shape[1] * 2), torch.float32, packed)
    scales = {"scale": state[f"{module}.weight_scale"], "double_scale": state[f"{module}.weight_scale_2"]}
    decoded: Tensor = tensor.dequantize(dtype=torch.float32, **scales, block_sizes={-1: 16})
    return decoded


@pytest.mark.parametrize("name", MODULES)
def test_modelopt_gives_our_operand(name: str, trained: TrainedModel, folders: dict[str, Path]) -> None:
    state = load_file(folders["modelopt"] / "model.safetensors")
    operand, amax = fprop_operand(trained, f"blocks.0.{name}")
    double_scale = amax / torch.full_like(amax, 2688)
    for module in modules_of(name):
        assert torch.equal(state[f"{module}.weight_scale_2"], double_scale), "one for all parts of a linear"
    alone = {key: torch.ones(()) if key.endswith("weight_scale_2") else value for key, value in state.items()}
    assert torch.equal(torch.cat([modelopt_decoded(alone, module) for module in modules_of(name)]), operand.float())
    whole = torch.cat([modelopt_decoded(state, module) for module in modules_of(name)])
    torch.testing.assert_close(whole, operand.float() * double_scale, rtol=2.0**-22, atol=0)


def test_their_converter_joins_the_two_formats(folders: dict[str, Path]) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    ignore = json.loads((folders["modelopt"] / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    converter = converters.ModelOptNvfp4Converter(ignore=ignore, targets=["re:.*_proj"])
    converted = converter.process(load_file(folders["modelopt"] / "model.safetensors"))
    expected = load_file(folders["compressed-tensors"] / "model.safetensors")
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("weight_global_scale"):  # 1 / (amax / 2688) for 2688 / amax
            torch.testing.assert_close(converted[name].view(1), tensor, rtol=2.0**-22, atol=0)
        else:
            assert torch.equal(converted[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_their_classes_read_our_sections(folders: dict[str, Path]) -> None:
    export = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    section = json.loads((folders["modelopt"] / "config.json").read_text())["quantization_config"]
    other = json.loads((folders["modelopt"] / "hf_quant_config.json").read_text())
    assert export.convert_hf_quant_config_format(other) == section
    scheme = scheme_of(folders["compressed-tensors"])
    assert (scheme.weights.strategy, scheme.weights.group_size, scheme.input_activations) == ("tensor_group", 16, None)
    assert scheme.format == "nvfp4-pack-quantized"


def test_what_trained_in_high_precision_stays_so(folders: dict[str, Path], trained: TrainedModel) -> None:
    """The files are the precision table: the second block, the head and the embedding hold numbers."""
    for name, folder in folders.items():
        state = load_file(folder / "model.safetensors")
        codes = {key.rpartition(".")[0] for key, tensor in state.items() if tensor.dtype == torch.uint8}
        assert codes == {module for linear in MODULES for module in modules_of(linear)}, name
        ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
        kept = {f"model.layers.1.{module}" for modules in MODULES.values() for module in modules}
        assert set(ignored) == {*kept, "lm_head"}
        assert state["lm_head.weight"].dtype == torch.float32


def logits_of_served_weights(run: TinyRun, trained: TrainedModel) -> Tensor:
    """Ours in FP32, in the precision `exported`: weights as Fprop multiplied them, activations not quantized."""
    config = load_run_config(run.run_dir)
    precision = replace(config.precision, compute_dtype=ComputeDtype.fp32)
    opened = open_trained(replace(config, precision=precision))
    model = model_of(opened)
    with torch.no_grad():
        for name, linear in linears_of(model).items():
            if trained.checked.plan.table()[name].fprop.w.quantized:
                linear.weight.copy_(linears_of(model_of(trained))[name].weight)  # BF16, of which the codes were made
        opened.assign(table_of(opened, "exported"))
        positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
        zeros = torch.zeros_like(TOKENS)
        logits: Tensor = model(TOKENS, zeros, positions, zeros).view(*TOKENS.shape, -1).float()
    return logits


def test_transformers_computes_our_logits(run: TinyRun, trained: TrainedModel, folders: dict[str, Path]) -> None:
    """ModelOpt decodes in FP32, so its logits are ours; compressed-tensors rounds each weight to BF16, 8 bits."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    expected = logits_of_served_weights(run, trained)
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders["compressed-tensors"], quantization_config=dequantize, dtype=torch.float32
    )
    with torch.no_grad():
        rounded = model(TOKENS).logits
    assert (rounded - expected).abs().max() < 0.02 * expected.std()
    state = load_file(folders["modelopt"] / "model.safetensors")
    coded = {key.rpartition(".")[0] for key, tensor in state.items() if tensor.dtype == torch.uint8}
    values = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in coded}
    values |= {f"{module}.weight": modelopt_decoded(state, module) for module in coded}
    model.load_state_dict(values)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


def test_a_block_whose_scale_is_zero_stands_for_zeros() -> None:
    """Its codes, whatever they were, must not be multiplied with the 1 that ModelOpt writes there."""
    x = torch.zeros(16, 32)
    x[:, 16:] = 1e-9  # below the smallest scale
    x[0, 0] = 1.0
    quantized = quantize_nvfp4(x)
    assert (quantized.scales.float() == 0).any()
    for form in (ExportFormat.compressed_tensors, ExportFormat.modelopt):
        codes, scales = (tensor for _, tensor in coded_rows(form, "m", quantized))
        written = QuantizedTensor(codes, scales, quantized.amax, quantized.divisor)
        assert torch.equal(written.dequantize(), quantized.dequantize())
    assert (scales.float() > 0).all(), "as ModelOpt's own exporter, which knows no scale of 0"
    for form in (ExportFormat.compressed_tensors, ExportFormat.modelopt):
        assert global_scale(form, torch.zeros(()), 2688.0).item() == 1.0


@pytest.mark.parametrize("name", FORMATS)
def test_activations_too(
    name: str, run: TinyRun, trained: TrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    """W4A4: the weights are the same, and every coded module has the scale of its input, shared by q, k and v."""
    arguments = ["--format", name, "--dtype", "fp32", "--activations", "256", "--to", str(tmp_path / "m")]
    assert main(["export", str(run.run_dir), *arguments]) == 0
    state = load_file(tmp_path / "m" / "model.safetensors")
    inputs = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2].startswith("input_")}
    for key, tensor in load_file(folders[name] / "model.safetensors").items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), state[key].view(-1).view(torch.uint8))
    assert len(inputs) == 7
    assert len(state) == len(load_file(folders[name] / "model.safetensors")) + 7
    q, k, v = (next(inputs[key] for key in inputs if f"{part}_proj" in key) for part in "qkv")
    assert q == k == v
    measured = input_amax(load_run_config(run.run_dir), step=3, max_tokens=256)["blocks.0.attention.qkv"]
    expected = 2688 / measured if name == "compressed-tensors" else measured / 2688
    assert q.item() == pytest.approx(expected.item(), rel=1e-6)
    section = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    if name == "modelopt":
        export = pytest.importorskip("modelopt.torch.export.convert_hf_config")
        assert (
            export.convert_hf_quant_config_format(json.loads((tmp_path / "m" / "hf_quant_config.json").read_text()))
            == section
        )
        return
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    trained.assign(trained.table("same"))
    positions, zeros = torch.arange(TOKENS.shape[1]).expand_as(TOKENS), torch.zeros_like(TOKENS)
    with torch.no_grad():
        theirs = model(TOKENS).logits.float()
        ours = trained.engine.stages[0](TOKENS, zeros, positions, zeros).view(*TOKENS.shape, -1).float()
    assert (theirs - ours).square().mean().sqrt() < 0.05 * ours.std(), "two global scales apart, and BF16"


def test_activations_need_the_run(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--activations", "256", "--to", str(tmp_path / "m")]
    assert main(["export", str(run.run_dir), *arguments]) == 2
    assert "of a format with codes" in capsys.readouterr().err
    assert main(["extract", str(run.run_dir), "--to", str(tmp_path / "alone")]) == 0
    assert main(["export", str(tmp_path / "alone"), *arguments, "--format", "modelopt"]) == 2
    assert "--activations reads the held-out set of the run" in capsys.readouterr().err


def test_parts_that_transformers_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projection of Mamba-2 is one tensor there and five of ours, with one global scale, whatever the pieces."""
    config = replace(
        ODD_HYBRID, pattern="M-", num_layers=2, hidden=64, ffn_hidden=96, mamba_num_heads=16, mamba_head_dim=8,
        mamba_num_groups=2, mamba_state=24,
    )  # fmt: skip
    held = {p.name: torch.randn(p.shape) * (1 + len(p.name) % 7) for p in model_parameters(config)}
    monkeypatch.setattr("megatron_fp4.interop.export.weights.CHUNK_BYTES", 32 * 64 * 4)
    masters = Masters(edit.write_tensors(
        tmp_path / "c", 1, {f"master/{name}": tensor for name, tensor in held.items()},
        lambda key: held[key.removeprefix("master/")], {"config": {}},
    ), config)  # fmt: skip
    names = [info.name for info in model_linears(config)]
    rows = [Row(name, nvfp4_paper() if name != "head" else LinearPrecision(), "") for name in names]
    tensors = coded_tensors(config, PrecisionTable(tuple(rows)), 1, None)
    form, bf16 = ExportFormat.modelopt, torch.bfloat16
    export = Export(form, tensors, masters, bf16, bf16, {}, 1 << 30)
    write_folder(export, tmp_path / "m", force=False, last=("README.md", lambda: b""))
    state = load_file(tmp_path / "m" / "model.safetensors")
    parts = [held[f"blocks.0.mamba.in_proj.{part}.weight"] for part in ("z", "x", "B", "C", "dt")]
    expected = quantize_nvfp4(torch.cat(parts).bfloat16(), tile=(16, 16))
    assert torch.equal(state["model.layers.0.mixer.in_proj.weight"], expected.codes)
    scales = state["model.layers.0.mixer.in_proj.weight_scale"]
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))
    assert state["model.layers.0.mixer.A_log"].dtype == torch.float32
