"""What a user gets wrong ends in one line on stderr and exit code 2, with nothing half-written behind."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from safetensors.torch import load, load_file, save_file
from worlds import world

from silva.engine import cli, export, train


class Ended(NamedTuple):
    code: int
    out: str
    error: str


def _main(program: Any, arguments: list[str]) -> Ended:
    out, error = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        patch.setattr(cli, "_others_are_left", lambda: False)  # this process has more to tell than its end
        code = program.main(arguments)
    return Ended(code, out.getvalue(), error.getvalue())


def run(recipe: Path | str, *overrides: str, program: Any = train) -> Ended:
    """`python -m silva.engine.train RECIPE ...` in a process of its own; raises on a traceback."""
    return world(1, _main, program, [str(recipe), *overrides])[0]


def refused(ended: Ended, *named: str) -> None:
    """One line, exit code 2, and the line names every one of `named`."""
    assert ended.code == 2
    assert ended.error.startswith("silva: error: ")
    assert ended.error.endswith("\n")
    assert len(ended.error.splitlines()) == 1, ended.error
    for part in named:
        assert part in ended.error


class Home:
    """A folder of one test with a recipe that would run: four short pairs, one step of dpo."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.output = folder, model, folder / "run"
        self.data = tiny.write(folder / "rows.jsonl", [pair(n) for n in range(4)])
        self.recipe = folder / "recipe.yaml"
        self.raw: dict[str, Any] = {
            "output": str(self.output),
            "objective": {"name": "dpo"},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {
                "train": [{"path": str(self.data), "format": "preference"}],
                "row_length": 512,
                "cache": str(folder / "cache"),
            },
            "training": {"global_batch": 4, "learning_rate": 1e-3, "max_steps": 1},
        }

    def rows(self, found: Sequence[Any]) -> None:
        """Replaces the data; a text is written as the line it is."""
        lines = (row if isinstance(row, str) else json.dumps(row) for row in found)
        self.data.write_text("".join(line + "\n" for line in lines))

    def copy_model(self) -> Path:
        """The checkpoint, to be damaged."""
        self.model = shutil.copytree(self.model, self.folder / "model")
        self.raw["model"]["path"] = str(self.model)
        return self.model

    def run(self, *overrides: str, program: Any = train) -> Ended:
        self.recipe.write_text(json.dumps(self.raw))  # JSON is YAML
        return run(self.recipe, *overrides, program=program)

    def assert_nothing_written(self) -> None:
        assert not self.output.exists()
        assert not list(self.folder.rglob("*.partial"))


def pair(number: int) -> dict[str, str]:
    return {
        "prompt": f"What is {number} + 1?",
        "chosen": f"It is {number + 1}.",
        "rejected": "I do not know.",
    }


