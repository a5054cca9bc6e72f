"""What no 4-bit file can hold is refused by name, with the remedy, and never quantized anew without a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fp4.cli.checkpoint import main
from megatron_fp4.interop.export.plan import CodedLinear, Requantize, coded_tensors, unquantized_modules
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision import AmaxScope, Format, Fprop, LinearPrecision, Operand, Rounding
from megatron_fp4.precision.recipes import RECIPES, nvfp4_paper
from megatron_fp4.precision.table import PrecisionTable, Row
from tests.helpers.tiny_run import TinyRun
from tests.interop.export.conftest import llama_run
from tests.train.in_process import make_trainer

LLAMA = ModelConfig(
    num_layers=1, hidden=64, ffn_hidden=128, num_heads=4, num_kv_heads=2, vocab_size=96, activation=Activation.swiglu
)
PAPER = nvfp4_paper()


def table(config: ModelConfig, precision: LinearPrecision, *, head: bool = False) -> PrecisionTable:
    names = [info.name for info in model_linears(config)]
    high = LinearPrecision()
    return PrecisionTable(tuple(Row(name, precision if head or name != "head" else high, "") for name in names))


def with_weight(operand: Operand, *, pad: bool = False) -> LinearPrecision:
    x = Operand(operand.format, rht_size=operand.rht_size)
    return LinearPrecision(Fprop(x, operand, pad=pad))


def coded(config: ModelConfig, precision: LinearPrecision, tp: int = 1, way: Requantize | None = None) -> CodedLinear:
    """The first linear of the model."""
    tensors = coded_tensors(config, table(config, precision), tp, way)
    return next(one.coded for one in tensors if one.coded and one.coded.name == "blocks.0.attention.qkv")


NVFP4 = Operand(Format.nvfp4)
REFUSED = {
    "its weight in mxfp4": (RECIPES["mxfp4"], 1),
    "its weight in fp8_block": (RECIPES["fp8"], 1),
    "its weight in mxfp8": (RECIPES["mxfp8"], 1),
    "behind a Hadamard transform of 16": (with_weight(replace(NVFP4, rht_size=16)), 1),
    "rounded stochastically": (with_weight(replace(NVFP4, rounding=Rounding.sr)), 1),
    "with many global scales .amax_scope=row.": (with_weight(replace(NVFP4, amax_scope=AmaxScope.row)), 1),
    "with many global scales .amax_scope=group128.": (with_weight(replace(NVFP4, amax_scope=AmaxScope.group128)), 1),
    "a global scale on each of 2 tensor-parallel ranks": (with_weight(replace(NVFP4, amax_scope=AmaxScope.shard)), 2),
    "its weight padded": (with_weight(replace(NVFP4, tile=(16, 16)), pad=True), 4),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_name(reason: str) -> None:
    precision, tp = REFUSED[reason]
    with pytest.raises(ValueError, match=f"blocks.0.attention.qkv multiplied .*{reason}.*--requantize 1x16 or 4over6"):
        coded(LLAMA, precision, tp)
    anew = coded(LLAMA, precision, tp, Requantize.rows)
    assert anew.operand == NVFP4
    assert anew.trained is None


def test_what_a_file_can_hold_is_the_operand_of_training() -> None:
    for precision, tp in ((PAPER, 2), (with_weight(replace(NVFP4, amax_scope=AmaxScope.shard)), 1)):
        linear = coded(LLAMA, precision, tp)
        assert linear.operand == linear.trained == precision.fprop.w
        assert linear.parts == tuple(f"blocks.0.attention.qkv.{part}.weight" for part in "qkv"), "one global scale"


def test_a_tied_head_stays_in_high_precision() -> None:
    tied = replace(LLAMA, tied_embeddings=True)
    assert unquantized_modules(tied, coded_tensors(tied, table(tied, PAPER), 1, None)) == ["lm_head"]
    with pytest.raises(ValueError, match="a tied table is in the files once"):
        coded_tensors(tied, table(tied, PAPER, head=True), 1, None)
    everything = coded_tensors(LLAMA, table(LLAMA, PAPER, head=True), 1, None)
    assert not unquantized_modules(LLAMA, everything)


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    narrow = replace(LLAMA, ffn_hidden=120)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.mlp\.down has 120 input features, and the files hold blocks of 16"
    ):
        coded_tensors(narrow, table(narrow, with_weight(NVFP4, pad=True)), 1, Requantize.rows)


def test_after_a_switch_to_bf16_the_user_chooses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights of the end have no operand of training: which step's precision counts is not for us to guess."""
    run = llama_run(tmp_path, f"precision.switch=[{{at_tokens: {2 * 4 * 32}, use: bf16}}]")
    make_trainer(run.overrides)[0].fit()
    arguments = ["export", str(run.run_dir), "--to", str(tmp_path / "m"), "--format", "modelopt"]
    assert main(arguments) == 2
    refusal = capsys.readouterr().err
    assert "had left its quantized formats behind when the checkpoint was written" in refusal
    assert "--precision-at 2 makes the codes" in refusal
    assert not (tmp_path / "m").exists()
    assert main([*arguments, "--precision-at", "41"]) == 2
    assert "the run has the steps 1 to 40" in capsys.readouterr().err
    assert main([*arguments, "--precision-at", "2"]) == 0
    assert "in the precision of step 2" in capsys.readouterr().out
    assert "in the precision of step 2" in (tmp_path / "m" / "README.md").read_text()


def test_choices_that_would_have_no_effect(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(run.run_dir), "--to", str(tmp_path / "m")]
    assert main([*arguments, "--requantize", "1x16"]) == 2
    assert "--format hf writes none" in capsys.readouterr().err
    assert main([*arguments, "--format", "modelopt", "--requantize", "4over6"]) == 0
    out = capsys.readouterr().out
    errors = [float(cell) for cell in out.splitlines()[-1].split()[1:]]
    assert out.splitlines()[-1].startswith("all ")
    assert errors[0] > errors[1] > errors[2] > 0.05, "a tile of 256, a row of 16, and two scales to choose from"
