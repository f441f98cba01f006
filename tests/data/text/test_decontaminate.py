"""Decontamination against brute force on random texts, hostile test sets, and GSM8K's own questions."""

import gzip
import json
import random

import pytest
import reading
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fidelity import families
from silva.engine.data import pipeline
from silva.engine.data.dataset import prepare
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.text.decontaminate import Decontaminator, SourceWords
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Data, Decontaminate, EvaluationSet, Source


def write(folder, questions, name="test.jsonl", field="question"):
    path = folder / name
    path.write_text("".join(json.dumps({field: each}) + "\n" for each in questions), encoding="utf-8")
    return str(path)


def built(*paths, fields=("question",), **settings):
    against = [EvaluationSet(path=str(path), fields=list(fields)) for path in paths]
    return Decontaminator(Decontaminate(against=against, **settings))


def text(rng, most, known=("a", "B", "c1", "dé")):
    """Few different words, so that they meet again; cases and marks vary."""
    words = [rng.choice(known) for _ in range(rng.randint(1, most))]
    return "".join(word + rng.choice([" ", ", ", "\n", "-", "? "]) for word in words)


def plain(said):
    return said.casefold().replace(",", " ").replace("-", " ").replace("?", " ").split()


@pytest.mark.parametrize("ngram", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(10))
def test_shared_ngrams(tmp_path, seed, ngram):
    rng = random.Random(seed)
    known = ("a", "B") if ngram == 8 else ("a", "B", "c1", "dé")
    tests = {f"{n}.jsonl": [text(rng, 16, known) for _ in range(4)] for n in range(2)}
    paths = [write(tmp_path, questions, name) for name, questions in tests.items()]
    decontaminator = built(*paths, ngram=ngram, boilerplate=1)

    def grams(words):
        if len(words) < ngram:
            return [tuple(words)]
        return [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]

    hits = 0
    for _ in range(100):
        instruction = text(rng, 14, known)
        expected = None
        for gram in grams(plain(instruction)):
            owners = [
                path
                for path, questions in zip(paths, tests.values(), strict=True)
                if any(gram in grams(plain(question)) for question in questions)
            ]
            if owners:
                expected = (owners[0], " ".join(gram))
                break
        found = decontaminator.match(instruction)
        assert found == expected
        hits += found is not None
    assert hits


@pytest.mark.parametrize("seed", range(10))
def test_held_texts(tmp_path, seed):
    rng = random.Random(seed)
    questions = [text(rng, 5) for _ in range(4)]
    decontaminator = built(write(tmp_path, questions), mode="substring")

    def folded(said):
        return " ".join(said.casefold().split())

    hits = 0
    for _ in range(100):
        instruction = text(rng, 20)
        found = decontaminator.match(instruction)
        assert (found is not None) == any(folded(question) in folded(instruction) for question in questions)
        if found:
            assert found.text in folded(instruction)
            assert found.text in map(folded, questions)
        hits += found is not None
    assert 0 < hits < 100


def test_texts_shorter_than_the_ngram_match_as_a_whole(tmp_path):
    decontaminator = built(
        write(tmp_path, ["What is 2 + 2?", "one two three four five six seven eight nine"])
    )
    assert decontaminator.match("what is 2+2").text == "what is 2 2"
    assert decontaminator.match("Please say: what is 2 + 2? Think first.") is None
    assert decontaminator.match("one two three") is None  # a piece of a longer test text
    assert decontaminator.match("two three four five six seven eight nine").text.startswith("two")
    assert decontaminator.match("!?") is None


def test_scripts_without_spaces_are_read_by_character(tmp_path):
    decontaminator = built(write(tmp_path, ["小明有五个苹果, 他吃了两个."]))
    assert decontaminator.match("问题: 小明有五个苹果他又买了").text == "小 明 有 五 个 苹 果 他"
    assert decontaminator.match("小红有五个苹果") is None


def test_spellings_of_one_letter_are_one(tmp_path):
    decontaminator = built(write(tmp_path, ["\ufb01ve naïve \uff11\uff12 straße x y z w"]))
    assert decontaminator.match("FIVE NAI\u0308VE 12 STRASSE X Y Z W")


@given(st.text(max_size=40), st.text(max_size=80))
def test_any_text_is_compared_without_failing(tmp_path_factory, question, instruction):
    path = write(tmp_path_factory.mktemp("any"), [question + " word"])
    for mode in ("ngram", "substring"):
        decontaminator = built(path, mode=mode)
        decontaminator.match(instruction)
        assert decontaminator.match(question + " word") is not None


def test_the_fields_of_a_row_are_one_text(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([{"Body": "Ann has two red apples.", "Question": "How many apples?"}]))
    decontaminator = built(path, fields=["Body", "Question"])
    assert decontaminator.match("Ann has two red apples. How many apples?").name == str(path)
    assert decontaminator.match("Ann has two red pears. How many apples?") is None