def completion(number: int, *, prompt_words: int = 1, answer_words: int = 1) -> dict[str, str]:
    return {
        "prompt": f"{number}: " + "why " * prompt_words,
        "completion": f"{number}: " + "because " * answer_words,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def home(tmp_path, model) -> Home:
    return Home(tmp_path, model)


# ---------------------------------------------------------------- the recipe and the command line


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.learning_rat=1e-3", ["command line", "unknown key", "did you mean learning_rate?"]),
        ("modle.path=x", ["modle", "did you mean model?"]),
        ("training.max_steps=many", ["training.max_steps", "'many'", "allowed"]),
        ("training.max_steps=1.5", ["training.max_steps", "1.5", "allowed"]),
        ("training.global_batch=0", ["training.global_batch", "found 0"]),
        ("data.train=[]", ["data.train", "at least one entry"]),
        ("objective.name=dpoo", ["objective.name", "'dpoo'", "'dpo'"]),
        ("objective.gamma=1.0", ["objective.gamma", "dpo does not use it"]),
        ("training.max_steps", ["command line", "training.max_steps", "key.path=value"]),
        ("data.train.1.limit=2", ["command line", "data.train.1.limit", "0 to 0"]),
        ("data.train.0.format=unpaired", ["data.train.0.format", "'unpaired'", "needs pairs"]),
        ("training.validate_every=1", ["training.validate_every", "without validation data"]),
        ("data.validation_fraction=0.9", ["data.validation_fraction", "leaves nothing to train on"]),
        ("parallel.tensor=2", ["parallel.tensor 2", "number of processes, 1"]),
        ("parallel.pipeline=2", ["parallel.pipeline 2", "number of processes, 1"]),
        ("parallel.context=2", ["parallel.context 2", "number of processes, 1"]),
        ("parallel.offload_optimizer=1", ["parallel.offload_optimizer", "found 1"]),
        ("model.path=no such folder", ["no such folder", "hub name"]),
        ("tokenizer.path=no such folder", ["no such folder", "tokenizer.path"]),
        ("tokenizer.chat_template=nothing.jinja", ["tokenizer.chat_template", "nothing.jinja"]),
        ("tokenizer.chat_template='{{ messages[0] }'", ["chat template", "cannot render"]),
        ("tokenizer.chat_template='{{ 1 / 0 }}'", ["chat template", "cannot render", "division by zero"]),
        ("data.train.0.columns={prompt: quesion}", ["rows.jsonl:1", "no prompt"]),
        ("reference.path=no such folder", ["no such folder"]),
        ("data.train.0.path=missing.jsonl", ["missing.jsonl", "no such file", "data.*.path"]),
        ("data.validation=[{path: missing.jsonl, format: preference}]", ["missing.jsonl", "no such file"]),
        ("data.train.0.format=messages", ["rows.jsonl", "messages", "comparisons"]),
        ("data.train.0.single_turn_pairs=true", ["rows.jsonl", "single_turn_pairs", "ultrainteract_pair"]),
        (
            "data.decontaminate={against: [{path: missing.jsonl, fields: [question]}]}",
            ["missing.jsonl", "no such file"],
        ),
    ],
)
def test_a_recipe_that_cannot_be_meant(override, named, home):
    refused(home.run(override), *named)
    home.assert_nothing_written()


def test_a_recipe_that_is_not_there(tmp_path):
    refused(run(tmp_path / "missing.yaml"), "missing.yaml", "no such file")
    refused(run("mini-stf"), "mini-stf", "did you mean mini-sft?")
    refused(run(tmp_path / "missing.yaml", program=export), "missing.yaml", "no such file")


def test_a_recipe_that_is_no_yaml(home):
    home.recipe.write_text("training: [1,\noutput: {")
    refused(run(home.recipe), "recipe.yaml", "not valid YAML", "line ")


