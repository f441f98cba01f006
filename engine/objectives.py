"""The losses: pure functions from log-probabilities or rewards to one loss and two rewards per comparison.

Nothing here knows a model, a recipe file or a process group. What a loss needs from the whole global batch
(KTO's KL estimate) comes in as an argument; dividing by the global count is the trainer's.

    N sequences, P comparisons (chosen, rejected)
    s = log pi - log pi_ref, summed over a response's scored tokens;  r = beta * s
    sigma = the logistic function

Every function takes (P,) tensors, one entry per comparison, and computes in at least float32 (bfloat16 and
float16 are widened first, float64 stays). The loss carries the gradient; the two rewards are detached, since
they are there to be looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from silva.engine.config import OBJECTIVE_KEYS


class Preference(NamedTuple):
    """What every objective returns: each (P,), at least float32. `sft` has (N,) losses and no rewards."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    return _wide(policy) - _wide(reference)


def _token_mean(total: Tensor, length: Tensor) -> Tensor:
    """Mean per token; a response without tokens has the mean 0, not NaN."""
    return total / length.clamp(min=1)


def _preference(loss: Tensor, chosen_reward: Tensor, rejected_reward: Tensor) -> Preference:
    return Preference(loss, chosen_reward.detach(), rejected_reward.detach())


def sft(policy: Tensor) -> Preference:
    """-log pi(response), summed over its scored tokens. Divided by the global count of scored tokens this is
    the mean cross-entropy.

    policy: (N,) log-probs, one per *sequence*. Returns an (N,) loss and two empty rewards.
    """
    loss = -_wide(policy)
    return _preference(loss, loss.new_empty(0), loss.new_empty(0))


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Preference:
    """-log sigma(r_c - r_r). Rafailov et al. 2023, arXiv 2305.18290, eq. 7."""
    chosen = beta * _log_ratio(policy_chosen, reference_chosen)
    rejected = beta * _log_ratio(policy_rejected, reference_rejected)
    return _preference(-logsigmoid(chosen - rejected), chosen, rejected)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float,
    average: bool = True,
) -> Preference:
    """(s_c - s_r - 1/(2 beta))^2. Azar et al. 2023, arXiv 2310.12036, eq. 17 (beta is the paper's tau).

    `average` takes s as a mean per token, as TRL and HALOs do, so that the squared loss does not grow with
    the length of a response; without it s is the sum, as the paper writes it. *_length: (P,) counts of scored
    tokens. The rewards are beta * (summed s) either way, so that they compare with the other objectives'.
    """
    chosen = _log_ratio(policy_chosen, reference_chosen)
    rejected = _log_ratio(policy_rejected, reference_rejected)
    if average:
        margin = _token_mean(chosen, chosen_length) - _token_mean(rejected, rejected_length)
    else:
        margin = chosen - rejected
    return _preference((margin - 1 / (2 * beta)).square(), beta * chosen, beta * rejected)


def cdpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Preference:
    """-(1 - e) log sigma(r_c - r_r) - e log sigma(r_r - r_c), e = label_smoothing: DPO when a share e of the
    labels is flipped. Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".

    TRL's "robust" is another loss (rDPO, arXiv 2403.00409): it *subtracts* the flipped term and divides by
    1 - 2e.
    """
    chosen = beta * _log_ratio(policy_chosen, reference_chosen)
    rejected = beta * _log_ratio(policy_rejected, reference_rejected)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return _preference(loss, chosen, rejected)


