"""The cases of `python -m benchmarks.fidelity`: tokens against transformers, losses and weights against TRL."""

from pathlib import Path

import pytest

from benchmarks.fidelity import cases, families, readers

# both sides compute in float32, in another order; AdamW divides by the root of the second moment, which makes a
# rounding error of a small gradient larger
LOSS, WEIGHT, EXPORT = 1e-5, 2e-5, 1e-5


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_scored_turn_has_the_ids_of_transformers(family, tmp_path):
    folder = families.checkpoint(family, tmp_path / "model")
    turns = list(cases.turns(family, folder, tmp_path / "exported"))
    assert len(turns) >= 8
    for turn in turns:
        assert turn.ours == turn.theirs, turn.name
        assert any(turn.ours.scored)


@pytest.mark.parametrize("case", cases.trainings(), ids=lambda case: case.name)
def test_a_run_equals_trls(case, tmp_path):
    found = cases.train(case, tmp_path)
    assert found.tokens == 0
    assert found.losses < LOSS
    assert found.weights < WEIGHT
    assert found.export is None or found.export < EXPORT


@pytest.mark.parametrize("case", cases.answered(), ids=lambda case: case.name)
def test_every_answer_has_the_loss_that_transformers_gives_it_alone(case, tmp_path):
    found = cases.answer(case, tmp_path)
    assert found.tokens == 0
    assert found.losses < LOSS
    assert found.export is not None
    assert found.export < EXPORT


@pytest.mark.parametrize("case", readers.exports(), ids=lambda case: case.name)
def test_readers_of_an_export_get_what_training_computed(case, tmp_path):
    found = readers.read(case, tmp_path)
    assert found.tokens == 0
    assert found.export < EXPORT


def test_the_checks_can_fail(tmp_path):
    """A row of another text is noticed in tokens, loss and weights."""
    case = next(case for case in cases.trainings() if case.name == "chatml, sft, prompt and completion")
    rows = [*case.rows[:-1], {**case.rows[-1], "completion": [cases.assistant("17 eggs per day.")]}]
    changed = cases.Training(case.name, case.family, case.objective, case.form, rows, theirs=case.rows)
    found = cases.train(changed, Path(tmp_path))
    assert found.tokens > 0
    assert found.losses > LOSS
    assert found.weights > WEIGHT
