"""Every setting says what it is, in one place, and refuses what its bound excludes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fp4.cli import explain
from megatron_fp4.cli.compose import CONFIG_DIR
from megatron_fp4.cli.schema import build
from megatron_fp4.precision.operand import Format, Rounding
from megatron_fp4.settings import Bound, Section, Setting, sections
from megatron_fp4.train.config import RunConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
SECTIONS = list(sections(RunConfig))
SETTINGS = [(f"{section.key}.{setting.name}", setting) for section in SECTIONS for setting in section.settings]
BOUNDED = [(key, setting) for key, setting in SETTINGS if setting.bound]


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def objections(key: str, setting: Setting) -> Iterator[str]:
    text = setting.sentence
    if not text:
        yield f"{key} has no sentence under it"
    elif not text.endswith(".") or not (text[0].isupper() or text[0].isdigit()):
        yield f"{key}: {text!r} is no sentence"
    elif words(text) == words(setting.name) or len(text.split()) < 3:
        yield f"{key}: {text!r} says no more than the name"
    if setting.choices and not all(name == name.lower() for name in setting.choices):
        yield f"{key}: omegaconf matches the members {list(setting.choices)} by name; write them in lower case"


def test_every_setting_has_its_sentence() -> None:
    assert [text for key, setting in SETTINGS for text in objections(key, setting)] == []


def test_every_section_says_what_it_is() -> None:
    assert [section.key for section in SECTIONS if not section.about.endswith(".")] == []


def test_the_page_is_what_the_command_prints() -> None:
    now = "run `megatron-fp4 explain --markdown > docs/settings.md`"
    assert (DOCS / "settings.md").read_text() == explain.page() + "\n", now


@pytest.mark.parametrize("section", SECTIONS, ids=[section.key for section in SECTIONS])
def test_explain_knows_every_key(section: Section) -> None:
    table = words(explain.explain(section.key))
    for setting in section.settings:
        text = explain.explain(f"{section.key}.{setting.name}")
        assert text.startswith(f"{section.key}.{setting.name}\n")
        assert words(setting.sentence) in words(text)
        assert all(label in text for label in ("default", "on resume", f"({setting.owner.__name__})"))
        assert words(setting.name) in table


def test_explain_says_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["train.global_batch"]) == 0
    printed = capsys.readouterr().out
    for text in ("int, in sequences", "default     8\n", "at least 1", "may change, logged", "gradient_accumulation"):
        assert text in printed
    (place,) = re.findall(r"stands in +(\S+):(\d+)", printed)
    assert "global_batch: Size = 8" in (DOCS.parent / place[0]).read_text().splitlines()[int(place[1]) - 1]
    assert explain.main(["optim.min_lr"]) == 0
    assert "0.0; in configs/ 3e-06" in capsys.readouterr().out
    assert explain.main(["optim.schedule"]) == 0
    assert "half a cosine from the end of the warm-up" in capsys.readouterr().out
    assert explain.main(["model.hidden"]) == 0
    assert "must stay (architecture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ("data.sources[0].paths", "data.sources[].paths"),
        ("data.sources.0.paths", "data.sources[].paths"),
        ("data.sources.paths", "data.sources[].paths"),
        ("precision.recipes.nvfp4.wgrad.dy.rht_size", "precision.recipes.NAME.wgrad.dy.rht_size"),
    ],
)
def test_explain_takes_the_keys_of_overrides(capsys: pytest.CaptureFixture[str], asked: str, key: str) -> None:
    assert explain.main([asked]) == 0
    assert capsys.readouterr().out.startswith(f"{key}\n")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("train.global_bacth", "did you mean train.global_batch"),
        ("seed", "did you mean data.seed or train.seed"),
        ("optimm", "did you mean optim"),
        ("precision.recipes.r.wgrad.b.rht_size", "is now called precision.recipes.r.wgrad.x.rht_size"),
        ("zzzz", "`megatron-fp4 explain` lists the sections"),
    ],
)
def test_explain_names_the_nearest_key(capsys: pytest.CaptureFixture[str], asked: str, nearest: str) -> None:
    assert explain.main([asked]) == 2
    assert nearest in capsys.readouterr().err


@pytest.mark.parametrize(
    "group", [str(path.relative_to(CONFIG_DIR)) for path in CONFIG_DIR.rglob("*") if path.is_dir()]
)
def test_explain_lists_the_options_of_a_group(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with a sentence, so each YAML file begins with one."""
    assert explain.main([group]) == 0
    text = capsys.readouterr().out
    options = explain.config_group(group)
    assert sorted(options) == sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    assert [option for option, sentence in options.items() if not sentence or f"  {option} " not in text] == []


