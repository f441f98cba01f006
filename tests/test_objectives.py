"""Every loss and its gradient against a float64 definition written out here, and against TRL's own code."""

import math
from types import SimpleNamespace

import pytest
import torch
import trl_losses

from silva.engine import objectives
from silva.engine.objectives import OBJECTIVES, Preference
from silva.engine.recipe import schema as config

torch.set_num_threads(1)

SETTINGS = config.Objective(
    name="dpo",
    beta=0.25,
    lambda_desirable=1.33,
    lambda_undesirable=0.8,
    label_smoothing=0.2,
    gamma=0.7,
    margin=0.4,
)
KL = 3.0
N, P = 9, 14


class Batch:
    """N sequences with log-probs around -20 or rewards around 0, compared P times: most more than once."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, unpaired: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float, shift: float) -> torch.Tensor:
            draw = torch.randn(N, generator=generator, dtype=torch.float64)
            return (draw * scale + shift).to(dtype)

        self.policy = normal(6, -20).clamp(max=-0.5).requires_grad_()
        self.reference = normal(6, -20).clamp(max=-0.5)
        self.rewards = normal(2, 0).requires_grad_()
        self.lengths = torch.randint(1, 30, (N,), generator=generator)
        self.lengths[5] = 1
        self.comparisons = torch.stack([torch.randperm(N, generator=generator)[:2] for _ in range(P)]).int()
        self.absolute = torch.rand(P, generator=generator) < 0.5
        if unpaired:
            self.comparisons[2, 0] = self.comparisons[5, 0] = self.comparisons[3, 1] = -1

    def leaf(self, name: str) -> torch.Tensor:
        return self.rewards if OBJECTIVES[name].head == "reward" else self.policy

    def run(self, name: str, settings: config.Objective = SETTINGS, kl: float = KL) -> Preference:
        return OBJECTIVES[name].preference(
            self.leaf(name),
            self.reference,
            self.lengths,
            self.comparisons,
            self.absolute,
            torch.tensor(kl),
            settings,
        )


# ---------------------------------------------------------------- the equations, in plain Python floats


def log_sigmoid(x):
    return torch.log(1 / (1 + torch.exp(-x)))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def definition(name: str, batch: Batch, p: int) -> torch.Tensor:
    """The loss of comparison p, straight from the papers: naive formulas, float64, no batching."""
    beta, gamma, e = SETTINGS.beta, SETTINGS.gamma, SETTINGS.label_smoothing
    c, r = batch.comparisons[p].tolist()
    value, length = batch.leaf(name), batch.lengths.double()
    s_c, s_r = (value - batch.reference)[c], (value - batch.reference)[r]
    margin = beta * s_c - beta * s_r
    mean_c, mean_r = value[c] / length[c], value[r] / length[r]
    z0 = max(0.0, beta * KL)
    match name:
        case "dpo":
            return -log_sigmoid(margin)
        case "ipo":
            return (s_c / length[c] - s_r / length[r] - 1 / (2 * beta)) ** 2
        case "cdpo":
            return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)
        case "hinge":
            return torch.maximum(torch.zeros(()), 1 - margin)
        case "nca":
            return -log_sigmoid(beta * s_c) - log_sigmoid(-beta * s_c) / 2 - log_sigmoid(-beta * s_r) / 2
        case "kto":
            desirable = SETTINGS.lambda_desirable * (1 - sigmoid(beta * s_c - z0))
            undesirable = SETTINGS.lambda_undesirable * (1 - sigmoid(z0 - beta * s_r))
            return (desirable if c >= 0 else 0) + (undesirable if r >= 0 else 0)
        case "simpo":
            return -log_sigmoid(beta * mean_c - beta * mean_r - gamma)
        case "orpo":
            odds_c = torch.exp(mean_c) / (1 - torch.exp(mean_c))
            odds_r = torch.exp(mean_r) / (1 - torch.exp(mean_r))
            return -mean_c - beta * log_sigmoid(torch.log(odds_c / odds_r))
        case "bt":
            return -log_sigmoid(value[c] - value[r])
        case "bt_margin":
            return -log_sigmoid(value[c] - value[r] - SETTINGS.margin)
        case "bt_dr":
            direct = -log_sigmoid(value[c]) - log_sigmoid(-value[r]) if batch.absolute[p] else 0
            return -log_sigmoid(value[c] - value[r]) + direct
    raise AssertionError(name)


PAIRED = [name for name in OBJECTIVES if name != "sft"]


@pytest.mark.parametrize(("name", "unpaired"), [*((name, False) for name in PAIRED), ("kto", True)])
def test_loss_and_gradient_are_the_definitions(name, unpaired):
    batch = Batch(unpaired=unpaired)
    got = batch.run(name).loss
    wanted = torch.stack([definition(name, batch, p) for p in range(P)])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    # A random weight per comparison, so that no two gradients can stand in for each other.
    weight = torch.randn(P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = batch.leaf(name)
    torch.testing.assert_close(
        *(torch.autograd.grad((weight * loss).sum(), leaf)[0] for loss in (got, wanted)),
        rtol=1e-9,
        atol=1e-12,
    )


def test_sft_is_the_negative_log_prob():
    batch = Batch()
    result = batch.run("sft")
    assert torch.equal(result.loss, -batch.policy)
    assert torch.equal(
        torch.autograd.grad(result.loss.sum(), batch.policy)[0], -torch.ones(N, dtype=torch.float64)
    )
    assert result.chosen_reward.shape == result.rejected_reward.shape == (0,)


def test_ipo_as_a_sum():
    batch = Batch()
    c, r = batch.comparisons.long().unbind(1)
    s = batch.policy - batch.reference
    wanted = (s[c] - s[r] - 1 / (2 * SETTINGS.beta)) ** 2
    got = batch.run("ipo", SETTINGS.model_copy(update={"ipo_average": False})).loss
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PAIRED)
def test_rewards(name):
    batch = Batch(unpaired=name == "kto")
    result = batch.run(name)
    c, r = batch.comparisons.long().unbind(1)
    if OBJECTIVES[name].head == "reward":
        reward = batch.rewards
    elif name in ("simpo", "orpo"):
        reward = SETTINGS.beta * batch.policy / batch.lengths
    else:
        reward = SETTINGS.beta * (batch.policy - batch.reference)
    for side, got in ((c, result.chosen_reward), (r, result.rejected_reward)):
        assert not got.requires_grad
        torch.testing.assert_close(
            got, torch.where(side >= 0, reward[side], 0.0).detach(), rtol=1e-12, atol=0
        )


def test_margin_per_comparison():
    batch = Batch()
    c, r = batch.comparisons.long().unbind(1)
    chosen, rejected = batch.rewards[c], batch.rewards[r]
    margin = torch.linspace(0, 2, P, dtype=torch.float64)
    got = objectives.bt_margin(chosen, rejected, margin=margin).loss
    torch.testing.assert_close(got, -log_sigmoid(chosen - rejected - margin), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- kto's two peculiarities


def test_the_kl_estimate_is_clamped_and_detached():
    batch = Batch()
    c, r = batch.comparisons.long().unbind(1)
    sides = (batch.policy[c], batch.policy[r], batch.reference[c], batch.reference[r])
    keys = {"beta": 0.25, "lambda_desirable": 1.0, "lambda_undesirable": 1.0}
    zero = objectives.kto(*sides, torch.tensor(0.0), **keys)
    negative = objectives.kto(*sides, torch.tensor(-5.0), **keys)
    assert torch.equal(zero.loss, negative.loss)
    kl = torch.tensor(3.0, requires_grad=True)
    objectives.kto(*sides, kl, **keys).loss.sum().backward()
    assert kl.grad is None


def test_an_absent_side_adds_nothing():
    batch = Batch(unpaired=True)
    result = batch.run("kto")
    assert result.chosen_reward[2] == result.chosen_reward[5] == result.rejected_reward[3] == 0
    (gradient,) = torch.autograd.grad(result.loss[[2, 5]].sum(), batch.policy)
    touched = set(batch.comparisons[[2, 5], 1].tolist())
    assert set(gradient.nonzero().flatten().tolist()) == touched
    with pytest.raises(ValueError, match="needs the KL estimate"):
        OBJECTIVES["kto"].preference(
            batch.policy, batch.reference, batch.lengths, batch.comparisons, batch.absolute, None, SETTINGS
        )


# ---------------------------------------------------------------- extremes, shapes, types


@pytest.mark.parametrize("name", PAIRED)
def test_float32_stays_finite_at_extremes(name):
    values = torch.tensor([-1e4, -300.0, -1e-3, -1e-12, 0.0, 300.0, 1e4])
    if name == "orpo":
        values = values[values <= 0]  # a log-prob; its own limit is p = 1, where the odds are infinite
    pairs = torch.cartesian_prod(torch.arange(len(values)), torch.arange(len(values))).int()
    for reference in (torch.zeros_like(values), values.flip(0)):
        leaf = values.clone().requires_grad_()
        result = OBJECTIVES[name].preference(
            leaf,
            reference,
            torch.ones(len(values), dtype=torch.int64),
            pairs,
            torch.ones(len(pairs), dtype=torch.bool),
            torch.tensor(1e4),
            SETTINGS,
        )
        (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
        for tensor in (*result, gradient):
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all()
        assert (result.loss >= 0).all()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_no_comparisons(name):
    """A row may hold sequences and no comparison, or (as the filling rows of a short rank) neither."""
    for sequences in (0, 3):
        leaf = torch.zeros(sequences, requires_grad=True)
        result = OBJECTIVES[name].preference(
            leaf,
            torch.zeros(sequences),
            torch.ones(sequences, dtype=torch.int32),
            torch.zeros((0, 2), dtype=torch.int32),
            torch.zeros(0, dtype=torch.bool),
            torch.tensor(0.0),
            SETTINGS,
        )
        assert result.loss.shape == ((sequences,) if name == "sft" else (0,))
        assert result.chosen_reward.shape == result.rejected_reward.shape == (0,)
        result.loss.sum().backward()
        assert leaf.grad is not None


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_at_least_float32(name, dtype):
    batch = Batch(dtype=dtype)
    wide = Batch(dtype=dtype)
    if dtype.itemsize == 2:
        for field in ("policy", "reference", "rewards"):
            setattr(wide, field, getattr(wide, field).float())
    got, wanted = batch.run(name), wide.run(name)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(one, other)  # the widening is exact, so is the rest


# ---------------------------------------------------------------- the table


def test_the_table():
    assert list(OBJECTIVES) == [
        "sft",
        "dpo",
        "ipo",
        "cdpo",
        "hinge",
        "nca",
        "kto",
        "simpo",
        "orpo",
        "bt",
        "bt_margin",
        "bt_dr",
    ]
    rewards = {name for name, objective in OBJECTIVES.items() if objective.head == "reward"}
    assert rewards == {"bt", "bt_margin", "bt_dr"}
    free = {name for name, objective in OBJECTIVES.items() if not objective.needs_reference}
    assert free == {"sft", "simpo", "orpo", *rewards}
    assert [name for name, objective in OBJECTIVES.items() if objective.needs_kl] == ["kto"]
    units = {name: objective.unit for name, objective in OBJECTIVES.items() if objective.unit != "comparison"}
    assert units == {"sft": "token", "kto": "side"}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_each_objective_reads_its_keys_and_no_others(name):
    """What `keys` names changes the loss; what it does not name does not. The same for the reference."""
    before = Batch().run(name)
    other = {
        "beta": 0.3,
        "lambda_desirable": 2.0,
        "lambda_undesirable": 2.0,
        "ipo_average": False,
        "label_smoothing": 0.1,
        "gamma": 0.1,
        "margin": 1.0,
    }
    for key, value in other.items():
        after = Batch().run(name, SETTINGS.model_copy(update={key: value}))
        assert torch.equal(before.loss, after.loss) == (key not in OBJECTIVES[name].keys)
    assert torch.equal(before.loss, Batch().run(name, kl=1.0).loss) == (not OBJECTIVES[name].needs_kl)
    batch = Batch()
    batch.reference = (
        batch.reference - torch.arange(N) if OBJECTIVES[name].needs_reference else torch.empty(0)
    )
    assert torch.equal(before.loss, batch.run(name).loss) == (not OBJECTIVES[name].needs_reference)


# ---------------------------------------------------------------- TRL


@pytest.mark.parametrize(
    ("name", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("hinge", "hinge"), ("nca", "nca_pair")]
)
def test_trl_dpo_trainer(name, loss_type):
    batch = Batch()
    sides = batch.comparisons.long().T.flatten()  # TRL's order: all chosen, then all rejected
    theirs, metrics = trl_losses.dpo_loss(
        batch.policy[sides], batch.reference[sides], batch.lengths[sides], loss_type, SETTINGS
    )
    ours = batch.run(name)
    compare(ours.loss.mean(), theirs, batch.policy)
    assert metrics["rewards/chosen"][0] == pytest.approx(ours.chosen_reward.mean().item(), rel=1e-9)
    assert metrics["rewards/rejected"][0] == pytest.approx(ours.rejected_reward.mean().item(), rel=1e-9)


def test_trl_kto_trainer():
    """TRL takes unpaired rows: ours, one comparison per row with the other side absent, is the same mean."""
    from trl import KTOTrainer

    batch = Batch()
    label = torch.arange(N) % 3 != 0
    index = torch.arange(N).int()
    absent = torch.full_like(index, -1)
    batch.comparisons = torch.stack([index.where(label, absent), index.where(~label, absent)], dim=1)
    outputs, mask = trl_losses.token_outputs(batch.policy, batch.lengths)
    stand_in = trl_losses.trainer(
        SETTINGS,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=SETTINGS.lambda_desirable,
        undesirable_weight=SETTINGS.lambda_undesirable,
        _compute_kl_logps=lambda model, inputs: torch.full((N,), KL, dtype=torch.float64),
    )
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(),
        "label": label,
        "ref_logps": batch.reference,
        "ref_KL_logps": torch.zeros(N, dtype=torch.float64),
    }
    theirs = KTOTrainer._compute_loss(stand_in, lambda **_: outputs, inputs, False)
    compare(batch.run("kto").loss.mean(), theirs, batch.policy)


@pytest.mark.parametrize("name", ["bt", "bt_margin"])
def test_trl_reward_trainer(name):
    from trl import RewardTrainer

    batch = Batch()
    sides = batch.comparisons.long().T.flatten()
    outputs = SimpleNamespace(logits=batch.rewards[sides][:, None])
    inputs = {"attention_mask": torch.ones(2 * P, 3)}
    if name == "bt_margin":
        inputs["margin"] = torch.full((P,), SETTINGS.margin, dtype=torch.float64)
    stand_in = trl_losses.trainer(SETTINGS, args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = RewardTrainer.compute_loss(stand_in, lambda **_: outputs, inputs)
    compare(batch.run(name).loss.mean(), theirs, batch.rewards)


@pytest.mark.parametrize("name", ["simpo", "cdpo"])
def test_trl_cpo_trainer(name, monkeypatch):
    """SimPO lives in TRL's CPO trainer. So does cDPO's formula, there without a reference: it gets ratios."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    batch = Batch()
    smoothing = SETTINGS.label_smoothing if name == "cdpo" else 0.0
    stand_in = SimpleNamespace(
        accelerator=trl_losses.Accelerator(),
        alpha=0.0,
        beta=SETTINGS.beta,
        simpo_gamma=SETTINGS.gamma,
        label_smoothing=smoothing,
        loss_type="simpo" if name == "simpo" else "sigmoid",
    )
    value = batch.policy / batch.lengths if name == "simpo" else batch.policy - batch.reference
    c, r = batch.comparisons.long().unbind(1)
    losses, chosen, rejected = CPOTrainer.cpo_loss(stand_in, value[c], value[r])
    ours = batch.run(name)
    compare(ours.loss, losses, batch.policy)
    torch.testing.assert_close(
        (ours.chosen_reward, ours.rejected_reward), (chosen, rejected), rtol=1e-12, atol=0
    )


