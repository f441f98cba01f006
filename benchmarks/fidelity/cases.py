"""Lists the comparisons: what is tokenized and what is trained, and what the other side is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.fidelity import families, runs, theirs
from benchmarks.fidelity.families import FAMILIES
from benchmarks.fidelity.runs import Rows, Settings, Tokens
from silva.engine.data.reading.messages import Message
from silva.engine.data.text.chat import ChatTokenizer

THOUGHT = "<think>\nadd them\n</think>\n\n4"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            },
        },
    }
]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]


def user(content: str) -> dict[str, Any]:
    """Return a user message."""
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    """Return an assistant message."""
    return {"role": "assistant", "content": content, **more}


# ---------------------------------------------------------------- text

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("What is 2 + 3?"), assistant("It is 5, because 2 and 3 make 5.")],
    "thoughts": [
        user("2+2?"),
        assistant(THOUGHT),
        user("and 1 more?"),
        assistant("<think>\n\n</think>\n\n5"),
    ],
    "three turns": [
        user("def f(x)?"),
        assistant("def f(x):\n    return x ** 2"),
        user("  Ünïcödé 梦,  and 😀 "),
        assistant("runs   of spaces."),
        user("again"),
        assistant("no"),
    ],
    "tags": [user("call it"), assistant(CALL), user("and now?"), assistant("5 <|im_end|> </s> [/INST] done")],
}
SYSTEM = {"role": "system", "content": "Answer in one word."}
TOOL_TURNS = [
    user("What is 2 + 3?"),
    assistant("", tool_calls=CALLS),
    {"role": "tool", "content": '{"sum": 5}'},
    assistant("It is 5."),
]


def conversations(family: str) -> Iterator[tuple[str, list[dict[str, Any]], list[Any] | None]]:
    """Yield (name, messages, tools) of every conversation that a family's template takes."""
    for name, messages in CONVERSATIONS.items():
        yield name, messages, None
    if FAMILIES[family].system:
        yield "a system message", [SYSTEM, *CONVERSATIONS["three turns"]], None
    if FAMILIES[family].tools:
        yield "tools", TOOL_TURNS, TOOLS


@dataclass(frozen=True)
class Turn:
    """Holds one scored turn, as Silva trains it and as transformers' chat template gives it.

    Attributes:
        name: of family, conversation and turn.
        ours: the path that ends with the turn.
        theirs: the ids of the conversation up to the turn, rendered and tokenized whole; scored behind the ids of the
            prompt with which a server is asked.
    """

    name: str
    ours: Tokens
    theirs: Tokens


def turns(family: str, folder: Path, exported: Path) -> Iterator[Turn]:
    """Yield every scored turn of every conversation of a family.

    Args:
        family: its name.
        folder: of its checkpoint.
        exported: where Silva's tokenizer is written, with the template that readers get.
    """
    tokenizer = ChatTokenizer.load(str(folder))
    tokenizer.save(exported)
    reader = AutoTokenizer.from_pretrained(exported)
    for name, messages, tools in conversations(family):
        context = [Message("context", json.dumps({"tools": tools}))] if tools else []
        said = [Message(m["role"], m["content"], _extra(m)) for m in messages]
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            [ours] = tokenizer.encode((*context, *said[: place + 1]), score="last").paths
            options = {"tokenize": True, "return_dict": False, "tools": tools}
            prompt = reader.apply_chat_template(messages[:place], add_generation_prompt=True, **options)
            whole = reader.apply_chat_template(messages[: place + 1], **options)
            border = _common(prompt, whole)
            yield Turn(
                f"{family}, {name}, message {place + 1}",
                Tokens(tuple(ours.tokens.tolist()), tuple(ours.scored.tolist())),
                Tokens(tuple(whole), tuple(k >= border for k in range(len(whole)))),
            )


def _extra(message: dict[str, Any]) -> str:
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return json.dumps(more) if more else ""


# ---------------------------------------------------------------- training