def test_the_real_command_line(tmp_path):
    """The same through the interpreter: code and streams as a shell sees them."""
    command = [sys.executable, "-m", "silva.engine.train", "recipe.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    refused(Ended(ended.returncode, ended.stdout, ended.stderr), "recipe.yaml", "no such file")
    assert ended.stdout == ""
    assert not list(tmp_path.iterdir())


def test_heads_that_three_processes_cannot_share(home):
    home.raw["parallel"] = {"tensor": 3}
    home.recipe.write_text(json.dumps(home.raw))
    first, *others = world(3, _main, train, [str(home.recipe)])
    refused(first, "parallel.tensor", "3", "heads")
    assert [ended.code for ended in others] == [2, 2]
    home.assert_nothing_written()


# ---------------------------------------------------------------- data


def with_rows(*found: Any, form: str = "preference", objective: str = "dpo") -> Callable[[Home], None]:
    def change(home: Home) -> None:
        home.rows(found)
        home.raw["objective"] = {"name": objective}
        home.raw["data"]["train"][0]["format"] = form

    return change


LONG = completion(1, answer_words=900)
UNPAIRED = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("change", "named"),
    {
        "empty": (with_rows(), ["rows.jsonl", "no row"]),
        "not JSON": (with_rows(pair(0), "{broken"), ["rows.jsonl:2", "not JSON", "on_bad_row"]),
        "not an object": (with_rows(pair(0), "[1]"), ["rows.jsonl:2", "not an object", "found list"]),
        "a field missing": (with_rows(pair(0), {"prompt": "a", "chosen": "b"}), ["rows.jsonl:2", "rejected"]),
        "a number for text": (with_rows(pair(0), pair(1) | {"chosen": 7}), ["rows.jsonl:2", "found int"]),
        "nested without end": (with_rows(pair(0), "[" * 100_000), ["rows.jsonl:2", "cannot be read"]),
        "equal sides": (with_rows(pair(0) | {"chosen": "a", "rejected": "a"}), ["rows.jsonl:1", "equals"]),
        "too long": (
            with_rows(completion(0), LONG, form="prompt_completion", objective="sft"),
            ["rows.jsonl:2", "512", "data.too_long"],
        ),
        "too long together": (
            with_rows({"prompt": "a", "chosen": "no " * 110, "rejected": "yes " * 110}),
            ["rows.jsonl:1", "together", "data.too_long"],
        ),
        "kto with one prompt": (
            with_rows(
                UNPAIRED, UNPAIRED | {"completion": "c", "label": False}, form="unpaired", objective="kto"
            ),
            ["kto", "more than one"],
        ),
        "a tree in a circle": (
            with_rows({"nodes": [{"id": 1, "text": "q"}, {"id": 2, "parent": 2, "text": "a"}]}, form="nodes"),
            ["rows.jsonl:1", "nodes are their own ancestors", "'2'", "on_bad_row"],
        ),
        "pairs for sft": (with_rows(pair(0), objective="sft"), ["rows.jsonl", "preference", "sequence"]),
    }.values(),
)
def test_data_that_cannot_be_used(change, named, home):
    change(home)
    refused(home.run(), *named)
    home.assert_nothing_written()


@pytest.mark.parametrize(
    ("rule", "rows", "shown"),
    [
        ("too_long=drop", [completion(0), LONG], "skipped: sequence longer than 512 tokens: 1 "),
        ("too_long=truncate_right", [completion(0), LONG], "sequence cut to 512 tokens (truncate_right): 1 "),
        ("too_long=truncate_left", [completion(0), LONG], "sequence cut to 512 tokens (truncate_left): 1 "),
        (
            "too_long=truncate_right",
            [completion(0), completion(1, prompt_words=900)],
            "skipped: sequence with no scored token left in 512 tokens: 1 ",
        ),
        ("on_bad_row=skip", [completion(0), "{broken", completion(2)], "skipped: the line is not JSON: 1 "),
        ("on_bad_row=skip", [completion(0), {"prompt": "a"}], "skipped: "),
    ],
)
def test_what_is_left_out_is_shown(rule, rows, shown, home):
    with_rows(*rows, form="prompt_completion", objective="sft")(home)
    ended = home.run(f"data.{rule}")
    assert ended.code == 0, ended.error
    (line,) = (line for line in ended.out.splitlines() if shown in line)
    assert line.endswith("(first: rows.jsonl:2)")
    assert (home.output / "export" / "config.json").is_file()


def test_nothing_left_says_what_was_left_out(home):
    with_rows("{broken", {"prompt": "a"})(home)
    refused(home.run("data.on_bad_row=skip"), "rows.jsonl", "not JSON: 1")
    home.assert_nothing_written()


# ---------------------------------------------------------------- model and tokenizer


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def halve(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:16].clone()


