"""Readers against rows written out by hand, published data with known counts, every kind of bad input."""

import gzip
import itertools
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import own_inputs
import pytest
import reading
from hypothesis import given
from hypothesis import strategies as st

from silva.engine.data.reading.files import open_rows
from silva.engine.data.reading.formats import FORMATS
from silva.engine.data.reading.messages import Message
from silva.engine.data.reading.parsed import Parsed
from silva.engine.data.reading.source import Comparison, SourceReader
from silva.engine.data.report import Report
from silva.engine.errors import UserError


@dataclass
class Source:
    """Stands in for the recipe's data source."""

    path: str
    format: str
    split: str = "train"
    limit: int | None = None
    absolute: bool = False
    single_turn_pairs: bool = False
    single_turn_seed: int = 0
    single_turn_limit: str = "depth"
    columns: dict[str, str] = field(default_factory=dict)


SEQUENCES = {"ultrainteract_sft", "messages", "prompt_completion"}


def write(folder: Path, rows, name="rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def read(path, form, *, kind=None, on_bad_row="refuse", report=None, **options):
    kind = kind or ("sequence" if form in SEQUENCES else "comparison")
    source = Source(str(path), form, **options)
    return list(reading.groups(source, kind=kind, on_bad_row=on_bad_row, report=report or Report()))


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


# ---- UltraInteract, in the style of the Eurus README ---------------------------------------------

SFT_ROWS = [
    {
        "id": "92a7356beaa7_1_1",
        "parent_id": "535550938ff5",
        "task": "Coding",
        "dataset": "codecontest",
        "instruction": "Write Python code to solve the task.\nMike has a string s.",
        "response": "Step 1: Count the differences.\n```python\ns = input()\n```",
    },
    {
        "id": "647b2e8706cf_1_1",
        "parent_id": "499d250c5852",
        "task": "Math_PoT",
        "dataset": "mathqa",
        "instruction": "Tool available:\n[1] Python interpreter\nwhat is the % change in area ?",
        "response": "Step 1: area = l*w.\n```python\nprint(300)\n```",
    },
    {
        "id": "92a19848da4f_1_1",
        "parent_id": "107cc9147d8c",
        "task": "Logic",
        "dataset": "hotpotqa",
        "instruction": "Which musician or group is from the US, 3OH!3 or Regina Spektor?",
        "response": "Step 3: 3OH!3.\nAnswer:3OH!3",
    },
]
TRAJECTORY = [
    {"from": "user", "value": "Simplify $(-3-2i)-(1+4i)$."},
    {"from": "assistant", "value": "Step 1: distribute.\n```python\n(-3) - (-1) + (-2i) - (-4i)\n```"},
    {"from": "user", "value": "Out: SyntaxError: invalid syntax\nYour answer is wrong."},
    {"from": "assistant", "value": "Step 1: distribute.\n```python\n(-3) - (-1) + (-2j) - (-4j)\n```"},
    {"from": "user", "value": "Out: (-2+2j)\nYour answer is wrong."},
]
PAIR_ROW = {
    "id": "d1f094e0e130_5_3",
    "parent_id": "d1f094e0e130",
    "task": "Math_PoT",
    "dataset": "MATH",
    "trajectory": TRAJECTORY,
    "chosen": "Step 1: Split the expression.\n```python\nprint('-4-6i')\n```",
    "rejected": "Step 1: distribute.\n```python\n-3 - 1 - 2j - 4j\n```",
}


def pair_row(turn, **changes):
    """The row of an earlier turn of PAIR_ROW's tree."""
    count = 2 * turn - 1
    row = {**PAIR_ROW, "id": f"d1f094e0e130_5_{turn}", "trajectory": TRAJECTORY[:count]}
    if count < len(TRAJECTORY):
        row |= {"chosen": f"right at turn {turn}", "rejected": TRAJECTORY[count]["value"]}
    return row | changes


def test_ultrainteract_sft(tmp_path):
    again = {**SFT_ROWS[0], "response": "Another way."}
    groups = read(write(tmp_path, [*SFT_ROWS, again]), "ultrainteract_sft")
    assert [group.id for group in groups] == ["535550938ff5", "499d250c5852", "107cc9147d8c"]
    assert groups[0].conversations == [
        (user(SFT_ROWS[0]["instruction"]), assistant(SFT_ROWS[0]["response"])),
        (user(SFT_ROWS[0]["instruction"]), assistant("Another way.")),
    ]
    assert groups[1].origin == "rows.jsonl:2"
    assert all(not group.comparisons for group in groups)


def test_sft_duplicates_count_twice(tmp_path):
    groups = read(write(tmp_path, [SFT_ROWS[0], SFT_ROWS[0]]), "ultrainteract_sft")
    assert [len(group.conversations) for group in groups] == [2]


def test_ultrainteract_pair(tmp_path):
    (group,) = read(write(tmp_path, [PAIR_ROW]), "ultrainteract_pair", absolute=True)
    history = tuple(Message(item["from"], item["value"]) for item in TRAJECTORY)
    assert group.id == "d1f094e0e130"
    assert group.conversations == [
        (*history, assistant(PAIR_ROW["chosen"])),
        (*history, assistant(PAIR_ROW["rejected"])),
    ]
    assert group.comparisons == [Comparison(0, 1, absolute=True, given=5)]


def test_ultrainteract_rows_of_one_tree_need_not_be_adjacent(tmp_path):
    other = {**pair_row(1), "parent_id": "other", "trajectory": [{"from": "user", "value": "Another task."}]}
    rows = [pair_row(1), other, pair_row(2), pair_row(3)]
    groups = read(write(tmp_path, rows), "ultrainteract_pair")
    assert [(group.id, group.origin) for group in groups] == [
        ("d1f094e0e130", "rows.jsonl:1"),
        ("other", "rows.jsonl:2"),
    ]
    assert len(groups[0].conversations) == 6
    places = [(each.chosen, each.rejected, each.given) for each in groups[0].comparisons]
    assert places == [(0, 1, 1), (2, 3, 3), (4, 5, 5)]


def test_equal_conversations_of_a_tree_are_kept_once(tmp_path):
    rows = [pair_row(1), pair_row(1, rejected="a second wrong answer")]
    (group,) = read(write(tmp_path, rows), "ultrainteract_pair")
    assert len(group.conversations) == 3
    assert group.comparisons == [Comparison(0, 1, given=1), Comparison(0, 2, given=1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": "d1f094e0e130"}, "id is not hash_depth_turn"),
        ({"id": "d1f094e0e130_2_3"}, "turn 3 of depth 2"),
        ({"id": "d1f094e0e130_5_2"}, "against 3 user messages"),
        ({"trajectory": TRAJECTORY[:4]}, "disagree about the turn"),
        ({"trajectory": []}, "trajectory is empty"),
        ({"trajectory": [{"from": "alien", "value": "x"}]}, "unknown role"),
        ({"trajectory": [{"speaker": "user", "text": "x"}]}, "neither role and content nor from and value"),
        ({"trajectory": "text"}, "not a list of messages"),
        ({"rejected": PAIR_ROW["chosen"]}, "chosen equals rejected"),
        ({"chosen": " \n"}, "chosen is empty"),
        ({"chosen": 3}, "chosen is not text"),
        ({"chosen": "\ud800"}, "not valid Unicode"),
    ],
)
def test_malformed_pair_rows(tmp_path, changes, words):
    path = write(tmp_path, [pair_row(1), PAIR_ROW | changes])
    with pytest.raises(UserError, match=words) as caught:
        read(path, "ultrainteract_pair")
    assert "rows.jsonl:2" in str(caught.value)
    assert "\n" not in str(caught.value)
    report = Report()
    groups = read(path, "ultrainteract_pair", on_bad_row="skip", report=report)
    assert [len(group.comparisons) for group in groups] == [1]
    assert sum(reading.judged(report).counts.values()) == 1
    assert list(reading.judged(report).examples.values()) == ["rows.jsonl:2"]


def test_another_root_in_one_tree_is_malformed(tmp_path):
    stranger = pair_row(1, trajectory=[{"from": "user", "value": "Another task."}], rejected="wrong")
    path = write(tmp_path, [pair_row(1), stranger])
    with pytest.raises(UserError, match=r"rows\.jsonl:2.*different instructions.*rows\.jsonl:1"):
        read(path, "ultrainteract_pair")


def test_a_turn_whose_parent_has_no_row_is_used_and_noted(tmp_path):
    """UltraInteract has no row for a turn without a correct action."""
    without_second = [pair_row(3), pair_row(1), pair_row(2, parent_id="other", rejected="x")]
    report = Report()
    groups = read(write(tmp_path, without_second), "ultrainteract_pair", report=report)
    assert [len(group.comparisons) for group in groups] == [2, 1]
    assert reading.judged(report).lines() == [
        "noted: the trajectory continues an action that no row of its tree rejects: 2 (first: rows.jsonl:1)"
    ]
    report = Report()
    read(write(tmp_path, [pair_row(3), pair_row(1), pair_row(2)]), "ultrainteract_pair", report=report)
    assert report.lines() == ["not read: dataset, task: 3 (first: rows.jsonl:1)"]


def test_the_row_of_the_eurus_readme(inputs, tmp_path):
    """A row as its authors print it: turn 3 of 5, alone."""
    page = (inputs / "ultrainteract_readme" / "Eurus_README.md").read_text(encoding="utf-8")
    text = page[page.index("## Preference Learning") :]
    text = text[text.index("{") : text.index("```\n", text.index("{"))]
    text = re.sub(r'(?m)(?<=[",\]{}\[])\s*//.*$', "", text)  # its comments
    row = json.loads(re.sub(r",\s*}", "}", re.sub(r']\s*"chosen"', '],"chosen"', text)), strict=False)
    report = Report()
    (group,) = read(write(tmp_path, [row]), "ultrainteract_pair", report=report)
    assert [len(one) for one in group.conversations] == [6, 6]
    assert group.conversations[0][-1].content == row["chosen"]
    assert [entry[:7] for entry in reading.judged(report).counts] == ["noted: "]


# ---- rows parsed here, merged there --------------------------------------------------------------


def scattered_rows(seed):
    """Rows of several trees in random order, some of them bad in themselves or in their tree."""
    rng = random.Random(seed)
    rows = [
        pair_row(turn)
        | {"parent_id": tree, "trajectory": [{"from": "user", "value": tree}, *TRAJECTORY[1 : 2 * turn - 1]]}
        for tree in "abcdefg"
        for turn in rng.sample([1, 2, 3], rng.randint(1, 3))
    ]
    stranger = pair_row(1, parent_id="a", trajectory=[{"from": "user", "value": "?"}])
    rows += [pair_row(1, id="x"), pair_row(1, chosen=" "), stranger]
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(10))
def test_shards_of_whole_trees_give_the_groups_of_one_reading(tmp_path, seed):
    path = write(tmp_path, scattered_rows(seed))
    source = Source(path, "ultrainteract_pair", absolute=True, single_turn_pairs=True)
    whole = Report()
    expected = list(reading.groups(source, kind="comparison", on_bad_row="skip", report=whole))

    reader = SourceReader(source, "comparison", "skip")
    report, spooled = Report(), []
    for row in open_rows(path, "train"):
        parsed = reader.parse(row, report)
        if parsed is not None:
            line = parsed.to_json().encode()
            assert b"\n" not in line
            assert Parsed.from_json(line.decode()) == parsed
            spooled.append((row.origin, line.decode()))
    found = []
    reports = [report]
    for trees in ("adg", "be", "cf?"):
        reports.append(Report())
        shard = [(origin, Parsed.from_json(line)) for origin, line in spooled]
        shard = [(origin, parsed) for origin, parsed in shard if parsed.group in trees]
        found += reader.groups(shard, reports[-1])
    assert sorted(found, key=lambda group: group.id) == sorted(expected, key=lambda group: group.id)
    random.Random(seed).shuffle(reports)
    merged = Report()
    for part in reports:
        merged.merge(Report.from_json(part.to_json()))
    assert merged.lines() == whole.lines()
    assert sum(merged.counts.values()) >= 3


