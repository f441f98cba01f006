"""Holds one tree's tokenized sequences front-coded: each stores only what it adds to its predecessor.

In a depth-first order every shared prefix is shared by neighbours. So the added tokens, one sequence after the other,
*are* the tokens of the merged tree, and the shared lengths alone tell how large the tree of any subset of the
sequences is: two sequences share the minimum of the shared lengths between them.

A *path* is one row of tokens from the tree's root. A *sequence* is what is compared and what has one log-prob: mostly
one path; several where the chat template writes the history of a later answer differently, so that each answer needs
the tokens of its own history.

A group has K paths, N sequences, U tokens of the merged tree, R runs of scored tokens and P comparisons.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# the missing side of a comparison that is unpaired feedback
ABSENT = -1
Ints = NDArray[np.int32]
Numbers = NDArray[np.integer[Any]]


@dataclass(slots=True)
class TokenSequence:
    """Holds the tokens of one path; scored[0] is always False, because nothing predicts the first token."""

    tokens: NDArray[np.int32]  # (n,)
    scored: NDArray[np.bool_]  # (n,)


def instruction_digest(instruction: str) -> bytes:
    """Compute the 16 bytes by which a group is held out or drawn; they depend on the first user message alone."""
    return hashlib.blake2b(instruction.encode(), digest_size=16).digest()


@dataclass(slots=True)
class TokenGroup:
    """Holds the paths of one tree, depth-first, the sequences that they make up, and what is compared among these.

    Equal paths are all stored (the second adds no tokens), and each of them counts.

    Attributes:
        tokens: (U,) int32, what path 0 holds, what path 1 adds to it, and so on.
        length: (K,) int32, tokens of each path.
        shared: (K,) int32, tokens that each path shares with its predecessor; 0 for the first.
        run_pointer: (K + 1,) int32, CSR over paths into `runs`.
        runs: (R, 2) int32, [start, stop) of the scored tokens of each path, rising and not adjacent.
        owner: (K,) int32, the sequence of each path; sequences are numbered by their first paths.
        comparisons: (P, 2) int32, (chosen, rejected) sequences, -1 where a side is absent; P = 0 for SFT.
        absolute: (P,) bool, whether the comparison also gets L_DR.
        instruction: of `instruction_digest`.
        first_sequence: number of sequence 0 in the data set.
        first_comparison: number of comparison 0 in the data set.
    """

    tokens: Ints
    length: Ints
    shared: Ints
    run_pointer: Ints
    runs: Ints
    owner: Ints
    comparisons: Ints
    absolute: NDArray[np.bool_]
    instruction: bytes = b""
    first_sequence: int = 0
    first_comparison: int = 0

    @classmethod
    def of(
        cls,
        paths: Sequence[TokenSequence],
        comparisons: Sequence[tuple[int, int]] | NDArray = (),
        absolute: Sequence[bool] | NDArray = (),
        instruction: bytes = b"",
        owner: Sequence[int] | None = None,
    ) -> TokenGroup:
        """Order and front-code paths, and renumber sequences and comparisons accordingly.

        Args:
            paths: in any order.
            comparisons: (chosen, rejected) sequences, ABSENT where a side is absent.
            absolute: whether each comparison also gets L_DR.
            instruction: of `instruction_digest`.
            owner: the sequence of each path, numbered from 0 without gaps; None: each path is a sequence.
        """
        order, shared = front_code([path.tokens for path in paths])
        given = range(len(paths)) if owner is None else owner
        # the new number of each sequence
        place = {ABSENT: ABSENT}
        for k in order:
            place.setdefault(given[k], len(place) - 1)
        runs = [_runs(paths[k].scored) for k in order]
        return cls(
            tokens=np.concatenate(
                [np.zeros(0, np.int32), *(paths[k].tokens[n:] for k, n in zip(order, shared, strict=True))]
            ),
            length=np.array([len(paths[k].tokens) for k in order], np.int32),
            shared=np.array(shared, np.int32),
            run_pointer=np.cumsum([0, *map(len, runs)], dtype=np.int32),
            runs=np.concatenate([np.zeros((0, 2), np.int32), *runs]),
            owner=np.array([place[given[k]] for k in order], np.int32),
            comparisons=np.array(
                [[place[int(side)] for side in pair] for pair in comparisons], np.int32
            ).reshape(-1, 2),
            absolute=np.asarray(absolute, bool),
            instruction=instruction,
        )

    def __len__(self) -> int:
        """Return the number of sequences."""
        return int(self.owner.max(initial=-1)) + 1

    @property
    def scored(self) -> Ints:
        """Return the number of scored tokens of each sequence, (N,) int32."""
        before = np.append(0, np.cumsum(self.runs[:, 1] - self.runs[:, 0]))
        return np.bincount(self.owner, np.diff(before[self.run_pointer]), len(self)).astype(np.int32)

    def paths_of(self, sequence: int) -> list[int]:
        """Return the paths of a sequence, rising."""
        return np.flatnonzero(self.owner == sequence).tolist()

    def path(self, k: int) -> TokenSequence:
        """Return path `k` as it was before front-coding."""
        scored = np.zeros(self.length[k], bool)
        for start, stop in self.runs[self.run_pointer[k] : self.run_pointer[k + 1]]:
            scored[start:stop] = True
        return TokenSequence(self._tokens(k, 0), scored)

    def paths(self) -> list[TokenSequence]:
        """Return all paths, in the group's order."""
        return [self.path(k) for k in range(len(self.length))]

    def sequence(self, k: int) -> TokenSequence:
        """Return the path of sequence `k`.

        Raises:
            ValueError: the sequence has several.
        """
        [path] = self.paths_of(k)
        return self.path(path)

    def subset(self, members: Numbers) -> TokenGroup:
        """Return the group of some sequences alone, without comparisons, which may name others.

        If all are members, this is the group itself, with its comparisons.

        Args:
            members: rising indices of paths: all paths of these sequences.
        """
        if len(members) == len(self.length):
            return self
        shared = self.common(members)
        parts = [self._tokens(k, n) for k, n in zip(members.tolist(), shared.tolist(), strict=True)]
        counts = np.diff(self.run_pointer)
        chosen = np.zeros(len(self.length), bool)
        chosen[members] = True
        return TokenGroup(
            tokens=np.concatenate([np.zeros(0, np.int32), *parts]),
            length=self.length[members],
            shared=shared,
            run_pointer=np.append(0, np.cumsum(counts[members])).astype(np.int32),
            runs=self.runs[np.repeat(chosen, counts)],
            owner=np.unique(self.owner[members], return_inverse=True)[1].astype(np.int32),
            comparisons=np.zeros((0, 2), np.int32),
            absolute=np.zeros(0, bool),
        )

    def common(self, members: Numbers) -> Ints:
        """Count the tokens that each of `members` (rising) shares with the member before it.

        Args:
            members: rising indices of paths.

        Returns:
            (len(members),) int32; 0 for the first.
        """
        if len(members) == len(self.length):
            return self.shared
        if len(members) < 2:
            return np.zeros(len(members), np.int32)
        # the minimum of `shared` over (previous member, member]
        least = np.minimum.reduceat(self.shared[: members[-1] + 1], members[:-1] + 1)
        return np.append(np.int32(0), least)

    def merged_size(self, members: Numbers) -> tuple[int, int]:
        """Count the tokens and the visible pairs of the tree of some paths.

        Args:
            members: rising indices of paths.

        Returns:
            (tokens, visible pairs); a token sees itself and its ancestors.
        """
        length, shared = self.length[members].astype(np.int64), self.common(members).astype(np.int64)
        pairs = (length * (length + 1) - shared * (shared + 1)).sum() // 2
        return int((length - shared).sum()), int(pairs)

    def _tokens(self, k: int, start: int) -> Ints:
        """Return the tokens of path `k` from place `start` on."""
        stop = int(self.length[k])
        found = np.empty(stop - start, np.int32)
        # end, in `tokens`, of the part that path j adds
        end = int((self.length[: k + 1] - self.shared[: k + 1]).sum())
        for j in range(k, -1, -1):
            first, length = int(self.shared[j]), int(self.length[j])
            # tokens [start, stop) are still to be found
            if first < stop:
                low = max(first, start)
                found[low - start : stop - start] = self.tokens[end - (length - low) :][: stop - low]
                stop = low
            if stop <= start:
                break
            end -= length - first
        return found


