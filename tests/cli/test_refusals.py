"""Bad input ends with one clear message, exit code 2 and no traceback, before any process group is made."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.train_tokenizer import train
from megatron_fp4 import pretrain
from megatron_fp4.cli import main as cli_main
from megatron_fp4.train.faults.signals import EXIT_CONFIG
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.precision.te import te_double


def refused(capsys: pytest.CaptureFixture[str], run: TinyRun, *overrides: str) -> str:
    """Run the program in this process and return what it said."""
    code = pretrain.main([*run.overrides, *overrides])
    printed = capsys.readouterr()
    assert code == EXIT_CONFIG, f"expected a refusal, got {code}: {printed.out}"
    assert printed.err.startswith("error: "), printed.err
    assert "Traceback" not in printed.err
    assert not run.run_dir.exists(), "a refused run must leave nothing behind"
    return printed.err


RAMP = [
    "train.global_batch=8",
    "train.batch_ramp.start_samples=2",
    "train.batch_ramp.increment_samples=2",
    "train.batch_ramp.ramp_samples=60",
]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_layer=4"], "did you mean 'model.num_layers'"),
        (["modle=gpt_tiny"], "did you mean 'model'"),
        (["model=gpt_tinny"], "did you mean 'gpt_tiny'"),
        (["precision.backend=emulate"], "emulated"),
        (["precision/recipe=nvfp4_no_rth"], "did you mean 'nvfp4_no_rht'"),
        (["precision/recip=nvfp4"], "did you mean 'precision/recipe'"),
        (["precision.rules=paper_12b"], "the options of a group are chosen by precision/rules=paper_12b"),
        (["precision.keep_bf16.lst=2"], "did you mean 'precision.keep_bf16.last'"),
        (["precision.keep_bf16.last=9"], "every GEMM in bf16; change precision.keep_bf16"),
        (["precision=nvfp4_no_rht"], "precision=nvfp4_no_rht is now called precision/recipe=nvfp4_no_rht"),
        (["precision=nvfp4", "precision/recipe=nvfp4_no_rht"], "both choose the recipe; leave one out"),
        (["precision=nvfp4_paper"], "precision=nvfp4_paper is now called precision/rules=paper_12b"),
        (
            ["precision.recipes.nvfp4.wgrad.b.rht_size=4"],
            "precision.recipes.nvfp4.wgrad.b.rht_size is now called precision.recipes.nvfp4.wgrad.x.rht_size",
        ),
        (
            ["precision.recipes.nvfp4={dgrad: {a: {rounding: rne}}}"],
            "dgrad.a is now called precision.recipes.nvfp4.dgrad.dy",
        ),
        (["optim.lr=fast"], "optim.lr"),
        (["optim.lr=-1"], "must be in (0, 1000]"),
        (["optim.lr=1e300"], "optim.lr = 1e+300, must be in (0, 1000]"),
        (["optim.weight_decay=1e300"], "optim.weight_decay = 1e+300, must be in [0, 1000]"),
        (["optim.eps=1e-50"], "optim.eps = 1e-50, must be in [1e-37, 1000]"),
        (["model.norm_eps=1e-50"], "model.norm_eps = 1e-50, must be in [1e-37, 1000]"),
        (["model.init_std=1e-50"], "model.init_std = 1e-50, must be in [1e-37, 1000]"),
        (["model.rope_base=1e-300"], "model.rope_base = 1e-300, must be in (1, 1e+12], or 0"),
        (["model.mamba_conv=1"], "model.mamba_conv = 1, must be at least 2"),
        (["data.skip=[[0,99999999999999999999]]"], "0 <= first < end <= 1,000,000,000,000,000"),
        (["parallel.tp=3"], "tp * pp * cp * dp = 3 * 1 * 1"),
        (["train.global_batch=5"], "5 is not a multiple of 2 * 1"),
        (["model.num_heads=3"], "num_heads"),
        (["model.hidden=72", "model.head_dim=16"], "multiple of 16"),
        (["data.seq_length=24", "train.micro_batch=1"], "tokens per microbatch"),
        (["precision.rules=[{match: '*', use: bf16}]"], "every GEMM in bf16"),
        (["precision.rules=[{match: 'blocks.9.*', use: bf16}, {match: '*', use: nvfp4}]"], "matches no linear"),
        (["precision.rules=[{match: '*', use: nvfp5}]"], "nvfp4"),
        (
            ["precision.rules=[{match: '*.up', use: nvfp5, fprop: nvfp4, dgrad: nvfp4, wgrad: nvfp4}]"],
            "precision recipe 'nvfp5' does not exist",
        ),
        (["+precision.recipes={same: {wgrad_output: compute}}"], "precision.recipes.same is what precision.evaluation"),
        (["precision.evaluation=fp9"], "fp9"),
        (["train.total_tokens=64"], "less than one step"),
        (["train.batch_ramp.start_samples=2"], "have no effect with ramp_samples = 0"),
        ([*RAMP, "train.batch_ramp.increment_samples=4"], "must reach train.global_batch = 8"),
        (
            [*RAMP, "train.batch_ramp.start_samples=1", "train.batch_ramp.increment_samples=1"],
            "1 is not a multiple of 2",
        ),
        ([*RAMP, "train.total_tokens=1000"], "less than the batch ramp of 60 samples and one step"),
        ([*RAMP, "train.batch_ramp.ramp_sample=3"], "did you mean 'train.batch_ramp.ramp_samples'"),
        (["train.hang_timeout_seconds=-1"], "train.hang_timeout_seconds = -1"),
        (["checkpoint.keep_best=1"], "nothing is evaluated"),
        (["train.eval_interval_steps=5"], "train.eval_interval_steps = 5 would have no effect"),
        (["--frobnicate"], "unknown option"),
        (
            ["--weight-decay", "0.1"],
            "unknown option '--weight-decay'; a setting has no dashes: optim.weight_decay=VALUE",
        ),
        (["--weight_decay=0.1"], "a setting has no dashes: optim.weight_decay=VALUE"),
        (["--vocab-size", "4"], "a setting has no dashes: model.vocab_size=VALUE"),
        (["--seed", "4"], "a setting has no dashes: data.seed=VALUE or train.seed=VALUE"),
        (["hydra.run.dir=outputs"], "hydra.run.dir has no effect"),
        (["hydra/launcher=basic"], "hydra/launcher has no effect"),
        (["precision.rules=[{match: '/(/', use: nvfp4}]"], "match = '/(/' is no regular expression: missing )"),
        (["precision.switch=[{match: '/[/', at_fraction: 0.5}]"], "match = '/[/' is no regular expression"),
        (
            ["+precision.recipes.nvfp4.fpropp.x.format=nvfp4"],
            "unknown key 'precision.recipes.nvfp4.fpropp.x.format'; did you mean 'precision.recipes.nvfp4.fprop'",
        ),
        (["+precision.recipes.nvfp4.fprop.x.fromat=nvfp4"], "did you mean 'precision.recipes.nvfp4.fprop.x.format'"),
        (["+precision.recipes.nvfp4.fprop={y: {format: nvfp4}}"], "Key 'y' not in 'Fprop'"),
        (["train.run_dir=s3://bucket/run"], "train.run_dir = s3://bucket/run: no store stands behind URLs"),
        (["train.init_from='s3://bucket/a?sig=word'"], "a URL holds no credentials"),
        (["checkpoint.mirror=s3://bucket"], "checkpoint.mirror = s3://bucket: it must look like s3://BUCKET/PREFIX"),
        (["checkpoint.mirror=runs/mirror"], "checkpoint.mirror = runs/mirror: no object store is reached by this"),
        (["checkpoint.mirror='s3://key:word@bucket/a'"], "a URL holds no credentials"),
        (["train.run_dir='~/run'"], "train.run_dir = ~/run: only a shell expands ~"),
        (["train.run_dir="], "train.run_dir is empty"),
        (["data.tokenizer=hf://meta/tokenizer.json"], "data.tokenizer = hf://meta/tokenizer.json: no store"),
        (["data.index_cache=gs://bucket/index"], "data.index_cache = gs://bucket/index: no store"),
        (["data.sources=[{name: a, paths: [s3://bucket/a]}]"], "data.sources[0].paths = s3://bucket/a: no store"),
        (["data.evaluation=[{name: a, paths: [file:///a]}]"], "data.evaluation[0].paths = file:///a: no store"),
        (["optim.warmup_tokens=999999"], "999999"),
        (["precision.backend=transformer_engine", "model.ffn_hidden=272"], "the contracted dimension, 272, must be a"),
        (["precision.backend=native_fp8"], "only GEMMs of two fp8_block operands run on its tensor cores"),
        (["optim.impl=te"], "optim.impl=te has CUDA kernels only, but this run is on cpu; set optim.impl=torch"),
        (["model.norm_impl=apex"], "model.norm_impl=apex has CUDA kernels only"),
        (["model.loss_impl=te"], "model.loss_impl=te has CUDA kernels only"),
        (["model.norm_impl=te", "precision.compute_dtype=fp32"], "proof mode"),
        (["model.loss_impl=te", "train.label_smoothing=0.1"], "train.label_smoothing = 0.1 with model.loss_impl=te"),
        (["train.label_smoothing=1.0"], "train.label_smoothing = 1.0, must be in [0, 1)"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str) -> None:
    assert expected in refused(capsys, tiny_run(tmp_path), *overrides)


@pytest.mark.parametrize(
    "command",
    [
        ["data", "tokenize", "a.txt", "--tokenizer", "t.model", "--output", "s3://bucket/set"],
        ["data", "make-corpus", "--output", "s3://bucket/a.jsonl"],
        ["data", "train-tokenizer", "a.txt", "--output", "~/t.model"],
        ["data", "merge", "a", "--output", "gs://bucket/set"],
        ["report", "run", "--html", "s3://bucket/page.html"],
        ["report", "run", "--plot", "s3://bucket/page.png"],
        ["checkpoint", "extract", "run", "--to", "s3://bucket/weights"],
        ["checkpoint", "export", "run", "--to", "a", "--tokenizer", "s3://bucket/t.model"],
        ["checkpoint", "rewind", "s3://bucket/run", "5"],
        ["report", "s3://bucket/run"],
        ["status", "s3://bucket/run"],
        ["evaluate", "s3://bucket/run"],
        ["generate", "run", "--checkpoint", "gs://bucket/run"],
        ["replay", "s3://bucket/bundle"],
        ["study", "s3://bucket/study.yaml"],
        ["plan", "--config-dir", "s3://bucket/configs"],
        ["data", "tokenize", "s3://bucket/a.jsonl", "--tokenizer", "t.model", "--output", "a"],
        ["data", "train-tokenizer", "s3://bucket/*.txt", "--output", "t.model"],
        ["data", "verify", "s3://bucket/set"],
        ["data", "verify", "set", "--heldout", "s3://bucket/set"],
        ["data", "stats", "s3://bucket/set"],
        ["data", "split", "s3://bucket/set", "--part", "a=1", "--output", "a"],
        ["data", "inspect", "--run", "az://container/run", "--sample", "0"],
        ["data", "ledger", "--run", "s3://bucket/run", "--step", "1"],
        ["data", "blend", "--plan", "s3://bucket/data.yaml", "--tokens", "1e9"],
    ],
)
def test_places_beyond_this_machine(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each wrote into a local folder of that name, or said that it was not there."""
    try:
        code: object = cli_main.run(command)
    except SystemExit as left:
        code = left.code
    assert code == EXIT_CONFIG
    assert re.search(r"no store stands behind URLs|only a shell expands ~", capsys.readouterr().err)


