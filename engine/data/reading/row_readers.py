"""Reads rows of every flat format: each reader takes one row and returns its conversations and comparisons.

A reader takes the row's fields by name and the kind of data that is wanted, and raises BadRow for a malformed row. It
looks at one row only; `Parsed.group` says which rows belong to one tree, and `source.py` merges them. The readers of
rows that hold a whole tree are in `tree_readers.py`, and the table of all readers is in `formats.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

from silva.engine.data.reading.messages import (
    BadRow,
    Conversation,
    answer,
    check,
    human_assistant,
    messages,
    prompt,
    quoted,
    root,
    shared_prefix,
    text,
    typename,
)
from silva.engine.data.reading.parsed import Kind, Parsed, answered, best_against_rest, pair, prompt_id

_TREE_ID = re.compile(r"(?P<hash>.+)_(?P<depth>\d+)_(?P<turn>\d+)")


def ultrainteract_sft(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of openbmb/UltraInteract_sft: one correct action, its history already folded into the instruction."""
    instruction = text(row["instruction"], "instruction")
    base = prompt(instruction, "instruction")
    return Parsed(
        text(row["parent_id"], "parent_id"),
        [answered(base, text(row["response"], "response"))],
        instruction=_bare(instruction),
    )


def _bare(instruction: str) -> str:
    """Return an UltraInteract instruction without the history that may be folded into it.

    Every action begins with "Step 1:". Both kinds of rows are cut, so that one instruction has one text in both.
    """
    return re.split(r"\n\s*Step 1:", instruction, maxsplit=1)[0].strip()


