"""`megatron-fp4 report`: what it says of runs that differ, what it refuses, and the page with all in one file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_fp4.cli.planning.plan import main as plan
from megatron_fp4.cli.report import main
from tests.cli.report.pages import drawn


def write_records(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_run(folder: Path, factor: float, *, spikes: bool = False) -> Path:
    records = [
        {"step": step, "loss": factor * 4 / step, "grad_norm": 1.0, "consumed_tokens": 1e6 * step, "lr": 1e-3}
        | {"tokens_per_second": 100.0, "tflops": 1.0, "skipped_steps": 0.0}
        for step in range(1, 31)
    ]
    extra = [{"step": 30, "eval/held<out/loss": 2.0}, {"step": 20, "save/seconds": 1.5, "save/blocking_seconds": 0.1}]
    write_records(folder, [*records, *extra])
    if spikes:
        (folder / "spikes.jsonl").write_text(json.dumps({"step": 7, "action": "skip", "loss": 9.0}) + "\n")
    return folder


def run_of_batch(folder: Path, batch: int, num_tokens: int, settings: str = "") -> Path:
    """Losses are a function of the consumed tokens, whatever the batch; a token is a million."""
    steps = range(1, num_tokens // batch + 1)
    write_records(
        folder,
        [
            {
                "step": step,
                "loss": 10.0 * (step * batch) ** -0.5,
                "grad_norm": 1.0,
                "consumed_tokens": 1e6 * step * batch,
            }
            | ({"eval/held/loss": 8.0 * (step * batch) ** -0.5} if step * batch % 20 == 0 else {})
            for step in steps
        ],
    )
    if settings:
        (folder / "config.yaml").write_text(settings)
    return folder


Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = write_run(tmp_path / "bf16", 1.0), write_run(tmp_path / "a&b", 1.02)
    assert main([str(base), str(other)]) == 0
    printed = capsys.readouterr().out
    assert "+2.00%" in printed
    assert f"{sum(4 / step for step in range(11, 31)) / 20:.4f}\n" in printed, "the mean of the last 20 steps"
    assert main([str(other), str(base)]) == 0
    assert "-1.96% against a&b at 30.00 M tokens" in capsys.readouterr().out


def test_the_plan_of_a_run_stands_below_its_curves(
    tmp_path: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = write_run(tmp_path / "run", 1.0), tmp_path / "report.html"
    small = ["model=gpt_tiny", "model.vocab_size=1024", "data.seq_length=256", "train.global_batch=8"]
    assert plan([*small, "train.total_tokens=1e6", "--json", "--plot", str(tmp_path / "plan.html")]) == 0
    (run / "plan.json").write_text(capsys.readouterr().out)
    assert report(run, "--html", page)[0] == 0
    text = page.read_text()
    assert "<h2>The plan of run</h2>" in text
    assert "days</text>" in text, "strong scaling, which --plot added"
    assert "prefers-color-scheme: dark" in text
    (run / "plan.json").write_text('{"fits": true}')
    code, _, error = report(run, "--html", page)
    assert code == 2
    assert "plan.json is not what `megatron-fp4 plan --json` prints" in error


@pytest.mark.parametrize(
    ("batch", "num_tokens"), [(2, 200), (1, 100), (8, 200), (3, 90)], ids=["batch 2", "half done", "batch 8", "batch 3"]
)
def test_runs_of_equal_loss_per_token_have_no_gap(batch: int, num_tokens: int, tmp_path: Path, report: Report) -> None:
    """At equal steps, batch 2 would be ahead by a third; the end of half a run is behind the end of the whole."""
    base, other = run_of_batch(tmp_path / "base", 1, 200), run_of_batch(tmp_path / "other", batch, num_tokens)
    for runs in ((base, other), (other, base)):
        code, out, _ = report(*runs)
        gaps = re.findall(r"(\S+)% against \S+ at ([\d.]+) M tokens", out)
        last = num_tokens // batch * batch
        evaluated = max(tokens for tokens in range(20, last + 1, 20) if tokens % batch == 0)
        assert (code, gaps) == (0, [("+0.00", f"{last}.00"), ("+0.00", f"{evaluated}.00")])


def test_runs_without_common_tokens_have_no_gap(tmp_path: Path, report: Report) -> None:
    late = [{"step": 9, "loss": 1.0, "grad_norm": 1.0, "consumed_tokens": 5e8}]
    code, out, _ = report(run_of_batch(tmp_path / "base", 1, 20), write_records(tmp_path / "late", late))
    assert (code, "no gap: no tokens that base has too" in out) == (0, True)


def test_runs_whose_directories_have_one_name(tmp_path: Path, report: Report) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    for number, folder in enumerate(folders):
        run_of_batch(folder, 1, 40 + number)
    page = tmp_path / "page.html"
    code, out, _ = report(*folders, "--html", page)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "training loss" in line] == ["a/run", "b/run", "c"]
    names = [line["name"] for line in drawn(page)["charts"][0]["lines"]]
    assert {"a/run", "b/run", "c"} <= set(names), "a line of the plot has no name of its own"
    code, out, err = report(folders[0], folders[1], "--equal", 1, 40)
    assert (code, "a/run and b/run are equal" in out, err) == (0, True, "")


@pytest.mark.parametrize(
    ("first", "last", "sentence"),
    [
        (9, 2, "steps 9 to 2 are no range"),
        (0, 5, "steps 0 to 5 are no range"),
        (-3, -1, "steps -3 to -1 are no range"),
        (60, 70, "neither a (to step 40) nor b (to step 50) has a step from 60 to 70"),
    ],
)
def test_a_proof_of_nothing_is_refused(first: int, last: int, sentence: str, tmp_path: Path, report: Report) -> None:
    runs = run_of_batch(tmp_path / "a", 1, 40), run_of_batch(tmp_path / "b", 1, 50)
    code, out, err = report(*runs, "--equal", first, last)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert report(*runs, "--equal", 39, 41)[0] == 1, "a step that one of them lacks is a difference"


def test_an_end_far_behind_both_runs_takes_no_time(tmp_path: Path, report: Report) -> None:
    runs = run_of_batch(tmp_path / "a", 1, 40), run_of_batch(tmp_path / "b", 1, 40)
    code, _, err = report(*runs, "--equal", 1, 10**15)
    assert (code, err) == (1, f"1 numbers differ; the first: steps 41 to {10**15} are in neither\n")


def test_a_run_is_not_compared_with_itself(tmp_path: Path, report: Report) -> None:
    run = run_of_batch(tmp_path / "a", 1, 40)
    (tmp_path / "link").symlink_to(run)
    for same in (run, tmp_path / "link", tmp_path / "a" / ".." / "a"):
        code, out, err = report(run, same, "--equal", 1, 9)
        assert (code, out, "is named twice" in err) == (2, "", True)


def not_a_number(folder: Path, steps: Sequence[int]) -> Path:
    """40 steps, with NaN as the trainer writes it in some."""
    return write_records(
        folder,
        [
            {"step": step, "consumed_tokens": 1e6 * step}
            | dict.fromkeys(("loss", "grad_norm", "tokens_per_second"), "nan" if step in steps else 3.0)
            for step in range(1, 41)
        ],
    )


def test_nan_near_the_end(tmp_path: Path, report: Report) -> None:
    base, run = not_a_number(tmp_path / "base", []), not_a_number(tmp_path / "run", [38])
    page, picture = tmp_path / "page.html", tmp_path / "loss.png"
    code, out, err = report(base, run, "--html", page, "--plot", picture)
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith("run"))
    assert "NaN (NaN or infinite in 1 step(s), the last 38)" in line
    assert "NaN% against base at 40.00 M tokens" in line
    assert "3 tokens/s in the median step" in out, "one step without a number leaves the others their median"
    assert ">NaN</td>" in page.read_text()
    (loss, *_) = drawn(page)["charts"]
    assert loss["broken"] == [[1, 38e6, 38]], "a dotted line stands there"
    assert picture.stat().st_size > 0


def test_nan_and_bit_for_bit(tmp_path: Path, report: Report) -> None:
    """Equal where both are NaN, a difference where one is, and no proof where nothing else is there."""
    a, b, c = (not_a_number(tmp_path / name, steps) for name, steps in (("a", [38]), ("b", [38]), ("c", [])))
    assert report(a, b, "--equal", 30, 40)[0] == 0
    code, _, err = report(a, c, "--equal", 30, 40)
    assert (code, "step 38: loss nan in a, 3.0 in c" in err) == (1, True)
    code, _, err = report(a, b, "--equal", 38, 38)
    assert (code, "nothing but NaN" in err) == (2, True)


def test_a_step_without_a_target_has_no_loss_in_either(tmp_path: Path, report: Report) -> None:
    """Equal where both lack it, a difference where one does."""
    records = [{"step": step, "consumed_tokens": 1e6 * step, "grad_norm": 1.0, "loss": 2.0} for step in range(1, 4)]
    without = [{key: value for key, value in record.items() if key != "loss"} for record in records]
    a, b = (write_records(tmp_path / name, [records[0], without[1], records[2]]) for name in ("a", "b"))
    assert report(a, b, "--equal", 1, 3)[0] == 0
    code, _, err = report(a, write_records(tmp_path / "c", records), "--equal", 1, 3)
    assert (code, "the first: step 2: loss None in a, 2.0 in c" in err) == (1, True)


def settings_of(lr: float, shard: str, tokenizer: str = "tok.model", **data: object) -> str:
    return json.dumps(
        {
            "optim": {"lr": lr},
            "train": {"run_dir": shard},
            "data": {
                "tokenizer": tokenizer,
                "seq_length": 32,
                "sources": [{"name": "web", "paths": [shard]}],
                "evaluation": [{"name": "held", "paths": ["held"], "max_tokens": 0}],
                **data,
            },
        }
    )


def test_settings_that_differ_stand_first(tmp_path: Path, report: Report) -> None:
    base = run_of_batch(tmp_path / "base", 1, 40, settings_of(1e-3, "shards"))
    run = run_of_batch(tmp_path / "run", 1, 40, settings_of(2e-3, "shards"))
    code, out, _ = report(base, run)
    lines = out.splitlines()
    assert (code, lines[0].split()) == (0, ["settings", "that", "differ", "base", "run"])
    assert lines[1].split() == ["optim.lr", "0.001", "0.002"]
    assert lines[2].startswith("base"), "the directory itself is no setting that matters"
    assert "other" not in out


def test_settings_that_cannot_be_read_are_one_sentence(tmp_path: Path, report: Report) -> None:
    base = run_of_batch(tmp_path / "base", 1, 40, "a: [1\nb: {")
    code, out, err = report(base)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "config.yaml cannot be read: " in err


def test_other_data_is_marked(tmp_path: Path, report: Report) -> None:
    base = run_of_batch(tmp_path / "base", 1, 40, settings_of(1e-3, "shards"))
    other = run_of_batch(tmp_path / "other", 1, 40, settings_of(1e-3, "more shards", seq_length=64))
    page = tmp_path / "page.html"
    code, out, _ = report(base, other, "--html", page)
    assert code == 0
    assert "other and base were trained on other data (data.seq_length, data.sources): their gap says little" in out
    assert "+0.00% against base at 40.00 M tokens (other data)" in out
    assert "+0.00% against base at 40.00 M tokens (other held-out data)" in out, "seen with more context"
    assert "other (other data)" in [line["name"] for line in drawn(page)["charts"][0]["lines"]]


def test_a_source_that_only_moved_is_the_same(tmp_path: Path, report: Report) -> None:
    """By the content that the ledgers name."""
    for name, content in (("base", "x"), ("moved", "x"), ("changed", "y")):
        run_of_batch(tmp_path / name, 1, 40, settings_of(1e-3, name))
        start = {
            "step": 1,
            "config": {},
            "sources": {"web": content},
            "held_out": {"held": content},
            "tokenizers": ["t"],
        }
        (tmp_path / name / "ledger.jsonl").write_text(json.dumps(start) + "\n")
    assert "other" not in report(tmp_path / "base", tmp_path / "moved")[1]
    out = report(tmp_path / "base", tmp_path / "changed")[1]
    assert "(other data)" in out
    assert "(other held-out data)" in out


def start_of(step: int, content: str) -> dict[str, Any]:
    return {"step": step, "config": {}, "sources": {"web": content}, "held_out": {"held": content}, "tokenizers": []}


def write_ledger(folder: Path, *starts: dict[str, Any]) -> Path:
    (folder / "ledger.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    return folder


def test_ledgers_know_other_data_without_settings(tmp_path: Path, report: Report) -> None:
    base, same, other = (
        write_ledger(run_of_batch(tmp_path / name, 1, 40), start_of(1, content))
        for name, content in (("base", "x"), ("same", "x"), ("other", "y"))
    )
    assert "other" not in report(base, same)[1]
    out = report(base, other)[1]
    assert "(other data)" in out
    assert "(other held-out data)" in out


def test_what_was_read_before_a_resume_counts(tmp_path: Path, report: Report) -> None:
    """Unless the later start voids it: then nothing is left that was trained on it."""
    base = write_ledger(run_of_batch(tmp_path / "base", 1, 40), start_of(1, "y"))
    first = {**start_of(1, "x"), "sources": {"old": "x"}}
    resumed = write_ledger(run_of_batch(tmp_path / "resumed", 1, 40), first, start_of(21, "y"))
    anew = write_ledger(run_of_batch(tmp_path / "anew", 1, 40), first, start_of(1, "y"))
    assert "were trained on other data (data.sources)" in report(base, resumed)[1]
    assert "other" not in report(base, anew)[1]


def test_a_ledger_that_does_not_say_what_was_read(tmp_path: Path, report: Report) -> None:
    base = write_ledger(run_of_batch(tmp_path / "base", 1, 40), {"step": 1, "config": {}})
    assert report(base, run_of_batch(tmp_path / "run", 1, 40))[0] == 0


@pytest.mark.parametrize(
    "text", ["- 1", "data: text", "data: [1]", "data: {sources: [x]}", "data: {evaluation: {a: b}}"]
)
def test_settings_of_something_else_are_one_sentence(tmp_path: Path, report: Report, text: str) -> None:
    base = run_of_batch(tmp_path / "base", 1, 40, text)
    code, out, err = report(base, run_of_batch(tmp_path / "run", 1, 40, settings_of(1e-3, "shards")))
    assert (code, out, err.count("\n"), "does not hold the settings of a run" in err) == (2, "", 1, True)


def test_names_are_no_formulas_and_none_is_hidden(tmp_path: Path, report: Report) -> None:
    """To matplotlib `$...$` is a formula, and what begins with an underscore has no place in a legend."""
    evaluated = {"step": 3, "consumed_tokens": 3e6, "loss": 1.0, "grad_norm": 1.0, "eval/web/$x_{$/loss": 2.0}
    runs = [write_records(tmp_path / name, [evaluated]) for name in ("_a", "lr$^$")]
    page = tmp_path / "page.html"
    picture = tmp_path / "loss.svg"
    code, _, err = report(*runs, "--html", page, "--plot", picture)
    assert (code, err) == (0, "")
    names = {"_a", "lr$^$", "_a: web/$x_{$"}
    charts = drawn(page)["charts"]
    assert names <= {line["name"] for line in charts[0]["lines"]}
    assert charts[1]["title"] == "loss against _a, percent"
    assert names <= set(re.findall(r">([^<]*)</text>", picture.read_text()))


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path: Path, report: Report) -> None:
    run = run_of_batch(tmp_path / "run", 1, 40)
    for option, path in (("--plot", "x.xyz"), ("--plot", "run"), ("--html", "run"), ("--html", "x.png")):
        code, out, err = report(run, option, tmp_path / path)
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert report(run, "--html", tmp_path / "run" / "metrics.jsonl" / "page.html")[0] == 2


def test_what_is_no_number_is_not_there(tmp_path: Path, report: Report) -> None:
    broken = {"step": 1, "loss": None, "grad_norm": "text", "consumed_tokens": "nan", "lr": [1], "tflops": True}
    records = [broken, {"step": 2, "loss": 2.0, "grad_norm": 1.0, "consumed_tokens": 2e6}]
    runs = [write_records(tmp_path / name, records) for name in ("a", "b")]
    assert report(*runs, "--html", tmp_path / "page.html")[0] == 0
    assert report(*runs, "--equal", 1, 2)[0] == 1, "step 1 has no loss, and does not say that it had no target"


def test_metrics_of_two_runs_in_one_file_are_refused(tmp_path: Path, report: Report) -> None:
    records = [
        {"step": step, "loss": 2.0, "consumed_tokens": tokens} for step, tokens in ((1, 1e6), (2, 2e6), (3, 5e5))
    ]
    code, _, err = report(write_records(tmp_path / "run", records))
    assert (code, "2e+06 tokens were consumed by step 2, 500000 by step 3" in err) == (2, True)


def test_between_tokenizers_there_is_no_gap(tmp_path: Path, report: Report) -> None:
    base = run_of_batch(tmp_path / "base", 1, 40, settings_of(1e-3, "shards"))
    other = run_of_batch(tmp_path / "run", 1, 40, settings_of(1e-3, "shards", "other.model"))
    page = tmp_path / "page.html"
    code, out, _ = report(base, other, "--html", page)
    assert code == 0
    assert "note: run and base are not compared, other tokenizer: nats per token do not compare" in out
    assert "% against" not in out
    assert "% against" not in page.read_text()


def test_speed_is_the_median_of_the_steps(tmp_path: Path, report: Report) -> None:
    """The last step was slow, because the machine was busy; the first because it compiled."""
    rates = [1.0, *[100.0] * 8, 7.0]
    records = [
        {
            "step": step,
            "loss": 2.0,
            "consumed_tokens": 1e6 * step,
            "tokens_per_second": rate,
            "tflops": rate,
            "mfu": rate,
        }
        for step, rate in enumerate(rates, 1)
    ]
    page = tmp_path / "page.html"
    code, out, _ = report(write_records(tmp_path / "run", records), "--html", page)
    assert (code, "100 tokens/s in the median step" in out) == (0, True)
    assert [page.read_text().count(f">{text}</td>") for text in ("100", "10000.0 %")] == [2, 1]


def test_speed_by_the_clock(tmp_path: Path, report: Report) -> None:
    """4 steps of 1000 tokens and 2 s, 1 s between them; 8 s pass between two launches: 4000 tokens in 20 s, 40%."""
    times = [103.0, 106.0, 117.0, 120.0]
    records = [
        {"step": step, "loss": 2.0, "consumed_tokens": 1000.0 * step, "tokens_per_second": 500.0, "step_seconds": 2.0}
        | {"wall_time": time, "wall_seconds": 3.0}
        for step, time in enumerate(times, 1)
    ]
    out = report(write_records(tmp_path / "run", records))[1]
    assert "500 tokens/s in the median step; 200 by the clock, goodput 40.0%" in out
    assert "(evaluation, saves, logging, start-up 20.0%; between launches, or made again 40.0%)" in out
