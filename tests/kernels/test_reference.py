"""The torch definitions against the mask's own words and transformers' formulas, in float64."""

import pytest
import torch

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
