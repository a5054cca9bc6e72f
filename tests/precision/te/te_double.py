"""A semantic double of Transformer Engine for machines without CUDA.

It has the signatures, storage layout and conventions of 2.20.2 (test_te_backend.py compares the signatures with the
sources), and its NVFP4 numbers come from TE's own reference quantizer and GEMM, loaded from the wheel. It has what the
reference has: nearest-even rounding, no reduction of amax. MXFP8 has TE's storage layout but this package's numbers, so
it checks how copies are taken and multiplied, not arithmetic; the FP8 block quantizer exists by name only.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.numerics import quantize_power_of_two
from megatron_fp4.precision.te.versions import SYMBOLS
from tests.numerics.te_oracle import load_reference, reference_quantizer

VERSION = "2.20.2"
BEFORE_2_19 = dict.fromkeys(("HybridQuantizer", "IdentityQuantizer", "NVFP4QuantizerRef", "Fp4Formats"))
"""What `install` takes away for an older version."""


class Quantizer:
    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage, self.internal = rowwise, columnwise, False

    def copy(self) -> Quantizer:
        return self


class NVFP4TensorStorage:
    def __init__(
        self,
        rowwise_data: Tensor | None,
        rowwise_scale_inv: Tensor | None,
        columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None,
        amax_rowwise: Tensor | None,
        amax_columnwise: Tensor | None,
        fp4_dtype: Any,
        quantizer: Any,
        with_gemm_swizzled_scales: bool,
        *,
        fake_dtype: torch.dtype | None = None,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = 448,
    ) -> None:
        given = dict(locals())
        self._metadata = {name: value for name, value in given.items() if name != "self"}

    def get_metadata(self) -> dict[str, Any]:
        return dict(self._metadata)


class NVFP4Quantizer(Quantizer):
    def __init__(
        self,
        fp4_dtype: Any = "kFloat4E2M1",
        rowwise: bool = True,
        columnwise: bool = True,
        with_amax_reduction: bool = False,
        amax_reduction_group: Any = None,
        with_rht: bool = False,
        with_post_rht_amax: bool = False,
        with_2d_quantization: bool = False,
        stochastic_rounding: bool = False,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = 448,
        nvfp4_4over6_err_mode: str = "MAE",
        with_random_sign_mask: bool = True,
    ) -> None:
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.with_rht, self.stochastic_rounding = with_rht, stochastic_rounding
        self.with_2d_quantization = with_2d_quantization
        self.with_amax_reduction, self.amax_reduction_group = with_amax_reduction, amax_reduction_group
        if stochastic_rounding or row_scaled_nvfp4:
            raise NotImplementedError("TE's reference has no stochastic rounding; row scaling is not used")
        if with_rht and not with_post_rht_amax:
            raise ValueError("with_rht needs with_post_rht_amax")
        self._reference = reference_quantizer(
            rowwise=rowwise,
            columnwise=columnwise,
            quant_tile_shape=(16, 16) if with_2d_quantization else (1, 16),
            with_rht=with_rht,
            with_random_sign_mask=with_random_sign_mask,
            nvfp4_use_4over6=nvfp4_use_4over6,
            nvfp4_e4m3_max=nvfp4_e4m3_max,
            nvfp4_4over6_err_mode=nvfp4_4over6_err_mode,
        )

    def __call__(self, tensor: Tensor) -> NVFP4TensorStorage:
        assert self.internal, "a tensor subclass would be made here"
        if self.with_amax_reduction:
            raise NotImplementedError("TE's reference has no amax reduction")
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.bfloat16
        if tensor.shape[0] % 16 or tensor.shape[1] % 16:
            raise RuntimeError(f"shape {tuple(tensor.shape)} is not a multiple of 16")
        result = self._reference.quantize(tensor)
        return NVFP4TensorStorage(
            **nvfp4_tensors(result, self.rowwise_usage, self.columnwise_usage),
            fp4_dtype="kFloat4E2M1",
            quantizer=self,
            with_gemm_swizzled_scales=False,
            fake_dtype=tensor.dtype,
            nvfp4_use_4over6=result.nvfp4_use_4over6,
            nvfp4_e4m3_max=result.nvfp4_e4m3_max,
        )


def nvfp4_tensors(result: Any, row: bool, column: bool) -> dict[str, Tensor | None]:
    """The tensors of a storage object, from a result of TE's reference quantizer."""
    return {
        "rowwise_data": result.data if row else None,
        "rowwise_scale_inv": _padded(result.scale) if row else None,
        "columnwise_data": result.data_t if column else None,
        "columnwise_scale_inv": _padded(result.scale_t) if column else None,
        "amax_rowwise": result.global_amax_row if row else None,
        "amax_columnwise": result.global_amax_col if column else None,
    }