messages = st.builds(Message, st.sampled_from(["user", "assistant"]), st.text(max_size=5))
conversations = st.lists(st.lists(messages, max_size=4).map(tuple), max_size=5)
sides = st.none() | st.integers(0, 9)


@given(st.text(), conversations, st.lists(st.tuples(sides, sides)))
def test_a_parsed_row_survives_json(group, said, pairs):
    parsed = Parsed(group, said, pairs)
    line = parsed.to_json()
    assert "\n" not in line
    assert Parsed.from_json(line.encode().decode()) == parsed


def test_reports_merge_to_the_same_whole_in_any_order():
    first, second, third = Report(), Report(), Report()
    first.skip("a", "x/train.jsonl:10")
    first.truncate("b", "x/train.jsonl:3")
    second.skip("a", "x/train.jsonl:9")
    second.add("skipped: a", "x/a/z.jsonl:70", 4)
    third.note("c", "hub/name:1")
    for order in itertools.permutations([first, second, third]):
        merged = Report()
        for part in order:
            merged.merge(part)
        assert merged.lines() == [
            "skipped: a: 6 (first: x/a/z.jsonl:70)",
            "noted: c: 1 (first: hub/name:1)",
            "truncated: b: 1 (first: x/train.jsonl:3)",
        ]
    assert Report().lines() == Report.from_json(Report().to_json()).lines() == []


