"""Reads rows that hold a whole tree: MINT's trajectories, nodes that name their parents, OASST's nested replies.

No reader is recursive, so a tree may have any depth.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from silva.engine.data.reading.messages import (
    BadRow,
    Conversation,
    Message,
    check,
    messages,
    prompt,
    quoted,
    role,
    root,
    text,
    typename,
)
from silva.engine.data.reading.parsed import Kind, Parsed, best_against_rest, compared, prompt_id

NODE_FIELDS = ("id", "parent", "role", "text", "correct", "rank", "score")
# the parent of the root
ROOT = -1


def mint(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read a row of MINT: one task tried by several models, {"prompt", "trajectories": [{"success", "turns"}]}.

    Turns start with the assistant. Every successful trajectory is compared with every unsuccessful one; SFT takes the
    successful ones. A model that answers nothing leaves an empty turn, or no turn at all. A trajectory is cut after
    its last action before that; it is left out if that would cut off the successful action. Both are counted.
    """
    base = prompt(row["prompt"], "prompt")
    tried, left_out = [], Counter[str]()
    for number, trajectory in enumerate(_list(row["trajectories"], "trajectories"), start=1):
        if not isinstance(trajectory, Mapping) or not isinstance(trajectory.get("success"), bool):
            raise BadRow("a trajectory has no success that is true or false", f"number {number}")
        if kind == "sequence" and not trajectory["success"]:
            continue
        turns = messages(trajectory.get("turns"), "turns", blank=True)
        actions = _whole_turns(turns)
        cut = turns[len(actions) :]
        if not actions or (trajectory["success"] and any(turn.role == "assistant" for turn in cut)):
            left_out["skipped: trajectory with an empty turn"] += 1
            continue
        if cut:
            left_out["truncated: trajectory cut after its last action that is not empty"] += 1
        tried.append(((*base, *actions), float(trajectory["success"])))
    if kind == "comparison":
        parsed = best_against_rest(
            base, tried, "no pair: the trajectories are all successful or all unsuccessful"
        )
    else:
        kept = [check(conversation, "trajectory") for conversation, _ in tried]
        parsed = Parsed(prompt_id(base), kept, reason="no successful trajectory")
    parsed.left_out += left_out
    return parsed


def _whole_turns(turns: Conversation) -> Conversation:
    """Return the longest prefix in which assistant and user alternate, nothing is blank and the assistant is last."""
    sound = 0
    for turn in turns:
        if turn.role != ("user" if sound % 2 else "assistant") or not turn.content.strip():
            break
        sound += 1
    return turns[: sound - 1 + sound % 2] if sound else ()


# ---------------------------------------------------------------- nodes


@dataclass(slots=True)
class Node:
    """Holds one text of a tree.

    Attributes:
        parent: index of the parent, or ROOT.
        role: of the speaker.
        text: may be blank.
        correct: verdict on an assistant's text that is not blank; None for all other nodes.
        score: of an assistant's text that is not blank, compared among siblings only; higher is better.
    """

    parent: int
    role: str
    text: str
    correct: bool | None = None
    score: float | None = None


