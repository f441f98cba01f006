"""One layout on one cluster: its stages built, their memory, and the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from silva.engine.parallel.forked import isolated_each

import torch

from silva.engine.errors import UserError
from silva.engine.model import gpt
from silva.engine.model.hf_layout import ModelShape
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
    """What a plan is made for, whatever the layout."""

    recipe: Recipe
    shape: ModelShape
    workload: Workload
    gpu: Gpu
    gpus: int
    assumptions: Assumptions = field(default_factory=Assumptions)

    def job(self, parallel: Parallel, row_length: int | None = None) -> Job:
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
    """Memory of every stage and the time of a step."""

    job: Job
    stages: Sequence[Stage]
    budgets: Sequence[Budget]
    time: StepTime
    utilisation: float  # of the GPUs' peak, by the operations the model needs (MFU)
    fits: bool

    @property
    def fullest(self) -> Budget:
        return max(self.budgets, key=lambda each: each.total)


def predict(setting: Setting, job: Job, stages: Sequence[Stage]) -> Prediction:
    """From measured or composed stages, in pipeline order."""
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
    """Every stage of a job: the first, the last and one of each number of layers between really built.

    Raises:
        UserError: the layout fits neither the model nor the number of GPUs.
    """
    stages = job.parallel.pipeline
    if job.world % stages:  # `groups.initialize` says the rest, but needs a rank to begin with
        raise UserError(
            f"parallel.pipeline is {stages}, which does not divide {job.world} GPUs: give --gpus a multiple of it"
        )
    layers = gpt.stage_layers(job.shape, job.parallel)
    # stages whose chunks have as many layers, and the same end of the model in them, are alike
    kinds = [(place == 0, place == stages - 1, *layers[place::stages]) for place in range(stages)]
    places = {kind: place for place, kind in enumerate(kinds)}
    ranks = [(job, place * (job.world // stages)) for place in places.values()]
    found = dict(zip(places, isolated_each(built.measure, ranks), strict=True))
    return [found[kind] for kind in kinds]


def advice(setting: Setting, prediction: Prediction) -> list[str]:
    """What to change, the likeliest first."""
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
                found.append(f"parallel.recompute=full (now {layout.recompute}) keeps one tensor a layer")
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
        found.append("parallel.sequence_parallel=true costs nothing and saves activations")
    return found


def as_overrides(prediction: Prediction, recipe: Recipe) -> list[str]:
    """The layout as `key=value`, ready to paste; row_length only where it differs from the recipe's."""
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
    """Without blanks, so that a shell takes it as one word."""
    return str(value).replace(" ", "")


def padded(row_length: int, parallel: Parallel) -> int:
    """Tokens of the longest row, padded as the trainer pads it."""
    multiple = gpt.row_multiple(parallel)
    return -(-row_length // multiple) * multiple