# ---- the other formats ---------------------------------------------------------------------------


def test_ultrafeedback_compares_all_that_are_not_ties(tmp_path):
    completions = [
        {"response": "a", "overall_score": 7.5},
        {"response": "b", "overall_score": "6"},
        {"response": "c", "overall_score": 7.5},
        {
            "response": "d",
            "overall_score": None,
            "annotations": {
                "honesty": {"Rating": "5"},
                "helpfulness": {"Rating": "N/A"},
                "truth": {"Rating": "4"},
            },
        },
    ]
    (group,) = read(write(tmp_path, [{"instruction": "q", "completions": completions}]), "ultrafeedback")
    pairs = {
        tuple(group.conversations[side][-1].content for side in (pair.chosen, pair.rejected))
        for pair in group.comparisons
    }
    assert pairs == {("a", "b"), ("c", "b"), ("a", "d"), ("b", "d"), ("c", "d")}
    assert len(group.comparisons) == 5


def test_ultrafeedback_without_a_pair_is_counted(tmp_path):
    tie = {"instruction": "t", "completions": [{"response": x, "overall_score": 1} for x in "ab"]}
    good = {
        "instruction": "q",
        "completions": [{"response": x, "overall_score": i} for i, x in enumerate("ab")],
    }
    report = Report()
    assert len(read(write(tmp_path, [good, tie]), "ultrafeedback", report=report)) == 1
    assert report.lines() == ["skipped: no pair: the completions are ties: 1 (first: rows.jsonl:2)"]


