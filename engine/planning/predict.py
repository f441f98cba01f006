"""Predicts one layout on one cluster: builds its stages, and computes their memory and the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from silva.engine.parallel.forked import isolated_each

import torch

from silva.engine.errors import UserError
from silva.engine.model import gpt
from silva.engine.model.families.shape import ModelShape
from silva.engine.objectives import OBJECTIVES
from silva.engine.planning import built
from silva.engine.planning.built import Job, Stage
from silva.engine.planning.hardware import Assumptions, Gpu
from silva.engine.planning.memory import Budget, budget
from silva.engine.planning.step_time import Load, StepTime, micro_batches, model_flops, replicas, step_time
from silva.engine.planning.workload import Workload
from silva.engine.recipe.schema import Parallel, Recipe


@dataclass(frozen=True)
class Setting:
    """Holds what a plan is made for, independent of the layout.

    Attributes:
        recipe: of the run.
        shape: of the model.
        workload: what one unit of the global batch has to compute.
        gpu: the kind of GPU.
        gpus: number of GPUs.
        assumptions: shares of the peaks, and what a process takes beside its tensors.
    """

    recipe: Recipe
    shape: ModelShape
    workload: Workload
    gpu: Gpu
    gpus: int
    assumptions: Assumptions = field(default_factory=Assumptions)

    def job(self, parallel: Parallel, row_length: int | None = None) -> Job:
        """Return the job of a layout; rows are as long as the recipe says if `row_length` is None."""
        return Job(
            shape=self.shape,
            parallel=parallel,
            training=self.recipe.training,
            head=OBJECTIVES[self.recipe.objective.name].head,
            dtype=getattr(torch, self.recipe.model.dtype),
            world=self.gpus,
            row_length=padded(row_length or self.recipe.data.row_length, parallel),
            scored=self.workload.scored / self.workload.unique,
        )

    def load(self, job: Job) -> Load:
        """Return what a step passes through the layout of a job."""
        units = self.recipe.training.global_batch
        return Load(
            rows=self.workload.rows(units, job.row_length, self.assumptions.row_fill),
            tokens=units * self.workload.unique,
            depth=min(self.workload.depth, job.row_length),
            scored=units * self.workload.scored,
            extra_forward=OBJECTIVES[self.recipe.objective.name].needs_kl,
        )


@dataclass(frozen=True)
class Prediction:
    """Holds the memory of every stage and the time of a step.

    Attributes:
        job: what is predicted.
        stages: in pipeline order.
        budgets: memory of each stage.
        time: of one step.
        utilisation: share of the GPUs' peak, by the operations the model needs (MFU).
        fits: whether every stage fits its GPU.
    """

    job: Job
    stages: Sequence[Stage]
    budgets: Sequence[Budget]
    time: StepTime
    utilisation: float
    fits: bool

    @property
    def fullest(self) -> Budget:
        """Return the memory of the stage that needs the most."""
        return max(self.budgets, key=lambda each: each.total)


def predict(setting: Setting, job: Job, stages: Sequence[Stage]) -> Prediction:
    """Predict memory and time from measured or composed stages.

    Args:
        setting: what the plan is made for.
        job: what the stages belong to.
        stages: in pipeline order.
    """
    load, gpu, assumptions = setting.load(job), setting.gpu, setting.assumptions
    count = micro_batches(job, load.rows)
    budgets = [budget(stage, place, job, count, assumptions) for place, stage in enumerate(stages)]
    time = step_time(job, stages, load, gpu, assumptions)
    needed = model_flops(job, load)
    return Prediction(
        job=job,
        stages=stages,
        budgets=budgets,
        time=time,
        utilisation=needed / (time.total * setting.gpus * gpu.flops),
        fits=all(each.fits(gpu, assumptions) for each in budgets),
    )


def build_stages(job: Job) -> list[Stage]:
    """Return every stage of a job in pipeline order, of which one of each kind is built.

    The first and the last stage are built, and of those between one for each number of layers; the others are equal.

    Raises:
        UserError: the layout does not fit the model or the number of GPUs.
    """
    stages = job.parallel.pipeline
    # `groups.initialize` checks the rest of the layout, but it needs a rank, which this division gives
    if job.world % stages:
        raise UserError(
            f"parallel.pipeline is {stages}, which does not divide {job.world} GPUs: give --gpus a multiple of it"
        )
    layers = gpt.stage_layers(job.shape, job.parallel)
    # two stages are equal if their chunks have equally many layers and contain the same end of the model
    kinds = [(place == 0, place == stages - 1, *layers[place::stages]) for place in range(stages)]
    places = {kind: place for place, kind in enumerate(kinds)}
    ranks = [(job, place * (job.world // stages)) for place in places.values()]
    found = dict(zip(places, isolated_each(built.measure, ranks), strict=True))
    return [found[kind] for kind in kinds]


def advice(setting: Setting, prediction: Prediction) -> list[str]:
    """Return advice on what to change, the likeliest first."""
    layout, fullest = prediction.job.parallel, prediction.fullest
    count = replicas(prediction.job)
    found = []
    if not prediction.fits:
        static = ("parameters", "gradients", "optimizer")
        if fullest.dominant in static:
            if not layout.distributed_optimizer and count > 1:
                found.append(
                    "parallel.distributed_optimizer=true spreads the optimizer over data-parallel ranks"
                )
            if layout.tensor < setting.gpu.per_node:
                found.append(f"a larger parallel.tensor (now {layout.tensor}) splits weights and gradients")
            found.append(f"a larger parallel.pipeline (now {layout.pipeline}) splits weights and gradients")
            if layout.distributed_optimizer:
                found.append("more GPUs spread the optimizer further")
                if not layout.offload_optimizer:
                    found.append("parallel.offload_optimizer=true keeps it in host memory")
        else:
            if layout.recompute != "full":
                found.append(
                    f"parallel.recompute=full (now {layout.recompute}) keeps only one tensor a layer"
                )
            if layout.tensor > 1 and not layout.sequence_parallel:
                found.append("parallel.sequence_parallel=true splits what tensor parallelism leaves whole")
            found.append(f"a shorter data.row_length (now {setting.recipe.data.row_length})")
            found.append(f"a larger parallel.context (now {layout.context}) splits every row")
            found.append(f"a larger parallel.tensor (now {layout.tensor})")
        found.append("--search looks for layouts that fit")
        return found
    time = prediction.time
    if time.rows < count:
        found.append(
            f"a step has {time.rows} rows for {count} replicas: {count - time.rows} of them idle; raise "
            "training.global_batch, lower data.row_length, or use fewer GPUs"
        )
    elif time.bubble > 0.2 * time.total:
        found.append(
            f"the pipeline bubble is {time.bubble / time.total:.0%} of a step: fewer stages, "
            "parallel.virtual_pipeline, a larger training.global_batch or a shorter data.row_length"
        )
    if time.gradients_and_weights > 0.1 * time.total and not layout.overlap:
        found.append("parallel.overlap=true hides reducing gradients behind the backward pass")
    if layout.tensor > 1 and not layout.sequence_parallel:
        found.append("parallel.sequence_parallel=true takes no extra time and saves activations")
    return found


def as_overrides(prediction: Prediction, recipe: Recipe) -> list[str]:
    """Return the layout as `key=value`, ready to paste; row_length only where it differs from the recipe's."""
    values = prediction.job.parallel.model_dump()
    words = {None: "null", True: "true", False: "false"}
    found = [
        f"parallel.{key}={words[value] if value is None or isinstance(value, bool) else _pasted(value)}"
        for key, value in values.items()
        if value != Parallel.model_fields[key].default or value != getattr(recipe.parallel, key)
    ]
    if prediction.job.row_length != padded(recipe.data.row_length, prediction.job.parallel):
        found.append(f"data.row_length={prediction.job.row_length}")
    return found


def _pasted(value: object) -> str:
    """Write a value without blanks, so that a shell takes it as one word."""
    return str(value).replace(" ", "")


def padded(row_length: int, parallel: Parallel) -> int:
    """Return the number of tokens of the longest row, padded as the trainer pads it."""
    multiple = gpt.row_multiple(parallel)
    return -(-row_length // multiple) * multiple
