"""Holds what a reader makes of one row, and provides what all readers need to make it."""

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
# chosen, rejected; where one side is None, it is unpaired feedback
Pair = tuple[int | None, int | None]


@dataclass(slots=True)
class Parsed:
    """Holds what one row says.

    Attributes:
        group: id of the tree that the row belongs to, in formats whose rows are grouped.
        conversations: empty for a row that is well formed but has nothing to learn from.
        comparisons: indices into this row's own `conversations`.
        instruction: of the tree, in formats whose prompts may hold more than it; by it a tree is held out or drawn, and
            found in test sets.
        given: messages of the prompt; None: the row does not say where it ends, and sides begin where they part.
        reason: why there are no conversations.
        left_out: counts the parts that are left out of a row that is otherwise used, by `Report` entry.
    """

    group: str
    conversations: list[Conversation]
    comparisons: list[Pair] = field(default_factory=list)
    given: int | None = None
    instruction: str = ""
    reason: str = field(default="", compare=False)
    left_out: Counter[str] = field(default_factory=Counter, compare=False)

    def to_json(self) -> str:
        """Return the row as one line of JSON, without `reason` and `left_out`.

        Of each conversation it stores only what it adds to the one before it.
        """
        told = []
        before: Conversation = ()
        for conversation in self.conversations:
            shared = len(shared_prefix(before, conversation))
            told.append([shared, [_short(message) for message in conversation[shared:]]])
            before = conversation
        return json.dumps(
            [self.group, told, self.comparisons, self.given, self.instruction], ensure_ascii=False
        )

    @classmethod
    def from_json(cls, line: str) -> Parsed:
        """Return the row that `to_json` was called on, without `reason` and `left_out`."""
        group, told, comparisons, given, instruction = json.loads(line)
        pairs = [(chosen, rejected) for chosen, rejected in comparisons]
        parsed = cls(group, [], pairs, given, instruction)
        before: Conversation = ()
        for shared, added in told:
            before = (*before[:shared], *(Message(*each) for each in added))
            parsed.conversations.append(before)
        return parsed


def _short(message: Message) -> list[str | bool]:
    """Return the message's fields without the last ones that have their usual values."""
    if message.train:
        return [message.role, message.content, *([message.extra] if message.extra else [])]
    return list(message)


def prompt_id(conversation: Conversation) -> str:
    """Compute an id of a conversation; the same messages give the same id in any file and any run."""
    digest = hashlib.sha256()
    for message in conversation:
        content = message.content + message.extra
        digest.update(f"{message.role} {len(content)} {content}".encode())
    return digest.hexdigest()[:32]


def pair(group: str, chosen: Conversation, rejected: Conversation, given: int | None = None) -> Parsed:
    """Make a row of one comparison.

    Args:
        group: id of the tree.
        chosen: the better conversation.
        rejected: the worse conversation.
        given: as in `Parsed`.

    Raises:
        BadRow: the two are equal, or one of them does not pass `check`.
    """
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    return Parsed(group, [check(chosen, "chosen"), check(rejected, "rejected")], [(0, 1)], given)


def answered(base: Conversation, response: str) -> Conversation:
    """Return the prompt followed by one assistant message."""
    return (*base, Message("assistant", response))


def best_against_rest(base: Conversation, scored: list[tuple[Conversation, float]], reason: str) -> Parsed:
    """Compare all continuations of one prompt whose scores differ; equal scores are ties, which are never compared.

    Equal continuations whose scores differ are not compared with each other, and counted.

    Args:
        base: the prompt.
        scored: (conversation, score) of each continuation; a higher score is better.
        reason: why there is nothing to learn from, where no scores differ.

    Raises:
        BadRow: a conversation does not pass `check`.
    """
    conversations = [check(conversation, "response") for conversation, _ in scored]
    ranked = [
        (better, worse)
        for better, worse in itertools.permutations(range(len(scored)), 2)
        if scored[better][1] > scored[worse][1]
    ]
    pairs = [(better, worse) for better, worse in ranked if conversations[better] != conversations[worse]]
    parsed = compared(prompt_id(base), pairs, conversations.__getitem__, reason)
    if len(pairs) < len(ranked):
        parsed.reason = "no pair: equal continuations have different scores"
        parsed.left_out["skipped: comparison whose chosen equals rejected"] += len(ranked) - len(pairs)
    return parsed


def compared(
    group: str, pairs: Sequence[tuple[int, int]], conversation: Callable[[int], Conversation], reason: str
) -> Parsed:
    """Make a row of the given pairs and of the conversations they name, each of which is made once.

    Args:
        group: id of the tree.
        pairs: (chosen, rejected), in any numbers that `conversation` knows.
        conversation: returns the conversation of a number.
        reason: why there is nothing to learn from, where there are no pairs.
    """
    used = sorted({side for each in pairs for side in each})
    place = {side: index for index, side in enumerate(used)}
    numbered: list[Pair] = [(place[better], place[worse]) for better, worse in pairs]
    return Parsed(group, [conversation(side) for side in used], numbered, reason=reason)