QUESTIONS = [
    ("What is 2 + 3?", "It is 5.", "It is 6, because 2 and 3 make 6."),
    ("def f(x)?", "return x ** 2", "return x"),
    ("2+2?", THOUGHT, "three"),
    ("ducks", "16 eggs per day.", "three eggs for breakfast, and runs   of spaces."),
]
PAIRS = [
    {"prompt": [user(q)], "chosen": [assistant(good)], "rejected": [assistant(bad)]}
    for q, good, bad in QUESTIONS
]
IMPLICIT = [{side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")} for row in PAIRS]
JUDGED = [
    {"prompt": [user(q)], "completion": [assistant(good if k % 2 else bad)], "label": bool(k % 2)}
    for k, (q, good, bad) in enumerate(QUESTIONS)
]
COMPLETIONS = [{"prompt": [user(q)], "completion": [assistant(good)]} for q, good, _ in QUESTIONS]
# the sides part at their first answer, and end with the same one
FOUR_TURNS = [
    {
        "chosen": [user(q), assistant(good), user("Are you sure?"), assistant("Yes, I am.")],
        "rejected": [user(q), assistant(bad), user("Are you sure?"), assistant("Yes, I am.")],
    }
    for q, good, bad in QUESTIONS
]
TEXT_PAIRS = [{"prompt": q + "\n", "chosen": good, "rejected": bad} for q, good, bad in QUESTIONS]
TEXT_COMPLETIONS = [{"prompt": q + "\n", "completion": good} for q, good, _ in QUESTIONS]
TEXT_JUDGED = [
    {"prompt": q + "\n", "completion": good if k % 2 else bad, "label": bool(k % 2)}
    for k, (q, good, bad) in enumerate(QUESTIONS)
]
WITH_SYSTEM = [{**row, "prompt": [SYSTEM, *row["prompt"]]} for row in PAIRS]
SYSTEM_COLUMN = [{**row, "system": SYSTEM["content"]} for row in PAIRS]
CALLING = [
    {
        "prompt": TOOL_TURNS[:1],
        "completion": [assistant("", tool_calls=CALLS)],
        "tools": json.dumps(TOOLS),
    },
    {"prompt": TOOL_TURNS[:3], "completion": TOOL_TURNS[3:], "tools": json.dumps(TOOLS)},
]
TAGGED = [{"prompt": [user("call it")], "completion": [assistant(CALL)]}, *COMPLETIONS[:1]]
REASONED = [
    {"prompt": [user(q)], "completion": [assistant(good, reasoning_content="add them")]}
    for q, good, _ in QUESTIONS
]


@dataclass(frozen=True)
class Case:
    """Describes a run of Silva.

    Attributes:
        name: of the case.
        family: whose checkpoint is trained.
        objective: of the recipe.
        form: the format of our rows.
        rows: as Silva reads them.
    """

    name: str
    family: str
    objective: str
    form: str
    rows: Rows


@dataclass(frozen=True)
class Training(Case):
    """Describes a run of both sides over the same rows.

    Attributes:
        theirs: as TRL reads them; None: the same.
        settings: of both.
        sections: further keys of our recipe.
    """

    theirs: Rows | None = None
    settings: Settings = field(default_factory=Settings)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)


def _matrix() -> Iterator[Training]:
    """Yield every family with every format, and every objective with one family."""
    formats: list[tuple[str, str, str, Rows]] = [
        ("sft", "prompt_completion", "prompt and completion", COMPLETIONS),
        ("dpo", "preference", "prompt, chosen, rejected", PAIRS),
        ("dpo", "preference", "chosen and rejected whole", IMPLICIT),
        ("kto", "unpaired", "judged completions", JUDGED),
        ("bt", "preference", "prompt, chosen, rejected", PAIRS),
    ]
    for family, described in FAMILIES.items():
        for objective, form, name, rows in formats:
            # TRL takes the EOS for padding where there is no other token, and reads the reward in front of it
            if family != "eurus" and not (objective == "bt" and described.pad in (None, described.eos)):
                yield Training(f"{family}, {objective}, {name}", family, objective, form, rows)
    for objective in ("ipo", "hinge", "nca"):
        yield Training(f"chatml, {objective}", "chatml", objective, "preference", PAIRS)


def _examples() -> Iterator[Training]:
    """Yield the inputs of public bug reports."""
    plain = {"tokenizer": {"chat_template": "none"}}
    yield Training("an answer with <tool_call>", "qwen2.5", "sft", "prompt_completion", TAGGED)
    yield Training("sides that part early", "chatml", "dpo", "preference", FOUR_TURNS)
    yield Training("tools and tool_calls", "qwen2.5", "sft", "prompt_completion", CALLING)
    yield Training("tools and tool_calls", "qwen3", "sft", "prompt_completion", CALLING)
    yield Training("reasoning_content", "qwen3", "sft", "prompt_completion", REASONED)
    yield Training("a system column", "zephyr", "dpo", "preference", SYSTEM_COLUMN, WITH_SYSTEM)
    for family in ("llama2", "qwen2.5"):
        for objective, form, rows in (
            ("dpo", "preference", TEXT_PAIRS),
            ("sft", "prompt_completion", TEXT_COMPLETIONS),
            ("kto", "unpaired", TEXT_JUDGED),
            *([("bt", "preference", TEXT_PAIRS)] if FAMILIES[family].pad else []),
        ):
            yield Training(f"text, {family}, {objective}", family, objective, form, rows, sections=plain)


def trainings() -> list[Training]:
    """Return all runs that are compared."""
    return [*_examples(), *_matrix()]


# ---------------------------------------------------------------- answers that TRL has no form for


@dataclass(frozen=True)
class Answers(Case):
    """Describes a run of "sft" or "dpo" whose first loss transformers gives, each scored answer by a pass of its own.

    Attributes:
        answers: of each sequence (chosen and rejected in turns), the conversations that end with a scored answer.
        sections: further keys of our recipe.
    """

    answers: Sequence[Sequence[Sequence[dict[str, Any]]]]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)