def ultrainteract_pair(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of openbmb/UltraInteract_pair: a trajectory that ends with the user, and two actions after it."""
    name = text(row["id"], "id")
    parts = _TREE_ID.fullmatch(name)
    if parts is None:
        raise BadRow("id is not hash_depth_turn", f"found {quoted(name)}")
    depth, turn = int(parts["depth"]), int(parts["turn"])
    trajectory = messages(row["trajectory"], "trajectory")
    if not 1 <= turn <= depth:
        raise BadRow("id names a turn outside its tree", f"turn {turn} of depth {depth} in {quoted(name)}")
    turns = sum(message.role == "user" for message in trajectory)
    if turn != turns:
        raise BadRow(
            "id and trajectory disagree about the turn", f"{quoted(name)} against {turns} user messages"
        )
    parsed = pair(
        text(row["parent_id"], "parent_id"),
        answered(trajectory, text(row["chosen"], "chosen")),
        answered(trajectory, text(row["rejected"], "rejected")),
    )
    parsed.instruction = _bare(next(m.content for m in trajectory if m.role == "user"))
    return parsed


def ultrafeedback(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of openbmb/UltraFeedback: several scored completions of one instruction.

    Every pair that is not a tie is compared. The score is `overall_score` or, without one, the mean of the
    completion's fine-grained ratings.
    """
    base = prompt(row["instruction"], "instruction")
    scored = [
        (answered(base, response), _overall_score(completion, number))
        for number, (completion, response) in enumerate(_completions(row["completions"]), start=1)
    ]
    return best_against_rest(base, scored, "no pair: the completions are ties")


def ultrasafety(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of openbmb/UltraSafety: completions rated harmless (1) or harmful (0); one pair per instruction.

    The pair is the first of the most harmless completions against the first of the least harmless: the paper takes one
    pair and does not say which. The row's `prompt`, the instruction inside a jailbreak, is not read.
    """
    base = prompt(row["instruction"], "instruction")
    scored = []
    for number, (completion, response) in enumerate(_completions(row["completions"]), start=1):
        annotations = completion.get("annotations")
        found = annotations.get("harmlessness") if isinstance(annotations, Mapping) else None
        rating = _rating(found[0] if isinstance(found, list) and found else found)
        if rating is None:
            raise BadRow("a completion has no harmlessness rating", f"number {number}")
        scored.append((response, rating))
    (chosen, best), (rejected, worst) = (pick(scored, key=lambda each: each[1]) for pick in (max, min))
    if best == worst:
        return Parsed(prompt_id(base), [], reason="no pair: the completions are equally harmless")
    return pair(prompt_id(base), answered(base, chosen), answered(base, rejected))


def _completions(value: Any) -> list[tuple[Mapping[str, Any], str]]:
    """Return each completion with its response."""
    if not isinstance(value, list) or not value:
        raise BadRow("completions is not a list of completions", f"found {typename(value)}")
    for number, completion in enumerate(value, start=1):
        if not isinstance(completion, Mapping) or "response" not in completion:
            raise BadRow("a completion has no response", f"number {number}")
    return [(completion, text(completion["response"], "response")) for completion in value]


def _overall_score(completion: Mapping[str, Any], number: int) -> float:
    score = _number(completion.get("overall_score"))
    if score is not None:
        return score
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, Mapping) else ()
    known = [rating for aspect in aspects if (rating := _rating(aspect)) is not None]
    if not known:
        raise BadRow("a completion has neither overall_score nor annotation ratings", f"number {number}")
    return sum(known) / len(known)


def _rating(aspect: Any) -> float | None:
    return _number(aspect.get("Rating")) if isinstance(aspect, Mapping) else None


def _number(value: Any) -> float | None:
    """Return a rating, which comes as a number or as text such as "4" or "N/A"; None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    # NaN gives None as well, because every comparison with it is false
    return number if abs(number) < float("inf") else None


def hh_rlhf(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of Anthropic/hh-rlhf: two whole dialogues as text, whose shared first messages are the prompt."""
    return _whole_pair(human_assistant(row["chosen"], "chosen"), human_assistant(row["rejected"], "rejected"))


def _whole_pair(chosen: Conversation, rejected: Conversation) -> Parsed:
    shared = shared_prefix(chosen, rejected)
    if chosen != rejected and not root(shared):
        raise BadRow("chosen and rejected do not start with the same user message")
    return pair(prompt_id(shared), chosen, rejected)


def preference(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of TRL's preference formats, or of the binarized UltraFeedback.

    The latter repeats the prompt, as messages, in chosen and rejected. A prompt given as text is one user message.
    Without a prompt, chosen and rejected are whole message lists.
    """
    if "prompt" not in row:
        if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
            raise BadRow(
                "the row has no prompt", "it may be absent only where chosen and rejected are message lists"
            )
        return _whole_pair(messages(row["chosen"], "chosen"), messages(row["rejected"], "rejected"))
    base = prompt(row["prompt"], "prompt")
    chosen, rejected = (_continued(base, row[name], name) for name in ("chosen", "rejected"))
    return pair(prompt_id(base), chosen, rejected, len(base))


def _continued(base: Conversation, value: Any, name: str) -> Conversation:
    """Return the prompt followed by an answer; an answer that itself starts with the prompt is returned as it is."""
    tail = answer(value, name)
    if tail[: len(base)] == base:
        return tail
    return (*base, *tail)


def unpaired(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of TRL's KTO format: one completion, and whether it is desirable."""
    base = prompt(row["prompt"], "prompt")
    if row["label"] not in (True, False, 0, 1):
        raise BadRow("label is neither true nor false", f"found {quoted(row['label'])}")
    conversation = check(_continued(base, row["completion"], "completion"), "completion")
    return Parsed(
        prompt_id(base), [conversation], [(0, None) if row["label"] else (None, 0)], given=len(base)
    )


def conversation_messages(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row that is a whole conversation, under `messages` or under ShareGPT's `conversations`."""
    name = "messages" if "messages" in row else "conversations"
    if name not in row:
        raise BadRow(
            "the row has neither messages nor conversations",
            f"it has {', '.join(row) or 'nothing'}; map it with columns: {{messages: <field of the file>}}",
        )
    return Parsed("", [check(messages(row[name], name), name)])


def prompt_completion(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read TRL's prompt and completion, as text or messages."""
    base = prompt(row["prompt"], "prompt")
    conversation = check(_continued(base, row["completion"], "completion"), "completion")
    return Parsed(prompt_id(base), [conversation], given=len(base))


def gsm8k_solutions(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of grade-school-math's example_model_solutions: one question with right or wrong model solutions."""
    base = prompt(row["question"], "question")
    scored = []
    for name, value in row.items():
        if isinstance(value, Mapping) and {"is_correct", "solution"} <= value.keys():
            if not isinstance(value["is_correct"], bool):
                raise BadRow(
                    "is_correct is neither true nor false", f"{name} has {quoted(value['is_correct'])}"
                )
            solution = answered(base, text(value["solution"], "solution"))
            scored.append((solution, float(value["is_correct"])))
    if not scored:
        raise BadRow("the row has no model solution", "a field holding {is_correct, solution} is needed")
    if kind == "comparison":
        return best_against_rest(base, scored, "no pair: the solutions are all correct or all incorrect")
    correct = [solution for solution, is_correct in scored if is_correct]
    return Parsed(prompt_id(base), correct, reason="no correct solution")
