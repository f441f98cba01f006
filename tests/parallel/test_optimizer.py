"""AdamW against torch's, the schedule against transformers'."""

import math

from silva.engine.parallel.optimizer import FusedAdam, learning_rate

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup


def test_steps_are_torch_adamws():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((7, 3), (5,))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator) for p in start]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            # one float32 formula in two orders of operation
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["step"] == 5


def test_parameters_without_gradient_stay():
    p = torch.nn.Parameter(torch.ones(3))
    FusedAdam([p], lr=1.0, weight_decay=0.5).step()
    assert p.tolist() == [1, 1, 1]


def rates(schedule: str, steps: int, warmup: float) -> list[float]:
    return [
        learning_rate(step, steps, peak=2.0, minimum=0.0, warmup=warmup, schedule=schedule)
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("schedule", "peer"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_schedules_are_transformers_own(schedule, peer):
    """Warm-up is one step ahead (transformers' first step has a rate of zero); the decay is the same curve."""
    steps, rising = 40, 4
    lambdas = peer(torch.optim.SGD([torch.zeros(1)], lr=2.0), rising, steps).lr_lambdas[0]
    expected = [2 * lambdas(step + 1 if step < rising else step) for step in range(steps)]
    assert rates(schedule, steps, rising / steps) == pytest.approx(expected)


def test_edges_of_the_schedule():
    assert rates("constant", 3, 0.0) == [2, 2, 2]
    assert rates("cosine", 1, 0.1) == [2]  # one step is all warm-up
    assert rates("cosine", 2, 1.0) == [1, 2]
    last = learning_rate(99, 100, peak=2.0, minimum=0.5, warmup=0.1, schedule="cosine")
    assert 0.5 < last < 0.51
    assert math.isclose(learning_rate(9, 100, peak=2.0, minimum=0.5, warmup=0.1, schedule="cosine"), 2.0)
