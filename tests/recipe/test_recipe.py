"""Recipes: what is read, what is inherited and overridden, and the one line every mistake ends in."""

import re
from pathlib import Path

import pytest

from silva.engine.data.reading.formats import FORMATS
from silva.engine.errors import UserError
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe import schema as config
from silva.engine.recipe.file import packaged, read
from silva.engine.recipe.loading import load

ALL = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))

RECIPE = """\
output: runs/x
objective: {name: dpo}
model: {path: some/model}
data:
  train:
    - {path: a.jsonl, format: preference}
    - {path: b.jsonl, format: ultrafeedback}
training: {global_batch: 8, learning_rate: 5e-7}
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes RECIPE, with text replaced, and gives its path."""

    def write(*replacements: tuple[str, str], name: str = "recipe.yaml", text: str = RECIPE) -> str:
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def refusal(file: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(file, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_values_types_and_defaults(recipe):
    loaded = load(recipe())
    assert loaded.training.learning_rate == 5e-7  # YAML 1.1 reads this spelling as text
    assert loaded.objective.beta == 0.1
    assert loaded.data.train[1].format == "ultrafeedback"
    assert loaded.tokenizer_path == loaded.reference_path == "some/model"
    assert loaded.export_path == Path("runs/x/export")
    assert loaded.reference_cache == Path("runs/x/reference")
    assert loaded.export_dtype == "bfloat16"
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 3


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "5.0e-07", ".5e-6", "0.0000005", "+5e-7"])
def test_numbers_in_every_spelling(recipe, text):
    assert load(recipe(("5e-7", text))).training.learning_rate == pytest.approx(5e-7, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("'7'", "7")],
)
def test_words_stay_words(recipe, text, value):
    assert load(recipe(("runs/x", text))).output == value


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("training.epochs=true", "found true; allowed: a valid integer"),
        ("training.epochs=2.0", "found 2.0; allowed: a valid integer"),
        ("training.epochs='2'", "found '2'; allowed: a valid integer"),
        ("training.epochs=0", "found 0; allowed: greater than or equal to 1"),
        ("training.learning_rate=fast", "found 'fast'; allowed: a valid number"),
        ("training.learning_rate=true", "found true; allowed: a valid number"),
        ("training.learning_rate=.nan", "found '.nan'; allowed: a valid number"),
        ("training.learning_rate=", "found nothing; allowed: a valid number"),
        ("parallel.overlap=1", "found 1; allowed: a valid boolean"),
        ("parallel.overlap=yes", "found 'yes'; allowed: a valid boolean"),
        ("output=3", "found 3; allowed: a valid string"),
        ("training=3", "found 3; allowed: a section of `key: value` lines"),
        ("data.train=[]", "found []; allowed: at least one entry"),
        ("data.train.0.single_turn_pairs=1", "found 1; allowed: a valid boolean"),
        ("data.train={}", "found {}; allowed: a valid list"),
        ("data.train.1.format=csv", "found 'csv'; allowed: 'ultrainteract_sft', 'ultrainteract_pair'"),
        ("objective.name=ppo", "found 'ppo'; allowed: 'sft', 'dpo', 'ipo'"),
        ("export.max_shard_size=5", "found 5; allowed: a valid string"),
    ],
)
def test_wrong_values(recipe, override, found):
    key = override.partition("=")[0]
    assert refusal(recipe(), override).startswith(f"command line: {key}: {found}")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{against: []}", "against: found []; allowed: at least one entry"),
        ("{against: [{path: x}]}", "against.0.fields: missing, and it has no default"),
        ("{against: [{path: x, fields: [q]}], mode: words}", "mode: found 'words'; allowed: 'ngram' or"),
        (
            "{against: [{path: x, fields: [q], ngrams: 8}]}",
            "against.0.ngrams: unknown key; allowed here: path",
        ),
        (
            "{against: [{path: x, fields: [q]}], ngram: 0}",
            "ngram: found 0; allowed: greater than or equal to 1",
        ),
    ],
)
def test_wrong_test_sets(recipe, value, problem):
    assert refusal(recipe(), f"data.decontaminate={value}").startswith(
        f"command line: data.decontaminate.{problem}"
    )


