"""Tree attention and its gradients against float64, with same-dtype torch as the measure of what a dtype allows."""

import mmap
import subprocess
import sys

import pytest
import torch
from forests import SHAPES, forest, forests, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from silva.kernels import reference, tree_attention_tiles, tree_blocks
from silva.kernels import tree_attention as tree_attention_module
from silva.kernels.tree_attention import attention_blocks, tree_attention
from silva.kernels.tree_attention_tiles import Problem, Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("out", "dq", "dk", "dv")


def inputs(queries, keys, heads, kv_heads, size, dtype, seed=0):
    """q, k, v and the gradient of the output, made on the CPU so that every device sees the same."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, heads, size), (keys, kv_heads, size), (keys, kv_heads, size), (queries, heads, size)]
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def results(attend, q, k, v, grad):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def truth(q, k, v, grad, sees, scale=None):
    """The masked softmax in float64."""

    def attend(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        score = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
        p = score.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)  # a query that sees nothing
        return torch.einsum("hij,jhd->ihd", p, v)

    return results(attend, *(x.double() for x in (q, k, v, grad)))


def check(found, same_dtype, expected):
    """Error at most twice that of torch in the same dtype, in the mean and at the worst element."""
    for name, got, plain, true in zip(NAMES, found, same_dtype, expected, strict=True):
        assert got.dtype == plain.dtype
        assert got.shape == true.shape
        # Where torch's own error is nil, as for a single key: one rounding of the largest output, and float32
        # roundings (1e-7) of terms up to about 100 that cancel in the gradient.
        floor = torch.finfo(got.dtype).eps * true.abs().amax() + 1e-5 if true.numel() else 0.0
        for size in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().amax()):
            if true.numel():
                error, allowed = size(got.double() - true), 2 * size(plain.double() - true) + floor
                assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def compare(
    row, heads=2, kv_heads=1, size=16, dtype=torch.float32, window=None, query_index=None, scale=None
):
    end, position = (x.to(DEVICE) for x in row)
    masks = {}
    if window is not None:
        masks |= {"position": position, "window": window}
    if query_index is not None:
        masks["query_index"] = query_index = query_index.to(DEVICE)
    queries = len(end) if query_index is None else len(query_index)
    tensors = inputs(queries, len(end), heads, kv_heads, size, dtype)
    found = results(lambda q, k, v: tree_attention(q, k, v, end, scale=scale, **masks), *tensors)
    if not queries:  # the definition's empty output hangs on no input
        assert [x.shape for x in found] == [tensors[i].shape for i in (3, 0, 1, 2)]
        assert not any(x.any() for x in found)
        return
    plain = results(lambda q, k, v: reference.tree_attention(q, k, v, end, scale=scale, **masks), *tensors)
    sees = visible(end, position, window=window, query_index=query_index)
    check(found, plain, truth(*tensors, sees, scale))


@pytest.mark.parametrize("name", SHAPES)
def test_plain_shapes(name):
    compare(forest(SHAPES[name]), heads=4, kv_heads=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1), (6, 2)])
def test_dtypes_and_groups_of_heads(dtype, heads, kv_heads):
    compare(forest(SHAPES["a deep tree"]), heads, kv_heads, 32, dtype)


@pytest.mark.parametrize("size", [16, 24, 64, 96, 128, 256])
def test_head_sizes(size):
    compare(forest([(40, 0), (20, 10), (9, 3)]), size=size, dtype=torch.bfloat16)


# long enough for one full tile of any shape, 128 query rows of one head by 128 keys at most
LONG = [(260, 0), (60, 100), (21, 100)]
# on a GPU its own; the interpreter runs any: with and without tensor descriptors
ARCHITECTURES = [None] if DEVICE.type == "cuda" else ["sm_80", "sm_90"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("size", "heads"), [(64, 1), (128, 4), (256, 2)])
def test_shipped_tiles(architecture, size, heads, monkeypatch):
    if architecture is not None:
        monkeypatch.setattr(tree_attention_tiles, "_architecture", lambda device: architecture)
    row = forest(LONG)
    blocks = attention_blocks(row[0].to(DEVICE), group=heads, size=size, dtype=torch.bfloat16)
    assert all(bool(lists.full.any()) for lists in blocks.lists.values())
    compare(row, heads, 1, size, torch.bfloat16)


def test_a_long_row_of_many_tiles():
    """Longer on a GPU, where it is quick: lists of hundreds of tiles, and many of them full."""
    runs = [(2000, 0), (700, 1100), (300, 1100), (900, 0)] if DEVICE.type == "cuda" else LONG
    compare(forest(runs), heads=4, kv_heads=2, size=64, dtype=torch.bfloat16)


@settings(max_examples=15, deadline=None)
@given(
    forests(),
    st.sampled_from([(1, 1), (4, 1), (4, 4), (8, 1)]),
    st.none() | st.integers(1, 60),
    st.none() | st.lists(st.integers(0, 400), max_size=50),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_random_forests(row, heads, window, picks, dtype):
    size = len(row[0])
    rows = None if picks is None else torch.tensor([pick % size for pick in picks if size], dtype=torch.int32)
    compare(row, *heads, dtype=dtype, window=window, query_index=rows)


def test_blocks_of_queries_are_rows_of_the_whole():
    """What context parallelism asks for: any blocks of queries against all keys, and key gradients that add up."""
    end = forest(SHAPES["a deep tree"])[0].to(DEVICE)
    q, k, v, grad = inputs(len(end), len(end), 4, 2, 16, torch.float32)
    whole = results(lambda q, k, v: tree_attention(q, k, v, end), q, k, v, grad)
    order = torch.arange(len(end), device=DEVICE).split(16)
    parts = []
    for rank in (0, 1):
        rows = torch.cat([order[rank], *order[3 - rank :: -2][:1], *order[4 + rank :: 2]]).unique()
        rows = torch.cat([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
        part = results(
            lambda q, k, v, rows=rows: tree_attention(q, k, v, end, query_index=rows),
            q[rows],
            k,
            v,
            grad[rows],
        )
        # the same products, summed in another order
        for found, expected in zip(part[:2], whole[:2], strict=True):
            torch.testing.assert_close(found, expected[rows])
        parts.append((rows, part))
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(len(end)))
    for n in (2, 3):
        torch.testing.assert_close(parts[0][1][n] + parts[1][1][n], whole[n])


def test_scale_and_scores_far_from_zero():
    compare(forest(SHAPES["documents"]), scale=0.5)
    compare(forest(SHAPES["documents"]), scale=40.0)


def test_a_query_that_sees_no_key_gives_zero():
    end, position = forest(SHAPES["a star"])
    end[40:60] = 0
    q, k, v, grad = inputs(len(end), len(end), 2, 1, 16, torch.float32)
    found = results(lambda q, k, v: tree_attention(q, k, v, end.to(DEVICE)), q, k, v, grad)
    expected = truth(q, k, v, grad, visible(end, position).to(DEVICE))
    for got, true in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-5)  # float32, about 100 terms


def test_strided_inputs_and_gradients():
    """As megatron-core hands them: heads of one projection, a transposed row, a gradient of stride zero."""
    end = forest(SHAPES["a star"])[0].to(DEVICE)
    size = len(end)
    mixed = torch.randn(size, 1, 2, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    key, value = mixed[:, 0, :, 2], mixed[:, 0, :, 3]
    query = mixed[:, 0, :, :2].transpose(0, 1).contiguous().transpose(0, 1).flatten(1, 2)
    odd = torch.randn(size * 2 * 16 + 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)[1:]
    for keys in (key, odd.view(size, 2, 16), key.transpose(1, 2).contiguous().transpose(1, 2)):
        grad = torch.ones((), device=DEVICE).expand(size, 4, 16)
        found = results(lambda q, k, v: tree_attention(q, k, v, end), query, keys, value, grad)
        tensors = [x.contiguous() for x in (query, keys, value, grad)]
        expected = results(lambda q, k, v: tree_attention(q, k, v, end), *tensors)
        assert all(map(torch.equal, found, expected))


def test_offsets_beyond_32_bits(monkeypatch):
    """Heads that lie so far apart that more than 2^31 elements are between the first and the last."""
    heads, apart, end = 4, 3 << 28, forest([(7, 0), (3, 4)])[0].to(DEVICE)
    count = heads * apart
    if DEVICE.type == "cuda":
        memory = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
    else:  # zeros that take no memory until they are written
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=torch.bfloat16)
    q, k, v, grad = inputs(len(end), len(end), heads, heads, 16, torch.bfloat16)
    far = memory.as_strided(q.shape, (16, apart, 1))
    far.copy_(q)
    found = []
    for largest in (tree_attention_module.LARGEST_STRIDE, apart + 1):  # copied, and read where they are
        monkeypatch.setattr(tree_attention_module, "LARGEST_STRIDE", largest)
        found.append(results(lambda q, k, v: tree_attention(q, k, v, end), far, k, v, grad))
    assert all(map(torch.equal, *found))


def test_the_same_bits_every_time_and_under_recomputation():
    end = forest(SHAPES["a deep tree"])[0].to(DEVICE)
    q, k, v, grad = inputs(len(end), len(end), 4, 2, 16, torch.bfloat16)
    blocks = attention_blocks(end, group=2, size=16, dtype=q.dtype)

    def attend(q, k, v):
        return tree_attention(q, k, v, end, blocks=blocks)

    def recomputed(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False)

    first, *others = (results(how, q, k, v, grad) for how in (attend, attend, recomputed))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_float64_takes_the_definition():
    end = forest(SHAPES["a star"])[0].to(DEVICE)
    q, k, v, _ = inputs(len(end), len(end), 2, 1, 16, torch.float64)
    assert torch.equal(tree_attention(q, k, v, end), reference.tree_attention(q, k, v, end))


def test_blocks_for_other_heads_are_refused():
    end = forest(SHAPES["a star"])[0].to(DEVICE)
    q, k, v, _ = inputs(len(end), len(end), 4, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="other heads"):
        tree_attention(q, k, v, end, blocks=tree_blocks.tree_blocks(end, []))
    with pytest.raises(ValueError, match="position"):
        tree_attention(q, k, v, end, window=3)


def test_shapes_that_do_not_fit_are_refused():
    """On a GPU they would be read beyond their ends."""
    end = forest(SHAPES["a star"])[0].to(DEVICE)
    q, k, v, _ = inputs(len(end), len(end), 4, 2, 16, torch.float32)
    for arguments in [(q, k[:-1], v[:-1], end), (q, k, v[:, :1], end), (q[:, :3], k, v, end),
                      (q, k, v, end[:-1]), (q[..., :8], k, v, end), (q.half(), k, v, end)]:  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            tree_attention(*arguments)
    blocks = attention_blocks(end, group=2, size=16, dtype=q.dtype)
    for wrong in [(q[:-1], k, v, end), (q[:-1], k[:-1], v[:-1], end[:-1])]:
        with pytest.raises(ValueError, match="the blocks are of"):
            tree_attention(*wrong, blocks=blocks)
    with pytest.raises(ValueError, match="scale"):
        tree_attention(q, k, v, end, scale=-1.0)


def test_tuned_tiles_take_the_place_of_the_shipped_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("SILVA_CACHE", str(tmp_path / "new"))
    tree_attention_tiles.tuned.cache_clear()
    ours, other = (Problem("sm_90", 128, "bfloat16", group) for group in (4, 1))
    shipped = tree_attention_tiles.tiles(ours)
    best = shipped._replace(forward=Tile(128, 128, 8, 2))
    tree_attention_tiles.tuned()[ours.key] = best
    tree_attention_tiles.save_tuned()
    tree_attention_tiles.tuned.cache_clear()  # as a later process begins
    assert tree_attention_tiles.tiles(ours) == best
    assert tree_attention_tiles.tiles(other) == shipped
    tree_attention_tiles.tuned.cache_clear()


def test_imports_and_runs_without_triton():
    """On a machine for which there is no Triton."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from silva.kernels.reference import tree_attention as definition
        from silva.kernels.tree_attention import tree_attention
        q, k = torch.randn(5, 2, 16), torch.randn(5, 1, 16)
        end = torch.tensor([5, 3, 3, 5, 5])
        assert torch.equal(tree_attention(q, k, k, end), definition(q, k, k, end))
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pointers_give_the_same_as_tensor_descriptors(monkeypatch):
    """GPUs without a copy engine read tiles through pointers."""
    end = forest(SHAPES["a star"])[0].to(DEVICE)
    tensors = inputs(len(end), len(end), 4, 2, 24, torch.bfloat16)
    found = []
    for descriptors in (True, False):
        monkeypatch.setattr(Problem, "descriptors", descriptors)
        found.append(results(lambda q, k, v: tree_attention(q, k, v, end), *tensors))
    assert all(map(torch.equal, *found))
