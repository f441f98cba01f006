"""Log-probs without logits against float64: tiles, shards of the vocabulary, extremes; gradients three ways."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import world

from silva.kernels import dispatch, linear_logprob, reference

torch.set_num_threads(1)


def draw(
    positions: int, vocabulary: int, hidden: int, dtype: torch.dtype, *, scale: float = 1.0, seed: int = 0
):
    """hidden, weight, target and an upstream gradient; logits have the deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(positions, hidden, generator=generator, dtype=torch.float64)
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64) * scale / hidden**0.5
    target = torch.randint(0, vocabulary, (positions,), generator=generator)
    grad = torch.randn(positions, generator=generator, dtype=torch.float64)
    return h.to(dtype), w.to(dtype), target, grad


def run(operation, hidden, weight, target, grad, device) -> list[torch.Tensor]:
    """Value and both gradients, in float64."""
    h, w = (x.detach().to(device).requires_grad_() for x in (hidden, weight))
    out = operation(h, w, target.to(device))
    out.backward(grad.to(out))
    assert h.grad is not None
    assert w.grad is not None
    return [x.detach().double().cpu() for x in (out, h.grad, w.grad)]


def errors(found, truth) -> list[float]:
    """Largest differences, relative to the largest element of the truth."""
    pairs = [(a, b) for a, b in zip(found, truth, strict=True) if b.numel()]
    return [float((a - b).abs().max() / (float(b.abs().max()) or 1.0)) for a, b in pairs]


@pytest.fixture(params=["one tile", "tiles", "torch"])
def way(request, monkeypatch) -> str:
    """Kernels on one tile; on many, whose blocks divide neither rows nor positions; torch's path on as many."""
    if request.param != "one tile":
        monkeypatch.setattr(linear_logprob, "LONGEST", 100)
        monkeypatch.setattr(linear_logprob, "SMALLEST_TILE", 15000)
        monkeypatch.setattr(linear_logprob, "LARGEST_TILE", 30000)
        monkeypatch.setattr(linear_logprob, "COLUMN_BLOCK", 128)
    if request.param == "torch":
        monkeypatch.setattr(linear_logprob, "runs_kernels", lambda x: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("positions", "vocabulary", "hidden"), [(252, 507, 123), (1, 507, 123), (0, 9, 4), (3, 1, 1)]
)
def test_value_and_gradients_three_ways(dtype, positions, vocabulary, hidden, way, device):
    inputs = draw(positions, vocabulary, hidden, dtype, scale=4.0)
    h, w, target, grad = inputs
    truth = run(reference.linear_logprob, h.double(), w.double(), target, grad, "cpu")
    plain = run(reference.linear_logprob, *inputs, device)
    found = run(linear_logprob.linear_logprob, *inputs, device)
    epsilon = torch.finfo(dtype).eps
    if positions:
        # float32 sums of H and V terms, whatever the inputs are
        assert float((found[0] - truth[0]).abs().max()) < 2e-6 * max(1.0, float(truth[0].abs().max()))
    # gradients: the slope and the result are rounded once each. Twice torch's own error, because the interpreter cuts
    # bfloat16 off where a GPU rounds; half an epsilon, because torch may be exact where V is 1
    for ours, theirs in zip(errors(found, truth)[-2:], errors(plain, truth)[-2:], strict=True):
        assert ours <= 2 * theirs + epsilon / 2


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_divides_the_logits(temperature, way, device):
    h, w, target, grad = draw(120, 333, 17, torch.float32, scale=3.0)
    truth = run(
        lambda h, w, t: reference.linear_logprob(h / temperature, w, t),
        h.double(),
        w.double(),
        target,
        grad,
        "cpu",
    )
    found = run(
        lambda h, w, t: linear_logprob.linear_logprob(h, w, t, temperature=temperature),
        h,
        w,
        target,
        grad,
        device,
    )
    assert max(errors(found, truth)) < 5e-6  # float32: sums of a hundred terms


def test_float64_is_exact(monkeypatch):
    monkeypatch.setattr(linear_logprob, "SMALLEST_TILE", 700)
    monkeypatch.setattr(linear_logprob, "LONGEST", 13)
    inputs = draw(40, 211, 9, torch.float64, scale=5.0)
    truth = run(reference.linear_logprob, *inputs, "cpu")
    assert max(errors(run(linear_logprob.linear_logprob, *inputs, "cpu"), truth)) < 1e-13


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_extreme_logits(scale, way, device):
    h, w, target, grad = draw(60, 301, 8, torch.float32, scale=scale)
    h[0], h[1] = 0, h[1].abs()  # one row of equal logits
    w[7] = w[7].abs() * 30  # and a token that has all of the next row's probability
    target[:2] = 7
    truth = run(reference.linear_logprob, h.double(), w.double(), target, grad, "cpu")
    found = run(linear_logprob.linear_logprob, h, w, target, grad, device)
    assert all(bool(x.isfinite().all()) for x in found)
    largest = float((h.double() @ w.double().T).abs().max())
    # a logit of size x has an error of some x * 2^-24, and the log-prob of a few of them
    assert float((found[0] - truth[0]).abs().max()) < 8 * largest * 2**-24
    assert found[0][1] == 0
    assert float(found[0][0]) == pytest.approx(-np.log(301), rel=1e-6)


