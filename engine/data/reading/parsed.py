"""What a reader makes of one row, and what every reader needs to make it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from silva.engine.data.reading.messages import BadRow, Conversation, Message, check, shared_prefix

Kind = Literal["sequence", "comparison"]
Pair = tuple[int | None, int | None]  # chosen, rejected; one side None is unpaired feedback


@dataclass(slots=True)
class Parsed:
    """What one row says. `comparisons` hold indices into this row's own `conversations`.

    An empty list of conversations is a well-formed row with nothing to learn from; `reason` then says why.
    `left_out` counts the parts of a row that is otherwise used, by `Report` entry.
    """

    group: str
    conversations: list[Conversation]
    comparisons: list[Pair] = field(default_factory=list)
    reason: str = field(default="", compare=False)
    left_out: Counter[str] = field(default_factory=Counter, compare=False)

    def to_json(self) -> str:
        """One line; a conversation holds what it adds to the one before. `reason` and `left_out` are not kept."""
        told = []
        before: Conversation = ()
        for conversation in self.conversations:
            shared = len(shared_prefix(before, conversation))
            told.append([shared, conversation[shared:]])
            before = conversation
        return json.dumps([self.group, told, self.comparisons], ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Parsed:
        """The row `to_json` was called on."""
        group, told, comparisons = json.loads(line)
        parsed = cls(group, [], [(chosen, rejected) for chosen, rejected in comparisons])
        before: Conversation = ()
        for shared, added in told:
            before = (*before[:shared], *(Message(role, content) for role, content in added))
            parsed.conversations.append(before)
        return parsed


def prompt_id(conversation: Conversation) -> str:
    """The same messages give the same id in any file and any run."""
    digest = hashlib.sha256()
    for role, content in conversation:
        digest.update(f"{role} {len(content)} {content}".encode())
    return digest.hexdigest()[:32]


def pair(group: str, chosen: Conversation, rejected: Conversation) -> Parsed:
    """One comparison; raises BadRow where the two are equal or no conversations."""
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    return Parsed(group, [check(chosen, "chosen"), check(rejected, "rejected")], [(0, 1)])


def answered(base: Conversation, response: str) -> Conversation:
    """The prompt and one assistant message."""
    return (*base, Message("assistant", response))


def best_against_rest(base: Conversation, scored: list[tuple[Conversation, float]], reason: str) -> Parsed:
    """All pairs of continuations of one prompt whose scores differ; equal scores are ties, never compared."""
    pairs = [
        (better, worse)
        for better, worse in itertools.permutations(range(len(scored)), 2)
        if scored[better][1] > scored[worse][1]
    ]
    for better, worse in pairs:
        if scored[better][0] == scored[worse][0]:
            raise BadRow(
                "chosen equals rejected", f"responses {better + 1} and {worse + 1} differ in score only"
            )
    conversations = [check(conversation, "response") for conversation, _ in scored]
    return compared(prompt_id(base), pairs, conversations.__getitem__, reason)


def compared(
    group: str, pairs: Sequence[tuple[int, int]], conversation: Callable[[int], Conversation], reason: str
) -> Parsed:
    """The pairs of one row and the conversations they name, each made once."""
    used = sorted({side for each in pairs for side in each})
    place = {side: index for index, side in enumerate(used)}
    numbered: list[Pair] = [(place[better], place[worse]) for better, worse in pairs]
    return Parsed(group, [conversation(side) for side in used], numbered, reason)