def answered() -> list[Answers]:
    """Return all runs whose peer is transformers itself."""
    chats = [list(CONVERSATIONS[name]) for name in ("three turns", "thoughts")]
    with_system = [[SYSTEM, *chat] for chat in chats]
    rewriting = ("qwen3", "deepseek-r1-distill", "phi3", "mistral-v0.1", "mistral-v0.3", "llama2", "eurus")
    found = []
    for family in rewriting:
        talk = with_system if FAMILIES[family].system else chats
        found.append(
            Answers(
                f"{family}, every turn of a conversation", family, "sft", "messages",
                [{"messages": each} for each in talk],
                [[each[: k + 1] for k, m in enumerate(each) if m["role"] == "assistant"] for each in talk],
            )
        )  # fmt: skip
        found.append(
            Answers(
                f"{family}, turns behind the parting", family, "dpo", "preference", FOUR_TURNS,
                [[row[side][:2], row[side]] for row in FOUR_TURNS for side in ("chosen", "rejected")],
                {"data": {"score": "turns"}},
            )
        )  # fmt: skip
    found.append(
        Answers(
            "the last turn alone", "chatml", "dpo", "preference", FOUR_TURNS,
            [[row[side]] for row in FOUR_TURNS for side in ("chosen", "rejected")],
            {"data": {"score": "last"}},
        )
    )  # fmt: skip
    muted = [[chat[0], {**chat[1], "weight": 0}, *chat[2:]] for chat in chats]
    found.append(
        Answers(
            "weight: 0", "chatml", "sft", "messages", [{"messages": chat} for chat in muted],
            [[c[: k + 1] for k, m in enumerate(c) if m["role"] == "assistant" and k != 1] for c in chats],
        )
    )  # fmt: skip
    return found


def _answers(case: Answers, folder: Path) -> list[list[Tokens]]:
    """Return the ids that transformers gives for every scored answer."""
    reader = AutoTokenizer.from_pretrained(folder)
    options = {"tokenize": True, "return_dict": False}
    found = []
    for sequence in case.answers:
        paths = []
        for said in sequence:
            whole = reader.apply_chat_template(list(said), **options)
            prompt = reader.apply_chat_template(list(said[:-1]), add_generation_prompt=True, **options)
            border = _common(prompt, whole)
            paths.append(Tokens(tuple(whole), tuple(k >= border for k in range(len(whole)))))
        found.append(paths)
    return found


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the ids that both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(left), len(right)))


