"""The settings table of a resume, and what it refuses."""

from __future__ import annotations

import pytest

from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.settings import to_json_values
from megatron_fp4.train.resume.differences import (
    ABSENT,
    Policy,
    ResumeRule,
    as_table,
    compare_settings,
    refuse_forbidden,
)
from megatron_fp4.train.resume.past_data import past_changes

SAVED = {
    "model": {"hidden": 64, "heads": 4},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "data": {"paths": ["a", "b"], "seed": 1, "seq_length": 32, "reset_documents": False},
    "precision": {"recipe": "x"},
    "logging": {"every": 1},
}


def changed(**groups: dict) -> dict:
    return {name: {**values, **groups.get(name, {})} for name, values in SAVED.items()}


def test_nothing_differs() -> None:
    same = changed(optim={"betas": (0.9, 0.95), "lr": 0.001}, logging={"every": 5})
    assert compare_settings(SAVED, same) == [], "a tuple is a list after JSON, and logging is not compared"


def test_a_renamed_setting_is_compared_under_its_present_name() -> None:
    """A resume from an older checkpoint would list every operand twice, as removed and as new."""
    saved = {"precision": {"recipes": {"r": {"wgrad": {"a": {"rht_size": 16}, "b": {"rht_size": 16}}}}}}
    now = {"precision": {"recipes": {"r": {"wgrad": {"dy": {"rht_size": 16}, "x": {"rht_size": 4}}}}}}
    [difference] = compare_settings(saved, now)
    assert (difference.key, difference.saved) == ("precision.recipes.r.wgrad.x.rht_size", 16)


@pytest.mark.parametrize(
    ("groups", "key", "policy", "refused"),
    [
        ({"model": {"hidden": 128}}, "model.hidden", Policy.refuse, True),
        ({"optim": {"lr": 2e-3}}, "optim.lr", Policy.note, False),
        ({"data": {"paths": ["b", "a"]}}, "data.paths", Policy.ask, True),
        ({"precision": {"recipe": "y"}}, "precision.recipe", Policy.note, False),
        ({"model": {"new_option": False}}, "model.new_option", Policy.ask, True),
        ({"optim": {"lr": True}}, "optim.lr", Policy.note, False),
        ({"data": {"seed": 2}}, "data.seed", Policy.refuse, True),
        ({"data": {"seq_length": 64}}, "data.seq_length", Policy.refuse, True),
    ],
)
def test_policy_per_kind(groups: dict, key: str, policy: Policy, refused: bool) -> None:
    [difference] = compare_settings(SAVED, changed(**groups))
    assert (difference.key, difference.policy, difference.refused) == (key, policy, refused)
    assert difference.used == ("refused" if refused else difference.configured)


def test_allowing_answers_ask_but_not_refuse() -> None:
    groups = {"data": {"reset_documents": True}, "model": {"heads": 8}}
    changes = compare_settings(SAVED, changed(**groups), allow=["data.*", "model.*"])
    assert {one.key: one.refused for one in changes} == {"data.reset_documents": False, "model.heads": True}
    with pytest.raises(ValueError, match=r"1 settings differ(.|\n)*model\.heads") as error:
        refuse_forbidden(changes)
    assert "data.reset_documents" not in str(error.value)


def test_refusal_names_the_remedy_with_what_is_allowed_already() -> None:
    """Settings on the command line replace each other: a list of the new keys only would take the old ones back."""
    now = changed(data={"reset_documents": True, "paths": ["c"]})
    changes = compare_settings(SAVED, now, allow=["data.paths"])
    remedy = r"can be allowed with 'train\.resume_allow=\[data\.paths,data\.reset_documents\]'$"
    with pytest.raises(ValueError, match=remedy):
        refuse_forbidden(changes)
    refuse_forbidden([one for one in changes if not one.refused])


def sources(*paths: str, name: str = "web", epochs: int = 1) -> dict:
    return {"data": {"sources": [{"name": name, "paths": list(paths), "max_epochs": epochs}], "phases": []}}


def test_data_that_moved_are_told_from_other_data() -> None:
    """A list compared as one value: the rule for paths never fitted, and both cells were cut to the same text."""
    old = "/lustre/project/tokenized/web-2024/shards/part-0001"
    [moved] = compare_settings(sources(old), sources(old.replace("0001", "0002")))
    assert (moved.key, moved.policy, moved.refused) == ("data.sources.0.paths", Policy.note, False)
    row = as_table([moved]).splitlines()[1].split("  ")
    cells = [cell.strip() for cell in row if cell.strip()]
    assert cells[1].endswith("0001']"), cells
    assert cells[2].endswith("0002']"), cells
    assert cells[2] == cells[3]
    [more] = compare_settings(sources(old), sources(old, epochs=3))
    assert (more.policy, more.refused) == (Policy.note, False), "the remedy of a source that is too small"
    [renamed] = compare_settings(sources(old), sources(old, name="books"))
    assert (renamed.key, renamed.refused) == ("data.sources.0.name", True)
    added = {"data": {"sources": [*sources(old)["data"]["sources"], {"name": "new", "paths": []}], "phases": []}}
    rows = {one.key: (one.saved, one.refused) for one in compare_settings(sources(old), added)}
    assert rows == {"data.sources.1.name": (ABSENT, True), "data.sources.1.paths": (ABSENT, False)}


