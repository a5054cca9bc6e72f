"""`megatron-fp4 health`: a planted illness is named with the rule that ends it; what is sound gets no advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_fp4 import pretrain
from megatron_fp4.cli.compose import from_yaml, to_run_config
from megatron_fp4.cli.trained import health
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.proofs.health import patient
from megatron_fp4.proofs.health.examine import Examination
from megatron_fp4.proofs.health.remedies import as_yaml, pattern_for, remedies, rule_for
from megatron_fp4.train.run import Run
from tests.helpers.tiny_run import tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of a hybrid with experts, and its checkpoint."""
    overrides = (
        *(
            "model.pattern='M-*E'",
            "model.num_layers=4",
            "model.ffn_hidden=64",
            "train.micro_batch=4",
            "train.global_batch=16",
        ),
        *("model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden=32"),
        *("model.mamba_num_heads=16", "model.mamba_head_dim=8"),
        *("precision.keep_bf16.last=0", "train.stop_after_steps=1"),
    )
    run = tiny_run(tmp_path_factory.mktemp("health"), *overrides)
    assert pretrain.main(list(run.overrides)) == 0
    return run.run_dir


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a fourth of the channels of the second linears that end in a name weak in each tile, once they are read."""

    def plant(*ends: str) -> None:
        right = patient.build

        def with_weak_channels(*arguments: Any) -> tuple[Run, Any]:
            run, start = right(*arguments)
            for name, linear in linears_of(run.engine.stages[0]).items():
                if name.endswith(ends):
                    with torch.no_grad():
                        linear.weight[:, ::4] *= 1e-2
            return run, start

        monkeypatch.setattr(patient, "build", with_weak_channels)

    return plant


def test_a_sound_model_gets_no_advice(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main([str(trained)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "healthy: no GEMM makes 1.00% of a gradient zero"
    assert "rules:" not in text
    assert "blocks.3.moe.experts.up" in text


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the linears once they are read."""
    right = patient.build

    def build(*arguments: Any) -> tuple[Run, Any]:
        run, start = right(*arguments)
        with torch.no_grad():
            change(linears_of(run.engine.stages[0]))
        return run, start

    monkeypatch.setattr(patient, "build", build)


def test_nan_is_not_healthy(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(monkeypatch, lambda linears: linears["blocks.1.mlp.up"].weight[3, 3].fill_(torch.nan))
    assert health.main([str(trained)]) == 2
    assert "more tensors is not finite at step 1, samples 0 to 15" in capsys.readouterr().err


def test_zeros_that_attention_hides_are_not_healthy(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fourth of the channels of V, which are a fourth of those of QKV."""
    spoil(monkeypatch, lambda linears: linears["blocks.2.attention.out"].weight[:, ::4].mul_(1e-2))
    assert health.main([str(trained)]) == 1
    text = capsys.readouterr().out
    assert "blocks.2.attention.qkv: more zeros than in BF16" in text
    assert "GEMMs of blocks.2.attention.out lose channels" in text
    assert "healthy" not in text


def test_the_advice_ends_what_was_planted(
    trained: Path,
    planted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In both forms of the output, of which the second is made of what was computed for the first."""
    planted("mlp.down", "experts.down")
    assert health.main([str(trained), "--threshold", "0.3"]) == 0, "a fourth is less than that"
    capsys.readouterr()
    right, examined = health.examine, list[Examination]()

    def examine(*arguments: Any) -> Examination:
        examined.append(right(*arguments))
        return examined[0]

    monkeypatch.setattr(health, "examine", examine)
    assert health.main([str(trained), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    illnesses = {one["names"][0]: one for one in result["illnesses"]}
    assert set(illnesses) == {"blocks.1.mlp.down", "blocks.3.moe.experts.down"}
    for name, first in (
        ("blocks.1.mlp.down", "blocks.1.mlp.up"),
        ("blocks.3.moe.experts.down", "blocks.3.moe.experts.up"),
    ):
        illness = illnesses[name]
        assert (illness["gemm"], illness["victims"], illness["remedy"]) == ("dgrad", [first], "1x16 weights")
        assert illness["before"] == illness["elements"] // 4
        assert illness["after"] == 0
        now, after, bf16 = ({one["name"]: one for one in result[key]}[first] for key in ("now", "after", "bf16"))
        assert now["zeros"] >= now["numel"] // 4
        assert max(after["zeros"], bf16["zeros"]) < now["numel"] // 100
    assert [rule["match"] for rule in yaml.safe_load(result["yaml"])["precision"]["rules"]] == list(illnesses)

    monkeypatch.setattr(health, "examine", lambda *_: examined[0])
    assert health.main([str(trained)]) == 1
    text = capsys.readouterr().out
    sentence = (
        "dgrad of blocks.1.mlp.down makes 25.00% of the weight gradients of blocks.1.mlp.up zero; with 1x16 weights"
    )
    assert f"{sentence} 0.00%" in text
    assert "    - {match: 'blocks.1.mlp.down', use: nvfp4_1x16}" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--step", "7"], "step_00000007 is neither a checkpoint nor a directory with some"),
        (["--samples", "3"], "--samples 3 is not a multiple of train.micro_batch = 4 x dp = 1"),
        (["--threshold", "2"], "--threshold = 2, must be between 0 and 1"),
    ],
)
def test_refusals(trained: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = health.main([str(trained), *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_advice_reads_as_settings() -> None:
    """What is printed is what was measured, whatever the recipe."""
    bases = dict.fromkeys(("fprop", "dgrad", "wgrad"), "nvfp4")
    listed = remedies(nvfp4_paper(), "dgrad", "nvfp4")
    assert [one.label for one in listed] == ["1x16 weights", "mxfp8 for dgrad", "bf16 for dgrad"]
    rules = [rule_for(f"*.{number}.*", [one], bases) for number, one in enumerate(listed)]
    rules.append(rule_for("/^head$/", [listed[0], *remedies(nvfp4_paper(), "wgrad", "nvfp4")[:1]], bases))
    recipes = {one.recipe: one.value for one in listed if one.value}
    read = to_run_config(from_yaml(as_yaml(rules, recipes))).precision
    assert read.rules == rules
    assert read.recipes == recipes
    assert read.recipes["nvfp4_1x16"].dgrad.w.tile == (1, 16)
    assert (rules[1].use, rules[1].dgrad) == ("nvfp4", "mxfp8")
    assert (rules[3].use, rules[3].wgrad) == ("nvfp4_1x16", "mxfp8"), "two remedies of one linear are one rule"


def test_patterns_name_the_ill_alone() -> None:
    downs = [f"blocks.{number}.mlp.down" for number in range(3)]
    assert pattern_for(downs, []) == "blocks.*.mlp.down"
    assert pattern_for(downs[:1], downs[1:]) == "blocks.0.mlp.down"
    assert pattern_for(downs[:2], downs[2:]) == r"/^blocks\.(0|1)\.mlp\.down$/"
