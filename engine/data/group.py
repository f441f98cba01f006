"""One tree's tokenized sequences, front-coded: each stores only what it adds to its predecessor.

In lexicographic order every shared prefix is shared by neighbours. So the added tokens, one sequence after the
other, *are* the tokens of the merged tree, and the shared lengths alone tell how large the tree of any subset of
the sequences is: two sequences share the minimum of the shared lengths between them.

N sequences, U tokens of the merged tree, R runs of scored tokens, P comparisons.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.chat import TokenSequence

ABSENT = -1  # a comparison's missing side: unpaired feedback
Ints = NDArray[np.int32]


def instruction_digest(instruction: str) -> bytes:
    """What a group is held out or drawn by: 16 bytes that depend on the first user message alone."""
    return hashlib.blake2b(instruction.encode(), digest_size=16).digest()


@dataclass(slots=True)
class TokenGroup:
    """The sequences of one tree, sorted by their tokens, and what is compared among them.

    Equal sequences are stored each (the second adds nothing) and count each.
    """

    tokens: Ints  # (U,) what sequence 0 holds, what sequence 1 adds to it, ...
    length: Ints  # (N,) tokens of each sequence
    shared: Ints  # (N,) tokens each shares with its predecessor; 0 for the first
    run_pointer: Ints  # (N + 1,) CSR over sequences into `runs`
    runs: Ints  # (R, 2) [start, stop) of the scored tokens of each sequence, rising and apart
    comparisons: Ints  # (P, 2) (chosen, rejected) sequences, -1: absent; P = 0 for SFT
    absolute: NDArray[np.bool_]  # (P,) whether the comparison also gets L_DR
    instruction: bytes = b""  # of `instruction_digest`
    first_sequence: int = 0  # number of sequence 0 in the data set
    first_comparison: int = 0

    @classmethod
    def of(
        cls,
        sequences: Sequence[TokenSequence],
        comparisons: Sequence[tuple[int, int]] | NDArray = (),
        absolute: Sequence[bool] | NDArray = (),
        instruction: bytes = b"",
    ) -> TokenGroup:
        """Sort and front-code `sequences`; `comparisons` are renumbered accordingly."""
        order, shared = front_code([s.tokens for s in sequences])
        place = np.empty(len(order) + 1, np.int32)
        place[order] = np.arange(len(order))
        place[ABSENT] = ABSENT
        runs = [_runs(sequences[k].scored) for k in order]
        return cls(
            tokens=np.concatenate(
                [
                    np.zeros(0, np.int32),
                    *(sequences[k].tokens[n:] for k, n in zip(order, shared, strict=True)),
                ]
            ),
            length=np.array([len(sequences[k].tokens) for k in order], np.int32),
            shared=np.array(shared, np.int32),
            run_pointer=np.cumsum([0, *map(len, runs)], dtype=np.int32),
            runs=np.concatenate([np.zeros((0, 2), np.int32), *runs]),
            comparisons=place[np.asarray(comparisons, np.int32).reshape(-1, 2)],
            absolute=np.asarray(absolute, bool),
            instruction=instruction,
        )

    def __len__(self) -> int:
        return len(self.length)

    def sequence(self, k: int) -> TokenSequence:
        """Sequence `k` as it was before front-coding."""
        ends = np.cumsum(self.length - self.shared)
        found = np.empty(self.length[k], np.int32)
        missing = int(self.length[k])  # tokens [0, missing) are still to be found
        for j in range(k, -1, -1):
            start = int(self.shared[j])
            if start < missing:
                begin = int(ends[j] - (self.length[j] - start))
                found[start:missing] = self.tokens[begin : begin + missing - start]
                missing = start
        scored = np.zeros(self.length[k], bool)
        for start, stop in self.runs[self.run_pointer[k] : self.run_pointer[k + 1]]:
            scored[start:stop] = True
        return TokenSequence(found, scored)

    def sequences(self) -> list[TokenSequence]:
        """All sequences, in the group's order."""
        return [self.sequence(k) for k in range(len(self))]

    def common(self, members: Sequence[int] | NDArray) -> Ints:
        """(len(members),) tokens each of `members` (rising) shares with the member before it; 0 for the first."""
        members = np.asarray(members, np.int64)
        if len(members) < 2:
            return np.zeros(len(members), np.int32)
        # minimum of `shared` over (previous member, member]
        bounds = members[:-1] + 1
        least = np.minimum.reduceat(self.shared[: members[-1] + 1], bounds)
        return np.append(np.int32(0), least).astype(np.int32)

    def merged_size(self, members: Sequence[int] | NDArray) -> int:
        """Tokens of the tree of `members` (rising, without repetition)."""
        members = np.asarray(members, np.int64)
        return int(self.length[members].sum() - self.common(members).sum())


def front_code(sequences: Sequence[Ints]) -> tuple[list[int], list[int]]:
    """The lexicographic order of token arrays, and how many tokens each shares with its predecessor in it."""
    # big-endian bytes compare as the token ids do, and Python compares bytes in C
    keys = [tokens.astype(">u4").tobytes() for tokens in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = [0] * min(1, len(order))
    for before, after in itertools.pairwise(order):
        a, b = sequences[before], sequences[after]
        n = min(len(a), len(b))
        differs = a[:n] != b[:n]
        shared.append(int(differs.argmax()) if differs.any() else n)
    return order, shared


def _runs(scored: NDArray[np.bool_]) -> Ints:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], scored, [False]])))
    return edges.reshape(-1, 2).astype(np.int32)
