"""One reader per row format: a row in, its conversations and comparisons out.

A reader looks at one row only; `Parsed.group` says which rows belong to one tree, `formats.py` merges them.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from silva.engine.data.messages import (
    BadRow,
    Conversation,
    Message,
    answer,
    check,
    human_assistant,
    messages,
    prompt,
    root,
    shared_prefix,
    text,
)

Kind = Literal["sequence", "comparison"]
_TREE_ID = re.compile(r"(?P<hash>.+)_(?P<depth>\d+)_(?P<turn>\d+)")


@dataclass(slots=True)
class Parsed:
    """What one row says. `comparisons` hold indices into this row's own `conversations`.

    An empty list of conversations is a well-formed row with nothing to learn from; `reason` then says why.
    """

    group: str
    conversations: list[Conversation]
    comparisons: list[tuple[int | None, int | None]] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """A reader, the kinds of data it gives, the fields a row must and may have, whether rows are grouped."""

    parse: Callable[[Mapping[str, Any], Kind], Parsed]
    kinds: tuple[Kind, ...]
    needs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    grouped: bool = True


def _prompt_id(conversation: Conversation) -> str:
    """The same messages give the same id in any file and any run."""
    digest = hashlib.sha256()
    for role, content in conversation:
        digest.update(f"{role} {len(content)} {content}".encode())
    return digest.hexdigest()[:32]


def _pair(group: str, chosen: Conversation, rejected: Conversation) -> Parsed:
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    return Parsed(group, [check(chosen, "chosen"), check(rejected, "rejected")], [(0, 1)])


def _best_against_rest(base: Conversation, scored: list[tuple[str, float]], reason: str) -> Parsed:
    """All pairs of answers to one prompt whose scores differ; equal scores are ties, never compared."""
    conversations = [check((*base, Message("assistant", response)), "response") for response, _ in scored]
    pairs = [
        (better, worse)
        for better, worse in itertools.permutations(range(len(scored)), 2)
        if scored[better][1] > scored[worse][1]
    ]
    for better, worse in pairs:
        if conversations[better] == conversations[worse]:
            raise BadRow(
                "chosen equals rejected", f"responses {better + 1} and {worse + 1} differ in score only"
            )
    if not pairs:
        return Parsed(_prompt_id(base), [], reason=reason)
    used = sorted({side for pair in pairs for side in pair})
    place = {side: index for index, side in enumerate(used)}
    return Parsed(
        _prompt_id(base),
        [conversations[side] for side in used],
        [(place[better], place[worse]) for better, worse in pairs],
    )


def ultrainteract_sft(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """openbmb/UltraInteract_sft: one correct action, its history already folded into the instruction."""
    conversation = (
        Message("user", text(row["instruction"], "instruction")),
        Message("assistant", text(row["response"], "response")),
    )
    return Parsed(text(row["parent_id"], "parent_id"), [conversation])


def ultrainteract_pair(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """openbmb/UltraInteract_pair: a trajectory that ends with the user, and two actions that follow it."""
    name = text(row["id"], "id")
    parts = _TREE_ID.fullmatch(name)
    if parts is None:
        raise BadRow("id is not hash_depth_turn", f"found {name!r}")
    depth, turn = int(parts["depth"]), int(parts["turn"])
    trajectory = messages(row["trajectory"], "trajectory")
    if not 1 <= turn <= depth:
        raise BadRow("id names a turn outside its tree", f"turn {turn} of depth {depth} in {name!r}")
    turns = sum(message.role == "user" for message in trajectory)
    if turn != turns:
        raise BadRow("id and trajectory disagree about the turn", f"{name!r} against {turns} user messages")
    return _pair(
        text(row["parent_id"], "parent_id"),
        (*trajectory, Message("assistant", text(row["chosen"], "chosen"))),
        (*trajectory, Message("assistant", text(row["rejected"], "rejected"))),
    )


def ultrafeedback(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """openbmb/UltraFeedback: several scored completions of one instruction; every pair that is not a tie.

    The score is `overall_score` or, without one, the mean of the completion's fine-grained ratings.
    """
    base = prompt(row["instruction"], "instruction")
    completions = row["completions"]
    if isinstance(completions, str) or not isinstance(completions, list) or not completions:
        raise BadRow("completions is not a list of completions", f"found {type(completions).__name__}")
    scored = [_scored(completion, number) for number, completion in enumerate(completions, start=1)]
    return _best_against_rest(base, scored, "no pair: the completions are ties")


def _scored(completion: Any, number: int) -> tuple[str, float]:
    if not isinstance(completion, Mapping) or "response" not in completion:
        raise BadRow("a completion has no response", f"number {number}")
    response = text(completion["response"], "response")
    score = _number(completion.get("overall_score"))
    if score is None:
        annotations = completion.get("annotations")
        aspects = annotations.values() if isinstance(annotations, Mapping) else ()
        ratings = [_number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, Mapping)]
        known = [rating for rating in ratings if rating is not None]
        if not known:
            raise BadRow("a completion has neither overall_score nor annotation ratings", f"number {number}")
        score = sum(known) / len(known)
    return response, score


def _number(value: Any) -> float | None:
    """Ratings come as numbers or as text such as "4" or "N/A"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None  # NaN compares false


