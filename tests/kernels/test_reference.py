"""The torch definitions against the mask's own words and transformers' formulas, in float64."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from silva.kernels import reference


def random_forest(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A random depth-first forest: (subtree_end, position), every token hanging under a random ancestor."""
    stack: list[int] = []
    position, end = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    for token in range(size):
        keep = int(torch.randint(0, len(stack) + 1, (), generator=generator))
        # mostly chains, as text is: a branch every now and then
        if torch.rand((), generator=generator) > 0.2:
            keep = len(stack)
        for closed in stack[keep:]:
            end[closed] = token
        del stack[keep:]
        position[token] = len(stack)
        stack.append(token)
    end[stack] = size
    return end, position


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "window"), [(1, 1, 1, None), (700, 4, 2, None), (613, 3, 3, 7)]
)
def test_tree_attention_is_the_masked_softmax(size, heads, kv_heads, window):
    generator = torch.Generator().manual_seed(size)
    end, position = random_forest(size, generator)
    q, k, v, grad = (
        torch.randn(size, h, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    i = torch.arange(size)
    sees = (i[None] <= i[:, None]) & (i[:, None] < end[None])
    if window:
        sees &= position[:, None] - position[None] < window
    repeat = heads // kv_heads
    score = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(repeat, 1)) / 4
    expected = torch.einsum(
        "hij,jhd->ihd", score.masked_fill(~sees, -torch.inf).softmax(-1), v.repeat_interleave(repeat, 1)
    )
    options = {"position": position, "window": window} if window else {}
    found = reference.tree_attention(q, k, v, end, **options)
    # 1e-12: float64 with at most a few hundred terms of order one
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    rows = torch.randperm(size, generator=generator)[: size // 2 + 1]
    part = reference.tree_attention(q[rows], k, v, end, query_index=rows, **options)
    torch.testing.assert_close(part, expected[rows], rtol=0, atol=1e-12)


def test_blocks_computed_again_give_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    end, position = random_forest(700, generator)
    found = []
    for largest in (0, 1 << 30):
        monkeypatch.setattr(reference, "LARGEST_KEPT", largest)
        q, k, v = (
            torch.randn(700, h, 8, generator=torch.Generator().manual_seed(h), requires_grad=True)
            for h in (4, 2, 2)
        )
        out = reference.tree_attention(q, k, v, end, position=position, window=50)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for again, kept in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)


class Live(TorchDispatchMode):
    """The most bytes that lived at once of storages made under it."""

    def __init__(self):
        super().__init__()
        self.peak, self.storages = 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


def test_long_rows_take_no_mask_of_the_row():
    """One chain of 16k tokens: half a mask of the row would be 128 MiB in bool, and 512 MiB as torch keeps it."""
    size = 16384
    end = torch.full((size,), size)
    q, k, v = (torch.randn(size, 1, 8, requires_grad=True) for _ in range(3))
    with Live() as live:
        reference.tree_attention(q, k, v, end).sum().backward()
    # a block's mask: 4 MiB in bool, 16 MiB in float32; everything else is 0.5 MiB for each of some tensors
    assert live.peak < 40 << 20


def test_a_query_that_sees_no_key_gives_zero():
    q, k, v = (torch.randn(600, h, 8, requires_grad=True) for h in (2, 1, 1))
    end = torch.full((600,), 600)
    end[:300] = 0  # all of the first block's queries, and some of the second's
    out = reference.tree_attention(q, k, v, end)
    assert not out[:300].any()
    assert out[300:].all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not gradient[:300].any()
        assert gradient.isfinite().all()


def test_no_queries_give_no_rows():
    q, k = torch.zeros(0, 2, 8), torch.zeros(3, 1, 8)
    assert (
        reference.tree_attention(q, k, k, torch.tensor([3, 3, 3]), query_index=torch.zeros(0).long()).shape
        == q.shape
    )


def test_a_window_needs_positions():
    x = torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="position"):
        reference.tree_attention(x, x, x, torch.tensor([2, 2]), window=1)


def test_layers_are_transformers_own():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 8, generator=generator)
    position = torch.tensor([0, 1, 2, 1, 40])
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    cos, sin = LlamaRotaryEmbedding(config)(x, position[None])
    expected, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), cos, sin)
    frequency = 1e6 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(reference.rotary(x, position, frequency), expected[0].transpose(0, 1))
    norm = LlamaRMSNorm(8, eps=1e-5)
    norm.weight.data = torch.randn(8, generator=generator)
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_linear_logprob_is_log_softmax():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (5, 11))
    target = torch.tensor([0, 10, 3, 3, 7])
    expected = (hidden @ weight.T).softmax(-1)[torch.arange(5), target].log()
    torch.testing.assert_close(reference.linear_logprob(hidden, weight, target), expected)
    assert reference.linear_logprob(hidden[:0], weight, target[:0]).shape == (0,)
