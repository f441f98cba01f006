"""The mini data set is what its generator makes, and every action in it does what the row says it does."""

import gzip
import json
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from silva.engine.errors import UserError
from silva.recipes.mini import actions, problems
from silva.recipes.mini.interpreter import Interpreter, code_of, is_correct
from silva.recipes.mini.make_model import VOCABULARY, make
from silva.recipes.mini.make_trees import FILES, PROBLEMS, forest, write
from silva.recipes.mini.make_trees import make as make_rows
from silva.recipes.mini.problems import Dice

MINI = Path(__file__).resolve().parents[2] / "recipes" / "mini"
SUBSET = 40


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    return {stem: _read(MINI / f"{stem}.jsonl.gz") for stem in FILES}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(MINI, tmp_path_factory.mktemp("model"), seed=0)


def _read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---- the shipped files are what the generator makes ----


def test_the_generator_makes_the_shipped_text(tmp_path):
    """All of it, compared as text; the compressed bytes also depend on the zlib in use."""
    for stem, rows in make_rows(PROBLEMS, seed=0).items():
        write(rows, tmp_path / f"{stem}.jsonl.gz")
        made, there = (folder / f"{stem}.jsonl.gz" for folder in (tmp_path, MINI))
        assert gzip.decompress(made.read_bytes()) == gzip.decompress(there.read_bytes()), stem


def test_fewer_problems_are_the_first_of_more(shipped):
    for stem, rows in make_rows(SUBSET, seed=0).items():
        assert rows
        assert rows == shipped[stem][: len(rows)]


def test_another_seed_makes_other_problems():
    assert make_rows(8, seed=1)["pair"][0]["id"] != make_rows(8, seed=0)["pair"][0]["id"]


def test_written_bytes_depend_on_the_rows_alone(tmp_path, shipped):
    """Neither the file's name nor the time is in the gzip header (RFC 1952: flags and mtime are zero)."""
    for name in ("first.gz", "second.gz"):
        write(shipped["pair_heldout"], tmp_path / name)
    data = (tmp_path / "first.gz").read_bytes()
    assert data == (tmp_path / "second.gz").read_bytes()
    assert data[3:8] == bytes(5)


def test_the_files_stay_small():
    assert sum((MINI / f"{stem}.jsonl.gz").stat().st_size for stem in FILES) < 600_000


# ---- the rows are UltraInteract's, and trees ----


def test_counts(shipped):
    trees = {stem: len({row["parent_id"] for row in rows}) for stem, rows in shipped.items()}
    assert trees == {"pair": 700, "sft": 700, "pair_heldout": 100, "sft_heldout": 100}
    assert {stem: len(rows) for stem, rows in shipped.items()} == {
        "pair": 1529,
        "sft": 1529,
        "pair_heldout": 198,
        "sft_heldout": 198,
    }
    depths = Counter(row["id"].split("_")[1] for row in shipped["pair"] if row["id"].endswith("_1"))
    assert set(depths) == set("12345")


def test_held_out_problems_are_others(shipped):
    def instructions(stem: str) -> set[str]:
        return {row["trajectory"][0]["value"] for row in shipped[stem]}

    assert not instructions("pair") & instructions("pair_heldout")
    assert len(instructions("pair")) == 700


def test_an_incorrect_action_is_expanded_by_the_next_turn(shipped):
    trees = defaultdict(list)
    for row in shipped["pair"] + shipped["pair_heldout"]:
        trees[row["parent_id"]].append(row)
    for parent, rows in trees.items():
        assert [row["id"] for row in rows] == [f"{parent}_{len(rows)}_{n}" for n in range(1, len(rows) + 1)]
        assert rows[0]["trajectory"][0]["value"].startswith(problems.PREAMBLE)
        for row, following in pairwise(rows):
            assert following["trajectory"][:-2] == row["trajectory"]
            assert following["trajectory"][-2] == {"from": "assistant", "value": row["rejected"]}
            assert following["trajectory"][-1]["from"] == "user"


def test_sft_rows_are_the_correct_actions_with_the_history_as_instruction(shipped):
    for suffix in ("", "_heldout"):
        pairs, responses = shipped[f"pair{suffix}"], shipped[f"sft{suffix}"]
        assert len({row["id"] for row in responses}) == len(responses)
        for pair, row in zip(pairs, responses, strict=True):
            assert row["parent_id"] == pair["parent_id"]
            assert row["response"] == pair["chosen"]
            assert row["instruction"] == "\n".join(turn["value"] for turn in pair["trajectory"])
            assert row["id"].split("_")[1:] == pair["id"].split("_")[1:]


# ---- every action was executed, and is right or wrong as said ----


def test_actions_do_what_the_rows_say(shipped):
    """Executes a third of the shipped actions again; the problem is the generator's, by its index."""
    answers = {problem.instruction: problem.answer for problem, _ in islice(forest(0), 250)}
    checked = 0
    with Interpreter() as interpreter:
        for row in shipped["pair"] + shipped["pair_heldout"]:
            answer = answers.get(row["trajectory"][0]["value"])
            if answer is None:
                continue
            assert is_correct(interpreter.run(code_of(row["chosen"])), answer), row["id"]
            assert not is_correct(interpreter.run(code_of(row["rejected"])), answer), row["id"]
            for action, reply in zip(row["trajectory"][1::2], row["trajectory"][2::2], strict=True):
                printed = interpreter.run(code_of(action["value"]))
                assert reply["value"].startswith(f"Out: {printed}\nYour answer is wrong.\n"), row["id"]
            checked += 1
    assert checked > 400


