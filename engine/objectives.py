"""Defines the losses: pure functions from log-probabilities or rewards to one loss and two rewards per comparison.

Nothing here knows a model, a recipe file or a process group. What a loss needs from the whole global batch (KTO's KL
estimate) comes in as an argument; the training step divides by the global count.

    N sequences, P comparisons (chosen, rejected)
    s = log pi - log pi_ref, summed over a response's scored tokens;  r = beta * s
    sigma = the logistic function

Every function takes (P,) tensors, one entry per comparison, and computes in at least float32 (bfloat16 and float16 are
widened first, float64 stays). The loss carries the gradient; the two rewards are detached, since they are only
reported.

A new loss is one function and one row of the table at the end. The function's signature says what it needs: each of
its parameters is one of `INPUTS`, or a key of the recipe's `objective` section (`silva.engine.recipe.schema`). It then
runs on every device through autograd. A fused kernel (`silva.kernels.preference_terms`) may be added; it has to agree
with the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# The inputs that a loss may ask for, by the name of its parameter. Each is (P,), except `policy` and `kl`.
INPUTS = {
    "policy": "(N,) log-probs, one per sequence: a loss without comparisons",
    "policy_chosen": "log-probs under the policy",
    "policy_rejected": "log-probs under the policy",
    "reference_chosen": "log-probs under the reference policy",
    "reference_rejected": "log-probs under the reference policy",
    "reward_chosen": "rewards of the reward head",
    "reward_rejected": "rewards of the reward head",
    "chosen_length": "scored tokens",
    "rejected_length": "scored tokens",
    "absolute": "bool, whether the comparison also gets an absolute-reward term",
    "has_chosen": "bool, false where the side is absent (unpaired feedback): its other inputs are then any numbers",
    "has_rejected": "the same of the other side",
    "kl": "scalar, the KL estimate of the global batch",
}


class Preference(NamedTuple):
    """Holds what a loss returns: three tensors (P,) of at least float32.

    A loss of single sequences has an (N,) loss and empty rewards.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    return _wide(policy) - _wide(reference)


def _token_mean(total: Tensor, length: Tensor) -> Tensor:
    """Return the mean per token; a response without tokens has the mean 0, not NaN."""
    return total / length.clamp(min=1)


def _preference(loss: Tensor, chosen_reward: Tensor, rejected_reward: Tensor) -> Preference:
    return Preference(loss, chosen_reward.detach(), rejected_reward.detach())


