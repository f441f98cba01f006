"""Radix merge: the sequences of one group become one depth-first tree in which a shared token stands once.

S tokens of the tree, N sequences, L scored positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.chat import TokenSequence

Ints = NDArray[np.int32]


@dataclass(slots=True)
class Tree:
    """One merged group; indices are relative to the tree's first token.

    Sequences keep the order they were given in; equal sequences are stored once and still count each.
    """

    tokens: Ints  # (S,)
    position: Ints  # (S,) depth of the token
    subtree_end: Ints  # (S,) one past the last token of the subtree under this token
    source: Ints  # (L,) the token whose hidden state predicts the scored token
    target: Ints  # (L,) the scored token's id
    span: Ints  # (L,) rising; a span is a run of scored tokens that the same sequences run through
    span_pointer: Ints  # (N + 1,) CSR over sequences
    span_index: Ints  # (span_pointer[-1],)
    last: Ints  # (N,) index of each sequence's last token
    unrolled: int  # tokens of all sequences, each alone
    scored: Ints  # (N,) scored tokens of each sequence

    def __len__(self) -> int:
        return len(self.tokens)


def _depth_first_order(sequences: Sequence[TokenSequence]) -> tuple[list[int], list[int]]:
    """Order in which sequences are laid out, and how many tokens each shares with its predecessor.

    In lexicographic order every shared prefix is shared by neighbours, so appending what each sequence adds
    to its predecessor *is* the depth-first layout of the radix tree.
    """
    # big-endian bytes compare as the token ids do, and Python compares bytes in C
    keys = [s.tokens.astype(">u4").tobytes() for s in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = [0]
    for before, after in itertools.pairwise(order):
        a, b = sequences[before].tokens, sequences[after].tokens
        n = min(len(a), len(b))
        differs = a[:n] != b[:n]
        shared.append(int(differs.argmax()) if differs.any() else n)
    return order, shared


def merged_size(sequences: Sequence[TokenSequence]) -> int:
    """Tokens of the tree that `merge` would build."""
    order, shared = _depth_first_order(sequences)
    return sum(len(sequences[k].tokens) - n for k, n in zip(order, shared, strict=True))


def merge(sequences: Sequence[TokenSequence]) -> Tree:
    """Merge sequences token by token into one radix tree, laid out depth-first.

    Two sequences share a token iff all tokens up to it are equal. Whether a token is scored belongs to the
    sequence, not to the token: an action can be one sequence's response and another's history.
    """
    order, shared = _depth_first_order(sequences)
    size = sum(len(sequences[k].tokens) - n for k, n in zip(order, shared, strict=True))
    tokens, position, parent, end = (np.zeros(size, np.int32) for _ in range(4))
    scored = np.zeros(size, bool)
    starts_run = np.zeros(size, bool)
    paths: list[Ints] = [np.zeros(0, np.int32)] * len(sequences)
    placed, previous = 0, np.zeros(0, np.int32)
    for k, n in zip(order, shared, strict=True):
        sequence = sequences[k]
        added = len(sequence.tokens) - n
        path = np.concatenate([previous[:n], np.arange(placed, placed + added, dtype=np.int32)])
        tokens[path[n:]] = sequence.tokens[n:]
        position[path[n:]] = np.arange(n, n + added)
        parent[path[1:]] = path[:-1]
        # a radix node begins where a sequence leaves its predecessor, on both branches
        starts_run[path[n : n + 1]] = True
        starts_run[previous[n : n + 1]] = True
        # within a node, a run of scored tokens ends where any sequence's scoring changes
        starts_run[path[1:][sequence.scored[1:] != sequence.scored[:-1]]] = True
        scored[path] |= sequence.scored
        placed += added
        end[path] = placed  # later sequences through the same token move its end on
        paths[k] = previous = path

    run = np.cumsum(starts_run, dtype=np.int32) - 1
    positions = np.flatnonzero(scored).astype(np.int32)
    runs, span = np.unique(run[positions], return_inverse=True)
    spans = [np.unique(run[path[s.scored]]) for path, s in zip(paths, sequences, strict=True)]
    return Tree(
        tokens=tokens,
        position=position,
        subtree_end=end,
        source=parent[positions],
        target=tokens[positions],
        span=span.astype(np.int32),
        span_pointer=np.cumsum([0, *map(len, spans)], dtype=np.int32),
        span_index=np.searchsorted(runs, np.concatenate([*spans, np.zeros(0, np.int32)])).astype(np.int32),
        last=np.array([path[-1] for path in paths], np.int32),
        unrolled=sum(len(s.tokens) for s in sequences),
        scored=np.array([int(s.scored.sum()) for s in sequences], np.int32),
    )