def front_code(sequences: Sequence[Ints]) -> tuple[list[int], list[int]]:
    """Find a depth-first order of token arrays.

    Among siblings, the larger subtree comes first. A block of keys is read for all queries up to the end of the
    largest subtree that begins in it. In this order, a block in which one branch ends and the next begins is read up
    to the end of the smaller branch.

    Args:
        sequences: token ids.

    Returns:
        Indices of `sequences` in the order, and how many tokens each shares with its predecessor in it.
    """
    # big-endian bytes compare as the token ids do, and Python compares bytes in C
    keys = [tokens.astype(">u4").tobytes() for tokens in sequences]
    lexicographic = sorted(range(len(sequences)), key=keys.__getitem__)
    length = [len(sequences[k]) for k in lexicographic]
    shared = [0] * min(1, len(length))
    for before, after in itertools.pairwise(lexicographic):
        a, b = sequences[before], sequences[after]
        n = min(len(a), len(b))
        differs = a[:n] != b[:n]
        shared.append(int(differs.argmax()) if differs.any() else n)

    added = [0, *itertools.accumulate(n - s for n, s in zip(length, shared, strict=True))]
    order, shared_in_order = [], []
    # sequences [first, end), and how many tokens they share with those before them
    open_subtrees = [(0, len(length), 0)] if length else []
    while open_subtrees:
        first, end, before = open_subtrees.pop()
        if end - first == 1:
            order.append(lexicographic[first])
            shared_in_order.append(before)
            continue
        # where the subtree first branches
        branch = min(shared[first + 1 : end])
        edges = [first, *(k for k in range(first + 1, end) if shared[k] == branch), end]
        children = sorted(
            itertools.pairwise(edges),
            # a sequence that ends at the branching point adds nothing and stays in front
            key=lambda child: (
                length[child[0]] > branch,
                -(added[child[1]] - added[child[0]] + shared[child[0]]),
            ),
        )
        for number, child in reversed(list(enumerate(children))):
            open_subtrees.append((*child, branch if number else before))
    return order, shared_in_order


def _runs(scored: NDArray[np.bool_]) -> Ints:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], scored, [False]])))
    return edges.reshape(-1, 2).astype(np.int32)