def test_a_wrong_value_in_a_file_names_the_file(recipe):
    file = recipe(("global_batch: 8", "global_batch: '8'"))
    assert refusal(file) == f"{file}: training.global_batch: found '8'; allowed: a valid integer"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        (
            "training.learning_rat=1",
            "unknown key; did you mean learning_rate?; allowed here: epochs, max_steps",
        ),
        ("data.train.0.formt=x", "unknown key; did you mean format?; allowed here: path, format"),
        (
            "learning_rate=1e-3",
            "unknown key; did you mean training.learning_rate?; allowed here: seed, output",
        ),
        ("zzz=1", "unknown key; allowed here: seed, output"),
        ("training.zzz.deeper=1", "unknown key; allowed here: epochs"),
    ],
)
def test_unknown_keys(recipe, override, hint):
    assert hint in refusal(recipe(), override)


def test_a_misspelt_required_key_is_reported_as_misspelt(recipe):
    line = refusal(recipe(("learning_rate", "lerning_rate")))
    assert "training.lerning_rate: unknown key; did you mean learning_rate?" in line
    assert line.endswith("(and 1 more)")


@pytest.mark.parametrize("key", ["output", "objective", "model", "data", "training"])
def test_missing_keys(recipe, key):
    lines = re.sub(rf"^{key}:.*\n(  .*\n)*", "", RECIPE, flags=re.MULTILINE)
    file = recipe(text=lines)
    assert refusal(file) == f"{file}: {key}: missing, and it has no default"


# ---------------------------------------------------------------- overrides


def test_overrides(recipe):
    loaded = load(
        recipe(),
        [
            "training.learning_rate=1e-3",
            "data.train.0.limit=100",
            "data.train.1.columns.prompt=question",
            "parallel={tensor: 2, sequence_parallel: true}",
        ],
    )
    assert loaded.training.learning_rate == 1e-3
    assert loaded.training.global_batch == 8
    assert [source.limit for source in loaded.data.train] == [100, None]
    assert loaded.data.train[1].columns == {"prompt": "question"}
    assert loaded.parallel.tensor == 2


def test_the_later_override_wins_and_values_may_hold_an_equals_sign(recipe):
    assert load(recipe(), ["output=a", "output=b=c"]).output == "b=c"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "seed: this is no `key.path=value`"),
        ("=3", "=3: this is no `key.path=value`"),
        ("training..epochs=3", "this is no `key.path=value`"),
        ("output.x=3", "output.x: output is 'runs/x', which has no keys of its own"),
        ("data.train.2.limit=3", "found index 2 of data.train; allowed: 0 to 1"),
        ("data.train.-1.limit=3", "found index -1 of data.train; allowed: 0 to 1"),
        ("data.train.path=3", "found index path of data.train; allowed: 0 to 1"),
        ("data.validation.0.path=x", "allowed: none, it is empty; set it whole: 'data.validation=[{...}]'"),
        ("output=[1", "output: the value is not valid YAML: line 1"),
    ],
)
def test_overrides_that_lead_nowhere(recipe, override, problem):
    line = refusal(recipe(), override)
    assert line.startswith("command line: ")
    assert problem in line


# ---------------------------------------------------------------- files and bases


def test_base_merges_sections_and_replaces_lists(recipe):
    recipe()
    child = recipe(
        name="child.yaml",
        text="base: recipe.yaml\nobjective: {name: ipo}\n"
        "data:\n  train: [{path: c, format: hh_rlhf}]\n  row_length: 64\n",
    )
    grandchild = recipe(name="grandchild.yaml", text="base: ./child.yaml\ntraining: {epochs: 3}\n")
    loaded = load(grandchild)
    assert (loaded.objective.name, loaded.training.epochs, loaded.training.global_batch) == ("ipo", 3, 8)
    assert [source.path for source in loaded.data.train] == ["c"]
    assert load(child).training.epochs == 1


def test_an_error_names_the_file_that_set_the_key(recipe):
    parent = recipe(("global_batch: 8", "global_batch: 0"))
    child = recipe(name="child.yaml", text="base: recipe.yaml\ntraining: {epochs: 0}\n")
    assert refusal(child, "training.global_batch=1").startswith(f"{child}: training.epochs: found 0")
    assert refusal(child, "training.epochs=1").startswith(f"{parent}: training.global_batch: found 0")


def test_a_packaged_recipe_as_base(recipe):
    file = recipe(name="mine.yaml", text="base: eurus-7b-kto\nobjective: {beta: 0.3}\n")
    assert load(file).objective.lambda_desirable == 1.33
    assert load(file).objective.beta == 0.3


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_bases_in_a_circle(recipe, names):
    following = dict(zip(names, (*names[1:], names[0]), strict=True))
    for name in names:
        first = recipe(name=f"{name}.yaml", text=f"base: {following[name]}.yaml\n")
    circle = " -> ".join(f"{name}.yaml" for name in (names[-1], *names))
    assert refusal(first).endswith(f"base: the bases form a circle: {circle}")