def hh_rlhf(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Anthropic/hh-rlhf: two whole dialogues as text; their shared first messages are the prompt."""
    return _whole_pair(human_assistant(row["chosen"], "chosen"), human_assistant(row["rejected"], "rejected"))


def _whole_pair(chosen: Conversation, rejected: Conversation) -> Parsed:
    shared = shared_prefix(chosen, rejected)
    if chosen != rejected and not root(shared):
        raise BadRow("chosen and rejected do not start with the same user message")
    return _pair(_prompt_id(shared), chosen, rejected)


def preference(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """TRL's preference formats; also the binarized UltraFeedback, whose sides repeat the prompt as messages.

    A prompt given as text is one user message. Without a prompt, chosen and rejected are whole message lists.
    """
    if "prompt" not in row:
        if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
            raise BadRow(
                "the row has no prompt", "it may be absent only where chosen and rejected are message lists"
            )
        return _whole_pair(messages(row["chosen"], "chosen"), messages(row["rejected"], "rejected"))
    base = prompt(row["prompt"], "prompt")
    chosen, rejected = (_continued(base, row[name], name) for name in ("chosen", "rejected"))
    return _pair(_prompt_id(base), chosen, rejected)


def _continued(base: Conversation, value: Any, name: str) -> Conversation:
    """The prompt followed by an answer; an answer that itself starts with the prompt is already the whole."""
    tail = answer(value, name)
    if tail[: len(base)] == base:
        return tail
    return (*base, *tail)


def unpaired(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """TRL's KTO format: one completion and whether it is desirable."""
    base = prompt(row["prompt"], "prompt")
    if row["label"] not in (True, False, 0, 1):
        raise BadRow("label is neither true nor false", f"found {row['label']!r}")
    conversation = check(_continued(base, row["completion"], "completion"), "completion")
    return Parsed(_prompt_id(base), [conversation], [(0, None) if row["label"] else (None, 0)])


def conversation_messages(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Whole conversations under `messages`, or under ShareGPT's `conversations`."""
    name = "messages" if "messages" in row else "conversations"
    if name not in row:
        raise BadRow(
            "the row has neither messages nor conversations",
            f"it has {', '.join(row) or 'nothing'}; map it with columns: {{messages: <field of the file>}}",
        )
    return Parsed("", [check(messages(row[name], name), name)])


def prompt_completion(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """TRL's prompt and completion, as text or messages; an optional `system` goes first, as in OpenOrca."""
    base = prompt(row["prompt"], "prompt")
    if row.get("system"):
        base = (Message("system", text(row["system"], "system")), *base)
    conversation = check(_continued(base, row["completion"], "completion"), "completion")
    return Parsed(_prompt_id(base), [conversation])


def gsm8k_solutions(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """grade-school-math's example_model_solutions: one question solved by several models, right or wrong."""
    base = prompt(row["question"], "question")
    scored = []
    for name, value in row.items():
        if isinstance(value, Mapping) and {"is_correct", "solution"} <= value.keys():
            if not isinstance(value["is_correct"], bool):
                raise BadRow("is_correct is neither true nor false", f"{name} has {value['is_correct']!r}")
            scored.append((text(value["solution"], "solution"), float(value["is_correct"])))
    if not scored:
        raise BadRow("the row has no model solution", "a field holding {is_correct, solution} is needed")
    if kind == "comparison":
        return _best_against_rest(base, scored, "no pair: the solutions are all correct or all incorrect")
    correct = [(*base, Message("assistant", solution)) for solution, is_correct in scored if is_correct]
    return Parsed(_prompt_id(base), correct, reason="no correct solution")


FORMATS: dict[str, Format] = {
    "ultrainteract_sft": Format(ultrainteract_sft, ("sequence",), ("parent_id", "instruction", "response")),
    "ultrainteract_pair": Format(
        ultrainteract_pair, ("comparison",), ("id", "parent_id", "trajectory", "chosen", "rejected")
    ),
    "ultrafeedback": Format(ultrafeedback, ("comparison",), ("instruction", "completions")),
    "hh_rlhf": Format(hh_rlhf, ("comparison",), ("chosen", "rejected")),
    "preference": Format(preference, ("comparison",), ("chosen", "rejected"), ("prompt",)),
    "unpaired": Format(unpaired, ("comparison",), ("prompt", "completion", "label")),
    "messages": Format(
        conversation_messages, ("sequence",), (), ("messages", "conversations"), grouped=False
    ),
    "prompt_completion": Format(prompt_completion, ("sequence",), ("prompt", "completion"), ("system",)),
    "gsm8k_solutions": Format(gsm8k_solutions, ("sequence", "comparison"), ("question",)),
}