def test_heads_not_divisible_by_tp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    printed = refused(capsys, tiny_run(tmp_path), "parallel.tp=4", "model.num_kv_heads=2")
    assert "model.num_kv_heads = 2 is not divisible by parallel.tp = 4" in printed


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (["parallel.dp=4"], "steps of 2 samples: .* 2 is not a multiple of 2 \\* 4 = 8; change train.batch_ramp"),
        (
            ["parallel.dp=1", "parallel.pp=4", "model.num_layers=4"],
            "steps of 2 samples: schedule 1f1b needs at least as many .* got 1 microbatches .* pp = 4",
        ),
    ],
)
def test_every_stage_of_a_ramp_must_fit_the_layout(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    layout: list[str],
    expected: str,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert re.search(expected, refused(capsys, tiny_run(tmp_path), *RAMP, *layout))


def test_hidden_not_a_multiple_of_16_per_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = refused(capsys, tiny_run(tmp_path), "parallel.tp=2", "model.ffn_hidden=272")
    assert "136" in printed, "the local size must be named"
    assert "multiple of 16" in printed


def test_a_vocabulary_below_the_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shards happen to hold no id beyond it; other text would."""
    lines = (f"word {number} and {number * number}" for number in range(500))
    train(lines, tmp_path / "t.model", vocab_size=280, model_type="bpe", threads=1)
    printed = refused(capsys, tiny_run(tmp_path), f"data.tokenizer={tmp_path}/t.model", "model.vocab_size=200")
    assert "model.vocab_size = 200 is less than the 280 of the tokenizer" in printed


def test_missing_truncated_and_foreign_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path)
    assert "nowhere" in refused(capsys, run, "data.sources=[{name: toy, paths: [/nowhere/shard]}]")
    assert "/nowhere/tokenizer.model" in refused(capsys, run, "data.tokenizer=/nowhere/tokenizer.model")
    shard = tmp_path / "shards/toy.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    printed = refused(capsys, run)
    assert "toy" in printed
    assert str(shard.stat().st_size) in printed.replace(",", ""), "expected and actual size must be named"


def test_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    output = run.with_overrides("model.vocab_size=50").run(expect=1)
    assert "beyond the vocabulary of 50" in output


def test_vocabulary_that_a_fused_loss_cannot_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = refused(capsys, tiny_run(tmp_path), "parallel.tp=2", "model.loss_impl=te", "model.vocab_size=97")
    assert "equal parts of the vocabulary: model.vocab_size = 97 is not divisible by parallel.tp = 2" in printed


def test_transformer_engine_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    printed = refused(capsys, tiny_run(tmp_path), "precision.backend=transformer_engine")
    assert "Transformer Engine cannot be imported" in printed
    assert "install transformer-engine" in printed
    assert printed.count("\n") == 1, "one clear message"


def test_a_recipe_that_this_version_cannot_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    te_double.install(monkeypatch)
    printed = refused(capsys, tiny_run(tmp_path), "precision=mxfp4", "precision.backend=transformer_engine")
    assert "mxfp4 has no quantizer there" in printed
    assert "version 2.20.2" in printed


def test_quantizers_that_need_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoGpu(te_double.NVFP4Quantizer):
        def __init__(self, **settings: Any) -> None:
            raise RuntimeError("Found no NVIDIA driver on your system")

    te_double.install(monkeypatch, NVFP4Quantizer=NoGpu)
    printed = refused(
        capsys, tiny_run(tmp_path), "precision/recipe=nvfp4_no_sr", "precision.backend=transformer_engine"
    )
    assert "needs a CUDA GPU, and torch sees none" in printed


def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "torch sees no CUDA device" in refused(capsys, tiny_run(tmp_path), "train.device=cuda")


@pytest.mark.parametrize(("rank", "local_rank", "speaks"), [(5, 1, False), (4, 0, True)])
def test_what_one_node_lacks_is_said_by_that_node(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    local_rank: int,
    speaks: bool,
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    launched = {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "node0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    run = tiny_run(tmp_path, "precision.backend=transformer_engine", "train.global_batch=16")
    assert pretrain.main(run.overrides) == EXIT_CONFIG
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: on {socket.gethostname()}: ") if speaks else not printed, printed


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    """`megatron-fp4 ... | head` closes the pipe while there is more to print."""
    command = f"{Path(sys.executable).with_name('megatron-fp4')} explain --markdown | head -n 1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert ended.stdout.count("\n") == 1
    assert ended.stderr == ""


def test_the_module_is_the_program() -> None:
    """As torchrun starts it on the ranks of a trained run; doing nothing, with exit code 0, would look like success."""
    done = subprocess.run([sys.executable, "-m", "megatron_fp4.cli.main", "evaluat"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown command 'evaluat'" in done.stderr
