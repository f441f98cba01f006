"""Means over what is there: absent sides count nowhere, equal rewards are half right."""

import json

import pytest
import torch

from silva.engine.objectives import Preference
from silva.engine.training.metrics import Journal, likelihood_sums, preference_sums, summarize


def test_sums_and_means():
    comparisons = torch.tensor([[0, 1], [2, 3], [4, -1], [-1, 5], [6, 7]])
    rewards = torch.tensor([[1.0, 0.0], [2.0, 3.0], [5.0, 99.0], [99.0, -1.0], [4.0, 4.0]])
    result = Preference(torch.arange(5.0), rewards[:, 0], rewards[:, 1])
    means = summarize(preference_sums(result, comparisons), 8)
    assert means == {
        "loss": 10 / 8,
        "reward_chosen": (1 + 2 + 5 + 4) / 4,
        "reward_rejected": (0 + 3 - 1 + 4) / 4,
        "reward_margin": (1 - 1 + 0) / 3,
        "reward_accuracy": pytest.approx(1.5 / 3),
    }
    assert summarize(likelihood_sums(torch.tensor([1.0, 2.0])), 2) == {"loss": 1.5}


def test_a_resumed_journal_holds_every_step_once(tmp_path):
    with Journal(tmp_path, writes=True, start_step=0) as journal:
        for step in range(4):
            journal.write(step, "train", {"loss": 1.0})
    with Journal(tmp_path, writes=True, start_step=2) as journal:
        for step in range(2, 5):
            journal.write(step, "train", {"loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (0, 1.0),
        (1, 1.0),
        (2, 2.0),
        (3, 2.0),
        (4, 2.0),
    ]
    assert any((tmp_path / "tensorboard").iterdir())
    Journal(tmp_path / "silent", writes=False, start_step=0).write(0, "train", {"loss": 1.0})
    assert not (tmp_path / "silent").exists()