@dataclass(slots=True)
class Tree:
    """Holds the nodes of one tree.

    Attributes:
        nodes: depth-first, siblings in the order in which the row lists them.
        before: what is said before the root.
        left_out: counts what is left out, by `Report` entry.
    """

    nodes: list[Node]
    before: Conversation = ()
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, parent: int, item: Mapping[str, Any], *, usual_role: str | None = None) -> int:
        """Read a node and append it.

        Args:
            parent: index of its parent, or ROOT.
            item: the node's fields.
            usual_role: of a node that names none; None where every node has to name its role.

        Returns:
            The node's index.

        Raises:
            BadRow: the node is malformed.
        """
        if "text" not in item:
            raise BadRow("a node has no text", f"it has {', '.join(item) or 'nothing'}")
        judged = _judgement(item)
        speaker = usual_role if item.get("role") is None else None
        node = Node(
            parent,
            speaker or role(item.get("role"), "a node"),
            text(item.get("text"), "a node's text", blank=True),
        )
        if node.role == "assistant" and node.text.strip():
            node.correct, node.score = judged
        elif node.role == "assistant" and judged != (None, None):
            self.left_out["skipped: judged node without a text"] += 1
        self.nodes.append(node)
        return len(self.nodes) - 1

    def conversation(self, index: int) -> Conversation:
        """Return the path from the root; successive texts of one role are one message, blank texts add nothing."""
        steps = []
        while index != ROOT:
            steps.append(self.nodes[index])
            index = self.nodes[index].parent
        said: list[tuple[Message, list[str]]] = [(message, [message.content]) for message in self.before]
        for node in reversed(steps):
            if node.text.strip() and said and said[-1][0].role == node.role:
                said[-1][1].append(node.text)
            elif node.text.strip():
                said.append((Message(node.role, ""), [node.text]))
        return check(
            tuple(message._replace(content="".join(texts)) for message, texts in said), "path to a node"
        )

    def correctness_pairs(self) -> list[tuple[int, int]]:
        """Pair every correct answer with every incorrect one, unless one lies on the other's path."""
        # the last node of each subtree; nodes lie depth-first, so a subtree is a range
        last = list(range(len(self.nodes)))
        for index in range(len(self.nodes) - 1, 0, -1):
            parent = self.nodes[index].parent
            last[parent] = max(last[parent], last[index])
        correct, incorrect = (
            [index for index, node in enumerate(self.nodes) if node.correct is verdict]
            for verdict in (True, False)
        )
        return [
            (good, bad)
            for good in correct
            for bad in incorrect
            if not (good < bad <= last[good] or bad < good <= last[bad])
        ]

    def sibling_pairs(self) -> list[tuple[int, int]]:
        """Pair every answer with every other answer to the same parent that has a lower score."""
        answers: dict[int, list[tuple[int, float]]] = {}
        for index, node in enumerate(self.nodes):
            if node.score is not None:
                answers.setdefault(node.parent, []).append((index, node.score))
        return [
            (better, worse)
            for siblings in answers.values()
            for better, high in siblings
            for worse, low in siblings
            if high > low
        ]

    def best_ends(self) -> list[int]:
        """Return the last answers of the paths on which no answer has a better sibling."""
        worse = {index for _, index in self.sibling_pairs()}
        kept: list[bool] = []
        for index, node in enumerate(self.nodes):
            kept.append(index not in worse and (node.parent == ROOT or kept[node.parent]))
        answers = [
            kept[index] and node.role == "assistant" and bool(node.text.strip())
            for index, node in enumerate(self.nodes)
        ]
        # whether an answer follows
        below = [False] * len(self.nodes)
        for index in range(len(self.nodes) - 1, 0, -1):
            below[self.nodes[index].parent] |= answers[index] or below[index]
        return [index for index, answer in enumerate(answers) if answer and not below[index]]

    def parsed(self, kind: Kind, named: list[tuple[int, int]] | None = None) -> Parsed:
        """Return what can be learned from the tree.

        Args:
            kind: of the data wanted.
            named: the comparisons to make, as indices of nodes; None makes those that the nodes' judgements give.
        """
        judged = any(node.correct is not None for node in self.nodes)
        if kind == "sequence":
            ends = [index for index, node in enumerate(self.nodes) if node.correct]
            found = [self.conversation(index) for index in (ends if judged else self.best_ends())]
            parsed = Parsed(_group(found), found, reason="no correct answer")
        else:
            pairs = (
                named if named is not None else self.correctness_pairs() if judged else self.sibling_pairs()
            )
            paths: dict[int, Conversation] = {}
            for side in itertools.chain.from_iterable(pairs):
                if side not in paths:
                    paths[side] = self.conversation(side)
            apart = [pair for pair in pairs if paths[pair[0]] != paths[pair[1]]]
            if len(apart) < len(pairs):
                self.left_out["skipped: comparison whose chosen equals rejected"] += len(pairs) - len(apart)
            reason = "no pair: no two answers are judged differently"
            parsed = compared(_group(list(paths.values())), apart, paths.__getitem__, reason)
        parsed.left_out += self.left_out
        return parsed


def _group(conversations: Sequence[Conversation]) -> str:
    return prompt_id(root(conversations[0])) if conversations else ""