def test_the_fingerprint_tells_texts_and_settings_apart(tmp_path):
    one, other = write(tmp_path, ["a b"], "1.jsonl"), write(tmp_path, ["a b"], "2.jsonl")
    prints = [
        built(one).fingerprint,
        built(other).fingerprint,
        built(one, other).fingerprint,
        built(one, ngram=3).fingerprint,
        built(one, mode="substring").fingerprint,
    ]
    write(tmp_path, ["a c"], "1.jsonl")
    prints.append(built(one).fingerprint)
    assert len(set(prints)) == len(prints)
    assert built(one).fingerprint == prints[-1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "test.jsonl holds no rows"),
        ('{"question": "a"}\n{"q": "b"}\n', "test.jsonl:2: no words under field question; it has q;"),
        ('{"question": 3}\n', "no words under field question; found 3;"),
        ('{"question": null}\n', "no words under field question"),
        ('{"question": " .. "}\n', "no words under field question; found ' .. '"),
        ("{broken\n", "test.jsonl:1: the line is not JSON"),
        ("[1]\n", "test.jsonl:1: the row is not an object"),
    ],
)
def test_a_test_set_that_says_nothing_is_refused(tmp_path, content, words):
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"^data\.decontaminate: ") as caught:
        built(tmp_path / "test.jsonl")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_test_set_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        built(tmp_path / "absent.jsonl")


def test_gsm8k_questions(inputs):
    """Every group made from the test questions is found; of the training questions the few that share 8 words."""
    folder = inputs / "gsm8k"
    decontaminator = built(folder / "test.jsonl.gz")
    source = Source(path=str(folder / "example_model_solutions.jsonl.gz"), format="gsm8k_solutions")
    groups = reading.groups(source, kind="comparison", on_bad_row="refuse", report=Report())
    assert all(decontaminator.match(group.conversations[0][0].content) for group in groups)

    def grams(question):
        words = "".join(letter if letter.isalnum() else " " for letter in question.casefold()).split()
        return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}

    with gzip.open(folder / "test.jsonl.gz", "rt") as lines:
        test = set().union(*(grams(json.loads(line)["question"]) for line in lines))
    with gzip.open(folder / "train.jsonl.gz", "rt") as lines:
        training = [json.loads(line)["question"] for line in lines]
    found = [decontaminator.match(question) is not None for question in training]
    assert found == [not grams(question).isdisjoint(test) for question in training]
    assert 0 < sum(found) < len(training) / 10


OPENING = "Solve the following math problem step by step"


def test_what_a_sources_prompts_have_in_common_is_no_match(tmp_path):
    """The opening is in one test text too; a test question among the instructions is still found."""
    question = "Janet sells ducks at nine in the morning, every day but Sunday, and wants to know why."
    test = write(
        tmp_path, [f"{OPENING}:\n{question}", "What is seven times eight, and what is nine times eight?"]
    )
    decontaminator = built(test)
    rest = [f"{number} apples and {number + 1} pears cost {number + 2} coins" for number in range(20)]
    instructions = [f"{OPENING}.\n{each}" for each in rest] + [f"{OPENING}.\n{question}"]
    assert all(decontaminator.match(each) for each in instructions)
    words = SourceWords(decontaminator)
    for each in instructions:
        words.add(each)
    hashes, common = words.boilerplate()
    assert common == [(OPENING.casefold(), 21, 21)]
    found = [decontaminator.match(each, hashes) for each in instructions]
    assert found[:-1] == [None] * 20
    assert found[-1] is not None
    assert found[-1].text.startswith("the following math problem step by step janet")


def test_what_a_test_sets_texts_have_in_common_is_no_match(tmp_path):
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    questions = [f"{OPENING}: how many {each} are there in {each} boxes of {each}?" for each in numbers]
    decontaminator = built(write(tmp_path, questions))
    assert [common for _, common in decontaminator.boilerplate] == [
        (f"{OPENING} how many".casefold(), 10, 10)
    ]
    assert decontaminator.match(f"{OPENING}: 2 + 2") is None
    assert decontaminator.match(questions[3]) is not None
    assert built(write(tmp_path, questions), boilerplate=1).match(f"{OPENING}: 2 + 2") is not None


@pytest.mark.parametrize(
    ("texts", "limit"), [(5, 5), (10, 5), (30, 10), (100, 11), (1000, 20), (80_000, 810)]
)
def test_a_test_question_in_a_few_other_words_is_no_boilerplate(texts, limit, tmp_path):
    decontaminator = built(write(tmp_path, [OPENING]))
    for count, expected in ((limit - 1, False), (limit, True)):
        words = SourceWords(decontaminator)
        for number in range(texts):
            words.add(OPENING if number < count else "something else")
        assert bool(words.boilerplate()[0]) == expected


def test_boilerplate_is_named_and_its_rows_are_kept(tmp_path):
    rows = [{"prompt": f"{OPENING}:\n{number} and {number}?", "completion": "yes"} for number in range(12)]
    found, left_out = kept(tmp_path, rows, [f"{OPENING}: what else is there to be found?"])
    assert found == 12
    [line] = left_out
    assert line.startswith(
        f"noted: taken for boilerplate and not for a test text: '{OPENING.casefold()}', in "
    )
    assert line.endswith(
        "rows.jsonl, of 12 instructions in: 12 (first: " + str(tmp_path / "rows.jsonl") + ")"
    )


def kept(folder, rows, questions):
    """How many rows a run would train on, and what is said of the others."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    against = [{"path": write(folder, questions), "fields": ["question"]}]
    settings = Data.model_validate(
        {"train": [{"path": str(file), "format": "prompt_completion"}], "decontaminate": {"against": against}}
    )
    tokenizer = ChatTokenizer.load(str(families.checkpoint("chatml", folder / "model")))
    data, [cache] = prepare(
        settings.train, tokenizer, settings, unit="sequence", cache=folder / "cache", seed=0
    )
    return data.sequences, pipeline.report(cache).lines()