def test_explain_names_what_is_inside_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["precision.recipes.nvfp4"]) == 0
    assert "inside: precision.recipes.NAME.fprop, precision.recipes.NAME.fprop.x," in capsys.readouterr().out


def test_explain_alone_lists_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [section.key for section in SECTIONS]


@pytest.mark.parametrize(
    ("bound", "text", "inside", "outside"),
    [
        (Bound(least=1), "at least 1", [1, 2], [0, math.nan]),
        (Bound(above=0), "positive", [1e-30], [0, -1]),
        (Bound(above=1, or_zero=True), "above 1, or 0", [0, 1.1], [1, 0.5, math.nan]),
        (Bound(least=0, below=1), "in [0, 1)", [0, 0.999], [1, -1e-9]),
        (Bound(least=0, most=1), "in [0, 1]", [0, 1], [1.1, math.nan]),
        (Bound(only=(0, 4, 16)), "0, 4 or 16", [4], [8, -1]),
        (Bound(), "a number", [-1], [math.nan]),
    ],
)
def test_bounds(bound: Bound, text: str, inside: list[float], outside: list[float]) -> None:
    assert str(bound) == text
    assert [bound.allows(value) for value in inside + outside] == [True] * len(inside) + [False] * len(outside)


def nested(key: str, value: Any) -> dict[str, Any]:
    """The settings around one, as YAML has them: what else must be there for the value to have a meaning."""
    beside: dict[str, dict[str, Any]] = {
        "data.sources[]": {"name": "a"},
        "data.evaluation[]": {"name": "a"},
        "data.phases[]": {"name": "a"},
        "data.tasks[]": {"name": "a"},
    }
    section, _, name = key.rpartition(".")
    needed = {"format": Format.nvfp4, "rounding": Rounding.sr} if section.startswith("precision.recipes") else {}
    tree: Any = {name: value} | beside.get(section, needed)
    for part in reversed(section.split(".")):
        tree = {part.removesuffix("[]"): [tree] if part.endswith("[]") else tree}
    return dict(tree)


@pytest.mark.parametrize(("key", "setting"), BOUNDED, ids=[key for key, _ in BOUNDED])
def test_bounds_are_enforced(key: str, setting: Setting) -> None:
    """Every bound that explain prints is one that a configuration is refused by, with its key or name."""
    bound = setting.bound
    assert bound is not None
    edges = [edge - (0 if edge == bound.above else 1) for edge in (bound.least, bound.above) if edge is not None]
    edges += [edge + (0 if edge == bound.below else 1) for edge in (bound.most, bound.below) if edge is not None]
    not_finite = [math.nan, math.inf, -math.inf] if setting.type is float else []
    for value in [*edges, *([-1] if bound.only else []), *not_finite]:
        with pytest.raises(ValueError, match=setting.name):
            build(RunConfig, nested(key, value))


@pytest.mark.parametrize(("key", "setting"), BOUNDED, ids=[key for key, _ in BOUNDED])
def test_defaults_are_within_their_bounds(key: str, setting: Setting) -> None:
    assert setting.bound is not None
    assert setting.bound.allows(setting.default), key


def test_every_number_has_a_bound() -> None:
    """A number without one is taken whatever it is: an interval of -1 saved every step, a width of -64 got a plan."""
    unbounded = [key for key, setting in SETTINGS if setting.type in (int, float) and setting.bound is None]
    assert not unbounded
