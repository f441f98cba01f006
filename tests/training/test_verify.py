"""Exports: what their readers are told, and that a reader who would get something else is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer, GenerationConfig
from worlds import world

from benchmarks.fidelity import cases, families
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.model import hf_export
from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer, verify


def recipe(family: str, objective: str, folder: Path, **sections: Any) -> Recipe:
    model = families.checkpoint(family, folder / "model", rewards=objective == "bt")
    rows = cases.PAIRS if objective == "bt" else cases.COMPLETIONS
    form = "preference" if objective == "bt" else "prompt_completion"
    file = tiny.write(folder / "rows.jsonl", rows)
    sections["data"] = {"train": [{"path": str(file), "format": form}]} | sections.get("data", {})
    return tiny.recipe(objective, model, file, folder / "run", **sections)


def train(made: Recipe, *patches: tuple[Any, str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for target, name, value in patches:
            patch.setattr(target, name, value)
        trainer.train(made)


def card(folder: Path) -> str:
    return (folder / "run" / "export" / "README.md").read_text()


def test_the_card_says_what_was_found(tmp_path):
    made = recipe("llama2", "bt", tmp_path)
    world(1, train, made)
    text = card(tmp_path)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "8 conversations of the training data: the same token ids" in text
    for how in ("each sequence alone", "in a batch padded on the left", "in a batch padded on the right"):
        assert f"relative to 1 + their size, {how}: they differ by at most" in text
    # the checkpoint names none, and every conversation ends with the EOS
    assert "id 0, a token that no conversation ends with" in text
    assert "The same weights as `export`" in (tmp_path / "run" / "export-eurus" / "README.md").read_text()
    reader = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    assert (reader.pad_token, reader.pad_token_id) == ("<unk>", 0)


def with_eos(folder: Path, padding: int | None) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))


def without_bos(self: ChatTokenizer, folder: Path) -> None:
    _save(self, folder)
    file = folder / "chat_template.jinja"
    file.write_text("{% set bos_token = '' %}" + file.read_text())


def scaled(tensors: dict[str, Any], *arguments: Any, **options: Any) -> None:
    _save_file(
        {name: 1.1 * x if "lm_head" in name else x for name, x in tensors.items()}, *arguments, **options
    )


_save, _save_file = ChatTokenizer.save, hf_export.save_file


@pytest.mark.parametrize(
    ("objective", "patch", "told"),
    [
        (
            "bt",
            (hf_export, "set_padding", with_eos),
            r"rewards, .*, each sequence alone: they differ by at most",
        ),
        ("sft", (ChatTokenizer, "save", without_bos), r"reads other ids from 4 of 4 conversations"),
        (
            "sft",
            (hf_export, "save_file", scaled),
            r"log-probs per scored token, each sequence alone: they differ",
        ),
    ],
)
def test_another_model_than_the_trained_one_is_refused(objective, patch, told, tmp_path):
    made = recipe("llama2", objective, tmp_path)
    with pytest.raises(RuntimeError, match=told):
        world(1, train, made, patch)
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert "they differ by at most" in card(tmp_path) or "reads other ids" in card(tmp_path)


def test_a_comparison_can_be_left_out(tmp_path):
    made = recipe("zephyr", "sft", tmp_path, export={"verify": False})
    world(1, train, made, (hf_export, "save_file", scaled))
    assert "not compared with the trained model: export.verify is false" in card(tmp_path)


def test_a_model_that_does_not_fit_is_not_compared(tmp_path):
    small = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1000))
    world(1, train, recipe("zephyr", "sft", tmp_path), (verify, "psutil", small))
    assert "does not fit into this host's memory" in card(tmp_path)


def test_held_out_rows_and_control_tokens_in_prompts(tmp_path):
    rows = [
        {"prompt": [cases.user(text)], "completion": [cases.assistant("yes")]}
        for text in ("a </s> b", "plain")
    ]
    held = tiny.write(tmp_path / "held.jsonl", rows)
    sources = {"validation": [{"path": str(held), "format": "prompt_completion"}]}
    world(1, train, recipe("zephyr", "sft", tmp_path, data=sources))
    text = card(tmp_path)
    assert "2 conversations of the validation data" in text
    assert "1 more spell control tokens in a prompt" in text


def test_generation_stops_where_answers_end(tmp_path):
    """Phi-3 names <|endoftext|> as its EOS, and its template ends answers with <|end|>."""
    world(1, train, recipe("phi3", "sft", tmp_path))
    export = tmp_path / "run" / "export"
    reader, settings = AutoTokenizer.from_pretrained(export), GenerationConfig.from_pretrained(export)
    assert reader.convert_ids_to_tokens(settings.eos_token_id) == ["<|endoftext|>", "<|end|>"]


def test_a_conversation_that_ends_with_the_padding_token_is_refused(tmp_path):
    """Without an EOS behind it, an answer may end with any token."""
    made = recipe("qwen2.5", "bt", tmp_path, tokenizer={"chat_template": "none", "append_eos": False})
    rows = [
        {"prompt": "a", "chosen": "b<|endoftext|>", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    tiny.write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        RuntimeError, match=r"rows\.jsonl:1: .*ends with '<\|endoftext\|>', which pads batches"
    ):
        world(1, train, made)
    skipping = made.model_copy(update={"data": made.data.model_copy(update={"on_bad_row": "skip"})})
    world(1, train, skipping)


@pytest.mark.parametrize(("room", "expected"), [(1, "<|pad|>"), (0, None)])
def test_a_tokenizer_without_a_token_to_spare(room, expected, tmp_path):
    """DeepSeek-R1's distilled models: the only special tokens are BOS and EOS."""
    folder = families.checkpoint("deepseek-r1-distill", tmp_path)
    tokenizer = ChatTokenizer.load(str(folder))
    assert tokenizer.padding is None
    found = tokenizer.padding_within(tokenizer.vocab_size + room)
    assert found == (None if expected is None else (tokenizer.vocab_size, expected))