def test_equal_completions_with_different_scores_lose_only_their_own_pair(tmp_path):
    completions = [
        {"response": response, "overall_score": score} for response, score in [("a", 1), ("a", 2), ("b", 3)]
    ]
    report = Report()
    rows = [{"instruction": "q", "completions": completions}]
    (group,) = read(write(tmp_path, rows), "ultrafeedback", report=report)
    pairs = {
        (group.conversations[each.chosen][-1].content, group.conversations[each.rejected][-1].content)
        for each in group.comparisons
    }
    assert pairs == {("b", "a")}
    assert report.lines() == ["skipped: comparison whose chosen equals rejected: 1 (first: rows.jsonl:1)"]


@pytest.mark.parametrize(
    ("completions", "words"),
    [
        ("x", "not a list"),
        ([], "not a list"),
        ([{"overall_score": 1}], "no response"),
        ([{"response": "a", "overall_score": 10**400}], "neither overall_score nor annotation"),
        (
            [{"response": "a", "annotations": {"x": {"Rating": "N/A"}}}],
            "neither overall_score nor annotation",
        ),
        (
            [{"response": "a", "overall_score": 1}, {"response": "a", "overall_score": 2}],
            "equal continuations have different scores",
        ),
    ],
)
def test_malformed_ultrafeedback(tmp_path, completions, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, [{"instruction": "q", "completions": completions}]), "ultrafeedback")


def safety(*ratings):
    return [
        {
            "response": f"{number}",
            "annotations": {"harmlessness": [{"Rating": rating}], "honesty": {"Rating": "5"}},
        }
        for number, rating in enumerate(ratings)
    ]


