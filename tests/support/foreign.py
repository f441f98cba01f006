"""Values and damage that foreign files may hold, for fuzz tests, and the check that all share."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from silva.engine.errors import UserError

WORDS = [
    "llama",
    "mistral",
    "LlamaForCausalLM",
    "../x.safetensors",
    "model.safetensors",
    "content",
    "<s>",
    "BPE",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**4000)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(WORDS)
)
ANY = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
BYTES = st.binary(max_size=60) | st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff\xfe", b"null"]
)


def fuzz(examples: int) -> settings:
    """The examples are always the same ones, so that a failure is seen again."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def written(value: object) -> str:
    """JSON, with numbers of any length."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(before)


def changed(draw: Callable[[Any], Any], value: Any) -> Any:
    """A copy of a JSON value in which one to three places, at any depth, hold something else or are gone."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        at: Any = whole
        key: Any = 0
        while isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
            at = at[key]
            # of long lists and tables the beginning and the end
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from([*keys[:20], *keys[-3:]]))
        if at is not whole and draw(st.integers(0, 4)) == 0:
            del at[key]
        else:
            at[key] = draw(ANY)
    return whole[0]


def refused_in_a_line(read: Callable[[], Any]) -> None:
    """Reads, or refuses in no more than 600 characters, which a program prints as one line; nothing else is raised."""
    said = "nothing"
    try:
        read()
    except UserError as error:
        said = str(error)
    assert 0 < len(said) < 600