def answer(case: Answers, work: Path) -> Measured:
    """Run a case and compare its first loss, and the exported model's, with transformers'.

    Args:
        case: what is run.
        work: an empty folder.
    """
    folder = families.checkpoint(case.family, work / "model")
    reference = families.checkpoint(case.family, work / "reference", seed=1)
    settings = Settings(reference=reference if case.objective == "dpo" else None)
    mine = runs.run(
        case.objective, case.rows, folder, settings, work / "silva", form=case.form, sections=case.sections
    )
    exported = work / "silva" / "run" / "export"
    # the exported tokenizer has the template that readers get
    sequences = _answers(case, exported)

    def loss(place: Path) -> float:
        if case.objective == "sft":
            return theirs.sft_loss(place, sequences)
        return theirs.dpo_loss(place, reference, sequences, settings.beta)

    peer = loss(folder)
    scored = [sum(sum(p.scored) for paths in run for p in paths) for run in (mine.tokens, sequences)]
    return Measured(
        ours=mine.losses[0],
        theirs=peer,
        tokens=abs(scored[0] - scored[1]),
        losses=abs(mine.losses[0] - peer),
        weights=0.0,
        export=abs(mine.after["loss"] - loss(exported)),
    )


# ---------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Measured:
    """Holds what a comparison found.

    Attributes:
        ours: our loss of the first step.
        theirs: theirs.
        tokens: ids, or marks of scored ids, that differ.
        losses: the largest difference of a step's loss.
        weights: the largest difference of a weight after the last step.
        export: difference between our validation loss of the trained model and transformers' loss of the exported one;
            None where it is not computed.
    """

    ours: float
    theirs: float
    tokens: int
    losses: float
    weights: float
    export: float | None


def train(case: Training, work: Path) -> Measured:
    """Run both sides of a case and compare them.

    Args:
        case: what is run.
        work: an empty folder.
    """
    rewards = case.objective == "bt"
    folder = families.checkpoint(case.family, work / "model", rewards=rewards)
    needs_reference = case.objective not in ("sft", "bt")
    reference = families.checkpoint(case.family, work / "reference", seed=1) if needs_reference else None
    settings = Settings(**{**vars(case.settings), "reference": reference})
    peer = theirs.run(case.objective, case.theirs or case.rows, folder, settings)
    mine = runs.run(
        case.objective, case.rows, folder, settings, work / "silva", form=case.form, sections=case.sections
    )
    export = None
    exported = work / "silva" / "run" / "export"
    if case.objective == "sft":
        export = abs(theirs.sft_loss(exported, peer.tokens) - mine.after["loss"])
    elif case.objective == "dpo" and reference is not None:
        export = abs(theirs.dpo_loss(exported, reference, peer.tokens, settings.beta) - mine.after["loss"])
    elif rewards:
        found = theirs.rewards(exported, [paths[0].ids for paths in peer.tokens], padded="right")
        export = abs(sum(found[::2]) / len(found[::2]) - mine.after["reward_chosen"])
    return Measured(
        ours=mine.losses[0],
        theirs=peer.losses[0],
        tokens=mismatched(mine.tokens, peer.tokens, scored=not rewards),
        losses=max(abs(a - b) for a, b in zip(mine.losses, peer.losses, strict=True)),
        weights=max(float((mine.weights[name] - peer.weights[name]).abs().max()) for name in mine.weights),
        export=export,
    )


def mismatched(
    ours: Sequence[Sequence[Tokens]], others: Sequence[Sequence[Tokens]], *, scored: bool = True
) -> int:
    """Count the ids that differ, and the ids of which only one side is scored; a missing id differs."""
    count = 0
    for mine, peer in zip(ours, others, strict=True):
        for a, b in zip(mine, peer, strict=True):
            count += sum(x != y for x, y in zip(a.ids, b.ids, strict=False)) + abs(len(a.ids) - len(b.ids))
            if scored:
                count += sum(x != y for x, y in zip(a.scored, b.scored, strict=False))
    return count
