"""The settings table of a resume, and what it refuses."""

from __future__ import annotations

import pytest

from megatron_fp4.train.resume.differences import (
    ABSENT,
    Policy,
    ResumeRule,
    as_table,
    compare_settings,
    refuse_forbidden,
)

SAVED = {
    "model": {"hidden": 64, "heads": 4},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "data": {"paths": ["a", "b"], "seed": 1},
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
    ],
)
def test_policy_per_kind(groups: dict, key: str, policy: Policy, refused: bool) -> None:
    [difference] = compare_settings(SAVED, changed(**groups))
    assert (difference.key, difference.policy, difference.refused) == (key, policy, refused)
    assert difference.used == ("refused" if refused else difference.configured)


def test_allowing_answers_ask_but_not_refuse() -> None:
    changes = compare_settings(SAVED, changed(data={"seed": 2}, model={"heads": 8}), allow=["data.*", "model.*"])
    assert {one.key: one.refused for one in changes} == {"data.seed": False, "model.heads": True}
    with pytest.raises(ValueError, match=r"1 settings differ(.|\n)*model\.heads") as error:
        refuse_forbidden(changes, "train.resume_allow=[...]")
    assert "data.seed" not in str(error.value)


def test_refusal_names_the_remedy() -> None:
    changes = compare_settings(SAVED, changed(data={"seed": 2}))
    with pytest.raises(ValueError, match=r"can be allowed with train\.resume_allow=\[data\.seed\]"):
        refuse_forbidden(changes, "train.resume_allow=[data.seed]")
    refuse_forbidden([one for one in changes if not one.refused], "")


def test_first_fitting_rule_decides_and_one_side_may_lack_a_key() -> None:
    rules = [ResumeRule("model.heads", Policy.note, "may change"), ResumeRule("model.*", Policy.refuse, "")]
    assert not compare_settings(SAVED, changed(model={"heads": 8}), rules)[0].refused
    without = {**SAVED, "precision": {}}
    gone = {one.key: one for one in compare_settings(SAVED, without)}
    assert gone["precision.recipe"].configured == ABSENT


def test_table_has_all_columns_aligned() -> None:
    changes = compare_settings(SAVED, changed(optim={"lr": 2e-3}, data={"paths": ["c" * 100]}))
    lines = as_table(changes).splitlines()
    assert lines[0].split() == ["setting", "checkpoint", "config", "used"]
    assert len(lines) == 3
    assert lines[1].index("refused") == lines[0].index("used"), "the columns do not line up"
    assert "0.001" in lines[2]
    assert "the config's value is used" in lines[2]
