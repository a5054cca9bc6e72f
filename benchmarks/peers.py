"""Quantizers of other projects, called through their own functions, for `python -m benchmarks.quantize --peers`.

Each takes a BF16 tensor to packed codes and block scales, finding the global maximum on the way, as ours does. Install
them with `pip install -e .[bench]`; what is not installed is named and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Quantizer = tuple[str, Callable[[], Tensor]]
"""Its name, and a call that returns the packed codes, uint8 `[R, C/2]`."""


def peers(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Those that are installed, for `x [R, C]`."""
    timed: dict[str, Callable[[], Tensor]] = {}
    for name, quantizers in (
        ("Transformer Engine reference", transformer_engine),
        ("torchao", torchao),
        ("modelopt", modelopt),
        ("compressed-tensors", compressed_tensors),
    ):
        try:
            timed.update(quantizers(x))
        except ImportError as error:
            print(f"{name} is left out: {error}; pip install -e .[bench]")
    return timed


def transformer_engine(x: Tensor) -> Iterator[Quantizer]:
    """`NVFP4QuantizerRef` of the pure-Python wheel, as the tests load it."""
    from tests.numerics.te_oracle import reference_quantizer

    quantizer = reference_quantizer(columnwise=False)
    yield "Transformer Engine reference", lambda: quantizer.quantize(x).data


def torchao(x: Tensor) -> Iterator[Quantizer]:
    """`nvfp4_quantize` as `NVFP4Tensor.to_nvfp4` calls it, eager and under torch.compile."""
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    def quantize(function: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        return function(x, 16, per_tensor_amax_to_scale(x.abs().amax()))[1]

    compiled = torch.compile(nvfp4_quantize)
    yield "torchao, eager", lambda: quantize(nvfp4_quantize)
    yield "torchao, compiled", lambda: quantize(compiled)


def modelopt(x: Tensor) -> Iterator[Quantizer]:
    """`NVFP4QTensor.quantize`, which measures amax and block scales itself."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    yield "modelopt", lambda: NVFP4QTensor.quantize(x, 16)[0]._quantized_data


def compressed_tensors(x: Tensor) -> Iterator[Quantizer]:
    """`generate_gparam`, `calculate_qparams` and `NVFP4PackedCompressor.compress`, as llm-compressor chains them."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    settings = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)

    def quantize() -> Tensor:
        low, high = torch.aminmax(x)
        global_scale = generate_gparam(low, high)
        low, high = torch.aminmax(x.view(x.shape[0], -1, 16), dim=2)
        scale, _ = calculate_qparams(low, high, settings, global_scale)
        state = {"weight": x, "weight_scale": scale, "weight_global_scale": global_scale}
        return NVFP4PackedCompressor.compress(state, scheme)["weight_packed"]

    yield "compressed-tensors", quantize
