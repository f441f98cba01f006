"""Synthetic trees of about UltraInteract's shape (arXiv 2404.02078, section 2): deterministic, any number."""

from __future__ import annotations

import numpy as np

from silva.engine.data.chat import TokenSequence
from silva.engine.data.group import TokenGroup

# trees that end after 1 .. 5 turns: most problems are solved at once, the rest mostly run into the limit
DEPTHS = (0.45, 0.18, 0.08, 0.04, 0.25)
INSTRUCTION, ACTION, OBSERVATION = (100, 400), (100, 400), (100, 300)  # tokens, least and most


def ultrainteract_tree(
    random: np.random.Generator, *, vocabulary: int = 32_000, scale: float = 1.0
) -> TokenGroup:
    """One tree: in every turn a correct action, which ends its branch, and an incorrect one, which goes on.

    Each turn gives one comparison of the two root-to-action paths.

    Args:
        scale: of all lengths.
    """

    def text(bounds: tuple[int, int]) -> list[int]:
        length = max(2, round(scale * int(random.integers(*bounds, endpoint=True))))
        return random.integers(3, vocabulary, length).tolist()

    path = [1, *text(INSTRUCTION)]
    sequences: list[TokenSequence] = []
    for _ in range(1 + int(random.choice(len(DEPTHS), p=DEPTHS))):
        for action in (text(ACTION), text(ACTION)):
            scored = np.arange(len(path) + len(action)) >= len(path)
            sequences.append(TokenSequence(np.array([*path, *action], np.int32), scored))
        path = [*path, *action, *text(OBSERVATION)]
    pairs = np.arange(len(sequences)).reshape(-1, 2)
    return TokenGroup.of(sequences, pairs, random.random(len(pairs)) < 0.5)


def ultrainteract(
    trees: int, *, seed: int = 0, vocabulary: int = 32_000, scale: float = 1.0
) -> list[TokenGroup]:
    """Independent trees."""
    random = np.random.default_rng(seed)
    return [ultrainteract_tree(random, vocabulary=vocabulary, scale=scale) for _ in range(trees)]
