"""The paper's 12B run in miniature: everything that happens in it once, in one run on four ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.data.ledger import read_step, reopen
from megatron_fp4.models.block import model_linears
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import VOCABULARY, TinyRun, write_toy_shard

STEPS = 10
FORWARD_IN_BF16 = "fprop x bf16, w bf16 | dgrad dy nvfp4 sr, w nvfp4 16x16 | wgrad dy nvfp4 sr rht16, x nvfp4 rht16"


def load(experiment: str) -> RunConfig:
    return to_run_config(compose_config([f"experiment={experiment}", "model.vocab_size=8192"]))


def test_hybrid_quick_is_the_12b_run_at_another_size() -> None:
    """Rules, recipes, windows and phases are the paper's, as fractions of the run."""
    small, paper, switched = map(load, ("hybrid_quick", "paper_12b_10t", "ablation_12b_bf16_fprop_at_8_2t"))
    assert (small.precision.rules, small.precision.recipes) == (paper.precision.rules, paper.precision.recipes)
    sizes = {"lr": paper.optim.lr, "min_lr": paper.optim.min_lr, "warmup_tokens": paper.optim.warmup_tokens}
    assert replace(small.optim, **sizes) == paper.optim
    for config in (small, paper):
        assert [phase.tokens / config.train.total_tokens for phase in config.data.phases] == [0.7, 0.2, 0.0]
    for config in (small, switched):
        plan = PrecisionPlan(config.precision, model_linears(config.model), total_tokens=int(config.train.total_tokens))
        assert plan.phases[1][0] / config.train.total_tokens == pytest.approx(0.82)
        changed = {formats for formats in plan.table(1).formats().values() if formats[1] != "bf16"}
        assert changed == {("bf16", "nvfp4", "nvfp4")}
    assert small.train.total_tokens % (100 * small.tokens_per_step) == 0, "each percent of the run is a whole step"


def test_the_shrunken_12b_run(tmp_path: Path) -> None:
    """TP 2 and PP 2; in ten steps: data phase 2 from step 8, decay from 9, switch and data phase 3 from step 10."""
    shard = write_toy_shard(tmp_path / "shards" / "toy")
    sources = ", ".join(f"{{name: phase{n}, paths: ['{shard}'], max_epochs: 0}}" for n in (1, 2, 3))
    phases = "{name: a, tokens: 1792, weights: {phase1: 1}}, {name: b, tokens: 512, weights: {phase2: 1}}"
    run_dir = tmp_path / "run"
    run = TinyRun(
        run_dir,
        (
            "experiment=hybrid_quick",
            f"model.vocab_size={VOCABULARY}",
            "data.tokenizer=''",
            "data.seq_length=64",
            f"data.sources=[{sources}]",
            f"data.phases=[{phases}, {{name: c, tokens: 0, weights: {{phase3: 1}}}}]",
            "data.evaluation=[]",
            "optim.warmup_tokens=512",
            f"train.run_dir='{run_dir}'",
            "train.global_batch=4",
            f"train.total_tokens={STEPS * 4 * 64}",
            "train.check_gemms=true",
            "train.statistics_interval_steps=5",
            "train.eval_interval_steps=0",
            "train.log_interval_steps=1",
            "logging.tensorboard=false",
        ),
    )
    output = run.run(4)

    assert output.count("precision changes") == 1
    after = output[output.index("step 10: precision changes") :].splitlines()
    assert "blocks.{2,4,7}.mamba.in_proj: fprop x nvfp4, w nvfp4 16x16 -> fprop x bf16, w bf16" in after
    assert after[7].startswith("step 10: data phase 'c'"), "six kinds of linears change, then the blend"
    assert after[8].startswith("step     10/10"), "and the step is made"

    records = {r["step"]: r for r in read_metrics(run_dir) if "loss" in r}
    assert sorted(records) == list(range(1, STEPS + 1))
    assert records[STEPS]["loss"] < records[1]["loss"] - 0.3, "it does not learn"
    rates = [records[step]["lr"] for step in range(1, STEPS + 1)]
    assert rates[0] < rates[1] == rates[7] == 3e-3, "warm-up of two steps, then constant to 80%"
    assert rates[7] > rates[8] > rates[9] == pytest.approx(3e-5)

    logged = [read_step(run_dir, step) for step in range(1, STEPS + 1)]
    loader = reopen(logged[0].start)
    origins = [loader.origins(step.first_sample, step.num_samples) for step in logged]
    assert [origin.source for of_step in origins for origin in of_step] == (
        ["phase1"] * 7 * 4 + ["phase2"] * 2 * 4 + ["phase3"] * 4
    )

    table = (run_dir / "quantization" / "step_00000005.txt").read_text()
    linears = {line.split("/")[0] for line in table.splitlines()[1:]}
    assert len(linears) == 16, "two linears in each of eight quantized blocks, from both pipeline stages"
    after_switch = (run_dir / "quantization" / "step_00000010.txt").read_text()
    assert "/fprop.x" in table
    assert "/fprop.x" not in after_switch, "Fprop is in BF16 by then"
    meta = json.loads((run_dir / "checkpoints/step_00000010/state.json").read_text())
    assert json.dumps(meta).count(FORWARD_IN_BF16) == 16, "the checkpoint tells the precision it was made in"