def test_an_independent_reading_of_the_problem_gives_the_same_answer(shipped):
    """The answer of the simplest family is read from its text alone, without the generator's operations."""
    read = 0
    with Interpreter() as interpreter:
        for row in shipped["pair"]:
            text = row["trajectory"][0]["value"].removeprefix(problems.PREAMBLE)
            if row["id"].endswith("_1") and text.startswith("Each of the "):
                price, count, paid = (int(word) for word in text.split() if word.isdigit())
                assert is_correct(interpreter.run(code_of(row["chosen"])), Fraction(paid - price * count))
                read += 1
    assert read > 20


def test_length_does_not_give_the_answer_away(shipped):
    lengths = [(len(row["chosen"]), len(row["rejected"])) for row in shipped["pair"]]
    chosen, rejected = (sum(side) / len(lengths) for side in zip(*lengths, strict=True))
    assert abs(chosen - rejected) < 0.03 * chosen
    longer = sum(c > r for c, r in lengths) + 0.5 * sum(c == r for c, r in lengths)
    assert 0.4 < longer / len(lengths) < 0.6


@pytest.mark.parametrize("mistake", [name for name, _ in actions.MISTAKES])
def test_every_mistake_is_made_and_is_wrong(mistake):
    """Each kind applies to some problem, and nearly always to the result the interpreter sees."""
    dice, made, wrong = Dice(mistake), 0, 0
    with Interpreter() as interpreter:
        while made < 20:
            problem = problems.draw(dice)
            spoiled = actions.spoil(actions.correct(problem, dice), mistake, problem, dice)
            if spoiled is not None:
                made += 1
                wrong += not is_correct(interpreter.run(code_of(spoiled[0].text())), problem.answer)
                assert spoiled[1].endswith(".")
    assert wrong >= 17


# ---- the interpreter ----


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(15 / 2)", "7.5"),
        ("x = 3", ""),
        ("print(1)\nprint(y)", "1\nNameError: name 'y' is not defined"),
        ("print((3", "SyntaxError: '(' was never closed (<action>, line 1)"),
        ('print("3" + 4)', 'TypeError: can only concatenate str (not "int") to str'),
    ],
)
def test_the_interpreter_says_what_python_prints(code, printed):
    with Interpreter() as interpreter:
        assert interpreter.run(code) == printed


def test_the_interpreter_forgets_names_and_survives_a_timeout():
    with Interpreter(timeout_seconds=0.5) as interpreter:
        assert interpreter.run("x = 1") == ""
        assert interpreter.run("print(x)").startswith("NameError")
        with pytest.raises(TimeoutError, match=r"0\.5 s"):
            interpreter.run("while True: pass")
        interpreter.timeout_seconds = 10.0
        assert interpreter.run("print(2)") == "2"


def test_a_number_is_compared_exactly():
    assert is_correct("12.0", Fraction(12))
    assert is_correct("note\n7.5", Fraction(15, 2))
    assert not is_correct("7", Fraction(15, 2))
    assert not is_correct("", Fraction(0))


# ---- the model ----


def test_the_model_is_a_checkpoint_transformers_loads(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<pad>"]
    config, generation = model.config, model.generation_config
    assert generation.eos_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    text = "naïve → 12 apples\n\tx = 3"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_renders_message_by_message(model_folder, shipped):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    row = next(row for row in shipped["pair"] if row["id"].endswith("_5_5"))
    messages = [{"role": turn["from"], "content": turn["value"]} for turn in row["trajectory"]]
    messages.append({"role": "assistant", "content": row["chosen"]})
    texts = [tokenizer.apply_chat_template(messages[:n], tokenize=False) for n in range(1, len(messages) + 1)]
    assert texts[0] == f"<s>[INST] {messages[0]['content']} [/INST]"
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    ids = [tokenizer.apply_chat_template(messages[:n], return_dict=False) for n in (2, len(messages))]
    assert ids[1][: len(ids[0])] == ids[0]
    assert ids[1].count(tokenizer.bos_token_id) == 1
    assert ids[1][-1] == tokenizer.eos_token_id
    assert len(ids[1]) < 700


def test_the_same_seed_makes_the_same_model(model_folder, tmp_path):
    again, other = make(MINI, tmp_path / "again", seed=0), make(MINI, tmp_path / "other", seed=1)
    for file in sorted(model_folder.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    assert (other / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_absent_or_empty_data_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"pair\.jsonl\.gz: no such file"):
        make(tmp_path, tmp_path / "model", seed=0)
    write([], tmp_path / "pair.jsonl.gz")
    with pytest.raises(UserError, match="has no rows"):
        make(tmp_path, tmp_path / "model", seed=0)
    assert not (tmp_path / "model").exists()
