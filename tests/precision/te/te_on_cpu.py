"""Makes a real Transformer Engine (2.20, built against a CUDA torch) importable and usable on a machine without a GPU.

Its Python code is real: recipes, modules, quantizers, tensor classes. CUDA probes answer as on a Blackwell GPU, memory
for "cuda" lies on the CPU, and the two kernels that a linear calls, `tex.quantize` (NVFP4) and `tex.generic_gemm`, are
computed by Transformer Engine's own reference quantizer and by torch. So the wiring is tested, not the kernels.

Only for `real_te_check.py`, in a process of its own: torch is patched for good.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.precision.te.te_double import _padded, direction, nvfp4_tensors


def patch_cuda() -> None:
    """Answers of a GPU of compute capability 10.0; must come before Transformer Engine is imported."""
    properties = types.SimpleNamespace(major=10, minor=0, name="none", multi_processor_count=148, total_memory=1 << 37)
    stream = types.SimpleNamespace(cuda_stream=0, wait_stream=lambda *_: None, wait_event=lambda *_: None)
    answers: dict[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (10, 0),
        "get_device_properties": properties,
        "current_stream": stream,
        "is_current_stream_capturing": False,
        "synchronize": None,
        "empty_cache": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_, **__: None
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    for name in ("empty", "zeros", "ones", "tensor", "empty_like", "full", "eye", "randint"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make_on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or "cuda" in str(device)):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return make_on_cpu


def patch_kernels() -> None:
    """Stand-ins for the kernels of a linear and of its all-gather."""
    from transformer_engine.pytorch import distributed  # loads the extension that the next line names

    import transformer_engine_torch as tex  # isort: skip

    tex.quantize = _quantize
    tex.generic_gemm = _generic_gemm
    tex.swap_first_dims = lambda x, out: x.transpose(0, 1).contiguous()
    distributed.pad_columnwise_scale_inv = _padded
    torch.distributed._coalescing_manager = lambda *_, **__: contextlib.nullcontext()  # gloo has none


def _quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """What the NVFP4 kernels store, from the settings that the C++ code reads off the quantizer."""
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4, reference_utils
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    assert isinstance(quantizer, NVFP4Quantizer), f"no kernel of {type(quantizer).__name__} is computed here"
    assert noop is None
    assert not quantizer.stochastic_rounding, "the reference rounds to nearest"
    assert quantizer.with_post_rht_amax == quantizer.with_rht
    assert tensor.dtype == torch.bfloat16
    tensor = tensor.detach()
    flat = tensor.reshape(-1, tensor.shape[-1]).contiguous()
    assert flat.shape[0] % 16 == flat.shape[1] % 16 == 0, "the C++ code refuses this shape"
    reference = reference_nvfp4.NVFP4QuantizerRef
    if quantizer.with_amax_reduction:
        reference = _with_amax_over(quantizer.amax_reduction_group, reference)
    quantized = reference(
        reference_utils.Fp4Formats.E2M1,
        rowwise=quantizer.rowwise_usage,
        columnwise=quantizer.columnwise_usage,
        quant_tile_shape=(16, 16) if quantizer.with_2d_quantization else (1, 16),
        with_rht=quantizer.with_rht,
        with_random_sign_mask=quantizer.rht_matrix_random_sign_mask_t != 0,
        nvfp4_use_4over6=quantizer.nvfp4_use_4over6,
        nvfp4_e4m3_max=quantizer.nvfp4_e4m3_max,
        nvfp4_4over6_err_mode=quantizer.nvfp4_4over6_err_mode,
    ).quantize(flat)
    tensors = nvfp4_tensors(quantized, quantizer.rowwise_usage, quantizer.columnwise_usage)
    if output is not None:
        for name, value in tensors.items():
            setattr(output, f"_{name}", value)
        return output
    described = quantizer.storage_metadata(tensor.dtype)
    rest = described["nontensor_kwargs"] | {"with_gemm_swizzled_scales": False}  # as for shapes that are not fused
    if quantizer.internal:
        return described["cls"](**tensors, **rest)
    return described["cls"](shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, **tensors, **rest)


def _with_amax_over(group: Any, reference: Any) -> Any:
    """The reference quantizer with each amax taken over the ranks of a group, as the C++ code does."""

    class Reduced(reference):  # type: ignore[misc]
        @classmethod
        def _quantize_blockwise_reference(cls, x: Tensor, amax: Tensor, *args: Any, **kwargs: Any) -> Any:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
            return super()._quantize_blockwise_reference(x, amax, *args, **kwargs)

    return Reduced


def _generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Any,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, None, None, None]:
    """`op(B) @ op(A)` in the row-major reading of cuBLAS; NVFP4 as in Transformer Engine's reference."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4, reference_utils
    from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

    assert quantizer is None
    assert bias is None
    assert not gelu
    dtype = next((known for known, te in TE_DType.items() if te == out_dtype), torch.bfloat16)
    if isinstance(A, NVFP4TensorStorage):
        left = direction(B, "columnwise" if transb else "rowwise")
        right = direction(A, "rowwise" if transa else "columnwise")
        reference = reference_nvfp4.NVFP4QuantizerRef(reference_utils.Fp4Formats.E2M1)
        product = reference.qgemm(
            left.data, right.data, None, torch.float32, left.scale, right.scale, qresult_x=left, qresult_w=right
        ).to(dtype)
    else:
        left, right = (x.reshape(-1, x.shape[-1]) for x in (B, A))
        product = ((left.T if transb else left) @ (right.T if transa else right)).to(dtype)
    if out is None:
        return product, None, None, None
    return (out.add_(product) if accumulate else out.copy_(product)), None, None, None