def test_missing_files(recipe, tmp_path):
    assert refusal("eurus-7b-nka") == (
        "eurus-7b-nka: no packaged recipe has this name, and it is no .yaml file; did you mean eurus-7b-nca?"
    )
    assert refusal("mini-sft.yaml") == "mini-sft.yaml: no such file; did you mean mini-sft?"
    assert "packaged recipes: eurus-70b-kto, " in refusal(str(tmp_path / "qqqq.yaml"))
    file = recipe(name="child.yaml", text="base: none.yaml\n")
    assert refusal(file).startswith(f"{file}: base: none.yaml: no such file")
    assert refusal(recipe(name="child.yaml", text="base: [a]\n")).endswith(
        "base: found ['a']; allowed: a recipe file, or a packaged recipe's name"
    )
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert "no such file" in refusal(str(folder))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "found nothing; a recipe is `key: value` lines"),
        ("- 1\n", "found [1]; a recipe is `key: value` lines"),
        ("a: [1\n", "not valid YAML: line 2, column 1: "),
        ("seed: 1\nseed: 2\n", "not valid YAML: line 2, column 1: the key 'seed' stands twice"),
        (
            "a: &x {b: 1}\nc: *x\n",
            "not valid YAML: line 2, column 4: aliases (*name) are not allowed in a recipe",
        ),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML: line 1, column 4: could not determine"),
        ("a: \x00\n", "not valid YAML: "),
        ("? [a]\n: 1\n", "not valid YAML: "),
    ],
)
def test_bad_yaml(recipe, text, problem):
    file = recipe(text=text)
    assert refusal(file).startswith(f"{file}: {problem}")


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read" in refusal(str(file))


def test_dotted_inputs_are_relative_to_the_file_that_states_them(tmp_path, recipe, monkeypatch):
    (tmp_path / "deep").mkdir()
    recipe(
        ("some/model", "../model"),
        ("a.jsonl", "./a.jsonl"),
        ("runs/x", "./runs"),
        text=RECIPE
        + "tokenizer: {path: ./tok, chat_template: ./chat.jinja}\nreference: {path: ./ref, cache: ./c}\n",
        name="deep/recipe.yaml",
    )
    child = recipe(name="child.yaml", text="base: deep/recipe.yaml\n")
    monkeypatch.chdir(tmp_path)
    for name in (child, "child.yaml"):
        loaded = load(name, ["data.train.1.path=./b.jsonl"])
        assert loaded.model.path == str(tmp_path / "model")
        assert [source.path for source in loaded.data.train] == [str(tmp_path / "deep/a.jsonl"), "./b.jsonl"]
        assert loaded.tokenizer.path == str(tmp_path / "deep/tok")
        assert loaded.tokenizer.chat_template == str(tmp_path / "deep/chat.jinja")
        assert loaded.reference.path == str(tmp_path / "deep/ref")
        # outputs are the caller's, never beside a recipe that may be installed
        assert (loaded.output, loaded.reference.cache) == ("./runs", "./c")


# ---------------------------------------------------------------- checks of several keys


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline: found 2 with pipeline 1"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel: found true with tensor 1"),
        (
            ["parallel.pipeline=2", "parallel.stage_layers=[3,4,5]"],
            "parallel.stage_layers: found 3 numbers; allowed: one for each of pipeline x virtual_pipeline = 2",
        ),
        (
            ["parallel.offload_optimizer=true", "parallel.distributed_optimizer=false"],
            "parallel.offload_optimizer: found true with distributed_optimizer false",
        ),
        (["objective.gamma=1.0"], "objective.gamma: found 1.0, but dpo does not use it; it uses: beta"),
        (["objective.name=bt", "objective.beta=0.2"], "found 0.2, but bt does not use it; it uses: no key"),
        (["objective.ipo_average=false"], "objective.ipo_average: found false, but dpo does not use it"),
        (["objective.name=bt_dr"], "objective.name: found 'bt_dr' without a source marked `absolute: true`"),
        (
            ["data.train.1.format=unpaired"],
            "data.train.1.format: found 'unpaired', judged single rows; dpo needs",
        ),
        (["data.max_length=5000"], "data.max_length: found 5000; allowed: at most data.row_length, 4096"),
        (["training.validate_every=5"], "training.validate_every: found 5 without validation data"),
        (
            ["training.min_learning_rate=1"],
            "training.min_learning_rate: found 1.0; allowed: at most learning_rate",
        ),
        (
            ["data.validation=[{path: v, format: preference}]", "data.validation_fraction=0.1"],
            "data.validation_fraction: found 0.1 beside data.validation",
        ),
    ],
)
def test_impossible_combinations(recipe, overrides, problem):
    line = refusal(recipe(), *overrides)
    assert line.startswith("command line: ")
    assert problem in line


