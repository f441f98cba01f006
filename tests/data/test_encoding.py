"""Groups of conversations as trees of tokens: what is scored, what is cut, and everything that is said about it."""

from __future__ import annotations

import json

import pytest
import reading

from benchmarks.fidelity import families
from silva.engine.data.encoding import Encoder, instructions
from silva.engine.data.reading.messages import Message
from silva.engine.data.reading.source import Comparison, Group
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Data, Source


def user(text):
    return Message("user", text)


def assistant(text, **more):
    return Message("assistant", text, json.dumps(more) if more else "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    def load(name):
        return ChatTokenizer.load(str(families.checkpoint(name, tmp_path_factory.mktemp(name))))

    return load


def encode(tokenizer, group, *, score="turns", unit="comparison", **settings):
    source = Source(path="x", format="preference")
    report = Report()
    encoder = Encoder(tokenizer, Data(train=[source], **settings), unit, score)
    return encoder(group, report), report


PAIR = Group(
    "t",
    [
        (user("q"), assistant("one"), user("sure?"), assistant("yes")),
        (user("q"), assistant("two"), user("sure?"), assistant("yes")),
    ],
    [Comparison(0, 1, given=1)],
    "rows.jsonl:1",
)


@pytest.mark.parametrize(("score", "texts"), [
    ("completion", ["one<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"]),
    ("turns", ["one<|im_end|>\n", "yes<|im_end|>\n"]),
    ("last", ["yes<|im_end|>\n"]),
    ("all", ["one<|im_end|>\n", "yes<|im_end|>\n"]),
])  # fmt: skip
def test_what_is_scored(tokenizer, score, texts):
    made = tokenizer("chatml")
    tree, report = encode(made, PAIR, score=score)
    assert not report.counts
    chosen = tree.sequence(int(tree.comparisons[0, 0]))
    runs = tree.runs[tree.run_pointer[tree.comparisons[0, 0]] : tree.run_pointer[tree.comparisons[0, 0] + 1]]
    backend = made._loaded.transformers
    assert [backend.decode(chosen.tokens[a:b]) for a, b in runs.tolist()] == texts


def test_one_conversation_behind_two_prompts_is_two_sequences(tokenizer):
    """Against one partner it parts at its first turn, against another at its second."""
    said = [*PAIR.conversations, (user("q"), assistant("one"), user("sure?"), assistant("no"))]
    group = Group("t", said, [Comparison(0, 1, given=1), Comparison(0, 2, given=3)], "rows.jsonl:1")
    tree, _ = encode(tokenizer("chatml"), group)
    first, second = tree.comparisons[:, 0].tolist()
    assert first != second
    assert tree.sequence(first).tokens.tolist() == tree.sequence(second).tokens.tolist()
    assert tree.sequence(first).scored.sum() > tree.sequence(second).scored.sum() > 0
    same, _ = encode(tokenizer("chatml"), group, score="last")
    assert same.comparisons[0, 0] == same.comparisons[1, 0]


def test_nothing_is_scored_where_rewards_are_read(tokenizer):
    tree, _ = encode(tokenizer("qwen3"), PAIR, score=None)
    assert len(tree.length) == len(tree) == 2
    assert not tree.scored.any()


def test_several_answers_of_a_rewriting_template_are_several_paths(tokenizer):
    tree, _ = encode(tokenizer("qwen3"), PAIR)
    assert (len(tree), len(tree.length)) == (2, 4)
    assert [len(tree.paths_of(k)) for k in range(2)] == [2, 2]


SYSTEM = (Message("system", "s"), user("q"), assistant("a"))


def test_what_a_template_cannot_render_is_a_row_like_any_other(tokenizer):
    group = Group("t", [*PAIR.conversations, SYSTEM], [*PAIR.comparisons, Comparison(0, 2)], "rows.jsonl:7")
    with pytest.raises(UserError, match=r"rows\.jsonl:7: .*System role not supported.*data\.on_bad_row=skip"):
        encode(tokenizer("gemma2"), group)
    tree, report = encode(tokenizer("gemma2"), group, on_bad_row="skip")
    assert len(tree.comparisons) == 1
    assert report.counts == {
        "skipped: conversation that the chat template cannot render": 1,
        "skipped: comparison with a side that was left out": 1,
    }
    alone = Group("t", [SYSTEM], [], "rows.jsonl:7", [0])
    assert encode(tokenizer("gemma2"), alone, unit="sequence", on_bad_row="skip")[0] is None


@pytest.mark.parametrize(
    ("family", "message", "note"),
    [
        ("qwen3", assistant("a", reasoning_content="so"), None),
        (
            "qwen2.5",
            assistant("a", reasoning_content="so"),
            "the chat template writes nothing of reasoning_content",
        ),
        ("chatml", assistant("a", tool_calls=[{}]), "the chat template writes nothing of tool_calls"),
        ("qwen3", assistant("a", name="bob"), "the chat template writes nothing of name"),
        (
            "deepseek-r1-distill",
            assistant("<think>\nso\n</think>\n\na"),
            "the chat template leaves out or changes a part of an answer",
        ),
    ],
)
def test_what_the_template_leaves_out_is_said(tokenizer, family, message, note):
    group = Group("t", [(user("q"), message)], [], "rows.jsonl:3", [1])
    _, report = encode(tokenizer(family), group, unit="sequence")
    notes = [line for line in report.lines() if "generation prompt" not in line]
    assert notes == ([f"noted: {note}: 1 (first: rows.jsonl:3)"] if note else [])


def test_tools_that_a_template_does_not_take_are_said(tokenizer):
    context = Message("context", json.dumps({"tools": [{"name": "add"}], "enable_thinking": False}))
    group = Group("t", [(context, user("q"), assistant("a"))], [], "rows.jsonl:3", [2])
    _, report = encode(tokenizer("zephyr"), group, unit="sequence")
    assert report.lines() == [
        "noted: the chat template writes nothing of enable_thinking: 1 (first: rows.jsonl:3)",
        "noted: the chat template writes nothing of tools: 1 (first: rows.jsonl:3)",
    ]


def test_messages_that_are_not_trained_on_score_nothing(tokenizer):
    muted = (user("q"), assistant("a")._replace(train=False), user("r"), assistant("b"))
    tree, _ = encode(tokenizer("chatml"), Group("t", [muted], [], "x:1", [0]), unit="sequence", score="all")
    full, _ = encode(tokenizer("chatml"), Group("t", [muted], [], "x:1", [0]), unit="sequence", score="last")
    assert tree.scored.tolist() == full.scored.tolist()
    silent = Group("t", [(user("q"), assistant("a")._replace(train=False))], [], "x:1", [0])
    tree, report = encode(tokenizer("chatml"), silent, unit="sequence", score="all")
    assert tree is None
    assert report.lines() == ["skipped: conversation of which no message is to be trained on: 1 (first: x:1)"]


def test_a_path_that_is_too_long(tokenizer):
    """Of a sequence with two paths, the longer one is cut, refused, or takes the sequence along."""
    long = (*PAIR.conversations[0][:2], user("sure? " * 20), assistant("yes"))
    group = Group("t", [long], [], "x:1", [0])
    made = tokenizer("qwen3")
    whole, _ = encode(made, group, unit="sequence", score="all")
    limit = int(whole.length.max()) - 1
    with pytest.raises(
        UserError, match=rf"x:1: a conversation of {limit + 1} tokens is longer than the {limit}"
    ):
        encode(made, group, unit="sequence", score="all", max_length=limit)
    tree, report = encode(made, group, unit="sequence", score="all", max_length=limit, too_long="drop")
    assert tree is None
    assert report.counts == {f"skipped: sequence longer than {limit} tokens": 1}
    tree, report = encode(
        made, group, unit="sequence", score="all", max_length=limit, too_long="truncate_left"
    )
    assert sorted(tree.length.tolist()) == sorted([int(whole.length.min()), limit])
    assert report.counts == {f"truncated: sequence cut to {limit} tokens (truncate_left)": 1}


def test_the_paths_of_one_sequence_have_to_fit_a_row(tokenizer):
    group = Group("t", [PAIR.conversations[0]], [], "x:1", [0])
    made = tokenizer("qwen3")
    whole, _ = encode(made, group, unit="sequence", score="all")
    assert whole.merged_size(range(len(whole.length)))[0] == len(whole.tokens)
    limits = {"row_length": len(whole.tokens) - 1, "unit": "sequence", "score": "all"}
    with pytest.raises(UserError, match=rf"the answers of a conversation take {len(whole.tokens)} tokens"):
        encode(made, group, **limits)
    tree, report = encode(made, group, **limits, too_long="drop")
    assert tree is None
    assert report.counts == {
        f"skipped: conversation whose answers do not fit a row of {limits['row_length']}": 1
    }


FOLDED = "Solve it.\nWhat is 2 + 3?\nStep 1: try.\n```python\n2 + 3\n```\nOut: \nYour answer is wrong."


def test_stages_agree_on_what_the_instruction_is(tmp_path):
    """SFT rows fold the turns before into it; the instruction decides what is held out, drawn or contaminated."""
    bare = "Solve it.\nWhat is 2 + 3?"
    folded = {"id": "t_2_2", "parent_id": "t", "instruction": FOLDED, "response": "Step 1: print it."}
    pair = {
        "id": "t_2_2",
        "parent_id": "t",
        "trajectory": [
            {"from": "user", "value": bare},
            {"from": "assistant", "value": "Step 1: try."},
            {"from": "user", "value": "Your answer is wrong."},
        ],
        "chosen": "Step 1: print it.",
        "rejected": "Step 1: guess.",
    }
    found = []
    for name, row, kind in (("sft", folded, "sequence"), ("pair", pair, "comparison")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        source = Source(path=str(file), format=f"ultrainteract_{name}")
        [group] = reading.groups(source, kind=kind, on_bad_row="refuse", report=Report())
        found.append(instructions(group))
    assert found == [[bare], [bare]]