def test_ultrasafety_gives_one_pair_for_an_instruction(tmp_path):
    """The data set's own shape: an annotation is a list of one, ratings are text."""
    rows = [
        {"instruction": "q", "prompt": "jailbreak q", "completions": safety("1", "0", "1", "0")},
        {"instruction": "r", "prompt": "jailbreak r", "completions": safety("0", "0")},
        {"instruction": "s", "completions": safety("0", "1")},
    ]
    rows[2]["completions"][0]["annotations"]["harmlessness"] = {"Rating": 0}
    report = Report()
    groups = read(write(tmp_path, rows), "ultrasafety", report=report)
    assert [group.conversations for group in groups] == [
        [(user("q"), assistant("0")), (user("q"), assistant("1"))],
        [(user("s"), assistant("1")), (user("s"), assistant("0"))],
    ]
    assert all(group.comparisons == [Comparison(0, 1, given=1)] for group in groups)
    assert report.lines() == [
        "not read: prompt: 2 (first: rows.jsonl:1)",
        "skipped: no pair: the completions are equally harmless: 1 (first: rows.jsonl:2)",
    ]


@pytest.mark.parametrize(
    ("completions", "words"),
    [
        ("x", "not a list"),
        ([3], "no response: number 1"),
        ([{"response": "a"}], "no harmlessness rating: number 1"),
        (safety("1", "N/A"), "no harmlessness rating: number 2"),
        ([{"response": "a", "annotations": {"harmlessness": []}}], "no harmlessness rating: number 1"),
        ([one | {"response": "a"} for one in safety("1", "0")], "chosen equals rejected"),
    ],
)
def test_malformed_ultrasafety(tmp_path, completions, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, [{"instruction": "q", "completions": completions}]), "ultrasafety")


def test_hh_rlhf(tmp_path):
    start = "\n\nHuman: one?\n\nAssistant: two \n\nHuman: three\nlines"
    rows = [
        {"chosen": start + "\n\nAssistant: good", "rejected": start + "\n\nAssistant: bad"},
        {"chosen": start + "\n\nAssistant: better", "rejected": start + "\n\nAssistant: bad"},
    ]
    (group,) = read(write(tmp_path, rows), "hh_rlhf")
    assert group.conversations[0] == (
        user("one?"),
        assistant("two "),
        user("three\nlines"),
        assistant("good"),
    )
    assert group.comparisons == [Comparison(0, 1, given=3), Comparison(2, 1, given=3)]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("Human: hi", "does not start with"),
        ("\n\nHuman: hi", "chosen does not end with an assistant"),
        ("\n\nHuman: hi\n\nAssistant: ", "Assistant turn is empty"),
        ("\n\nHuman: hi\n\nHuman: hi\n\nAssistant: x", "do not alternate"),
        ("\n\nHuman: other\n\nAssistant: x", "same user message"),
    ],
)
def test_malformed_hh_rlhf(tmp_path, chosen, words):
    row = {"chosen": chosen, "rejected": "\n\nHuman: hi\n\nAssistant: y"}
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, [row]), "hh_rlhf")


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": turns("q"), "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]},
        {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"prompt": None, "chosen": turns("q", "a"), "rejected": turns("q", "b"), "score": 1},
    ],
)
def test_preference_in_each_of_its_shapes(tmp_path, row):
    (group,) = read(write(tmp_path, [row]), "preference")
    assert group.conversations == [(user("q"), assistant("a")), (user("q"), assistant("b"))]
    assert group.comparisons == [Comparison(0, 1, given=1)]


def test_preference_rows_with_one_prompt_are_one_group(tmp_path):
    rows = [
        {"prompt": prompt, "chosen": "a", "rejected": rejected}
        for rejected, prompt in zip("bcd", "pqp", strict=True)
    ]
    groups = read(write(tmp_path, rows), "preference")
    assert [len(group.comparisons) for group in groups] == [2, 1]
    assert len(groups[0].conversations) == 3
    assert groups[0].id == read(write(tmp_path, rows[2:]), "preference")[0].id


def test_multi_turn_preference_with_a_system_message(tmp_path):
    prompt = [SYSTEM, *turns("q", "a", "r")]
    row = {"prompt": prompt, "chosen": turns("", "x")[1:], "rejected": turns("", "y")[1:]}
    (group,) = read(write(tmp_path, [row]), "preference")
    assert [message.role for message in group.conversations[0]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "chosen": "a"}, "no rejected.*it has prompt, chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, ": rejected is null"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": turns("q", "a"), "chosen": "a", "rejected": "b"}, "does not end with a user"),
        ({"prompt": "q", "chosen": turns("z", "a"), "rejected": "b"}, "do not alternate"),
        ({"chosen": turns("q", "a"), "rejected": turns("r", "b")}, "same user message"),
        ({"chosen": turns("q", "a", "r"), "rejected": turns("q", "b")}, "does not end with an assistant"),
    ],
)
def test_malformed_preference(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, [row]), "preference")


