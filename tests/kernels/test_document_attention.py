"""Which rows are plain documents, and that FlashAttention's path gives the numbers of the tree's."""

from __future__ import annotations

import flash_stand_in
import forests
import pytest
import torch
from hypothesis import given

from silva.kernels import document_attention
from silva.kernels.document_attention import documents
from silva.kernels.reference import tree_attention


@pytest.fixture
def flash(monkeypatch):
    flash_stand_in.install(monkeypatch)
    yield
    document_attention._function.cache_clear()


def row_of(lengths: list[int], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(subtree_end, position) of documents and one-token padding."""
    ends, size = torch.tensor(lengths).cumsum(0), sum(lengths)
    end = torch.cat([ends.repeat_interleave(torch.tensor(lengths)), torch.arange(size, size + padding) + 1])
    position = torch.cat([torch.arange(n) for n in [*lengths, *[1] * padding]])
    return end.int(), position.int()


@pytest.mark.parametrize(
    ("lengths", "padding", "starts", "longest"),
    [
        ([3, 1, 4], 0, [0, 3, 4, 8], 4),
        ([3, 1, 1], 3, [0, 3, 4, 5, 8], 3),
        ([2], 7, [0, 2, 9], 7),
        ([1], 0, [0, 1], 1),
    ],
)
def test_documents_of_a_row(lengths, padding, starts, longest):
    found = documents(row_of(lengths, padding)[0], sum(lengths))
    assert found is not None
    assert (found.starts.tolist(), found.longest) == (starts, longest)
    assert found.starts.dtype == torch.int32


def test_padding_alone_is_one_document():
    found = documents(torch.arange(1, 6, dtype=torch.int32), 0)
    assert found is not None
    assert (found.starts.tolist(), found.longest) == ([0, 5], 5)


@given(forests.forests())
def test_a_row_is_plain_exactly_if_no_token_has_two_children(row):
    end, position = row
    branches = False
    for i in range(1, len(end)):
        # a token that begins at depth d > 0 hangs under the last one at depth d - 1: a second child branches there
        branches |= bool(position[i] > 0 and position[i] != position[i - 1] + 1)
    assert (documents(torch.as_tensor(end), len(end)) is None) == branches


@pytest.mark.parametrize("window", [None, 1, 3])
def test_numbers_are_tree_attentions(flash, window):
    end, position = row_of([5, 1, 9, 2], 4)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(len(end), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    row = documents(end, 17)
    assert row is not None
    grad = torch.randn(len(end), 4, 8, dtype=torch.float64)
    grad[17:] = 0  # padding is scored by nobody
    found = document_attention.document_attention(q, k, v, row, window=window)
    masks = {"position": position, "window": window} if window else {}
    expected = tree_attention(q, k, v, end, **masks)
    torch.testing.assert_close(found[:17], expected[:17], rtol=1e-12, atol=1e-12)  # float64
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
