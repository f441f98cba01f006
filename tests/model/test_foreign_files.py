"""config.json and the index of a foreign checkpoint, of any content: read, or refused in one short line."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny
from foreign import ANY, BYTES, fuzz, refused_in_a_line, written
from hypothesis import given
from hypothesis import strategies as st

from silva.engine.errors import UserError
from silva.engine.model import hf

FUZZ = fuzz(400)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("whole"))


@FUZZ
@given(data=st.data())
def test_a_config_of_any_values(data, whole, tmp_path):
    config = json.loads((whole / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        config[data.draw(st.sampled_from([*config, "architectures", "rope_scaling", "head_dim"]))] = (
            data.draw(ANY)
        )
    (tmp_path / "config.json").write_text(written(data.draw(st.just(config) | ANY)))
    refused_in_a_line(lambda: hf.read_shape(tmp_path))


@FUZZ
@given(content=BYTES)
def test_a_config_of_any_bytes(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError):
        hf.read_shape(tmp_path)
    refused_in_a_line(lambda: hf.read_shape(tmp_path))


@FUZZ
@given(index=st.fixed_dictionaries({"weight_map": ANY | st.dictionaries(st.text(max_size=5), ANY)}) | ANY)
def test_an_index_of_any_values(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(written(index))
    with ExitStack() as opened:
        refused_in_a_line(lambda: hf._Checkpoint(tmp_path, opened).check({"a": (1,)}, unused=set()))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", ""])
def test_an_index_stays_in_its_folder(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with ExitStack() as opened, pytest.raises(UserError, match="file of the folder, found"):
        hf._Checkpoint(tmp_path, opened)