def test_unpaired(tmp_path):
    rows = [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": turns("q"), "completion": turns("", "b")[1:], "label": 0},
    ]
    (group,) = read(write(tmp_path, rows), "unpaired")
    assert group.comparisons == [Comparison(0, None, given=1), Comparison(None, 1, given=1)]
    with pytest.raises(UserError, match="label is neither"):
        read(write(tmp_path, [{**rows[0], "label": "yes"}]), "unpaired")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, *turns("q", "a", "r", "b")]},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "r"},
                {"from": "gpt", "value": "b"},
            ]
        },
    ],
)
def test_messages_and_sharegpt(tmp_path, row):
    groups = read(write(tmp_path, [row, row]), "messages")
    expected = (Message("system", "s"), user("q"), assistant("a"), user("r"), assistant("b"))
    assert [group.conversations for group in groups] == [[expected], [expected]]
    assert [group.origin for group in groups] == ["rows.jsonl:1", "rows.jsonl:2"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "neither messages nor conversations"),
        ({"messages": turns("q")}, "does not end with an assistant"),
        ({"messages": turns("q", "a", "r")}, "does not end with an assistant"),
        ({"messages": turns("q", "a")[::-1]}, "message 1 is from assistant, not user"),
        ({"messages": [SYSTEM]}, "does not end with an assistant"),
        ({"messages": [*turns("q"), SYSTEM, *turns("", "a")[1:]]}, "message 2 is from system, not assistant"),
        ({"messages": turns("q", "")}, "content is empty"),
        ({"messages": [3]}, "not an object"),
    ],
)
def test_malformed_messages(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, [row]), "messages")


def test_prompt_completion_with_columns(tmp_path):
    rows = [{"question": "q", "response": answer, "system_prompt": system} for answer, system in ["as", "b "]]
    columns = {"prompt": "question", "completion": "response", "system": "system_prompt"}
    rows[1]["system_prompt"] = ""
    groups = read(write(tmp_path, rows), "prompt_completion", columns=columns)
    assert [group.conversations for group in groups] == [
        [(Message("system", "s"), user("q"), assistant("a"))],
        [(user("q"), assistant("b"))],
    ]


def test_gsm8k_solutions_have_the_published_counts(inputs):
    published = {"both": 731, "pairs": 2429, "questions": 1319, "right": 2001}
    counts = published if inputs.real else own_inputs.GSM8K
    path = inputs / "gsm8k" / "example_model_solutions.jsonl.gz"
    report = Report()
    groups = read(path, "gsm8k_solutions", report=report)
    assert len(groups) == counts["both"]
    assert sum(len(group.comparisons) for group in groups) == counts["pairs"]
    assert sum(report.counts.values()) == counts["questions"] - counts["both"]

    with gzip.open(path, "rt") as lines:
        first = json.loads(next(lines))
    solutions = [value for value in first.values() if isinstance(value, dict)]
    expected = {
        (one["solution"], other["solution"])
        for one, other in itertools.product(solutions, repeat=2)
        if one["is_correct"] and not other["is_correct"]
    }
    found = {
        (groups[0].conversations[pair.chosen][-1].content, groups[0].conversations[pair.rejected][-1].content)
        for pair in groups[0].comparisons
    }
    assert found == expected

    report = Report()
    groups = read(path, "gsm8k_solutions", kind="sequence", report=report)
    assert sum(len(group.conversations) for group in groups) == counts["right"]
    assert len(groups) + report.counts["skipped: no correct solution"] == counts["questions"]


# ---- files ---------------------------------------------------------------------------------------

ROWS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(5)]


def prompts(groups):
    return [group.conversations[0][0].content for group in groups]


