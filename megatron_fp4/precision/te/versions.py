"""Which versions of Transformer Engine are taken, what of them is used, and what each can do.

Taken is what was released in the twelve months before this was written, the training image's 2.17 among it. This file
never imports Transformer Engine (`api` does), so that it can be held against the sources of any version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from megatron_fp4.precision.operand import ScaleOrder

Number = tuple[int, int]
MINIMUM = (2, 10)
KNOWN = "2.20.2"
"""The newest version that tests have seen."""
MODULES = (2, 19)
"""From here on `te.Linear` can quantize the two directions of a tensor differently, and ships its reference."""


class Symbol(NamedTuple):
    """A class or function of Transformer Engine. module: its place in the package. passed: arguments given by name."""

    module: str
    passed: tuple[str, ...] = ()
    since: Number = MINIMUM


DIRECTIONS = ("rowwise", "columnwise")
SYMBOLS = {
    "NVFP4Quantizer": Symbol(
        "pytorch.tensor.nvfp4_tensor",
        (
            *DIRECTIONS,
            "with_rht",
            "with_post_rht_amax",
            "with_2d_quantization",
            "stochastic_rounding",
            "with_random_sign_mask",
        ),
    ),
    "MXFP8Quantizer": Symbol("pytorch.tensor.mxfp8_tensor", DIRECTIONS),
    "Float8BlockQuantizer": Symbol(
        "pytorch.tensor.float8_blockwise_tensor",
        (*DIRECTIONS, "amax_epsilon", "force_pow_2_scales", "block_scaling_dim"),
    ),
    "general_gemm": Symbol(
        "pytorch.cpp_extensions.gemm", ("out_dtype", "layout", "grad", "use_split_accumulator", "out", "accumulate")
    ),
    "NVFP4BlockScaling": Symbol(
        "common.recipe", ("disable_rht", "disable_stochastic_rounding", "disable_2d_quantization")
    ),
    "CustomRecipe": Symbol("common.recipe", ("qfactory",)),
    "IdentityQuantizer": Symbol("pytorch.tensor.identity_tensor", (), MODULES),
    "HybridQuantizer": Symbol("pytorch.tensor.hybrid_tensor", ("rowwise_quantizer", "columnwise_quantizer"), MODULES),
    "NVFP4QuantizerRef": Symbol(
        "pytorch.custom_recipes.reference_nvfp4",
        ("dtype", *DIRECTIONS, "quant_tile_shape", "with_rht", "with_random_sign_mask"),
        MODULES,
    ),
    "Fp4Formats": Symbol("pytorch.custom_recipes.reference_utils", (), MODULES),
}
FOUR_OVER_SIX_PASSED = ("nvfp4_use_4over6", "nvfp4_e4m3_max", "nvfp4_4over6_err_mode")
"""What `NVFP4Quantizer` and its reference are given beside that for four over six."""


@dataclass(frozen=True)
class Features:
    """What one version does.

    scale_order: how block scales are made. four_over_six: `NVFP4Quantizer` has it. mixed_directions: `te.Linear` can
    quantize the two directions of a tensor differently, or leave one in BF16 (Hybrid and Identity quantizers).
    """

    scale_order: ScaleOrder
    four_over_six: bool
    mixed_directions: bool


def number_of(version: str) -> Number:
    """(major, minor) of "2.20.2". Raises ValueError for a version below the minimum."""
    match = re.match(r"(\d+)\.(\d+)", version)
    number = (int(match[1]), int(match[2])) if match else (0, 0)
    if number < MINIMUM:
        raise ValueError(
            f"Transformer Engine {version} is older than {MINIMUM[0]}.{MINIMUM[1]}, the oldest version that is taken;"
            f" install transformer-engine[pytorch]>={MODULES[0]}.{MODULES[1]}, or use precision.backend=emulated"
        )
    return number


def features_of(version: str) -> Features:
    """What "2.20.2" does, by its number; what is newer than the tests know does what the newest known one does."""
    number = number_of(version)
    return Features(
        scale_order=ScaleOrder.te if number >= (2, 14) else ScaleOrder.paper,
        four_over_six=number >= (2, 17),
        mixed_directions=number >= MODULES,
    )