class MXFP8TensorStorage:
    def __init__(
        self,
        rowwise_data: Tensor | None,
        rowwise_scale_inv: Tensor | None,
        columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None,
        fp8_dtype: Any,
        quantizer: Any,
        with_gemm_swizzled_scales: bool,
        *,
        fake_dtype: torch.dtype | None = None,
    ) -> None:
        given = dict(locals())
        self._metadata = {name: value for name, value in given.items() if name != "self"}

    def get_metadata(self) -> dict[str, Any]:
        return dict(self._metadata)


class MXFP8Quantizer(Quantizer):
    def __init__(
        self, fp8_dtype: Any, *, rowwise: bool = True, columnwise: bool = True, with_2d_quantization: bool = False
    ) -> None:
        super().__init__(rowwise=rowwise, columnwise=columnwise)

    def __call__(self, tensor: Tensor) -> MXFP8TensorStorage:
        """Column-wise data and scales keep the layout of the tensor (nvfp4's are transposed)."""
        along, across = (
            quantize_power_of_two(x, element="e4m3", tile=(1, 32)) for x in (tensor, tensor.T.contiguous())
        )
        codes = [along.codes.view(torch.uint8), across.codes.view(torch.uint8).T.contiguous()]
        scales = [_padded(along.scales), _padded(across.scales).T.contiguous()]
        row, column = self.rowwise_usage, self.columnwise_usage
        return MXFP8TensorStorage(
            codes[0] if row else None,
            scales[0] if row else None,
            codes[1] if column else None,
            scales[1] if column else None,
            fp8_dtype="kFloat8E4M3",
            quantizer=self,
            with_gemm_swizzled_scales=False,
            fake_dtype=tensor.dtype,
        )


class Float8BlockQuantizer(Quantizer):
    def __init__(
        self,
        fp8_dtype: Any,
        *,
        rowwise: bool,
        columnwise: bool,
        amax_epsilon: float = 0.0,
        force_pow_2_scales: bool = True,
        block_scaling_dim: int = 2,
    ) -> None:
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.block_scaling_dim = block_scaling_dim


class IdentityQuantizer(Quantizer):
    def __init__(self, *, dtype: Any = None, rowwise: bool = True, columnwise: bool = True) -> None:
        super().__init__(rowwise=rowwise, columnwise=columnwise)


class HybridQuantizer(Quantizer):
    def __init__(self, *, rowwise_quantizer: Any, columnwise_quantizer: Any, columnwise_source: str = "original"):
        super().__init__(rowwise=True, columnwise=True)
        self.rowwise_quantizer, self.columnwise_quantizer = rowwise_quantizer, columnwise_quantizer


class QuantizerRole:
    def __init__(self, module_type: str = "", tensor_type: str = "", name: str = "") -> None:
        self.module_type, self.tensor_type, self.name = module_type, tensor_type, name


class CustomRecipe:
    def __init__(
        self,
        qfactory: Any,
        fp8_format: Any = "HYBRID",
        fp8_dpa: bool = False,
        fp8_mha: bool = False,
        backward_override: str | None = None,
        quantization_alignment: int = 128,
    ) -> None:
        self.qfactory, self.backward_override = qfactory, backward_override


class NVFP4BlockScaling:
    """Each default is one that the environment could have set."""

    def __init__(
        self,
        disable_rht: bool = True,
        disable_stochastic_rounding: bool = True,
        disable_2d_quantization: bool = True,
        row_scaled_activation: bool = True,
        nvfp4_4over6: str = "all",
        nvfp4_4over6_e4m3_use_256: str = "none",
        nvfp4_4over6_err_mode: str = "MSE",
        fp4_format: Any = "E2M1",
        fp8_format: Any = "E4M3",
        fp8_dpa: bool = False,
        fp8_mha: bool = False,
        backward_override: str | None = "high_precision",
    ) -> None:
        given = dict(locals())
        self.fields = {name: value for name, value in given.items() if name not in ("self", "fp4_format", "fp8_format")}


