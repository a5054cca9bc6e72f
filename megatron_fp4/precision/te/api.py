"""The only file that imports Transformer Engine: its symbols, found and checked once."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fp4.comm.launch import environment
from megatron_fp4.precision.te.versions import SYMBOLS, Features, Symbol, features_of, number_of

PACKAGE = "transformer_engine"
FAST_MATH = ("NVTE_USE_FAST_MATH", "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH")
"""Environment variables that its NVFP4 kernels read at each call, and then round differently (trap 4)."""


@dataclass(frozen=True, eq=False)
class Api:
    """Transformer Engine as it is installed. symbols: the classes and functions of `versions.SYMBOLS`."""

    version: str
    features: Features
    symbols: Mapping[str, Any]
    e4m3: Any


def load_api() -> Api:
    """Import Transformer Engine.

    Raises ValueError with the remedy if it is absent, broken, too old, not as it is used here, or set to other numbers
    by an environment variable.
    """
    for name, value in environment(*FAST_MATH).items():
        if value not in ("", "0"):
            raise ValueError(
                f"{name}={value} makes Transformer Engine's NVFP4 kernels round differently, which no"
                f" precision recipe can say; unset it"
            )
    version = str(_imported(PACKAGE).__version__)
    number = number_of(version)
    wanted = {name: symbol for name, symbol in SYMBOLS.items() if number >= symbol.since}
    symbols = {name: getattr(_imported(f"{PACKAGE}.{symbol.module}"), name, None) for name, symbol in wanted.items()}
    unfit = [name for name, symbol in wanted.items() if not _fits(symbols[name], symbol)]
    if unfit:
        raise ValueError(
            f"Transformer Engine {version} has no {', '.join(unfit)} as precision.backend=transformer_engine uses it;"
            f" use a version from 2.19 to 2.20, or precision.backend=emulated"
        )
    return Api(version, features_of(version), symbols, _imported("transformer_engine_torch").DType.kFloat8E4M3)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"precision.backend=transformer_engine: Transformer Engine cannot be imported"
            f" ({type(error).__name__}: {error}); install transformer-engine[pytorch]>=2.19 beside a CUDA build of"
            f" torch, or use precision.backend=emulated"
        ) from error


def _fits(implementation: Callable[..., Any] | None, symbol: Symbol) -> bool:
    """Whether it exists and takes what is passed by name."""
    if implementation is None:
        return False
    parameters = inspect.signature(implementation).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_all or set(symbol.passed) <= set(parameters)
