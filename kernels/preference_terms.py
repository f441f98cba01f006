"""States in Triton the losses that have a fused kernel: the loss of a comparison and its slopes, written out.

Their torch definitions, with equations and sources, are in `silva.engine.objectives`; the tests compare every formula
and every slope here with them in float64. A constexpr chooses the loss, so a compiled kernel has one of them. A loss
that is not here runs through autograd.
"""

from __future__ import annotations

from typing import NamedTuple

from silva.kernels.dispatch import jit, tl


class Terms(NamedTuple):
    """Says what a fused loss reads beside the log-probs or rewards and `beta`.

    Attributes:
        reference: whether log-probs under the reference policy are subtracted.
        reward: whether its values are rewards, one per sequence, not log-probs of positions.
        numbers: the keys of the recipe that it reads as `first` and `second`.
    """

    reference: bool = False
    reward: bool = False
    numbers: tuple[str, ...] = ()


TERMS = {
    "sft": Terms(),
    "dpo": Terms(reference=True),
    "ipo": Terms(reference=True),
    "cdpo": Terms(reference=True, numbers=("label_smoothing",)),
    "hinge": Terms(reference=True),
    "nca": Terms(reference=True),
    "kto": Terms(reference=True, numbers=("lambda_desirable", "lambda_undesirable")),
    "simpo": Terms(numbers=("gamma",)),
    "orpo": Terms(),
    "bt": Terms(reward=True),
    "bt_margin": Terms(reward=True, numbers=("margin",)),
    "bt_dr": Terms(reward=True),
}


@jit
def _log1p(y):
    """Compute log(1 + y) for |y| <= 1; what rounding 1 + y loses is added to first order."""
    u = 1.0 + y
    return tl.log(u) - ((u - 1.0) - y) / u


@jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@jit
def _one_minus_exp(x):
    """Compute 1 - exp(x) for x <= 0; above -log 2 by its series, whose tail is under 1e-9 of the sum."""
    y = 1.0
    for k in tl.static_range(10):
        y = 1.0 + x * y / (11 - k)
    return tl.where(x < -0.6931472, 1.0 - tl.exp(x), -x * y)


@jit
def preference_terms(
    chosen,
    rejected,
    chosen_length,
    rejected_length,
    absolute,
    baseline,
    beta,
    first,
    second,
    OBJECTIVE: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """Compute the loss of a comparison, its slopes in `chosen` and `rejected`, and the two rewards.

    Args:
        chosen: sum of log pi, minus log pi_ref where the loss has a reference; or a reward.
        rejected: the same of the rejected side.
        chosen_length: scored positions of the chosen sequence, at least 1, for ipo, simpo and orpo.
        rejected_length: the same of the rejected sequence.
        absolute: whether bt_dr adds the absolute-reward term.
        baseline: beta times the KL estimate, at least 0, for kto.
        beta: of the objective.
        first: the first number that `TERMS` names.
        second: the second number that `TERMS` names.
        OBJECTIVE: a key of `TERMS`.
        AVERAGE: whether ipo divides by the lengths.

    Returns:
        Loss, slope in `chosen`, slope in `rejected`, reward of the chosen and reward of the rejected side.
    """
    if OBJECTIVE == "dpo" or OBJECTIVE == "cdpo" or OBJECTIVE == "hinge":
        c, r = beta * chosen, beta * rejected
        margin = c - r
        if OBJECTIVE == "dpo":
            loss = -_log_sigmoid(margin)
            slope = -beta * _sigmoid(-margin)
        elif OBJECTIVE == "cdpo":
            loss = -(1 - first) * _log_sigmoid(margin) - first * _log_sigmoid(-margin)
            slope = beta * (first * _sigmoid(margin) - (1 - first) * _sigmoid(-margin))
        else:
            loss = tl.maximum(1.0 - margin, 0.0)
            slope = tl.where(margin < 1.0, -beta, 0.0)
        slope_c, slope_r = slope, -slope
    elif OBJECTIVE == "ipo":
        c, r = beta * chosen, beta * rejected
        if AVERAGE:
            distance = chosen / chosen_length - rejected / rejected_length - 1 / (2 * beta)
            slope_c, slope_r = 2 * distance / chosen_length, -2 * distance / rejected_length
        else:
            distance = chosen - rejected - 1 / (2 * beta)
            slope_c, slope_r = 2 * distance, -2 * distance
        loss = distance * distance
    elif OBJECTIVE == "nca":
        c, r = beta * chosen, beta * rejected
        loss = -_log_sigmoid(c) - 0.5 * _log_sigmoid(-c) - 0.5 * _log_sigmoid(-r)
        slope_c = beta * (0.5 * _sigmoid(c) - _sigmoid(-c))
        slope_r = 0.5 * beta * _sigmoid(r)
    elif OBJECTIVE == "kto":
        c, r = beta * chosen, beta * rejected
        up, down = first * _sigmoid(baseline - c), second * _sigmoid(r - baseline)
        loss = up + down
        slope_c, slope_r = -beta * up * _sigmoid(c - baseline), beta * down * _sigmoid(baseline - r)
    elif OBJECTIVE == "simpo":
        c, r = beta * (chosen / chosen_length), beta * (rejected / rejected_length)
        margin = c - r - first
        loss = -_log_sigmoid(margin)
        slope = -beta * _sigmoid(-margin)
        slope_c, slope_r = slope / chosen_length, -slope / rejected_length
    elif OBJECTIVE == "orpo":
        mean_c, mean_r = chosen / chosen_length, rejected / rejected_length
        c, r = beta * mean_c, beta * mean_r
        # a probability that rounds to 1 is held one rounding step below it
        low_c, low_r = tl.minimum(mean_c, -1.1920929e-7), tl.minimum(mean_r, -1.1920929e-7)
        rest_c, rest_r = _one_minus_exp(low_c), _one_minus_exp(low_r)
        e_c, e_r = tl.exp(low_c), tl.exp(low_r)
        log_c = tl.where(low_c < -0.6931472, _log1p(-e_c), tl.log(rest_c))
        log_r = tl.where(low_r < -0.6931472, _log1p(-e_r), tl.log(rest_r))
        ratio = (mean_c - mean_r) - (log_c - log_r)
        loss = -mean_c - beta * _log_sigmoid(ratio)
        slope = -beta * _sigmoid(-ratio)
        odds_c = tl.where(mean_c <= -1.1920929e-7, e_c / rest_c, 0.0)
        odds_r = tl.where(mean_r <= -1.1920929e-7, e_r / rest_r, 0.0)
        slope_c = (slope * (1.0 + odds_c) - 1.0) / chosen_length
        slope_r = -slope * (1.0 + odds_r) / rejected_length
    else:
        # bt, bt_margin, bt_dr
        c, r = chosen, rejected
        margin = c - r
        if OBJECTIVE == "bt_margin":
            margin -= first
        loss = -_log_sigmoid(margin)
        slope_c, slope_r = -_sigmoid(-margin), _sigmoid(-margin)
        if OBJECTIVE == "bt_dr":
            loss += tl.where(absolute, -_log_sigmoid(c) - _log_sigmoid(-r), 0.0)
            slope_c -= tl.where(absolute, _sigmoid(-c), 0.0)
            slope_r += tl.where(absolute, _sigmoid(r), 0.0)
    return loss, slope_c, slope_r, c, r