def general_gemm(
    A: Any,
    B: Any,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: bool = False,
    gelu_in: Any = None,
    alpha: float = 1.0,
    beta: float | None = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: Tensor | None = None,
    bias: Any = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    ub: Any = None,
    ub_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
) -> tuple[Tensor, None, None, None]:
    """`B @ A.T`; as in TE, T of A and N of B mean the row-wise copy."""
    assert layout in ("TN", "NN", "NT")
    directions = ["rowwise" if layout[1] == "N" else "columnwise", "rowwise" if layout[0] == "T" else "columnwise"]
    if isinstance(A, MXFP8TensorStorage):
        product = (_mxfp8_values(B, directions[0]) @ _mxfp8_values(A, directions[1]).T).to(out_dtype)
        return product if out is None else out.add_(product), None, None, None
    left, right = direction(B, directions[0]), direction(A, directions[1])
    reference = load_reference()
    reference.gemm.GEMMType = types.SimpleNamespace(FPROP=0, DGRAD=1, WGRAD=2)
    kind = {"TN": 0, "NN": 1, "NT": 2}[layout]
    result = B.get_metadata()["quantizer"]._reference.qgemm(
        left.data,
        right.data,
        None,
        out_dtype,
        left.scale,
        right.scale,
        out=out,
        accumulate=accumulate,
        gemm_type=kind,
        qresult_x=left,
        qresult_w=right,
    )
    if out is not None:
        result = out.copy_(result)
    return result, None, None, None


def direction(storage: Any, name: str) -> Any:
    """One copy as the reference holds it. Raises where the adapter asks for a copy that was not made."""
    metadata = storage.get_metadata()
    data, amax = metadata[f"{name}_data"], metadata[f"amax_{name}"]
    if data is None:
        raise RuntimeError(f"GEMM requested the {name} representation, but it is unavailable")
    scale = metadata[f"{name}_scale_inv"][: data.shape[0], : data.shape[1] // 8].view(torch.float8_e4m3fn)
    return types.SimpleNamespace(
        data=data,
        scale=scale,
        global_amax_row=amax,
        global_amax_col=amax,
        nvfp4_use_4over6=metadata["nvfp4_use_4over6"],
        nvfp4_e4m3_max=metadata["nvfp4_e4m3_max"],
    )


def _mxfp8_values(storage: Any, name: str) -> Tensor:
    """FP32 `[M, K]`, contracted along K."""
    metadata = storage.get_metadata()
    data, scales = metadata[f"{name}_data"], metadata[f"{name}_scale_inv"]
    if name == "columnwise":
        data, scales = data.T, scales.T
    scales = scales[: data.shape[0], : data.shape[1] // 32].contiguous().view(torch.float8_e8m0fnu).float()
    return data.contiguous().view(torch.float8_e4m3fn).float() * scales.repeat_interleave(32, 1)


def _padded(scale: Tensor) -> Tensor:
    """Bytes, padded to multiples of 128 x 4 as TE stores them."""
    rows, columns = -scale.shape[0] % 128, -scale.shape[1] % 4
    return torch.nn.functional.pad(scale.view(torch.uint8), (0, columns, 0, rows), value=0x7F)


def modules(version: str = VERSION, **replaced: Any) -> dict[str, types.ModuleType]:
    """The fake package, as entries of sys.modules. replaced: other objects (None: absent) for some symbols."""
    reference = load_reference()
    from_reference = {
        "NVFP4QuantizerRef": reference.NVFP4QuantizerRef,
        "Fp4Formats": reference.reference_utils.Fp4Formats,
    }
    packages: dict[str, types.ModuleType] = {}
    for name in ("transformer_engine", "transformer_engine_torch"):
        packages[name] = types.ModuleType(name)
    packages["transformer_engine"].__dict__["__version__"] = version
    packages["transformer_engine"].__path__ = []
    packages["transformer_engine_torch"].__dict__["DType"] = types.SimpleNamespace(kFloat8E4M3="kFloat8E4M3")
    for name, (place, *_) in SYMBOLS.items():
        module = packages.setdefault(f"transformer_engine.{place}", types.ModuleType(f"transformer_engine.{place}"))
        symbol = replaced[name] if name in replaced else globals().get(name, from_reference.get(name))
        if symbol is not None:
            module.__dict__[name] = symbol
    return packages


def install(monkeypatch: pytest.MonkeyPatch, version: str = VERSION, **replaced: Any) -> None:
    for name, module in modules(version, **replaced).items():
        monkeypatch.setitem(sys.modules, name, module)
