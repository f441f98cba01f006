"""Every objective's kernel against `silva.engine.objectives` in float64: loss, rewards, metrics and slopes."""

import math

from silva.engine.parallel import groups  # noqa: F401  prepares megatron-core for the CPU before metrics imports it

import pytest
import torch

from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Objective
from silva.engine.training.metrics import likelihood_sums, preference_sums
from silva.kernels import preference_loss as module
from silva.kernels.preference_loss import Structure, preference_loss
from silva.kernels.preference_terms import TERMS
from silva.kernels.reference import sequence_sums

NUMBERS = {
    "gamma": 0.7,
    "margin": 0.4,
    "label_smoothing": 0.2,
    "lambda_desirable": 1.33,
    "lambda_undesirable": 0.8,
}


class Forest:
    """Random trees: spans of random lengths, sequences of spans in their tree, comparisons of sequences in it."""

    def __init__(
        self, trees: int, *, seed: int = 0, spans: int = 6, longest: int = 40, unpaired: bool = False
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        lengths: list[int] = []
        paths: list[list[int]] = []
        compared: list[list[int]] = []
        starts = [[0, 0, 0]]
        for _ in range(trees):
            first_span, first_sequence = len(lengths), len(paths)
            lengths += [draw(1, longest) for _ in range(draw(1, spans))]
            for _ in range(draw(2, 7)):
                mine = torch.rand(len(lengths) - first_span, generator=generator) < 0.6
                paths.append([first_span + k for k in torch.nonzero(mine)[:, 0].tolist()])
            count = len(paths) - first_sequence
            for _ in range(draw(0, 5)):
                pair = torch.randperm(count, generator=generator)[:2] + first_sequence
                compared.append(pair.tolist())
                if unpaired and draw(0, 2) == 0:
                    compared[-1][draw(0, 1)] = -1
            starts.append([len(lengths), len(paths), len(compared)])

        def int32(values) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        self.span = int32([u for u, length in enumerate(lengths) for _ in range(length)])
        scored = int32([sum(lengths[u] for u in path) for path in paths])
        self.structure = Structure(
            span_start=int32([0, *torch.tensor([*lengths, 0]).cumsum(0)[:-1].tolist()][: len(lengths) + 1]),
            span_pointer=int32(
                [0, *torch.tensor([*map(len, paths), 0]).cumsum(0)[:-1].tolist()][: len(paths) + 1]
            ),
            span_index=int32([u for path in paths for u in path]),
            comparisons=int32(compared).reshape(-1, 2),
            tree_start=int32(starts),
            scored=scored,
            absolute=torch.rand(len(compared), generator=generator) < 0.5,
        )
        self.logprob = -torch.rand(len(self.span), generator=generator) * 2
        self.reward = torch.randn(len(paths), generator=generator) * 2
        # near the policy's own sums, as a reference policy's are
        sums = self.sums(self.logprob)
        self.reference = (sums + torch.randn(len(paths), generator=generator) * 3).clamp(max=-0.1)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        return sequence_sums(values, self.span, self.structure.span_pointer, self.structure.span_index)

    def values(self, name: str) -> torch.Tensor:
        return self.reward if TERMS[name].reward else self.logprob


def found(forest: Forest, name: str, beta: float, kl: float, average: bool, device, values=None):
    s = Structure(*(x.to(device) for x in forest.structure))
    values = (forest.values(name) if values is None else values).to(device).clone().requires_grad_()
    out = preference_loss(
        values,
        s,
        name,
        reference_logprob=forest.reference.to(device) if TERMS[name].reference else None,
        kl=torch.tensor(kl, device=device) if name == "kto" else None,
        beta=beta,
        ipo_average=average,
        **NUMBERS,
    )
    (1.7 * out.loss).backward()
    torch.testing.assert_close(values.grad, 1.7 * out.coefficient)
    return [x.detach().cpu() for x in out]


def truth(forest: Forest, name: str, beta: float, kl: float, average: bool, values=None):
    """The same four, from the engine's pure functions under float64 autograd."""
    values = (forest.values(name) if values is None else values).double().requires_grad_()
    s = forest.structure
    per_sequence = values if TERMS[name].reward else forest.sums(values)
    settings = Objective(name=name, beta=beta, ipo_average=average, **NUMBERS)
    result = OBJECTIVES[name].preference(
        per_sequence,
        forest.reference.double(),
        s.scored,
        s.comparisons,
        s.absolute,
        torch.tensor(kl, dtype=torch.float64),
        settings,
    )
    if name == "sft":
        sums, rewards = likelihood_sums(result.loss), torch.zeros(0, 2)
    else:
        sums, rewards = preference_sums(result, s.comparisons), torch.stack(result[1:], 1)
    (slope,) = torch.autograd.grad(result.loss.sum(), values, allow_unused=True)
    return [result.loss.sum().detach(), sums, rewards, torch.zeros_like(values) if slope is None else slope]


def agree(ours, theirs, scale: float, name: str, forest: Forest) -> None:
    """scale: the size of the numbers that are subtracted, whose last bit is what float32 can lose."""
    loss, sums, rewards, slope = ours
    atol = 4e-7 * scale
    terms = max(1, len(forest.structure.comparisons) if name != "sft" else len(forest.reward))
    torch.testing.assert_close(loss.double(), theirs[0], rtol=2e-5, atol=terms * atol)
    torch.testing.assert_close(sums, theirs[1], rtol=2e-5, atol=terms * atol)
    torch.testing.assert_close(rewards.double(), theirs[2].double(), rtol=2e-5, atol=atol)
    torch.testing.assert_close(slope.double(), theirs[3], rtol=2e-5, atol=terms * atol)


CASES = [(name, True) for name in OBJECTIVES] + [("ipo", False)]


def test_every_objective_of_the_engine_is_here():
    assert set(TERMS) == set(OBJECTIVES)
    for name, objective in OBJECTIVES.items():
        assert TERMS[name].reference == objective.needs_reference
        assert TERMS[name].reward == (objective.head == "reward")
        read = set(objective.keys) - {"beta", "ipo_average"}
        assert read == set(TERMS[name].numbers)


@pytest.mark.parametrize(("name", "average"), CASES)
@pytest.mark.parametrize("trees", [1, 5])
def test_loss_metrics_rewards_and_slopes(name, average, trees, device, monkeypatch):
    monkeypatch.setattr(module, "POSITION_BLOCK", 16)  # spans and entries of several steps
    monkeypatch.setattr(module, "LANES", 4)  # and sequences and comparisons of several
    forest = Forest(trees, seed=trees)
    arguments = (forest, name, 0.25, 3.0, average)
    agree(found(*arguments, device), truth(*arguments), 100, name, forest)


@pytest.mark.parametrize("kl", [-2.0, 0.0, 7.5])
def test_kto_with_absent_sides_and_any_estimate(kl, device):
    forest = Forest(6, seed=3, unpaired=True)
    sides = forest.structure.comparisons
    assert bool((sides[:, 0] < 0).any())
    assert bool((sides[:, 1] < 0).any())
    arguments = (forest, "kto", 0.25, kl, True)
    agree(found(*arguments, device), truth(*arguments), 100, "kto", forest)


@pytest.mark.parametrize(("name", "average"), CASES)
def test_extremes_of_both_signs_and_ties(name, average, device):
    """One scored position per sequence, so that its log-prob, and the margin with it, can be anything."""
    sizes = [0.0, 1e-3, 1.0, -1.0, 20.0, -20.0, -90.0, 1e4, -1e4]
    pairs = [(a, b) for a in sizes for b in sizes]
    forest = Forest(0)
    count = 2 * len(pairs)
    values = torch.tensor(pairs).flatten()
    if name in ("orpo", "simpo", "sft"):
        values = -values.abs()  # a log-prob, not a difference of two
    line = torch.arange(count + 1, dtype=torch.int32)
    forest.structure = Structure(
        span_start=line,
        span_pointer=line,
        span_index=line[:-1],
        comparisons=line[:-1].reshape(-1, 2),
        tree_start=torch.tensor([[0, 0, 0], [100, 100, 50], [count, count, count // 2]], dtype=torch.int32),
        scored=torch.ones(count, dtype=torch.int32),
        absolute=line[: count // 2] % 2 == 0,
    )
    forest.span, forest.reference = line[:-1], torch.zeros(count)
    arguments = (forest, name, 1.0, 1.0, average)
    ours, theirs = found(*arguments, device, values), truth(*arguments, values)
    assert all(bool(x.isfinite().all()) for x in ours)
    # orpo: the odds of a probability that rounds to 1 are held at the rounding step of the type, float32's or float64's
    if name == "orpo":
        keep = (values.reshape(-1, 2) < -1e-6).all(1)
        assert 50 < int(keep.sum()) < len(keep)
        torch.testing.assert_close(ours[2].double(), theirs[2], rtol=1e-6, atol=1e-6)
        theirs[3] = theirs[3].reshape(-1, 2)[keep]
        ours[3] = ours[3].reshape(-1, 2)[keep]
    else:
        torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)
    # one term each: no cancellation but that of the two inputs, exact where they differ much; slopes of 1e-39 vanish
    scale = 1e-3 if name == "ipo" else 1e-6
    torch.testing.assert_close(ours[3].double(), theirs[3], rtol=2e-5, atol=scale)


def test_small_losses_keep_their_digits(device):
    """-log sigma(x) is exp(-x) for large x: relative precision, also of the slope."""
    forest = Forest(0)
    margin = torch.linspace(0.1, 80, 60)
    values = torch.stack([margin, torch.zeros(60)], 1).flatten()
    forest.structure = forest.structure._replace(
        comparisons=torch.arange(120, dtype=torch.int32).reshape(-1, 2),
        tree_start=torch.tensor([[0, p, p // 2] for p in range(0, 122, 2)], dtype=torch.int32),
        scored=torch.ones(120, dtype=torch.int32),
        absolute=torch.zeros(60, dtype=torch.bool),
    )
    forest.reference = values
    ours, theirs = (
        found(forest, "bt", 1.0, 0.0, True, device, values),
        truth(forest, "bt", 1.0, 0.0, True, values),
    )
    torch.testing.assert_close(ours[3].double(), theirs[3], rtol=1e-5, atol=0)
    for p in (0, 20, 59):
        forest.structure = forest.structure._replace(
            comparisons=torch.tensor([[2 * p, 2 * p + 1]], dtype=torch.int32),
            tree_start=torch.tensor([[0, 0, 0], [0, 120, 1]], dtype=torch.int32),
        )
        loss = found(forest, "bt", 1.0, 0.0, True, device, values)[0]
        torch.testing.assert_close(
            loss.double(), truth(forest, "bt", 1.0, 0.0, True, values)[0], rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", ["dpo", "sft", "bt"])
def test_nothing_to_compare(name, device):
    """No tree at all; trees whose sequences score nothing and are compared with nobody."""
    ours = found(Forest(0), name, 0.1, 0.0, True, device)
    assert ours[0] == 0
    assert not ours[1].any()
    assert ours[3].shape == (0,)
    forest = Forest(2)
    forest.structure = forest.structure._replace(
        comparisons=torch.zeros(0, 2, dtype=torch.int32),
        absolute=torch.zeros(0, dtype=torch.bool),
        span_pointer=torch.zeros_like(forest.structure.span_pointer),
        span_index=torch.zeros(0, dtype=torch.int32),
        tree_start=forest.structure.tree_start * torch.tensor([1, 1, 0], dtype=torch.int32),
    )
    ours = found(forest, name, 0.1, 0.0, True, device)
    assert ours[0] == 0
    assert not ours[3].any()


def test_the_same_bits_every_time_and_in_every_company(device):
    """A tree's slopes do not depend on the trees beside it, and a launch leaves nothing behind for the next."""
    forest = Forest(7, seed=5)
    first, second = (found(forest, "dpo", 0.1, 0.0, True, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    s = forest.structure
    spans, _, comparisons = s.tree_start[3].tolist()
    forest.structure = s._replace(tree_start=s.tree_start[:4])
    positions = int(s.span_start[spans])
    forest.logprob = forest.logprob[:positions]
    alone = found(forest, "dpo", 0.1, 0.0, True, device)
    assert torch.equal(alone[3], first[3][:positions])
    assert torch.equal(alone[2][:comparisons], first[2][:comparisons])


def test_a_policy_that_is_its_own_reference_has_no_margin(device):
    """Log-probs near -500, whose sums in float32 depend on their order: the kernel's are those of `sequence_sums`."""
    forest = Forest(5, seed=8, longest=300)
    forest.reference = forest.sums(forest.logprob)
    assert float(forest.reference.min()) < -500
    loss, sums, rewards, _ = found(forest, "dpo", 0.1, 0.0, True, device)
    assert not rewards.any()
    assert not sums[1:4].any()
    assert float(loss) == pytest.approx(len(rewards) * math.log(2), rel=1e-6)


def test_strided_inputs(device):
    forest = Forest(4, seed=2)
    expected = found(forest, "dpo", 0.1, 0.0, True, device)
    forest.reference = forest.reference.double().repeat_interleave(2)[::2]
    s = forest.structure
    forest.structure = s._replace(
        comparisons=s.comparisons.repeat(1, 2)[:, :2], tree_start=s.tree_start.T.contiguous().T
    )
    forest.logprob = forest.logprob.repeat_interleave(3)[::3]
    strided = found(forest, "dpo", 0.1, 0.0, True, device)
    assert all(map(torch.equal, strided, expected))


def test_not_a_number_is_not_hidden(device):
    forest = Forest(3, seed=1)
    forest.logprob[5] = torch.nan
    assert found(forest, "sft", 0.1, 0.0, True, device)[0].isnan()


def test_what_is_missing_is_named():
    forest = Forest(1)
    for name, match in [("dpo", "reference_logprob"), ("ppo", "no objective 'ppo'")]:
        with pytest.raises(ValueError, match=match):
            preference_loss(forest.logprob, forest.structure, name)
    with pytest.raises(ValueError, match="kl"):
        preference_loss(forest.logprob, forest.structure, "kto", reference_logprob=forest.reference)
