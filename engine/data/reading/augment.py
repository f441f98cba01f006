"""The reward model's extra pairs: actions of different turns of an UltraInteract tree, as single-turn answers."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence

from silva.engine.data.reading.messages import Conversation, root
from silva.engine.data.reading.parsed import answered

MOST_COMBINATIONS = 10  # correct times incorrect actions of an instruction that is augmented at all
MOST_PAIRS = 9  # of one instruction
MOST_USES = 3  # of one action


def single_turn_pairs(
    pairs: Sequence[tuple[Conversation, Conversation]], seed: int
) -> list[tuple[Conversation, Conversation]]:
    """Correct actions against incorrect actions of other turns, each as an answer to the instruction itself.

    Eurus, arXiv 2404.02078, appendix B: "we scale up the pairs by matching every correct action for each instruction
    with one incorrect action of other turns. This leads to NxN pairs of single-turn actions for a trajectory of depth
    N. We remove the action pairs consisting of nodes at the same turn [...] we only select instructions with
    NxN <= 10, and [...] randomly sample at most 9 pairs with each action occurring no more than 3 times."

    Read so: NxN is the number of different correct times different incorrect actions of the instruction (which is
    N squared for one trajectory of depth N); an instruction with more than 10 gets none. All combinations are drawn
    from but those of two actions seen at the same turn. The draw depends on the texts and the seed alone, not on the
    order of rows. The paper's count of 240K cannot be checked here.

    Args:
        pairs: (chosen, rejected) trajectories of one instruction; an action is a last message.

    Returns:
        (chosen, rejected) conversations of instruction and action.
    """
    if not pairs:
        return []
    instruction = root(pairs[0][0])
    turns: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})  # action -> lengths of its trajectories
    for pair in pairs:
        for actions, trajectory in zip(turns, pair, strict=True):
            actions.setdefault(trajectory[-1].content, set()).add(len(trajectory))
    correct, incorrect = turns
    if len(correct) * len(incorrect) > MOST_COMBINATIONS:
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
    whole = repr((seed, [tuple(message) for message in instruction], texts))
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()
