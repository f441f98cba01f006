"""Makes a reward model's extra pairs: actions of different turns of an UltraInteract tree, as single-turn answers."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from silva.engine.data.reading.messages import Conversation, root
from silva.engine.data.reading.parsed import answered

# an instruction is augmented only if its N x N is at most this
MOST_COMBINATIONS = 10
# pairs made for one instruction
MOST_PAIRS = 9
# pairs that one action may occur in
MOST_USES = 3


# what N is: the number of turns, or the numbers of different correct and incorrect actions
Limit = Literal["depth", "actions"]


def single_turn_pairs(
    pairs: Sequence[tuple[Conversation, Conversation]], seed: int, limit: Limit = "depth"
) -> list[tuple[Conversation, Conversation]]:
    """Pair correct actions with incorrect actions of other turns, each as an answer to the instruction itself.

    Eurus, arXiv 2404.02078, appendix B: "we scale up the pairs by matching every correct action for each instruction
    with one incorrect action of other turns. This leads to NxN pairs of single-turn actions for a trajectory of depth
    N. We remove the action pairs consisting of nodes at the same turn [...] we only select instructions with
    NxN <= 10, and [...] randomly sample at most 9 pairs with each action occurring no more than 3 times."

    This is read as follows: N is the turn of the deepest pair, so instructions of up to 3 turns are augmented (with
    `limit` "actions": those whose different correct actions times their different incorrect ones are at most 10, which
    is the same unless a turn has several pairs). Pairs are drawn from all combinations except those of two actions seen
    at the same turn. The draw depends only on the texts and the seed, not on the order of rows.

    By the paper's Table 1, 12,199 trees have 2 turns and 4,756 have 3. If every turn had one pair, they would give
    2 x 12,199 + 6 x 4,756 = 52,934 single-turn pairs. The paper's total of 240K is not reached by any reading of these
    sentences that we know of.

    Args:
        pairs: (chosen, rejected) trajectories of one instruction; an action is the last message of one.
        seed: of the draw.
        limit: what N is.

    Returns:
        (chosen, rejected) conversations of instruction and action.
    """
    if not pairs:
        return []
    instruction = root(pairs[0][0])
    # for correct and for incorrect actions: the lengths of the trajectories that end with each action
    turns: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})
    for pair in pairs:
        for actions, trajectory in zip(turns, pair, strict=True):
            actions.setdefault(trajectory[-1].content, set()).add(len(trajectory))
    correct, incorrect = turns
    depth = max(sum(message.role == "user" for message in chosen) for chosen, _ in pairs)
    if (depth**2 if limit == "depth" else len(correct) * len(incorrect)) > MOST_COMBINATIONS:
        return []
    candidates = [
        (good, bad)
        for good, bad in itertools.product(correct, incorrect)
        if good != bad and not correct[good] & incorrect[bad]
    ]
    uses: Counter[tuple[str, str]] = Counter()
    drawn: list[tuple[Conversation, Conversation]] = []
    for good, bad in sorted(candidates, key=lambda texts: _draw(seed, instruction, texts)):
        both = ("correct", good), ("incorrect", bad)
        if len(drawn) < MOST_PAIRS and all(uses[action] < MOST_USES for action in both):
            uses.update(both)
            drawn.append((answered(instruction, good), answered(instruction, bad)))
    return drawn


def _draw(seed: int, instruction: Conversation, texts: tuple[str, str]) -> bytes:
    whole = repr((seed, [(message.role, message.content) for message in instruction], texts))
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()
