"""Random depth-first forests, as rows of packed trees are: where each token's subtree ends, and its depth."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def forest(runs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(subtree_end, position), each (S,) int32, of runs (length, depth of the token they hang under).

    A run of depth 0, or the first one, begins a tree; a depth beyond the open branch means its last token.
    """
    stack: list[int] = []
    position: list[int] = []
    end: list[int] = []
    for length, depth in runs:
        for closed in stack[depth:]:
            end[closed] = len(end)
        del stack[depth:]
        for _ in range(length):
            position.append(len(stack))
            stack.append(len(end))
            end.append(0)
    for closed in stack:
        end[closed] = len(end)
    return torch.tensor(end, dtype=torch.int32), torch.tensor(position, dtype=torch.int32)


def forests(longest_run: int = 40, runs: int = 8) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    run = st.tuples(st.integers(1, longest_run), st.sampled_from([0, 0, 1, 5, 17, 30, 61, 1000]))
    return st.lists(run, max_size=runs).map(forest)


def visible(
    end: Tensor, position: Tensor, *, window: int | None = None, query_index: Tensor | None = None
) -> Tensor:
    """(S_q, S) bool, the mask in its own words."""
    j = torch.arange(end.shape[0], device=end.device)
    i = (j if query_index is None else query_index.long())[:, None]
    sees = (j <= i) & (i < end)
    return sees if window is None else sees & (position[i] - position < window)


# rows with nothing random about them: name -> runs
SHAPES = {
    "nothing": [],
    "one token": [(1, 0)],
    "one chain": [(83, 0)],
    "documents": [(31, 0), (1, 0), (64, 0), (2, 0)],
    "a star": [(33, 0), *[(9, 33)] * 8],
    "tokens that see only themselves": [(1, 0)] * 50,
    "a deep tree": [(20, 0), (18, 20), (40, 20), (11, 60), (13, 60), (7, 13), (16, 0)],
}