def test_not_a_number_is_not_hidden(way, device):
    h, w, target, _ = draw(5, 50, 8, torch.float32)
    h[2, 3] = torch.nan
    found = linear_logprob.linear_logprob(h.to(device), w.to(device), target.to(device))
    assert found.isnan().tolist() == [False, False, True, False, False]


def test_a_source_that_predicts_several_targets_gets_the_summed_gradient(way, device):
    h, w, target, grad = draw(90, 120, 11, torch.float32)
    source = torch.randint(0, 25, (90,), generator=torch.Generator().manual_seed(1))

    def gathered(operation):
        return lambda h, w, t: operation(h[source.to(h.device)], w, t)

    truth = run(gathered(reference.linear_logprob), h[:25].double(), w.double(), target, grad, "cpu")
    found = run(gathered(linear_logprob.linear_logprob), h[:25], w, target, grad, device)
    assert max(errors(found, truth)) < 5e-6  # float32: sums of a hundred terms


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.nbytes)
        return out


@pytest.mark.parametrize("kernels", [False, True])
def test_logits_are_never_stored(kernels, device, monkeypatch):
    monkeypatch.setattr(linear_logprob, "SMALLEST_TILE", 1000)
    monkeypatch.setattr(linear_logprob, "runs_kernels", lambda x: kernels)
    positions, vocabulary = (30, 2000) if kernels else (400, 3000)
    inputs = draw(positions, vocabulary, 1, torch.float32)
    with Largest() as largest:
        run(linear_logprob.linear_logprob, *inputs, device if kernels else "cpu")
    # a sixteenth, rounded up to whole blocks of 64 columns
    assert largest.size <= 4 * positions * (vocabulary / 16 + 64)


# ---------------------------------------------------------------- shards of the vocabulary


def sharded(h, w, target, grad, rows: int, dtype: torch.dtype) -> list[np.ndarray]:
    """Return, on one rank, log-probs and this rank's share of the gradients."""
    first = dist.get_rank() * rows
    real = min(max(len(w) - first, 0), rows)
    mine = torch.full((rows, w.shape[1]), torch.nan, dtype=dtype)  # padding must not be read
    mine[:real] = w[first : first + real]
    options = {"group": dist.group.WORLD, "first_row": first, "real_rows": real}
    a, b = h.clone().requires_grad_(), mine.clone().requires_grad_()
    logprob = linear_logprob.linear_logprob(a, b, target, **options)
    logprob.backward(grad.to(logprob.dtype))
    assert a.grad is not None
    assert b.grad is not None
    assert not b.grad[real:].any()
    return [x.detach().double().numpy() for x in (logprob, a.grad, b.grad[:real])]


FORKS = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="forks processes on the CPU; autograd does not survive that beside a GPU",
)


@FORKS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shards_of_the_vocabulary(size, dtype, monkeypatch):
    # 507 tokens are padded to a multiple of 64 per process: of eight processes the last has nothing but padding
    rows = -(-507 // (64 * size)) * 64 + (64 if size == 8 else 0)
    monkeypatch.setattr(linear_logprob, "SMALLEST_TILE", 3000)
    h, w, target, grad = draw(41, 507, 12, dtype, scale=3.0)
    truth = run(reference.linear_logprob, h.double(), w.double(), target, grad, "cpu")
    # float64 and float32: sums of hundreds of terms; bfloat16: one rounding of the slope, cut off in the interpreter,
    # one of each rank's gradient
    tolerance = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2**-6}[dtype]
    ranks = world(size, sharded, h, w, target, grad, rows, dtype)
    for rank in ranks:
        assert errors([torch.from_numpy(rank[0])], truth[:1])[0] < min(tolerance, 5e-6)
    summed = [
        torch.from_numpy(sum(rank[1] for rank in ranks)),
        torch.from_numpy(np.concatenate([r[2] for r in ranks])),
    ]
    assert max(errors(summed, truth[1:])) < tolerance


@FORKS
def test_no_positions_on_shards():
    def nothing() -> float:
        h, w, target, _ = draw(0, 8, 4, torch.float32)
        h.requires_grad_()
        out = linear_logprob.linear_logprob(
            h, w, target, group=dist.group.WORLD, first_row=8 * dist.get_rank()
        )
        out.sum().backward()
        return float(out.numel())

    assert world(2, nothing) == [0, 0]


def test_float64_takes_torchs_path():
    assert not dispatch.runs_kernels(torch.zeros(1, dtype=torch.float64))
    assert dispatch.runs_kernels(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"))