def test_a_key_the_objective_does_not_use_may_stand_at_its_default(recipe):
    assert load(recipe(), ["objective.name=sft", "objective.beta=0.1"]).objective.name == "sft"
    assert "found 0.2, but sft does not use it" in refusal(
        recipe(), "objective.name=sft", "objective.beta=0.2"
    )


def test_kto_takes_unpaired_rows_and_its_own_keys(recipe):
    loaded = load(
        recipe(), ["objective.name=kto", "objective.lambda_desirable=1.33", "data.train.0.format=unpaired"]
    )
    assert loaded.objective.lambda_desirable == 1.33


def test_layouts_that_are_possible(recipe):
    loaded = load(
        recipe(), ["parallel={tensor: 2, pipeline: 2, virtual_pipeline: 2, sequence_parallel: true}"]
    )
    assert loaded.parallel.virtual_pipeline == 2


def test_the_tables_agree_with_the_types():
    keys = {key for objective in OBJECTIVES.values() for key in objective.keys}
    assert keys == set(config.Objective.model_fields) - {"name"}
    assert set(config.Source.model_fields["format"].annotation.__args__) == set(FORMATS)


# ---------------------------------------------------------------- packaged recipes, saving


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_load_and_survive_saving(name, tmp_path):
    recipe = load(name)
    saved = tmp_path / "saved.yaml"
    saved.write_text(recipe.dump())
    assert load(str(saved)) == recipe
    assert recipe.describe().startswith(f"objective  {recipe.objective.name}")
    for source in (*recipe.data.train, *recipe.data.validation):
        if "jsonl" in source.path and "mini" in name:
            assert Path(source.path).is_file()


def test_every_packaged_file_is_a_recipe_or_a_base():
    assert {"eurus-7b-sft", "eurus-70b-nca", "eurus-7b-rm", "mini-sft", "mini-nca", "mini-rm"} <= set(
        packaged()
    )
    assert {name for name in ALL if not name.endswith("-base")} == set(packaged())
    for base in (name for name in ALL if name.endswith("-base")):
        assert "missing, and it has no default" in refusal(base)


def test_the_papers_settings():
    """One epoch, cosine, warm-up 0.1; SFT 2e-5; preference 5e-7, beta 0.1, KTO ratio 1.33; RM 1e-5."""
    rates = {"sft": 2e-5, "dpo": 5e-7, "nca": 5e-7, "kto": 5e-7, "bt_dr": 1e-5}
    for name in (name for name in packaged() if name.startswith("eurus")):
        recipe = load(name)
        training, objective = recipe.training, recipe.objective
        assert (training.epochs, training.schedule, training.warmup) == (1, "cosine", 0.1)
        assert training.learning_rate == rates[objective.name]
        assert objective.beta == 0.1
        ratio = objective.lambda_desirable / objective.lambda_undesirable
        assert ratio == (1.33 if objective.name == "kto" else 1.0)
        assert recipe.tokenizer.chat_template == "eurus"
        assert recipe.tokenizer.append_eos is (False if objective.name == "bt_dr" else None)
        absolute = [source.path for source in recipe.data.train if source.absolute]
        assert absolute == (["openbmb/UltraInteract_pair"] if objective.name == "bt_dr" else [])


def test_saving_keeps_text_that_looks_like_something_else(recipe):
    loaded = load(recipe(), ["output='5e-7'", "model.path='true'", "tokenizer.chat_template='{{ a }}\n'"])
    saved = recipe(name="saved.yaml", text=loaded.dump())
    assert load(saved) == loaded


def test_an_unknown_section_of_the_command_line_is_blamed_on_it():
    with pytest.raises(UserError, match=r"^command line: modle: unknown key; did you mean model\?"):
        load("mini-sft", ["modle.path=x"])


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("eurus") and name != "eurus-base"])
def test_the_papers_recipes_skip_and_count_bad_rows(name):
    """The data sets of the hub have empty answers and conversations that begin with the assistant."""
    raw, _, _ = read(name, [])
    assert raw["data"]["on_bad_row"] == "skip"