@pytest.mark.parametrize(
    ("damage", "named"),
    {
        "no template": (no_template, ["no chat template", "tokenizer.chat_template"]),
        "fewer words than the tokenizer": (
            lambda folder: edit_json(folder / "config.json", vocab_size=100),
            ["tokenizer has", "only 100"],
        ),
        "another shape": (
            lambda folder: edit_tensors(folder, halve),
            ["model.layers.1.mlp.down_proj.weight", "[16, 48]", "[32, 48]"],
        ),
        "a tensor missing": (
            lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight")),
            ["model.norm.weight", "missing", "[32]"],
        ),
        "cut short": (cut_short, ["model.safetensors", "damaged", "again"]),
        "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), ["damaged"]),
        "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["neither model.safetensors"]),
        "GPT-2": (
            lambda folder: edit_json(
                folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]
            ),
            ["config.json", "'gpt2'", "llama, mistral, qwen2, qwen3, phi3"],
        ),
        "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "missing"]),
        "config cut short": (lambda folder: (folder / "config.json").write_text("{"), ["not valid JSON"]),
        "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["neither tokenizer.json"]),
        "tokenizer cut short": (
            lambda folder: (folder / "tokenizer.json").write_text('{"version": '),
            ["tokenizer.json", "not a JSON file"],
        ),
        "an unknown tokenizer": (
            lambda folder: edit_json(folder / "tokenizer.json", model={"type": "?"}),
            ["tokenizer", "cannot load it"],
        ),
        "a tokenizer of nothing": (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            ["tokenizer"],
        ),
    }.values(),
)
def test_a_model_that_cannot_be_used(damage, named, home):
    damage(home.copy_model())
    refused(home.run(), *named)
    home.assert_nothing_written()


def test_damaged_weights_without_a_reference_pass(home):
    """Where the reference pass does not read the weights first."""
    cut_short(home.copy_model())
    home.raw["objective"] = {"name": "bt"}
    refused(home.run(), "model.safetensors", "damaged")
    home.assert_nothing_written()


def test_a_reference_of_another_shape(home, tmp_path):
    other = tiny.checkpoint(tmp_path / "other", hidden_size=64)
    refused(home.run(f"reference.path={other}"), str(other), "another shape", "hidden is 64 and not 32")
    home.assert_nothing_written()


# ---------------------------------------------------------------- outputs


def test_a_foreign_export_folder_is_noticed_before_training(home):
    foreign = home.folder / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    refused(home.run(f"export.path={foreign}"), str(foreign), "export.path")
    assert [file.name for file in foreign.iterdir()] == ["thesis.tex"]
    home.assert_nothing_written()


@pytest.mark.parametrize("key", ["output", "export.path", "reference.cache"])
def test_a_file_where_a_folder_has_to_be(key, home):
    file = home.folder / "file"
    file.write_text("mine")
    refused(home.run(f"{key}={file}"), str(file))
    refused(home.run(f"{key}={file / 'inside'}"), str(file))
    assert file.read_text() == "mine"
    home.assert_nothing_written()


def test_columns_may_trade_places(home):
    """The columns of the file swapped by the recipe: the rejected answer is read as the chosen one."""
    ended = home.run("data.train.0.columns={chosen: rejected, rejected: chosen}")
    assert ended.code == 0, ended.error


def test_an_export_without_a_run(home):
    refused(home.run(program=export), str(home.output), "no checkpoint to export")
    home.assert_nothing_written()


def test_a_damaged_reference_cache_is_computed_again(home):
    cache = home.folder / "log-probs"
    first = home.run(f"reference.cache={cache}")
    assert first.code == 0, first.error
    (file,) = cache.iterdir()
    good = file.read_bytes()
    last = next(line for line in first.out.splitlines() if line.startswith("last_step"))
    for number, damaged in enumerate((b"", good[:-3], b"\xff" * 200)):
        file.write_bytes(damaged)
        ended = home.run(f"reference.cache={cache}", f"output={home.folder / str(number)}")
        assert ended.code == 0, ended.error
        assert "log-probs computed" in ended.out
        assert last.split()[1] in ended.out
        [mended] = cache.iterdir()
        # the header's keys have no order
        assert load_file(mended)["logprob"].tolist() == load(good)["logprob"].tolist()


def test_any_script_may_name_a_folder(tmp_path, model):
    folder = tmp_path / "Übung 数据 d'été"
    folder.mkdir()
    home = Home(folder, model)
    home.copy_model()
    home.rows([pair(n) | {"prompt": f"什么 {n}? 🙂"} for n in range(3)])
    ended = home.run()
    assert ended.code == 0, ended.error
    assert (home.output / "export" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.partial"))
    with home.data.open("a") as file:
        file.write("{broken\n")
    refused(home.run(f"output={folder / '二'}", f"data.train.0.path={home.data}"), "rows.jsonl:4")
