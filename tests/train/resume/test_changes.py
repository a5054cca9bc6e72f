"""What a resumed run may change, through the whole of a start; every remedy that a refusal prints leads to a start."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_fp4.train import build as build_module
from tests.helpers.tiny_run import TinyRun, tiny_run, write_toy_shard
from tests.train.in_process import make_trainer

SOURCE = "{{name: {name}, paths: ['{path}'], max_epochs: {epochs}}}"


def with_sources(run: TinyRun, *sources: str, phases: str = "[]") -> TinyRun:
    return run.with_overrides(f"data.sources=[{','.join(sources)}]", f"data.phases={phases}")


def blend(late: float, early: float = 3.0) -> str:
    """Four steps of an early blend, then a late one; the weight of the source toy in each."""
    tokens = 4 * 4 * 32
    phases = [f"{{name: {name}, weights: {{toy: {weight}, other: 1}}" for name, weight in (("a", early), ("b", late))]
    return f"[{phases[0]}, tokens: {tokens}}}, {phases[1]}}}]"


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    """Two steps of a run on two sources are saved."""
    base = tiny_run(tmp_path, "precision=bf16", "model.num_layers=1", "train.stop_after_steps=2")
    write_toy_shard(tmp_path / "shards/other", seed=1)
    whole = with_sources(base, *two_sources(tmp_path), phases=blend(1.0))
    trainer, _ = make_trainer(whole.overrides)
    trainer.fit()
    return whole


def two_sources(folder: Path, *, names: tuple[str, str] = ("toy", "other"), epochs: int = 9) -> list[str]:
    return [SOURCE.format(name=name, path=folder / "shards" / name, epochs=epochs) for name in names]


def test_data_that_only_moved(run: TinyRun, tmp_path: Path) -> None:
    shutil.move(tmp_path / "shards", tmp_path / "elsewhere")
    moved = with_sources(run, *(text.replace("/shards/", "/elsewhere/") for text in two_sources(tmp_path)))
    resumed, _ = make_trainer(moved.with_overrides(f"data.phases={blend(1.0)}").overrides)
    assert resumed.position.step == 2
    assert "data.sources.0.paths" in resumed.start.changes


def test_a_phase_that_is_to_come_may_change_and_the_present_one_asks(run: TinyRun) -> None:
    resumed, _ = make_trainer(run.with_overrides(f"data.phases={blend(7.0)}").overrides)
    assert [segment.weights for segment in resumed.run.loader.plan.segments] == [(3, 1), (7, 1)]
    present = run.with_overrides(f"data.phases={blend(7.0, early=5.0)}")
    with pytest.raises(ValueError, match=r"data\.phases\.0\.weights\.toy +3\.0 +5\.0 +refused +ask"):
        make_trainer(present.overrides)
    allowed, _ = make_trainer(present.with_overrides("train.resume_allow=[data.phases*]").overrides)
    assert [(one.first, one.weights) for one in allowed.run.loader.plan.segments] == [
        (0, (3, 1)),
        (8, (5, 1)),
        (16, (7, 1)),
    ]


def test_a_stop_that_is_behind_stops_at_once(run: TinyRun) -> None:
    """It was a traceback, and an exit code that asks for a restart."""
    resumed, _ = make_trainer(run.with_overrides("train.stop_after_steps=1").overrides)
    assert resumed.fit() == 0
    assert resumed.position.step == 2


def test_samples_that_are_to_come_may_be_skipped(run: TinyRun) -> None:
    """What the end of a diverged run advises."""
    resumed, _ = make_trainer(run.with_overrides("data.skip=[[8,20]]").overrides)
    assert resumed.run.loader.plan.skip == [(8, 20)]
    with pytest.raises(ValueError, match=r"data\.skip .*refused"):
        make_trainer(run.with_overrides("data.skip=[[4,20]]").overrides)


@pytest.mark.parametrize("setting", ["data.seed=7", "data.seq_length=16"])
def test_what_no_remedy_changes_names_none(run: TinyRun, setting: str) -> None:
    """It was 'ask', and a run that allowed it was refused for the second time, with another message."""
    messages = []
    for more in ((), ("train.resume_allow=[data.*]",)):
        with pytest.raises(
            ValueError, match=r"must be as in the checkpoint; or choose another train\.run_dir"
        ) as error:
            make_trainer(run.with_overrides(setting, f"train.total_tokens={40 * 4 * 32}", *more).overrides)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "resume_allow" not in messages[0]


def first_remedy(run: TinyRun) -> list[str]:
    """The override that the refusal of a resume prints, as a shell would take it."""
    with pytest.raises(ValueError, match="resume refused") as error:
        make_trainer(run.overrides)
    quoted = re.search(r"can be allowed with ('.*')$", str(error.value))
    assert quoted, str(error.value)
    return shlex.split(quoted[1])


@pytest.mark.parametrize(
    "changes",
    [
        ["data.reset_documents=true"],
        ["train.seed=5"],
        ["train.seed=5", "data.reset_documents=true"],
        ["data.skip=[[4,20]]"],
        ["train.seed=5", "train.resume_allow=[data.reset_documents]", "data.reset_documents=true"],
    ],
)
def test_the_remedy_of_a_refusal_leads_to_a_start(run: TinyRun, changes: list[str]) -> None:
    changed = run.with_overrides(*changes)
    resumed, _ = make_trainer(changed.with_overrides(*first_remedy(changed)).overrides)
    assert resumed.position.step == 2


def test_another_content_of_a_source_and_its_remedy(run: TinyRun, tmp_path: Path) -> None:
    for path in (tmp_path / "shards").glob("toy*"):
        path.unlink()
    write_toy_shard(tmp_path / "shards/toy", seed=5)
    with pytest.raises(ValueError, match="data source 'toy' changed since the checkpoint") as error:
        make_trainer(run.overrides)
    allow = re.search(r"'(train\.resume_allow=.*?)'", str(error.value))
    assert allow, str(error.value)
    sources = [text.replace("name: toy", "name: new") for text in two_sources(tmp_path)]
    renamed = with_sources(run, *sources, phases=blend(1.0).replace("toy", "new"))
    with pytest.raises(ValueError, match=r"data\.sources\.0\.name +toy +new +refused"):
        make_trainer(renamed.overrides)
    resumed, _ = make_trainer(renamed.with_overrides(allow[1]).overrides)
    assert resumed.run.loader.plan.segments[-1].sources == ("new", "other")


def test_more_epochs_of_a_source_that_is_too_small(run: TinyRun, tmp_path: Path) -> None:
    longer = run.with_overrides("train.total_tokens=1e6")
    with pytest.raises(ValueError, match="set max_epochs of the source to more than 9"):
        make_trainer(longer.overrides)
    more = with_sources(longer, *two_sources(tmp_path, epochs=99), phases=blend(1.0))
    make_trainer(more.overrides)


def test_data_that_do_not_go_on_are_refused_before_the_model_is_made(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of thousands of ranks would read its whole checkpoint first."""
    for path in (tmp_path / "shards").glob("toy*"):
        path.unlink()
    write_toy_shard(tmp_path / "shards/toy", seed=5)
    monkeypatch.setattr(build_module, "build_trainable", lambda *_: pytest.fail("the model was made first"))
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        make_trainer(run.overrides)
