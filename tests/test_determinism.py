"""What a step computes in a fixed order, on GPUs too, by torch's own list of the operations that do not.

There is no GPU here: every operation that is dispatched in a step is compared with that list. The kernels' own order is
fixed by how they are written (docs/reliability.md).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# On the list, and yet in a fixed order here.
ALLOWED = {
    # the plain torch path of log-probs, which GPUs do not take: at most one number is added to each place
    "scatter_add_",
    # of log-probs' targets, without a gradient
    "gather",
    # on GPUs, with accumulate=True, torch sorts; the list has it for CPU tensors alone
    "index_put",
    # writes each place once
    "index_put_",
}


class Recorder(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def listed() -> set[str]:
    """The operations that torch's documentation calls nondeterministic, and what their gradients are made of."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    names = set(re.findall(r":func:`torch\.(?:Tensor\.|nn\.functional\.)?(\w+)`", text))
    assert {"index_add", "scatter_add_", "cumsum", "index_put", "bincount"} <= names
    # the gradient of index_select is an index_add; in place, or out of place, it is the same
    return {each for name in names for each in (name, name.rstrip("_"), f"{name.rstrip('_')}_")} | {
        "embedding_bag_backward",
        "_embedding_bag_dense_backward",
        "nll_loss2d_forward",
    }


def train(made: Recipe) -> set[str]:
    """Trains and validates, and gives back the names of all operations."""
    found: set[str] = set()

    @contextlib.contextmanager
    def recorded(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        with Recorder() as recorder:
            yield
            running.validate()
        found.update(recorder.names)

    trainer.train(made, around=recorded)
    return found


LAYOUTS = [
    (2, {"tensor": 2, "sequence_parallel": True}),
    (2, {"context": 2}),
    (2, {"pipeline": 2}),
    (2, {"overlap": True}),
]


@pytest.mark.parametrize(
    ("objective", "size", "parallel"),
    [
        *((objective, 1, {"recompute": "full"}) for objective in ("sft", "dpo", "kto", "nca", "bt_dr")),
        *((objective, *layout) for objective in ("kto", "bt_dr") for layout in LAYOUTS),
    ],
    ids=str,
)
def test_a_step_takes_no_operation_whose_order_is_open(objective, size, parallel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = tiny.checkpoint(folder / "model")
    kind = "sft" if objective == "sft" else "pair"
    rows, held = (tiny.write(folder / f"{n}.jsonl", tiny.rows(kind, n)) for n in (5, 3))
    form = "ultrainteract_sft" if objective == "sft" else "ultrainteract_pair"
    made = tiny.recipe(
        objective,
        model,
        rows,
        folder / "run",
        data={"validation": [{"path": str(held), "format": form}]},
        training={"global_batch": 4, "max_steps": 1},
        parallel=parallel,
        export={"verify": False},
    )
    names = set().union(*world(size, train, made))
    assert {"mm", "silu"} <= names
    assert names & listed() <= ALLOWED


def test_the_kernels_add_no_numbers_by_atomics():
    found = {
        (file.name, line.strip())
        for file in KERNELS.glob("*.py")
        for line in file.read_text().splitlines()
        if "tl.atomic" in line
    }
    # counts, as a whole number, the programs that have ended: the last one sums in order
    assert found == {("preference_loss.py", "if tl.atomic_add(arrived_ptr, 1) == trees - 1:")}