def sft(policy: Tensor) -> Preference:
    """Compute -log pi(response), summed over its scored tokens.

    Divided by the global count of scored tokens, this is the mean cross-entropy.

    Args:
        policy: (N,) log-probs, one per *sequence*.

    Returns:
        The (N,) loss and two empty rewards.
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
    """Compute -log sigma(r_c - r_r).

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7.
    """
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
    ipo_average: bool = True,
) -> Preference:
    """Compute (s_c - s_r - 1/(2 beta))^2.

    Azar et al. 2023, arXiv 2310.12036, eq. 17 (beta is the paper's tau). The rewards are beta * (summed s), whatever
    `ipo_average` says, so that they compare with those of the other objectives.

    Args:
        policy_chosen: (P,) log-probs under the policy.
        policy_rejected: (P,) log-probs under the policy.
        reference_chosen: (P,) log-probs under the reference policy.
        reference_rejected: (P,) log-probs under the reference policy.
        chosen_length: (P,) scored tokens.
        rejected_length: (P,) scored tokens.
        beta: the factor of the rewards.
        ipo_average: whether s is a mean per token, as TRL and HALOs take it, so that the squared loss does not grow
            with the length of a response; without it s is the sum, as the paper writes it.
    """
    chosen = _log_ratio(policy_chosen, reference_chosen)
    rejected = _log_ratio(policy_rejected, reference_rejected)
    if ipo_average:
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
    """Compute -(1 - e) log sigma(r_c - r_r) - e log sigma(r_r - r_c), e = label_smoothing.

    This is DPO for labels of which a share e is flipped. Mitchell 2023, "A note on DPO with noisy preferences and
    relationship to IPO". TRL's "robust" is another loss (rDPO, arXiv 2403.00409): it *subtracts* the flipped term and
    divides by 1 - 2e.
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
    """Compute max(0, 1 - (r_c - r_r)).

    This is SLiC-HF's loss (arXiv 2305.10425) in the normalised form of RSO, Liu et al. 2023, arXiv 2309.06657.
    """
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
    """Compute -log sigma(r_c) - 1/2 log sigma(-r_c) - 1/2 log sigma(-r_r), the pair form (K = 2) of NCA.

    Chen et al. 2024, arXiv 2402.05369.
    """
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
    """Compute lambda_D (1 - sigma(r_c - z0)) + lambda_U (1 - sigma(z0 - r_r)), z0 = max(0, beta * kl), detached.

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4. The loss sums both sides, so it is divided by the number of
    sides, not of comparisons. An absent side adds no loss and no gradient, and has the reward 0; its inputs must be
    finite.

    Args:
        policy_chosen: (P,) log-probs under the policy.
        policy_rejected: (P,) log-probs under the policy.
        reference_chosen: (P,) log-probs under the reference policy.
        reference_rejected: (P,) log-probs under the reference policy.
        kl: scalar, the mean of s over the mismatched pairs of the *global batch*; clamped and detached here.
        beta: the factor of the rewards.
        lambda_desirable: lambda_D, the weight of chosen sides.
        lambda_undesirable: lambda_U, the weight of rejected sides.
        has_chosen: (P,) bool, whether the side is present; None if all are.
        has_rejected: (P,) bool, whether the side is present; None if all are.
    """
    chosen = beta * _log_ratio(policy_chosen, reference_chosen)
    rejected = beta * _log_ratio(policy_rejected, reference_rejected)
    baseline = beta * _wide(kl).detach().clamp(min=0)
    # 1 - sigma(x) is sigma(-x), which keeps its digits where sigma(x) has rounded to 1
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
    """Compute -log sigma(r_c - r_r - gamma), r = beta * mean per token of log pi, without a reference policy.

    Meng et al. 2024, arXiv 2405.14734, eq. 6 (its beta is 2 to 10, far above DPO's).
    """
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
    """Compute -log p_c - beta * log sigma(log odds(p_c) - log odds(p_r)).

    log p is the mean per token of log pi, and odds(p) = p / (1 - p). Hong et al. 2024, arXiv 2403.07691, eq. 4, 6 and
    7 (beta is the paper's lambda).

    The first term is the chosen response's own token mean, as in the paper; TRL takes one mean over all tokens of the
    micro-batch, prompts included.
    """
    chosen = _token_mean(_wide(policy_chosen), chosen_length)
    rejected = _token_mean(_wide(policy_rejected), rejected_length)
    log_odds_ratio = (chosen - rejected) - (_log1m_exp(chosen) - _log1m_exp(rejected))
    return _preference(-chosen - beta * logsigmoid(log_odds_ratio), beta * chosen, beta * rejected)


def _log1m_exp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x <= 0, by that one of two formulas which loses no digits to cancellation.

    A probability that rounds to 1 has infinite odds; it is held one rounding step below 1, where value and gradient
    are finite.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def bt(reward_chosen: Tensor, reward_rejected: Tensor) -> Preference:
    """Compute -log sigma(R_c - R_r), where R is the reward head's output.

    This is the Bradley-Terry loss; Ouyang et al. 2022, arXiv 2203.02155, eq. 1.
    """
    return bt_margin(reward_chosen, reward_rejected, margin=0.0)


def bt_margin(reward_chosen: Tensor, reward_rejected: Tensor, *, margin: float | Tensor) -> Preference:
    """Compute -log sigma(R_c - R_r - margin).

    Touvron et al. 2023 (Llama 2), arXiv 2307.09288, eq. 2.

    Args:
        reward_chosen: (P,) rewards of the reward head.
        reward_rejected: (P,) rewards of the reward head.
        margin: one number, or (P,).
    """
    chosen, rejected = _wide(reward_chosen), _wide(reward_rejected)
    return _preference(-logsigmoid(chosen - rejected - margin), chosen, rejected)


def bt_dr(reward_chosen: Tensor, reward_rejected: Tensor, absolute: Tensor) -> Preference:
    """Compute L_BT + L_DR = -log sigma(R_c - R_r) - log sigma(R_c) - log sigma(-R_r).

    Yuan et al. 2024 (Eurus), arXiv 2404.02078, section 3.

    Args:
        reward_chosen: (P,) rewards of the reward head.
        reward_rejected: (P,) rewards of the reward head.
        absolute: (P,) bool, whether the last two terms are added.
    """
    chosen, rejected = _wide(reward_chosen), _wide(reward_rejected)
    direct = -logsigmoid(chosen) - logsigmoid(-rejected)
    return _preference(-logsigmoid(chosen - rejected) + direct.where(absolute.bool(), 0.0), chosen, rejected)


# ---------------------------------------------------------------- the table

Unit = Literal["token", "comparison", "side"]


@dataclass(frozen=True)
class Objective:
    """Holds one row of the table: a loss, and the unit of the global count that it is divided by.

    Attributes:
        function: the loss; its parameters are `INPUTS` and keys of the recipe.
        unit: "token" (scored tokens), "comparison", or "side" (present sides of comparisons).
    """

    function: Callable[..., Preference]
    unit: Unit = "comparison"

    @property
    def name(self) -> str:
        """Return the function's name, which is a value of `objective.name` in a recipe."""
        return self.function.__name__

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the `INPUTS` that the loss reads."""
        return tuple(name for name in inspect.signature(self.function).parameters if name in INPUTS)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of the recipe's `objective` section that the loss reads."""
        return tuple(name for name in inspect.signature(self.function).parameters if name not in INPUTS)

    @property
    def head(self) -> Literal["lm", "reward"]:
        """Return which head the model needs: "lm" gives log-probs, "reward" gives a reward for every sequence."""
        return "reward" if "reward_chosen" in self.inputs else "lm"

    @property
    def pairwise(self) -> bool:
        """Tell whether this is a loss of comparisons, not of single sequences."""
        return "policy" not in self.inputs

    @property
    def needs_reference(self) -> bool:
        """Tell whether log-probs under the reference policy are needed."""
        return "reference_chosen" in self.inputs

    @property
    def needs_kl(self) -> bool:
        """Tell whether the KL estimate of the global batch is needed."""
        return "kl" in self.inputs

    def preference(
        self,
        values: Tensor,
        reference: Tensor,
        lengths: Tensor,
        comparisons: Tensor,
        absolute: Tensor,
        kl: Tensor | None,
        settings: Any,
    ) -> Preference:
        """Gather the two sides of every comparison and call the loss.

        Args:
            values: (N,) log-probs or rewards.
            reference: (N,) log-probs under the reference policy, read only if `needs_reference`.
            lengths: (N,) scored tokens.
            comparisons: (P, 2) integer, (chosen, rejected); -1 for an absent side, which only a loss that reads
                `has_chosen` and `has_rejected` takes.
            absolute: (P,) bool.
            kl: scalar, read only if `needs_kl`.
            settings: the recipe's `objective` section, or anything with the attributes `keys`.

        Returns:
            What the loss returns.

        Raises:
            ValueError: the loss needs the KL estimate, and `kl` is None.
        """
        if self.needs_kl and kl is None:
            raise ValueError(f"objective {self.name} needs the KL estimate of the global batch")
        given = {"policy": values, "absolute": absolute, "kl": kl}
        for place, side in enumerate(("chosen", "rejected") if self.pairwise else ()):
            index = comparisons[:, place]
            at = index.clamp(min=0).long()
            given |= {f"policy_{side}": values[at], f"reward_{side}": values[at]}
            given |= {f"{side}_length": lengths[at], f"has_{side}": index >= 0}
            if self.needs_reference:
                given[f"reference_{side}"] = reference[at]
        keys = {name: getattr(settings, name) for name in self.keys}
        return self.function(**{name: given[name] for name in self.inputs}, **keys)


OBJECTIVES: dict[str, Objective] = {}


def add(function: Callable[..., Preference], *, unit: Unit = "comparison") -> Objective:
    """Add a row to the table: from then on the function's name is a value of `objective.name` in a recipe.

    Args:
        function: a loss of `INPUTS` and of keys of the recipe's `objective` section.
        unit: of the global count that its sum is divided by.

    Returns:
        The row.

    Raises:
        ValueError: another loss has this name.
    """
    row = Objective(function, unit)
    if row.name in OBJECTIVES:
        raise ValueError(f"objective {row.name} is in the table already: give the function another name")
    OBJECTIVES[row.name] = row
    return row


add(sft, unit="token")
add(dpo)
add(ipo)
add(cdpo)
add(hinge)
add(nca)
add(kto, unit="side")
add(simpo)
add(orpo)
add(bt)
add(bt_margin)
add(bt_dr)
