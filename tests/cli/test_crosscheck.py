"""`crosscheck` agrees with TE's own reference implementation and finds planted differences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.cli import crosscheck
from megatron_fp4.numerics import quantize_nvfp4, random_hadamard
from tests.helpers.tiny_run import tiny_run
from tests.precision.te import te_double


def printed(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str, expect: int) -> str:
    code = crosscheck.main(
        tiny_run(folder, "precision/recipe=nvfp4_no_sr", "precision.compile=false", *overrides).overrides
    )
    output = capsys.readouterr()
    assert code == expect, output.out + output.err
    return output.out + output.err


def test_agrees_with_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    te_double.install(monkeypatch)
    text = printed(capsys, tmp_path, expect=0)
    assert "Transformer Engine 2.20.2, block scale = amax_b * (S_enc * (1/6))" in text
    for what in ("fprop.x", "wgrad.x", "fprop.w", "dgrad.w", "dgrad.dy", "wgrad.dy"):
        assert f"equal   {what}: amax, scales and codes, bit for bit" in text, f"{what} was not compared"
    assert "equal   wgrad: largest error" in text, "products were not compared"


def test_one_bit_of_a_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    te_double.install(monkeypatch)
    plain = te_double._padded

    def one_bit(scale: Any) -> Any:
        scale = plain(scale).clone()
        scale[7, 2] ^= 1
        return scale

    monkeypatch.setattr(te_double, "_padded", one_bit)
    text = printed(capsys, tmp_path, expect=1)
    assert "DIFFERS fprop.x: scales[7, 2]: Transformer Engine has" in text, "the place must be named"
    assert "(1 of" in text


def test_one_code_and_amax(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    plain = te_double.NVFP4Quantizer.__call__

    def planted(self: Any, x: Any) -> Any:
        operand = plain(self, x)
        operand._metadata["rowwise_data"][3, 4] ^= 0x10  # the odd element: column 9
        operand._metadata["amax_columnwise"] = operand._metadata["amax_columnwise"] * 1.5
        return operand

    monkeypatch.setattr(te_double.NVFP4Quantizer, "__call__", planted)
    text = printed(capsys, tmp_path, expect=1)
    assert "DIFFERS fprop.x: codes[3, 9]" in text
    assert "DIFFERS wgrad.x: amax" in text
    assert "DIFFERS wgrad: largest error" in text, "a wrong amax changes the product"


class Stochastic(te_double.NVFP4Quantizer):
    """The double with stochastic rounding, from this package's formulas. noise: smallest value drawn."""

    noise = 0.0

    def __init__(self, **settings: Any) -> None:
        self.random = settings.pop("stochastic_rounding", False)
        super().__init__(**settings)

    def __call__(self, x: Any) -> Any:
        operand = super().__call__(x)
        if self.random:
            generator = torch.Generator().manual_seed(1)
            column = random_hadamard(x.T.contiguous()) if self.with_rht else x.T.contiguous()
            for name, source in (("rowwise_data", x), ("columnwise_data", column)):
                noise = torch.rand(source.shape, generator=generator).clamp(min=self.noise, max=1 - 2**-8)
                operand._metadata[name] = quantize_nvfp4(source, noise=noise).codes
        return operand


def test_stochastic_rounding_by_distribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    te_double.install(monkeypatch, NVFP4Quantizer=Stochastic)
    text = printed(capsys, tmp_path, "precision/recipe=nvfp4", expect=0)
    assert "equal   dgrad.dy: amax and scales bit for bit; stochastic codes: bias" in text
    monkeypatch.setattr(Stochastic, "noise", 0.3)
    text = printed(capsys, tmp_path, "precision/recipe=nvfp4", expect=1)
    assert "DIFFERS dgrad.dy: amax and scales bit for bit; stochastic codes: bias +0.0" in text, "a bias passes"


def test_nothing_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert "install transformer-engine" in printed(capsys, tmp_path, expect=2)


def test_nothing_to_compare_is_no_agreement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    te_double.install(monkeypatch)
    code = crosscheck.main(tiny_run(tmp_path, "precision=bf16").overrides)
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    assert "quantize no GEMM at the start, so there is nothing to compare" in output.err
