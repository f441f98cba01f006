"""Compares the planner's prediction with the engine's measured steps, as a part of `gpu.py` that needs no GPU.

For every row that the part "step" has recorded of the engine, the same model, layout and number of rows are predicted,
with their mean length for the time and the longest one for the memory. Causes are compared with the profiled groups of
kernels: the planner counts the output matrix among the products, the groups have it under log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

# this import comes first, because it prepares megatron-core
from silva.engine.parallel import groups  # noqa: F401
from silva.engine.parallel.forked import isolated_each

import torch

from benchmarks.gpu_comparisons import FULL, SMOKE
from benchmarks.gpu_record import Row
from benchmarks.gpu_session import Session, begin
from benchmarks.gpu_step import CARDS, recipe
from silva.engine.planning import built
from silva.engine.planning.built import Job, Stage
from silva.engine.planning.hardware import GIB, GPUS, Assumptions, Gpu
from silva.engine.planning.memory import budget
from silva.engine.planning.predict import padded
from silva.engine.planning.step_time import Load, StepTime, micro_batches, step_time

# the causes of time in a plan, and the groups of kernels that each stands for
CAUSES = {
    "products": ("products", "log-probs"),
    "attention": ("attention",),
    "elementwise": ("elementwise", "other"),
    "optimizer": ("optimizer",),
}


def plan(session: Session) -> None:
    """Compare the planner's prediction with every recorded step of the engine."""
    rows = session.record.rows("step")
    steps = [row for row in rows if row["table"] == "steps" and row["attention"] == "silva"]
    shares = {(row["objective"], row["layout"]): row for row in rows if row["table"] == "kernels"}
    name = "h100-80g" if session.smoke else CARDS.get(session.record.data["device"])
    # a prediction belongs to the rows that it was compared with
    newest = max((entry["run"] for entry in session.record.entries("step")), default=0)
    if any(entry["run"] < newest for entry in session.record.entries("plan")):
        session.record.forget(["plan"])
    if not steps:
        session.missing("engine", "the part step has no rows of the engine")
        return
    if name is None:
        session.missing("engine", f"the planner has no figures of a {session.record.data['device']}")
        return
    session.summarize(figures)
    for row in steps:
        which = row["objective"], row["layout"]
        measure = partial(lines, row, shares.get(which), GPUS[name], session.smoke)
        session.lines(" ".join(which), measure)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Return measured over predicted, for the time of a step and the memory of its tensors."""
    return {
        f"plan_{row['objective']}_{row['layout']}_{row['what'].replace(' ', '_')}": row["measured/predicted"]
        for row in rows
        if row["what"] in ("step", "tensors")
    }


def lines(row: Row, share: Row | None, gpu: Gpu, smoke: bool) -> list[Row]:
    """Return the seconds of a step by cause and its GiB, each predicted and measured."""
    mean, longest = (
        job(row["objective"], length, row["scored"] / row["tokens"], smoke)
        for length in (row["padded"] / row["rows"], row["longest"])
    )
    stage, wide = isolated_each(built.measure, [(mean, 0), (longest, 0)])
    load = Load(
        rows=row["rows"], tokens=row["tokens"], depth=row["pairs"] / row["tokens"], scored=row["scored"]
    )
    time = step_time(mean, [stage], load, gpu, Assumptions())
    return [
        {"objective": row["objective"], "layout": row["layout"], **line}
        for line in (*times(time, row, share), *memory(wide, longest, row))
    ]


def job(objective: str, length: float, scored: float, smoke: bool) -> Job:
    """Return what the part "step" ran as a job of the planner.

    Args:
        objective: of the step.
        length: tokens of a row.
        scored: share of the tokens that are scored.
        smoke: whether the model is the one of smoke runs.
    """
    size = SMOKE if smoke else FULL
    made = recipe(objective, size)
    # the planner computes a row of equal sequences, so the row's length has to be a multiple of their number
    tokens = padded(round(length), made.parallel)
    return Job(
        shape=size.shape,
        parallel=made.parallel,
        training=made.training,
        head="lm",
        dtype=torch.bfloat16,
        world=1,
        row_length=-(-tokens // built.SEQUENCES) * built.SEQUENCES,
        scored=scored,
    )


def times(time: StepTime, row: Row, share: Row | None) -> list[dict[str, Any]]:
    """Return a line for the seconds of the step, and one for each cause."""
    found = [beside("step", time.total, row["seconds"], "s")]
    for cause, kinds in CAUSES.items():
        # the profile gives only shares of kernel time, so that the causes add up to the step timed without it
        measured = row["seconds"] * sum(share[f"{kind}_share"] for kind in kinds) if share else None
        found.append(beside(cause, getattr(time, cause), measured, "s"))
    return found


def memory(stage: Stage, made: Job, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return lines for the GiB of the tensors and of the whole process."""
    found = budget(stage, 0, made, micro_batches(made, row["rows"]), Assumptions())
    lines = [beside("tensors", (found.total - found.reserve) / GIB, row["peak_GiB"], "GiB")]
    return [*lines, beside("whole process", found.total / GIB, row.get("device_GiB"), "GiB")]


def beside(what: str, predicted: float, measured: float | None, unit: str) -> dict[str, Any]:
    """Return a line with the prediction, the measurement and their ratio."""
    found: dict[str, Any] = {"what": what, "unit": unit, "predicted": predicted}
    if measured is None:
        return found | {"measured": "not measured", "measured/predicted": ""}
    return found | {"measured": measured, "measured/predicted": measured / predicted}


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin({"plan": plan})