def nodes(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read any tree as a list: {"nodes": [{"id", "parent", "role", "text", "correct" | "rank" | "score"}]}.

    The root is the node without `parent`. A node without `role` is the assistant's. The root without `role` is the
    user's, unless the row has a `prompt` (text or messages), which goes before the root. So a path through nodes
    without roles is one answer in steps. Texts are joined as they are.

    If the row has `comparisons`, as [chosen id, rejected id], these answers (nodes of the assistant) are compared. If
    it has none, every correct answer is compared with every incorrect one, unless one lies on the other's path; in
    trees without `correct`, siblings of different `rank` (lower is better) or `score` (higher is better) are compared.
    SFT takes the correct answers; in trees without `correct`, it takes the last answers of the paths on which no
    answer has a better sibling.
    """
    listed = _list(row["nodes"], "nodes")
    tree = Tree([], prompt(row["prompt"], "prompt") if "prompt" in row else ())
    places = _arrange(listed, tree)
    if not tree.before and not tree.nodes[0].text.strip():
        raise BadRow("the tree has no instruction", "neither its root nor a prompt of the row has a text")
    named = None
    if kind == "comparison" and "comparisons" in row:
        named = [_named(each, places) for each in _list(row["comparisons"], "comparisons")]
    return tree.parsed(kind, named)


def _arrange(listed: Sequence[Any], tree: Tree) -> dict[str, int]:
    """Add the nodes to `tree` depth-first.

    Args:
        listed: the nodes of the row.
        tree: without nodes.

    Returns:
        The index in `tree` of each id.

    Raises:
        BadRow: the nodes are not one whole tree, or one of them is malformed.
    """
    for number, item in enumerate(listed, start=1):
        if not isinstance(item, Mapping):
            raise BadRow("a node is not an object", f"number {number} is a {typename(item)}")
    names = [_identifier(item.get("id"), "id") for item in listed]
    known = {name: number for number, name in enumerate(names)}
    if len(known) < len(names):
        raise BadRow("two nodes have the same id", quoted(Counter(names).most_common(1)[0][0]))
    children: dict[str | None, list[int]] = {}
    for number, item in enumerate(listed):
        parent = None if item.get("parent") is None else _identifier(item["parent"], "parent")
        if parent is not None and parent not in known:
            raise BadRow(
                "a node's parent is not in the tree",
                f"{quoted(parent)}, the parent of {quoted(names[number])}",
            )
        children.setdefault(parent, []).append(number)
    roots = children.get(None, [])
    if len(roots) > 1:
        raise BadRow(
            "the tree has more than one root", " and ".join(quoted(names[number]) for number in roots[:2])
        )
    places: dict[str, int] = {}
    waiting = [(number, ROOT) for number in roots]
    while waiting:
        number, parent_place = waiting.pop()
        usual = "user" if parent_place == ROOT and not tree.before else "assistant"
        place = tree.add(parent_place, listed[number], usual_role=usual)
        places[names[number]] = place
        waiting += [(child, place) for child in reversed(children.get(names[number], []))]
    if len(places) < len(names):
        lost = next(name for name in names if name not in places)
        raise BadRow("nodes are their own ancestors", f"{quoted(lost)} is one of them or lies under one")
    return places


def oasst(row: Mapping[str, Any], kind: Kind) -> Parsed:
    """Read one of OASST's nested message trees: {"prompt": {"text", "role", "rank", "deleted", "replies": [...]}}.

    The ranked assistant replies to one message are compared (rank 0 is best); SFT takes the last replies of the paths
    on which each is the best ranked. Deleted messages are left out with everything under them, and counted.
    """
    tree = Tree([])
    waiting: list[tuple[Any, int]] = [(row["prompt"], ROOT)]
    while waiting:
        message, parent = waiting.pop()
        if not isinstance(message, Mapping):
            raise BadRow("a message is not an object", f"found {typename(message)}")
        if message.get("deleted"):
            tree.left_out["skipped: deleted message with its replies"] += 1
            continue
        place = tree.add(parent, message)
        replies = message.get("replies")
        if replies:
            waiting += [(reply, place) for reply in reversed(_list(replies, "replies"))]
    return tree.parsed(kind)


# ---------------------------------------------------------------- fields


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is not a list with entries", f"found {typename(value)}")
    return value


def _identifier(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow(f"a node's {name} is neither text nor a whole number", f"found {quoted(value)}")
    return str(value)


def _judgement(item: Mapping[str, Any]) -> tuple[bool | None, float | None]:
    """Return a node's (correct, score); a rank counts as its negative, because a lower rank is better."""
    correct = item.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise BadRow("a node's correct is neither true nor false", f"found {quoted(correct)}")
    for name, sign in (("rank", -1), ("score", 1)):
        value = item.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
                raise BadRow(f"a node's {name} is not a number", f"found {quoted(value)}")
            return correct, sign * value
    return correct, None


def _named(pair: Any, places: Mapping[str, int]) -> tuple[int, int]:
    """Return the indices of a comparison's (chosen, rejected) nodes."""
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise BadRow("a comparison is not [chosen id, rejected id]", f"found {quoted(pair)}")
    chosen, rejected = (_identifier(each, "id") for each in pair)
    for name in (chosen, rejected):
        if name not in places:
            raise BadRow("a comparison names a node that is not in the tree", quoted(name))
    return places[chosen], places[rejected]
