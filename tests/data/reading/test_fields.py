"""What a row holds beside prompts and answers: system, tools, calls, weights, parts, and what nothing reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import reading

from silva.engine.data.reading.formats import FORMATS
from silva.engine.data.reading.messages import Message
from silva.engine.data.reading.source import Group
from silva.engine.data.report import Report
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Source

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [{"function": {"name": "add", "arguments": {"a": 2, "b": None}}}]
ANSWERS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(folder, rows, form, *, on_bad_row="refuse", report=None, **options) -> list[Group]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kind: Any = "comparison" if "comparison" in FORMATS[form].kinds else "sequence"
    source = Source(path=str(path), format=form, **options)
    return list(reading.groups(source, kind=kind, on_bad_row=on_bad_row, report=report or Report()))


# one row of every format, and how many conversations it gives
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    "ultrainteract_sft": ({"parent_id": "t", "instruction": "q", "response": "a"}, 1),
    "ultrainteract_pair": (
        {
            "id": "t_1_1",
            "parent_id": "t",
            "trajectory": [{"from": "user", "value": "q"}],
            "chosen": "a",
            "rejected": "b",
        },
        2,
    ),
    "ultrafeedback": (
        {"instruction": "q", "completions": [{"response": x, "overall_score": ord(x)} for x in "ab"]},
        2,
    ),
    "ultrasafety": (
        {
            "instruction": "q",
            "completions": [
                {"response": x, "annotations": {"harmlessness": [{"Rating": r}]}}
                for x, r in [("a", "1"), ("b", "0")]
            ],
        },
        2,
    ),
    "hh_rlhf": ({x: f"\n\nHuman: q\n\nAssistant: {x}" for x in ("chosen", "rejected")}, 2),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, 2),
    "unpaired": ({"prompt": "q", "completion": "a", "label": True}, 1),
    "messages": ({"messages": ANSWERS}, 1),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, 1),
    "gsm8k_solutions": (
        {"question": "q", **{x: {"is_correct": x == "a", "solution": x} for x in "ab"}},
        2,
    ),
    "mint": (
        {
            "prompt": "q",
            "trajectories": [
                {"success": x == "a", "turns": [{"role": "assistant", "content": x}]} for x in "ab"
            ],
        },
        2,
    ),
    "nodes": (
        {
            "nodes": [
                {"id": 0, "text": "q"},
                {"id": 1, "parent": 0, "text": "a", "correct": True},
                {"id": 2, "parent": 0, "text": "b", "correct": False},
            ]
        },
        2,
    ),
    "oasst": (
        {
            "prompt": {
                "text": "q",
                "role": "prompter",
                "replies": [{"text": x, "role": "assistant", "rank": ord(x), "replies": []} for x in "ab"],
            }
        },
        2,
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_takes_a_system_message_and_what_templates_take(tmp_path, form):
    row, count = ROWS[form]
    more = {
        "system": "be kind",
        "tools": json.dumps(TOOLS),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    [plain], [group] = read(tmp_path, [row], form), read(tmp_path, [row | more], form)
    assert len(plain.conversations) == len(group.conversations) == count
    for before, conversation in zip(plain.conversations, group.conversations, strict=True):
        context, system, *rest = conversation
        assert context.role == "context"
        assert json.loads(context.content) == {"tools": TOOLS, "enable_thinking": False}
        assert system == Message("system", "be kind")
        assert tuple(rest) == before
    assert [c.given - 2 for c in group.comparisons] == [c.given for c in plain.comparisons]
    if group.given and form == "prompt_completion":
        assert group.given == [3]
    report = Report()
    read(tmp_path, [row | more | {"source": "web", "score": None}], form, report=report)
    # a format that looks into every field reads this one too
    unread = [] if FORMATS[form].all_fields else ["not read: source: 1 (first: rows.jsonl:1)"]
    assert report.lines() == unread


@pytest.mark.parametrize("form", ["preference", "unpaired", "prompt_completion"])
def test_rows_with_one_prompt_and_other_tools_or_systems_are_other_trees(tmp_path, form):
    row = ROWS[form][0]
    assert len(read(tmp_path, [row, row | {"system": "s"}, row | {"tools": TOOLS}, row], form)) == 3


def test_a_system_field_beside_a_system_message(tmp_path):
    messages = [{"role": "system", "content": "s"}, *ANSWERS]
    [same] = read(tmp_path, [{"messages": messages, "system": "s"}], "messages")
    assert [m.role for m in same.conversations[0]] == ["system", "user", "assistant"]
    [empty] = read(tmp_path, [{"messages": messages, "system": " "}], "messages")
    assert empty.conversations == same.conversations
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the row's system field and its system message differ"
    ):
        read(tmp_path, [{"messages": messages, "system": "t"}], "messages")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": "{"}, "tools is not JSON"),
        ({"tools": {"a": 1}}, "tools is not a list: found dict"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object: found list"),
        ({"system": 3}, "system is not text: found int"),
    ],
)
def test_malformed_fields_of_a_row(tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, [{"messages": ANSWERS} | more], "messages")


def conversation(tmp_path, *messages, **options):
    [group] = read(tmp_path, [{"messages": list(messages)}], "messages", **options)
    return group.conversations[0]


def test_calls_results_and_thoughts_stay_with_their_messages(tmp_path):
    said = conversation(
        tmp_path,
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "think"},
        {"role": "tool", "content": "5", "tool_call_id": "x", "name": "add"},
        {"role": "observation", "content": "6"},
        {"role": "assistant", "content": "five", "tool_calls": []},
    )
    assert [message.role for message in said] == ["user", "assistant", "tool", "tool", "assistant"]
    assert said[1].fields() == {
        "role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "think",
    }  # fmt: skip
    assert said[2].fields() == {"role": "tool", "content": "5", "tool_call_id": "x", "name": "add"}
    assert said[4] == Message("assistant", "five")


def test_messages_that_are_not_trained_on(tmp_path):
    said = conversation(
        tmp_path,
        ANSWERS[0],
        {"role": "assistant", "content": "a", "weight": 0},
        ANSWERS[0],
        {"role": "assistant", "content": "b", "train": False, "weight": 1},
        ANSWERS[0],
        {"role": "assistant", "content": "c", "weight": 1.0},
    )
    assert [message.train for message in said] == [True, False, True, False, True, True]
    with pytest.raises(UserError, match=r"weight is neither 0 nor 1, false nor true: found 0\.5"):
        conversation(tmp_path, ANSWERS[0], {"role": "assistant", "content": "a", "weight": 0.5})


def test_a_content_of_parts_is_their_text(tmp_path):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " this?"}]
    assert (
        conversation(tmp_path, {"role": "user", "content": parts}, ANSWERS[1])[0].content == "What is this?"
    )
    with pytest.raises(UserError, match="content has a part that is not text: part 2 is 'image'"):
        conversation(tmp_path, {"role": "user", "content": [parts[0], {"type": "image"}]}, ANSWERS[1])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": None}, "messages message content is null"),
        ({"role": None, "content": "x"}, "messages message role is null"),
        ({"from": "human", "value": None, "role": None, "content": None}, "content is null"),
        ({"content": "x"}, "has neither role and content nor from and value: it has content"),
        ({"role": "x" * 500, "content": "x"}, r"unknown role: 'x{79}\.\.\. \(500 characters\)"),
    ],
)
def test_null_is_called_null_and_long_values_are_clipped(tmp_path, message, words):
    with pytest.raises(UserError, match=words):
        conversation(tmp_path, message, ANSWERS[1])


def test_keys_of_messages_that_nothing_reads_are_said(tmp_path):
    report = Report()
    answer = {"role": "assistant", "content": "a", "id": 7, "lang": None, "created": "2026"}
    read(tmp_path, [{"messages": [ANSWERS[0], answer]}, {"messages": ANSWERS}], "messages", report=report)
    assert report.lines() == ["not read: messages[].created, messages[].id: 1 (first: rows.jsonl:1)"]


def test_tools_may_follow_the_assistant_only(tmp_path):
    result = {"role": "tool", "content": "5"}
    with pytest.raises(UserError, match="message 1 is from tool, not user"):
        conversation(tmp_path, result, ANSWERS[1])
    with pytest.raises(UserError, match="message 2 is from tool, not assistant"):
        conversation(tmp_path, ANSWERS[0], result, ANSWERS[1])
    with pytest.raises(UserError, match="message 4 is from user, not assistant or tool"):
        conversation(tmp_path, *ANSWERS, result, ANSWERS[0], ANSWERS[1])


def test_a_prompt_may_end_with_a_result(tmp_path):
    prompt = [ANSWERS[0], {"role": "assistant", "tool_calls": CALLS}, {"role": "tool", "content": "5"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "five"}]}
    [group] = read(tmp_path, [row], "prompt_completion")
    assert group.given == [3]
    assert group.conversations[0][1].fields()["content"] is None