def phases(*lengths_and_weights: tuple[int, float], skip: tuple[tuple[int, int], ...] = ()) -> dict:
    """Phases of so many tokens in which the source web has such a weight, code 1."""
    blends = [{"name": "", "tokens": tokens, "weights": {"web": w, "code": 1.0}} for tokens, w in lengths_and_weights]
    return {"phases": blends, "skip": [list(span) for span in skip], "sources": []}


@pytest.mark.parametrize(
    ("configured", "past"),
    [
        (phases((320, 1.0), (320, 2.0), (0, 9.0)), []),
        (phases((320, 1.0), (0, 2.0)), []),
        (phases((320, 1.0), (640, 2.0), (0, 3.0)), []),
        (phases((320, 1.0), (64, 2.0), (256, 9.0), (0, 3.0)), ["data.phases"]),
        (phases((320, 1.0), (96, 2.0), (0, 3.0)), []),
        (phases((320, 9.0), (320, 2.0), (0, 3.0)), ["data.phases"]),
        (phases((288, 1.0), (352, 2.0), (0, 3.0)), ["data.phases"]),
        (phases((320, 1.0), (320, 9.0), (0, 3.0)), ["data.phases"]),
        (phases(), ["data.phases"]),
        (phases((320, 1.0), (320, 2.0), (0, 3.0), skip=((13, 20),)), []),
        (phases((320, 1.0), (320, 2.0), (0, 3.0), skip=((12, 20),)), ["data.skip"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str([list(p.values())[1:] for p in value["phases"]]),
)
def test_what_a_change_of_phases_says_about_samples_that_were_read(configured: dict, past: list[str]) -> None:
    """13 samples of 32 tokens were read: ten of the first phase, three of the second, at the weight 2."""
    saved = phases((320, 1.0), (320, 2.0), (0, 3.0))
    state = {"plan": {"segments": [], "skip": []}, "consumed_samples": 13, "seq_length": 32}
    assert past_changes(state, saved, configured) == past
    refused = [one for one in compare_settings({"data": saved}, {"data": configured}, past=past) if one.refused]
    assert bool(refused) is bool(past)


def test_first_fitting_rule_decides_and_one_side_may_lack_a_key() -> None:
    rules = [ResumeRule("model.heads", Policy.note, "may change"), ResumeRule("model.*", Policy.refuse, "")]
    assert not compare_settings(SAVED, changed(model={"heads": 8}), rules)[0].refused
    without = {**SAVED, "precision": {}}
    gone = {one.key: one for one in compare_settings(SAVED, without)}
    assert gone["precision.recipe"].configured == ABSENT


def test_an_empty_text_is_seen_in_the_table() -> None:
    changes = compare_settings({"train": {"decay_from": ""}}, {"train": {"decay_from": "5120"}})
    assert as_table(changes).splitlines()[1].split()[:4] == ["train.decay_from", "''", "5120", "5120"]


def test_table_has_all_columns_aligned() -> None:
    changes = compare_settings(SAVED, changed(optim={"lr": 2e-3}, data={"paths": ["c" * 100]}))
    lines = as_table(changes).splitlines()
    assert lines[0].split() == ["setting", "checkpoint", "config", "used"]
    assert len(lines) == 3
    assert lines[1].index("refused") == lines[0].index("used"), "the columns do not line up"
    assert "0.001" in lines[2]
    assert "the config's value is used" in lines[2]


def test_a_checkpoint_from_before_there_was_a_choice_was_made_by_adamw() -> None:
    configured = {"optim": {"algorithm": "adamw", "muon": {"momentum": 0.95}, "lr": 1.0}}
    assert compare_settings({"optim": {"lr": 1.0}}, configured) == []
    configured["optim"]["algorithm"] = "muon"
    (difference,) = compare_settings({"optim": {"lr": 1.0}}, configured)
    assert difference.key == "optim.algorithm"
    assert difference.refused
    assert "train.init_from" in difference.reason


def test_a_checkpoint_from_before_there_were_experts_has_none() -> None:
    """A dense run goes on in the program that knows experts; one that gets them is another model."""
    saved = {"model": {"hidden": 64}}
    dense = to_json_values(ModelConfig(hidden=64))
    now = {"model": {"hidden": 64, "moe": dense["moe"], "mtp": dense["mtp"]}}
    assert compare_settings(saved, now) == []
    now["model"]["moe"] = to_json_values(MoeConfig(num_experts=8, ffn_hidden=32))
    differences = {one.key: (one.saved, one.refused) for one in compare_settings(saved, now)}
    assert differences == {"model.moe.num_experts": (0, True), "model.moe.ffn_hidden": (0, True)}