def hinge(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Preference:
    """max(0, 1 - (r_c - r_r)). SLiC-HF's loss (arXiv 2305.10425) in the normalised form of RSO,
    Liu et al. 2023, arXiv 2309.06657."""
    chosen = beta * _log_ratio(policy_chosen, reference_chosen)
    rejected = beta * _log_ratio(policy_rejected, reference_rejected)
    return _preference(torch.relu(1 - (chosen - rejected)), chosen, rejected)


def nca(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Preference:
    """-log sigma(r_c) - 1/2 log sigma(-r_c) - 1/2 log sigma(-r_r): the pair form (K = 2) of NCA.
    Chen et al. 2024, arXiv 2402.05369."""
    chosen = beta * _log_ratio(policy_chosen, reference_chosen)
    rejected = beta * _log_ratio(policy_rejected, reference_rejected)
    loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return _preference(loss, chosen, rejected)


def kto(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    kl: Tensor,
    *,
    beta: float,
    lambda_desirable: float,
    lambda_undesirable: float,
    has_chosen: Tensor | None = None,
    has_rejected: Tensor | None = None,
) -> Preference:
    """lambda_D (1 - sigma(r_c - z0)) + lambda_U (1 - sigma(z0 - r_r)), z0 = max(0, beta * kl), detached.
    Ethayarajh et al. 2024, arXiv 2402.01306, section 4.

    kl: scalar, the mean of s over the mismatched pairs of the *global batch*; the function clamps and
    detaches it. has_chosen, has_rejected: (P,) bool. An absent side adds no loss, no gradient and the
    reward 0; its inputs must be finite. The loss sums both sides: divide by the number of sides, not of
    comparisons.
    """
    chosen = beta * _log_ratio(policy_chosen, reference_chosen)
    rejected = beta * _log_ratio(policy_rejected, reference_rejected)
    baseline = beta * _wide(kl).detach().clamp(min=0)
    # 1 - sigma(x) is sigma(-x), which keeps its digits where sigma(x) has rounded to 1.
    chosen_loss = lambda_desirable * torch.sigmoid(baseline - chosen)
    rejected_loss = lambda_undesirable * torch.sigmoid(rejected - baseline)
    if has_chosen is not None:
        chosen, chosen_loss = chosen.where(has_chosen, 0.0), chosen_loss.where(has_chosen, 0.0)
    if has_rejected is not None:
        rejected, rejected_loss = rejected.where(has_rejected, 0.0), rejected_loss.where(has_rejected, 0.0)
    return _preference(chosen_loss + rejected_loss, chosen, rejected)


def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Preference:
    """-log sigma(r_c - r_r - gamma), r = beta * mean per token of log pi; no reference policy.
    Meng et al. 2024, arXiv 2405.14734, eq. 6 (its beta is 2 to 10, far above DPO's)."""
    chosen = beta * _token_mean(_wide(policy_chosen), chosen_length)
    rejected = beta * _token_mean(_wide(policy_rejected), rejected_length)
    return _preference(-logsigmoid(chosen - rejected - gamma), chosen, rejected)


def orpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float,
) -> Preference:
    """-log p_c - beta * log sigma(log odds(p_c) - log odds(p_r)), log p = mean per token of log pi and
    odds(p) = p / (1 - p). Hong et al. 2024, arXiv 2403.07691, eq. 4, 6 and 7 (beta is the paper's lambda).

    The first term is the chosen response's own token mean, as in the paper; TRL takes one mean over all
    tokens of the micro-batch, prompts included.
    """
    chosen = _token_mean(_wide(policy_chosen), chosen_length)
    rejected = _token_mean(_wide(policy_rejected), rejected_length)
    log_odds_ratio = (chosen - rejected) - (_log1m_exp(chosen) - _log1m_exp(rejected))
    return _preference(-chosen - beta * logsigmoid(log_odds_ratio), beta * chosen, beta * rejected)


def _log1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, by the branch that does not cancel.

    A probability that rounds to 1 has infinite odds; it is held one rounding step below 1, where value and
    gradient are finite.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def bt(reward_chosen: Tensor, reward_rejected: Tensor) -> Preference:
    """-log sigma(R_c - R_r), R the reward head's output. Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155,
    eq. 1."""
    return bt_margin(reward_chosen, reward_rejected, margin=0.0)


def bt_margin(reward_chosen: Tensor, reward_rejected: Tensor, *, margin: float | Tensor) -> Preference:
    """-log sigma(R_c - R_r - margin). Touvron et al. 2023 (Llama 2), arXiv 2307.09288, eq. 2.

    margin: one number, or (P,).
    """
    chosen, rejected = _wide(reward_chosen), _wide(reward_rejected)
    return _preference(-logsigmoid(chosen - rejected - margin), chosen, rejected)


def bt_dr(reward_chosen: Tensor, reward_rejected: Tensor, absolute: Tensor) -> Preference:
    """L_BT + L_DR = -log sigma(R_c - R_r) - log sigma(R_c) - log sigma(-R_r), the last two only where
    `absolute` (P,) bool. Yuan et al. 2024 (Eurus), arXiv 2404.02078, section 3."""
    chosen, rejected = _wide(reward_chosen), _wide(reward_rejected)
    direct = -logsigmoid(chosen) - logsigmoid(-rejected)
    return _preference(-logsigmoid(chosen - rejected) + direct.where(absolute.bool(), 0.0), chosen, rejected)


# ---------------------------------------------------------------- one call for every objective


class Settings(Protocol):
    """The hyper-parameters an objective may read: `config.Objective`, or anything with these attributes."""

    @property
    def beta(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def margin(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def ipo_average(self) -> bool: ...
    @property
    def lambda_desirable(self) -> float: ...
    @property
    def lambda_undesirable(self) -> float: ...


class _Batch(NamedTuple):
    """A batch by sides, each pair (chosen, rejected) of (P,) tensors. An absent side holds finite numbers."""

    policy: tuple[Tensor, Tensor]  # log-probs, or rewards
    reference: tuple[Tensor, Tensor]
    lengths: tuple[Tensor, Tensor]
    present: tuple[Tensor, Tensor]
    absolute: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Objective:
    """One row of the table of objectives: what the trainer must provide, and how the loss is called.

    head: what the model returns per sequence, a log-prob ("lm") or a reward ("reward").
    unit: what the global count counts: scored tokens, comparisons, or present sides of comparisons.
    """

    name: str
    call: Callable[[_Batch, Settings], Preference] | None  # None: sft, whose loss is per sequence
    head: Literal["lm", "reward"] = "lm"
    unit: Literal["token", "comparison", "side"] = "comparison"
    needs_reference: bool = True
    needs_kl: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """The keys of the recipe's `objective` section this objective reads."""
        return OBJECTIVE_KEYS[self.name]

    def preference(
        self,
        policy: Tensor,
        reference: Tensor,
        lengths: Tensor,
        comparisons: Tensor,
        absolute: Tensor,
        kl: Tensor | None,
        settings: Settings,
    ) -> Preference:
        """Gathers the two sides of every comparison and calls the loss.

        policy: (N,) log-probs or rewards. reference: (N,) log-probs, read only if `needs_reference`.
        lengths: (N,) scored tokens. comparisons: (P, 2) integer, -1 for an absent side (kto alone takes it).
        absolute: (P,) bool, read by bt_dr. kl: scalar, read only if `needs_kl`.
        Raises ValueError where `needs_kl` and kl is None.
        """
        if self.call is None:
            return sft(policy)
        if self.needs_kl and kl is None:
            raise ValueError(f"objective {self.name} needs the KL estimate of the global batch")
        chosen, rejected = comparisons.clamp(min=0).long().unbind(1)
        reference = reference if self.needs_reference else torch.zeros_like(policy)
        has_chosen, has_rejected = (comparisons >= 0).unbind(1)
        batch = _Batch(
            policy=(policy[chosen], policy[rejected]),
            reference=(reference[chosen], reference[rejected]),
            lengths=(lengths[chosen], lengths[rejected]),
            present=(has_chosen, has_rejected),
            absolute=absolute,
            kl=policy.new_zeros(()) if kl is None else kl,
        )
        return self.call(batch, settings)


def _kto(batch: _Batch, settings: Settings) -> Preference:
    return kto(
        *batch.policy,
        *batch.reference,
        batch.kl,
        beta=settings.beta,
        lambda_desirable=settings.lambda_desirable,
        lambda_undesirable=settings.lambda_undesirable,
        has_chosen=batch.present[0],
        has_rejected=batch.present[1],
    )


_TABLE = (
    Objective("sft", None, unit="token", needs_reference=False),
    Objective("dpo", lambda x, o: dpo(*x.policy, *x.reference, beta=o.beta)),
    Objective(
        "ipo", lambda x, o: ipo(*x.policy, *x.reference, *x.lengths, beta=o.beta, average=o.ipo_average)
    ),
    Objective(
        "cdpo", lambda x, o: cdpo(*x.policy, *x.reference, beta=o.beta, label_smoothing=o.label_smoothing)
    ),
    Objective("hinge", lambda x, o: hinge(*x.policy, *x.reference, beta=o.beta)),
    Objective("nca", lambda x, o: nca(*x.policy, *x.reference, beta=o.beta)),
    Objective("kto", _kto, unit="side", needs_kl=True),
    Objective(
        "simpo", lambda x, o: simpo(*x.policy, *x.lengths, beta=o.beta, gamma=o.gamma), needs_reference=False
    ),
    Objective("orpo", lambda x, o: orpo(*x.policy, *x.lengths, beta=o.beta), needs_reference=False),
    Objective("bt", lambda x, _: bt(*x.policy), "reward", needs_reference=False),
    Objective(
        "bt_margin", lambda x, o: bt_margin(*x.policy, margin=o.margin), "reward", needs_reference=False
    ),
    Objective("bt_dr", lambda x, _: bt_dr(*x.policy, x.absolute), "reward", needs_reference=False),
)
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _TABLE}