def test_trl_orpo_trainer(monkeypatch):
    """The odds-ratio term alone, in float32: TRL's other term also averages over the prompt's tokens."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    batch = Batch()
    mean = batch.policy / batch.lengths
    c, r = batch.comparisons.long().unbind(1)
    stand_in = SimpleNamespace(accelerator=trl_losses.Accelerator(), beta=SETTINGS.beta)
    theirs = ORPOTrainer.odds_ratio_loss(stand_in, mean[c], mean[r])
    torch.testing.assert_close(batch.run("orpo").loss + mean[c], -theirs[0].double(), rtol=1e-5, atol=1e-7)


def compare(ours, theirs, leaf, rtol=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    weight = torch.ones_like(ours) if ours.ndim == 0 else torch.linspace(-1, 1, len(ours), dtype=ours.dtype)
    gradients = [torch.autograd.grad((weight * loss).sum(), leaf)[0] for loss in (ours, theirs)]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12)


def test_known_values():
    """By hand: indifference costs log 2 per log-sigmoid."""
    zero = torch.zeros(1)
    assert objectives.dpo(zero, zero, zero, zero, beta=0.1).loss.item() == pytest.approx(math.log(2))
    assert objectives.nca(zero, zero, zero, zero, beta=0.1).loss.item() == pytest.approx(2 * math.log(2))
    assert objectives.bt_dr(zero, zero, torch.ones(1, dtype=torch.bool)).loss.item() == pytest.approx(
        3 * math.log(2)
    )
    assert objectives.ipo(
        zero, zero, zero, zero, torch.ones(1), torch.ones(1), beta=0.1
    ).loss.item() == pytest.approx(25)
