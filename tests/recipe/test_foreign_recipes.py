"""Recipes of any content: read, or refused in one short line."""

from __future__ import annotations

import pytest
import yaml
from foreign import ANY, BYTES, changed, fuzz, refused_in_a_line
from hypothesis import given
from hypothesis import strategies as st

from silva.engine.errors import UserError
from silva.engine.recipe.file import PACKAGED
from silva.engine.recipe.loading import load

HOSTILE = {
    "deep lists": "seed: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "seed: " + "{a: " * 3000 + "1" + "}" * 3000,
    "a long integer": "seed: " + "9" * 5000,
    "a large integer": "seed: " + "9" * 30,
    "a number that is infinite": "base: eurus-7b-sft\noutput: x\ntraining: {learning_rate: 1e999}",
    "code": "seed: !!python/object/apply:os.system ['echo']",
    "no integer": "seed: !!int abc",
    "no time": "seed: 2001-99-99\noutput: !!timestamp 2001-99-99",
    "no truth value": "seed: !!bool abc",
    "a key that is a list": "[a]: 1",
    "half a character": 'output: "\\udcff"',
    "many aliases": "a: &a [1]\nb: [*a, *a]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_ends_in_one_line(name, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(HOSTILE[name])
    with pytest.raises(UserError):
        load(str(file), [])
    refused_in_a_line(lambda: load(str(file), []))
    key, _, value = HOSTILE[name].partition(": ")
    refused_in_a_line(lambda: load("mini-sft", [f"{key}={value}"]))


@fuzz(300)
@given(data=st.data())
def test_recipes_with_any_values(data, tmp_path):
    before = yaml.safe_load(
        (PACKAGED / data.draw(st.sampled_from(["mini-rm.yaml", "eurus-7b-dpo.yaml"]))).read_text()
    )
    before = {"output": "out", **before}
    file = tmp_path / "recipe.yaml"
    found = changed(data.draw, before) if data.draw(st.integers(0, 9)) else data.draw(ANY)
    try:
        file.write_text(yaml.safe_dump(found))
    except ValueError:
        # a number with more digits than Python writes
        return
    refused_in_a_line(lambda: load(str(file), []))


@fuzz(100)
@given(content=BYTES)
def test_recipes_of_any_bytes(content, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    refused_in_a_line(lambda: load(str(tmp_path / "recipe.yaml"), []))


@fuzz(200)
@given(
    override=st.text(max_size=30)
    | st.sampled_from(["training=", "data.train=[", "a.b.c=1", "data.train.9=1"])
)
def test_overrides_of_any_text(override):
    refused_in_a_line(lambda: load("mini-sft", [override]))
