"""A report is one file that loads nothing, is well formed, and has every series of every run; markers, words, units."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fp4.cli.render.comparison import tokens_text
from megatron_fp4.cli.render.report.charts import MAX_POINTS, Points
from megatron_fp4.cli.render.report.picture import write_losses
from megatron_fp4.cli.report import main
from megatron_fp4.train.history.events import EventKind, events_of
from megatron_fp4.train.telemetry.series import RunSeries, read_runs
from tests.cli.report.pages import drawn, read_page

Change = Callable[[int], dict[str, Any]]
TOKENS = 1_000_000.0


def a_run(folder: Path, factor: float = 1.0, change: Change = lambda _: {}, steps: int = 40, batch: int = 1) -> Path:
    """A falling loss, an evaluation every ten million tokens on two sets. change: step -> what its record has else."""
    folder.mkdir(parents=True)
    records = []
    for step in range(1, steps + 1):
        tokens = step * batch * TOKENS
        loss = factor * (2 + 8 * (tokens / TOKENS) ** -0.7)
        record = {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "consumed_tokens": tokens}
        record |= {
            "tokens_per_second": 100.0 + step,
            "step_seconds": 0.5,
            "skipped_steps": 0.0,
            "wall_time": 1.8e9 + step,
        }
        record |= {"data_phase": 0.0, "precision_phase": 0.0, "batch_samples": float(batch)}
        if tokens % (10 * TOKENS) == 0:
            record |= {"eval/web/loss": loss + 0.1, "eval/code/loss": loss - 0.1}
        records.append(record | change(step))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def statistics(step: int) -> dict[str, Any]:
    """Of three operands, the second the worst in all."""
    if step % 10:
        return {}
    snr = {
        "blocks.0.mlp.up/fprop.x": 20.0,
        "blocks.1.mlp.up/wgrad.dy": 9.0 - step / 10,
        "blocks.0.mlp.up/fprop.w": 15.0,
    }
    values: dict[str, Any] = {}
    for name, one in snr.items():
        shares = {"snr_db": one, "underflow": 0.1 / one, "saturation": 0.01 / one}
        values |= {f"quantization/{name}/{key}": value for key, value in shares.items()}
    return values


@pytest.fixture
def page(tmp_path: Path) -> Path:
    runs = [a_run(tmp_path / "bf16"), a_run(tmp_path / "a&b<c", 1.02, statistics)]
    path = tmp_path / "out" / "report.html"
    assert main([*map(str, runs), "--html", str(path)]) == 0
    return path


def test_the_page_is_whole(page: Path) -> None:
    """A cluster has no network, and a mail no folder beside it."""
    elements = read_page(page).elements
    loads = ("src", "href", "srcset", "data", "action", "poster")
    pairs = [(name, value or "") for _, attributes in elements for name, value in attributes.items()]
    loaded = [pair for pair in pairs if pair[0] in loads and not pair[1].startswith("#")]
    assert loaded == []
    text = page.read_text(encoding="utf-8")
    style = "".join(read_page(page).texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'"), "the browser would let it load something"
    assert re.findall(r"https?://[^\s\"'<>)]+", text) in ([], ["https://github.com/leeoniya/uPlot"])
    assert len(text.encode()) < 400_000, "too much for a mail"


def test_the_page_is_well_formed_and_names_are_escaped(page: Path) -> None:
    parsed = read_page(page)
    assert parsed.texts["h1"] == ["a&b<c against bf16"]
    assert "&b<c" not in page.read_text(), "a name of a run became an element"
    assert [a["content"] for t, a in parsed.elements if a.get("name") == "viewport"]
    assert "prefers-color-scheme: dark" in "".join(parsed.texts["style"])


def test_every_series_of_every_run_is_drawn(page: Path) -> None:
    data = drawn(page)
    by_title = {chart["title"]: chart for chart in data["charts"]}
    assert data["runs"] == ["bf16", "a&b<c"]
    loss = by_title["loss (nats per token)"]
    assert [(line["name"], line["style"], line["shape"]) for line in loss["lines"]] == [
        ("bf16", "trend", 0),
        ("a&b<c", "trend", 0),
        ("bf16: code", "dots", 0),
        ("a&b<c: code", "dots", 0),
        ("bf16: web", "dots", 1),
        ("a&b<c: web", "dots", 1),
        ("bf16: each step", "raw", 0),
        ("a&b<c: each step", "raw", 0),
    ]
    for title in ("gradient norm", "learning rate", "time of a step, and of it the wait for data"):
        assert [line["name"] for line in by_title[title]["lines"]] == ["bf16", "a&b<c"]
    assert "steps without an update, so far" not in by_title, "there was none in either run"
    assert "samples of a step" not in by_title, "it is one number in all steps of all runs"
    for chart in data["charts"]:
        for line in chart["lines"]:
            assert len(line["t"]) == len(line["y"]) == len(line["s"] or line["t"]) > 0
    places = [int(a["data-chart"] or "") for _, a in read_page(page).elements if "data-chart" in a]
    assert places == list(range(len(data["charts"])))


def test_quantization_is_shown_worst_first(page: Path) -> None:
    worst = ["blocks.1.mlp.up/wgrad.dy", "blocks.0.mlp.up/fprop.w", "blocks.0.mlp.up/fprop.x"]
    charts = {chart["title"]: chart["lines"] for chart in drawn(page)["charts"]}
    for title in (
        "signal to noise of quantized operands, dB",
        "non-zero elements that became zero",
        "elements beyond the largest code",
    ):
        assert [line["name"] for line in charts[title]] == [f"a&b<c: {name}" for name in worst]
    rows = [a["data-line"] for _, a in read_page(page).elements if "data-line" in a]
    assert rows == [f"a&b<c: {name}" for name in worst]


def test_experts_and_residual_stream_are_shown_worst_first(tmp_path: Path) -> None:
    def watched(step: int) -> dict[str, Any]:
        layers = {"blocks.1": 1.0, "blocks.5": 1.0 + step / 10}
        values = {f"experts/max_vio/{name}": one for name, one in layers.items()}
        values |= {f"experts/entropy/{name}": 3.0 - one for name, one in layers.items()}
        return values | {f"residual/blocks.{block}/rms": 10.0**block for block in range(3)} if step % 10 == 0 else {}

    path = tmp_path / "page.html"
    assert main([str(a_run(tmp_path / "run", change=watched)), "--html", str(path)]) == 0
    charts = {chart["title"]: chart for chart in drawn(path)["charts"]}
    worst = ["run: blocks.5", "run: blocks.1"]
    violation = charts["load of a layer's busiest expert over the mean, less 1"]
    assert [line["name"] for line in violation["lines"]] == worst
    assert [line["name"] for line in charts["entropy of a router's shares, nats"]["lines"]] == worst
    assert "experts of a layer without a token" not in charts, "nothing was measured"
    rms = charts["root mean square of the residual stream behind a block"]
    assert [line["name"] for line in rms["lines"]] == ["run: blocks.2", "run: blocks.1", "run: blocks.0"]
    assert rms["log"]


def test_one_run_is_compared_with_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert main([str(a_run(tmp_path / "run")), "--html", str(path)]) == 0
    assert not [chart for chart in drawn(path)["charts"] if "against" in chart["title"]]
    (words,) = [text for text in read_page(path).texts["p"] if text.startswith("run stands at step 40")]
    assert "40.00 M tokens" in words
    assert "It ran without a resume, a rollback or a skipped step." in words


def test_what_the_comparison_shows_stands_first_and_in_words(tmp_path: Path) -> None:
    base, other = a_run(tmp_path / "bf16"), a_run(tmp_path / "nvfp4", 1.02, batch=2, steps=20)
    for run, use, batch in ((base, "bf16", 1), (other, "nvfp4", 2)):
        settings = {"train": {"seed": 7, "global_batch": batch}, "precision": {"use": use}, "data": {"seed": 8}}
        (run / "config.yaml").write_text(json.dumps(settings))
    path = tmp_path / "page.html"
    assert main([str(base), str(other), "--html", str(path)]) == 0
    parsed = read_page(path)
    of_base, of_other, noise = parsed.texts["p"][:3]
    assert of_base.startswith("bf16 stands at step 40 (40.00 M tokens): training loss ")
    assert "At 40.00 M tokens, the training loss is 2.00 % above" in of_other, "20 steps of 2 against 40 of 1"
    assert "the loss on web is 1.9" in of_other
    assert "Settings that differ: precision.use nvfp4 instead of bf16, train.global_batch 2 instead of 1." in of_other
    assert "Each of these runs was made once, from one seed (train.seed=7, data.seed=8)" in noise
    assert "was not measured, so the differences have no interval" in noise
    assert "The runs are short (20 steps, 40.00 M tokens)" in noise
    assert "±" not in noise


def test_equal_losses_and_losses_that_are_no_numbers_are_called_so(tmp_path: Path) -> None:
    broken = a_run(tmp_path / "broken", change=lambda step: {"loss": "nan"} if step == 39 else {})
    path = tmp_path / "page.html"
    assert main([str(a_run(tmp_path / "base")), str(a_run(tmp_path / "same")), str(broken), "--html", str(path)]) == 0
    words = read_page(path).texts["p"]
    assert "the training loss is equal to" in words[1]
    assert "the training loss is NaN against" in words[2]
    assert "a loss that is not finite in 1 step(s), the last 39" in words[2]


def test_only_what_is_equal_to_the_bit_is_called_equal(tmp_path: Path) -> None:
    """6.2637 against 6.2639 is -0.003 %, which two digits would show as nothing."""
    folders = [a_run(tmp_path / "base"), a_run(tmp_path / "near", 1 - 3e-5), a_run(tmp_path / "off", 1 + 6e-5)]
    assert main([*map(str, folders), "--html", str(tmp_path / "page.html")]) == 0
    words = read_page(tmp_path / "page.html").texts["p"]
    assert "the training loss is less than 0.01 % below" in words[1]
    assert "the training loss is 0.01 % above" in words[2]


def test_speed_is_of_the_same_steps_and_the_clock_of_the_page_is_that_of_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """512 tokens a step; the first takes 20 s, most of it to compile, the second 0.5 s: 1024 / 21.5 s by the clock."""

    def timed(step: int) -> dict[str, Any]:
        seconds = 20.0 if step == 1 else 0.5
        values = {"consumed_tokens": 512.0 * step, "step_seconds": seconds, "tokens_per_second": 512 / seconds}
        return values | {"wall_seconds": seconds + 0.5, "wall_time": (1e3, 1001.0)[step - 1]}

    run = a_run(tmp_path / "run", change=timed, steps=2)
    assert main([str(run), "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "training loss (mean of the last 2 steps)" in out
    assert "1,024 tokens/s in the median step; 48 by the clock, goodput 95.3% (of it 93.0% in the first step" in out
    page = read_page(tmp_path / "page.html")
    assert "(mean of the last 2 steps)" in page.texts["p"][0]
    cells = page.texts["td"]
    shown = {
        name: cells[number + 1]
        for number, cell in enumerate(cells)
        for name in ("tokens/s (median", "time of a step", "tokens/s by the clock", "goodput", "of it in the first")
        if cell.startswith(name)
    }
    assert list(shown.values()) == ["1,024", "500 ms", "47.628", "95.3%", "93.0%"]


def eventful(step: int) -> dict[str, Any]:
    """Another blend after step 10, precision after 20; a learning rate that jumps after 25 and falls from 31."""
    rate = 1e-3 if step <= 25 else 5e-4
    changes = {"data_phase": float(step > 10), "precision_phase": float(step > 20)}
    return changes | {"lr": rate if step <= 30 else rate * (1 - (step - 30) / 20), "skipped_steps": float(step > 5)}


def test_what_changed_on_the_way_has_a_mark(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", change=eventful)
    launches = [
        {"step": step, "wall_time": 1.8e9, "command": "pretrain <x>", "ranks": 2, "device": "cpu"}
        for step in (0, 30, 15)
    ]
    lines = "".join(json.dumps(one | {"parameters": 12345, "versions": {}}) + "\n" for one in launches)
    (run / "launches.jsonl").write_text(lines)
    spikes = [
        {"step": 34, "action": "roll_back", "loss": 9.0},
        {"step": 34, "action": "roll_back", "to_step": 32, "skipped_samples": [1, 2]},
    ]
    (run / "spikes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in spikes))
    events = [(event.kind, event.step, event.tokens / TOKENS) for event in events_of(RunSeries.read(run))]
    assert events == [
        (EventKind.data, 10, 10),
        (EventKind.resume, 15, 15),  # the launch after step 30 is void: the next one began before it
        (EventKind.precision, 20, 20),
        (EventKind.lr, 25, 25),
        (EventKind.lr, 30, 30),
        (EventKind.rollback, 32, 32),
    ]
    path = tmp_path / "page.html"
    assert main([str(run), "--html", str(path)]) == 0
    assert [mark["s"] for mark in drawn(path)["marks"]] == [10, 15, 20, 25, 30, 32]
    text = read_page(path).texts["p"][0]
    assert "resumed after step 15" in text
    assert "rolled back to the state after step 32" in text
    assert "1 step without an update" in text
    assert "pretrain &lt;x&gt;" in path.read_text()
    assert "Loss spikes of run" in read_page(path).texts["h2"]
    assert "12,345 parameters" not in read_page(path).texts["td"], "there are no settings, so no model"


@pytest.mark.parametrize("rates", [[k / 9 for k in range(10)] + [1.0] * 30, [math.cos(k / 30) + 1 for k in range(40)]])
def test_a_warm_up_and_a_cosine_are_no_jumps(rates: list[float], tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", change=lambda step: {"lr": rates[step - 1]})
    assert [event for event in events_of(RunSeries.read(run)) if event.kind is EventKind.lr] == []


@pytest.mark.parametrize("batch", [1, 4])
def test_the_thick_line_does_not_run_above_the_curve(batch: int, tmp_path: Path) -> None:
    """A mean of the last 20 steps is up to 60 % above this loss; the line stays within 2 %, also for large steps."""
    run = RunSeries.read(a_run(tmp_path / "run", steps=200 // batch, batch=batch))
    curve = run.curve("loss")
    line = curve.trend(20 * curve.spacing)
    late = max(a / b for a, b in zip(curve.smooth().values, curve.values, strict=True))
    assert late > 1.2
    assert all(abs(a / b - 1) < 0.02 for a, b in zip(line.values, curve.values, strict=True))


def test_the_thick_line_goes_around_what_is_no_number() -> None:
    points = [1.0 * step for step in range(1, 101)]
    values = [math.nan if step == 50 else 3.0 for step in range(1, 101)]
    line = RunSeries(
        Path("run"), "run", {int(t): {"consumed_tokens": t, "loss": v} for t, v in zip(points, values, strict=True)}
    )
    trend = line.curve("loss").trend(20.0)
    assert [step for step, value in enumerate(trend.values, 1) if math.isnan(value)] == [50]
    assert all(value == pytest.approx(3.0) for step, value in enumerate(trend.values, 1) if step != 50)


def test_a_long_run_keeps_its_spikes_and_stays_small() -> None:
    steps = list(range(100_000))
    values = [9.0 if step == 54_321 else math.nan if step == 77 else 2.0 for step in steps]
    kept = Points([1e6 * step for step in steps], steps, values).thinned()
    assert len(kept.values) <= MAX_POINTS + 1
    assert 54_321 in (kept.steps or [])
    assert 77 in (kept.steps or [])
    assert kept.tokens == [1e6 * step for step in kept.steps or []]


def test_units_adapt() -> None:
    assert [tokens_text(tokens) for tokens in (512, 409_600, 3e7, 1.2e9, 1e13)] == [
        "512",
        "409,600",
        "30.00 M",
        "1.20 B",
        "10.00 T",
    ]


def test_the_picture_of_ten_trillion_tokens_says_trillions(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["consumed_tokens"] *= 250_000
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_losses(read_runs([run]), tmp_path / "loss.svg")
    svg = (tmp_path / "loss.svg").read_text()
    assert "consumed tokens (trillions)" in svg
    assert "run: web" in svg


def test_between_tokenizers_bits_per_byte_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nats per token are not: a vocabulary of shorter pieces has less of them to tell per token."""
    runs = []
    for name, factor in (("base", 1.0), ("short", 0.5)):
        bits = {"eval/web/perplexity": 7.0, "eval/web/bits_per_byte": 1.0 + (name == "short") / 50}
        run = a_run(tmp_path / name, factor, lambda step, bits=bits: {} if step % 10 else bits)  # type: ignore[misc]
        (run / "config.yaml").write_text(json.dumps({"data": {"tokenizer": f"{name}.model"}}))
        runs.append(run)
    path = tmp_path / "page.html"
    assert main([*map(str, runs), "--html", str(path)]) == 0
    out = capsys.readouterr().out
    assert "eval/web/loss" in out
    assert "(perplexity 7, 1.0200 bits per byte)   no gap: other tokenizer" in out
    assert re.search(r"eval/web/bits_per_byte +1.0200   \+2.00% against base at 40.00 M tokens \(other tokenizer", out)
    words = read_page(path).texts["p"][1]
    assert "At 40.00 M tokens, bits per byte on web is 2.00 % above that of base." in words
    assert "Its other losses are not compared with those of base: other tokenizer" in words
    gaps = next(chart for chart in drawn(path)["charts"] if "against" in chart["title"])
    assert [line["y"][-1] for line in gaps["lines"]] == [2.0]