def test_every_kind_of_file_gives_the_same_groups(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines.replace(b"\n", b"\n\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    (tmp_path / "d.json").write_bytes(lines)
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    table.to_parquet(str(tmp_path / "f.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder" / "data").mkdir(parents=True)
    write(tmp_path / "folder" / "data", ROWS[:2], "train-00000-of-00002.jsonl")
    write(tmp_path / "folder" / "data", ROWS[2:], "train-00001-of-00002.jsonl")
    write(tmp_path / "folder" / "data", ROWS[:1], "test-00000-of-00001.jsonl")
    for name in [
        "a.jsonl",
        "b.jsonl.gz",
        "c.json",
        "d.json",
        "e.json.gz",
        "f.parquet",
        "saved",
        "splits",
        "folder",
    ]:
        assert prompts(read(tmp_path / name, "preference")) == ["q0", "q1", "q2", "q3", "q4"], name
    for name in ["splits", "folder"]:
        assert prompts(read(tmp_path / name, "preference", split="test")) == ["q0"], name
        with pytest.raises(UserError, match="split"):
            read(tmp_path / name, "preference", split="dev")
    assert prompts(read(tmp_path / "a.jsonl", "preference", limit=2)) == ["q0", "q1"]
    assert read(tmp_path / "a.jsonl", "preference")[1].origin == "a.jsonl:3"
    assert read(tmp_path / "f.parquet", "preference")[1].origin == "f.parquet:2"


def test_rows_stream(tmp_path):
    """The first group is there before a later bad line is met."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns("q", "a")}) + "\n{\n")
    groups = reading.groups(
        Source(str(path), "messages"), kind="sequence", on_bad_row="refuse", report=Report()
    )
    assert next(groups).origin == "rows.jsonl:1"
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the line is not JSON"):
        next(groups)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": ', "the line is not JSON"),
        (b"[1, 2]", "not an object with named fields"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_unreadable_lines(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{words}"):
        read(path, "preference")
    report = Report()
    assert len(read(path, "preference", on_bad_row="skip", report=report)) == 1
    assert len(report.lines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"", "it holds no rows"),
        ("rows.jsonl", b"\n\n", "it holds no rows"),
        ("rows.json", b"[]", "it holds no rows"),
        ("rows.json", b"[{]", "not a JSON list"),
        ("rows.txt", b"x", r"unknown kind of file; use one of \.jsonl"),
        ("rows.jsonl.gz", b"no gzip", "damaged or cut short"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-12], "damaged or cut short"),
        ("rows.parquet", b"PAR1 no", "cannot be read as Parquet"),
    ],
)
def test_unusable_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / name, "preference", on_bad_row="skip")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "absent.jsonl", "preference")
    with pytest.raises(UserError, match="no such file or folder"):
        read("absent.jsonl", "preference")
    with pytest.raises(UserError, match="no file ending in"):
        read(tmp_path, "preference")
    write(tmp_path, ROWS, "train.jsonl")
    write(tmp_path, ROWS, "more.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl is named after a split and more\.jsonl is not"):
        read(tmp_path, "preference")


def test_a_hub_that_does_not_answer(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(name, *, split):
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match="someone/absent: no such file or folder here, and the Hugging Face hub"
    ):
        read("someone/absent", "preference")


def test_a_hub_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def answer(name, *, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    groups = read("someone/data", "preference", split="test")
    assert asked == [("someone/data", "test")]
    assert groups[4].origin == "someone/data:5"


def test_all_rows_skipped_is_an_error_that_says_why(tmp_path):
    path = write(tmp_path, [{"prompt": "q"}, {"prompt": "r"}])
    with pytest.raises(
        UserError, match=r"none of its 2 rows can be used: skipped: the row has no chosen, rejected: 2"
    ):
        read(path, "preference", on_bad_row="skip")


def test_wrong_requests_are_refused_before_any_row_is_read(tmp_path):
    path = write(tmp_path, ROWS)

    def ask(**changes):
        options = {"format": "preference", "kind": "comparison", "columns": {}} | changes
        source = Source(path, options["format"], columns=options["columns"])
        return reading.groups(source, kind=options["kind"], on_bad_row="refuse", report=Report())

    with pytest.raises(UserError, match="unknown format 'csv'; known: ultrainteract_sft, ultrainteract_pair"):
        ask(format="csv")
    with pytest.raises(UserError, match="gives comparisons, this objective needs sequences"):
        ask(kind="sequence")
    with pytest.raises(
        UserError, match="gives sequences without comparisons, this objective needs comparisons"
    ):
        ask(format="messages")
    with pytest.raises(
        UserError, match="columns names question, but format preference reads chosen, rejected, prompt"
    ):
        ask(columns={"question": "prompt"})
    assert set(FORMATS) >= {"hh_rlhf", "unpaired", "messages", "gsm8k_solutions"}
