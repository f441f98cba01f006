"""Tokenizer files of any content: read, or refused in one short line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from foreign import ANY, BYTES, changed, fuzz, refused_in_a_line, written
from hypothesis import given
from hypothesis import strategies as st

from silva.engine.data.text import tokenizer_files
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.errors import UserError

FUZZ = fuzz(150)


def load(folder: Path) -> None:
    """What a run does with a tokenizer before it reads data."""
    ChatTokenizer.load(str(folder), chat_template="none")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """A `tokenizer.json` beside its settings."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("bpe"))
    load(folder)
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory, _own_inputs) -> Path:
    """A `tokenizer.model` of Mistral's kind, with the settings that such tokenizers come with."""
    folder = tmp_path_factory.mktemp("pieces")
    shutil.copy(_own_inputs / "tokenizers" / "mistral-v1" / "tokenizer.model", folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>", "lstrip": False}}
    decoder = {"600": {"content": "<|im_start|>", "special": True, "lstrip": False, "normalized": False}}
    settings = {"add_bos_token": True, "legacy": True, "added_tokens_decoder": decoder, **names}
    for name, content in {
        "tokenizer_config.json": settings,
        "special_tokens_map.json": names,
        "added_tokens.json": {"<|im_start|>": 600},
        "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
    }.items():
        (folder / name).write_text(json.dumps(content))
    load(folder)
    return folder


def copied(source: Path, folder: Path) -> Path:
    for name in tokenizer_files.NAMES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    return folder


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
@FUZZ
@given(data=st.data())
def test_settings_of_any_values(kind, data, bpe, pieces, tmp_path):
    folder = copied(bpe if kind == "bpe" else pieces, tmp_path)
    files = sorted(file for file in folder.glob("*.json"))
    file = data.draw(st.sampled_from(files))
    before = json.loads(file.read_text())
    file.write_text(
        written(data.draw(ANY) if data.draw(st.integers(0, 9)) == 0 else changed(data.draw, before))
    )
    refused_in_a_line(lambda: load(folder))


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
@fuzz(60)
@given(data=st.data(), content=BYTES)
def test_files_of_any_bytes(kind, data, content, bpe, pieces, tmp_path):
    folder = copied(bpe if kind == "bpe" else pieces, tmp_path)
    data.draw(st.sampled_from(sorted(folder.iterdir()))).write_bytes(content)
    refused_in_a_line(lambda: load(folder))


@fuzz(60)
@given(place=st.integers(0, 2000), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_sentencepiece_model(place, bit, cut, pieces, tmp_path):
    """The first pieces, or the settings at the end, with a flipped bit; or what is before them."""
    folder = copied(pieces, tmp_path)
    content = bytearray((folder / "tokenizer.model").read_bytes())
    place = place if place < 1000 else len(content) - place + 999
    content[place] ^= 1 << bit
    (folder / "tokenizer.model").write_bytes(content[:place] if cut else content)
    refused_in_a_line(lambda: load(folder))


def test_a_template_that_is_no_text(bpe, tmp_path):
    folder = copied(bpe, tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ 1 }}")
    with pytest.raises(UserError, match=r"utf-8.*invalid start byte"):
        ChatTokenizer.load(str(folder))
