"""What makes a run what it is: every key of a recipe is classified, and every difference is shown."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from silva.engine.recipe import identity
from silva.engine.recipe.schema import Recipe

RECIPE = Recipe.model_validate(
    {
        "output": "runs/x",
        "objective": {"name": "dpo"},
        "model": {"path": "some/model"},
        "data": {
            "train": [
                {"path": "a.jsonl", "format": "preference"},
                {"path": "b.jsonl", "format": "ultrafeedback"},
            ]
        },
        "training": {"global_batch": 8, "learning_rate": 5e-7},
    }
)
CONTENTS = {
    "data": "d",
    "validation": "v",
    "tokenizer": "t",
    "model": "m",
    "reference": "r",
    "steps": 20,
}
OLD = identity.of(RECIPE, CONTENTS)
BY_CONTENT = sorted(name for name, kind in identity.KINDS.items() if kind not in ("identity", "free"))


def changed(name: str, value: Any, **contents: Any) -> dict[str, Any]:
    """The same run with one key changed, and what it leads to."""
    run = copy.deepcopy(OLD)
    *path, last = name.split(".")
    section = run["recipe"]
    for part in path:
        section = section[int(part)] if isinstance(section, list) else section[part]
    section[int(last) if isinstance(section, list) else last] = value
    run["contents"] |= contents
    return run


def test_every_key_is_classified_and_no_other():
    assert sorted(identity.names()) == sorted(identity.KINDS)
    assert set(identity.CHANGEABLE) <= set(identity.KINDS)
    assert not [name for name in identity.CHANGEABLE if identity.KINDS[name] == "free"]


@pytest.mark.parametrize("name", identity.KINDS)
def test_a_changed_key_is_a_difference_unless_it_is_free(name):
    found = identity.differences(OLD, changed(name, "other"))
    if identity.KINDS[name] == "identity":
        assert list(found) == [name]
        assert found[name].endswith("is 'other'")
        assert identity.differences(OLD, changed(name, "other"), allowed=[name]) == {}
    else:
        assert found == {}


@pytest.mark.parametrize("name", BY_CONTENT)
def test_what_a_path_leads_to_decides(name):
    kind = identity.KINDS[name]
    found = identity.differences(OLD, changed(name, "moved", **{kind: "other"}))
    assert list(found) == [name]
    [told] = identity.differences(OLD, OLD | {"contents": CONTENTS | {kind: "other"}}).values()
    assert told == "is the same, but what it leads to has changed"
    assert identity.differences(OLD, changed(name, "moved", **{kind: "other"}), allowed=[name]) == {}


def test_the_innermost_difference_is_shown():
    run = changed("data.train.1.limit", 100, data="other")
    assert identity.differences(OLD, run) == {"data.train.1.limit": "was nothing, is 100"}
    run["recipe"]["training"]["learning_rate"] = 1e-6
    assert identity.differences(OLD, run) == {
        "data.train.1.limit": "was nothing, is 100",
        "training.learning_rate": "was 5e-07, is 1e-06",
    }


def test_a_source_more_is_shown():
    run = changed("data.train", OLD["recipe"]["data"]["train"][:1], data="other")
    [(name, what)] = identity.differences(OLD, run).items()
    assert name == "data.train"
    assert "a.jsonl" in what


def test_other_data_of_the_same_names_do_not_blame_the_steps():
    run = OLD | {"contents": CONTENTS | {"data": "other", "steps": 30}}
    assert list(identity.differences(OLD, run)) == ["data.train"]


def test_only_some_keys_are_compared():
    run = changed("training.learning_rate", 1.0)
    assert identity.differences(OLD, run, only=["objective.beta"]) == {}
