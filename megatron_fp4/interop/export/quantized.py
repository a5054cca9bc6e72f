"""The two 4-bit formats that are served: names and meanings of their tensors, and their sections of config.json.

    per linear             compressed-tensors       ModelOpt
    codes   uint8 [N,K/2]  weight_packed            weight               two E2M1 codes a byte, even column low
    scales  E4M3 [N,K/16]  weight_scale             weight_scale         linear, not swizzled
    one     FP32           weight_global_scale [1]  weight_scale_2 []    2688 / amax, and its inverse amax / 2688

2688 = 6 * 448 is what a recipe's largest code times largest block scale comes to; with four_over_six it is 6 * 256.

Written from compressed-tensors 0.20 (`compressors/nvfp4/base.py`) and ModelOpt 0.47 (`export/convert_hf_config.py`,
`quantization/qtensor/nvfp4_tensor.py`), neither of which is imported. Codes of a block whose scale is 0 are written as
0, whatever they were: they stand for 0 in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.interop.export.parts import FileTensor
from megatron_fp4.interop.export.plan import BLOCK
from megatron_fp4.numerics import QuantizedTensor
from megatron_fp4.numerics.stages import encode_scale

MODELOPT_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""vLLM reads the files of no other producer."""


class ExportFormat(Enum):
    """What is written, by the name on the command line."""

    hf = "hf"
    compressed_tensors = "compressed-tensors"
    modelopt = "modelopt"

    @property
    def coded(self) -> bool:
        return self is not ExportFormat.hf


def coded_names(form: ExportFormat) -> tuple[str, str, str]:
    """Names of codes, block scales and global scale in a module."""
    if form is ExportFormat.modelopt:
        return "weight", "weight_scale", "weight_scale_2"
    return "weight_packed", "weight_scale", "weight_global_scale"


def coded_file_tensors(form: ExportFormat, module: str, rows: int, columns: int) -> list[FileTensor]:
    """The tensors of one linear module with a weight `[rows, columns]`."""
    codes, scales, global_scale = (f"{module}.{name}" for name in coded_names(form))
    return [
        FileTensor(codes, torch.uint8, (rows, columns // 2)),
        FileTensor(scales, torch.float8_e4m3fn, (rows, columns // BLOCK)),
        FileTensor(global_scale, torch.float32, () if form is ExportFormat.modelopt else (1,)),
    ]


def coded_rows(form: ExportFormat, module: str, quantized: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
    """Codes and scales of some rows, as the files hold them."""
    codes, scales, _ = (f"{module}.{name}" for name in coded_names(form))
    empty = quantized.scales.float() == 0
    zeroed = torch.where(empty.repeat_interleave(BLOCK // 2, 1), 0, quantized.codes).to(torch.uint8)
    yield codes, zeroed
    one = torch.ones((), dtype=torch.float32)
    written = torch.where(empty, one, quantized.scales.float()) if form is ExportFormat.modelopt else quantized.scales
    yield scales, written.to(torch.float8_e4m3fn)


def global_scale(form: ExportFormat, amax: Tensor, divisor: float) -> Tensor:
    """The global scale of a linear, FP32: `divisor / amax` `[1]`, or `amax / divisor` `[]`; 1 for a weight of zeros."""
    if form is ExportFormat.modelopt:
        return torch.where(amax == 0, 1.0, amax / torch.full_like(amax, divisor))
    return encode_scale(amax, divisor)[0].view(1)


def input_name(form: ExportFormat) -> str:
    """Name of the global scale of a module's input, with the meaning of that of the weight."""
    return "input_scale" if form is ExportFormat.modelopt else "input_global_scale"


def config_sections(form: ExportFormat, unquantized: Sequence[str], *, activations: bool) -> dict[str, Any]:
    """`quantization_config` of config.json: weights in NVFP4, and inputs as the server has them (W4A16) or too (W4A4).

    activations: whether the files hold scales of inputs.
    """
    weights: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": BLOCK, "dynamic": False}
    if form is ExportFormat.modelopt:
        inputs = {"input_activations": weights} if activations else {}
        return {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4" if activations else "W4A16_NVFP4",
            "config_groups": {"group_0": {**inputs, "weights": weights, "targets": ["Linear"]}},
            "ignore": list(unquantized),
            "producer": MODELOPT_PRODUCER,
        }
    weights |= {"strategy": "tensor_group", "symmetric": True, "scale_dtype": "torch.float8_e4m3fn"}
    name = "nvfp4-pack-quantized"
    inputs = weights | {"dynamic": "local"}  # block scales from the batch, the global one from the file
    group: dict[str, Any] = {"format": name, "targets": ["Linear"], "weights": weights}
    group["input_activations"] = inputs if activations else None
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


def quantization_files(form: ExportFormat, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Files beside config.json that repeat its section, by name."""
    if form is not ExportFormat.modelopt:
        return {}
    quantization = {
        "quant_algo": sections["quant_algo"],
        "kv_cache_quant_algo": None,
        "group_size": BLOCK,
        "exclude_modules": sections["ignore"],
    }
    return {"hf_quant_config.json": {"producer": MODELOPT_PRODUCER, "quantization": quantization}}
