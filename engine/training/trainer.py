"""Runs one recipe: the set-up, then the loop, then the export.

The set-up is ordered so that a user's mistake is found before expensive work. Everything that a step does is a
function of (recipe, step, state), so a run that was killed and started again computes the same as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups, optimizer
from silva.engine.parallel.heartbeat import Heartbeat

import torch
import torch.distributed as dist

from silva.engine.checkpoint import state
from silva.engine.checkpoint.saver import Saver
from silva.engine.data.loader import BatchLoader, GlobalBatch
from silva.engine.errors import Stopped, UserError
from silva.engine.model import gpt, hf
from silva.engine.objectives import OBJECTIVES
from silva.engine.progress import ProgressBar, say
from silva.engine.recipe.schema import Recipe
from silva.engine.training import backends, inputs, publish, reference_policy, resume
from silva.engine.training.interruption import Interruption
from silva.engine.training.metrics import Journal
from silva.engine.training.output_lock import OutputLock
from silva.engine.training.step import Step, StepSettings


@dataclass(slots=True)
class Summary:
    """Holds the results of a finished run.

    Attributes:
        steps: of the whole run.
        before: validation metrics of the model before training; empty without validation data, or for a resumed run.
        after: validation metrics of the trained model; empty without validation data.
        unique_tokens: tokens of the rows, in the steps that this process ran.
        unrolled_tokens: tokens of the same steps' sequences, each counted alone.
        export: the folder of the exported model.
        last: training metrics of the last step.
    """

    steps: int
    before: dict[str, float]
    after: dict[str, float]
    unique_tokens: int
    unrolled_tokens: int
    export: Path
    last: dict[str, float] = field(default_factory=dict)


# makes the context in which an optimizer step runs, from the trainer, the step's number and its batch
Around = Callable[["Trainer", int, GlobalBatch], AbstractContextManager[None]]


def train(recipe: Recipe, *, around: Around | None = None) -> Summary:
    """Run a recipe from the checkpoint that it names to the exported one, resuming where an earlier run stopped.

    The call is collective: every process of the world makes it.

    Args:
        recipe: of the run.
        around: makes the context in which an optimizer step runs; when the context is left, `Trainer.last` holds the
            step's metrics.

    Returns:
        The results of the run.

    Raises:
        UserError: recipe, data, checkpoint or layout are unusable.
    """
    with (
        groups.joined(recipe.parallel, seed=recipe.seed),
        Heartbeat(
            groups.own_store(), groups.rank(), groups.world_size(), recipe.training.hang_minutes * 60
        ) as heartbeat,
        contextlib.ExitStack() as held,
    ):
        return Trainer(recipe, around=around, held=held, heartbeat=heartbeat).run()


class Trainer:
    """Holds one run on this process: its inputs, its step, and where it saves.

    Args:
        recipe: of the run.
        around: as in `train`.
        held: keeps what the run holds until its context is left: the lock of its folder, and the handlers of signals.
            None: the run holds neither.
        heartbeat: is told what the run is at; None: nobody watches it.

    Attributes:
        output: the folder of the run.
        first: whether this is the first process, which writes.
        inputs: of the run.
        heartbeat: watches the processes of the run.
        interruption: tells when to stop and when to save; None if `held` was None.
        reference: log-probs of the training data under the reference policy; None if the objective needs none.
        validation_reference: those of the validation data.
        identity: what the run is, kept with its checkpoints; see `resume.run_of`.
        newest: the checkpoint that the run resumes from; None for a new run.
        step: computes the steps.
        saver: writes the checkpoints.
        last: metrics of the newest step.
        taken: the number of steps that have been taken, those of earlier processes included.
        left_out: how many steps up to the newest one, without one in between, were not finite and changed nothing.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        around: Around | None = None,
        held: contextlib.ExitStack | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.recipe, self.around = recipe, around
        self.heartbeat = heartbeat or Heartbeat(None, 0, 1, 0)
        self.interruption: Interruption | None = None
        self.output = Path(recipe.output)
        self.first = groups.rank() == 0
        self.last: dict[str, float] = {}
        self.taken = self.left_out = 0
        objective = OBJECTIVES[recipe.objective.name]
        say(recipe.describe())
        inputs.check_outputs(recipe)
        backends.check(recipe)
        self.inputs = inputs.read(recipe)
        if held is not None:
            lock = OutputLock(self.output)
            groups.from_first(lambda: bool(held.enter_context(lock)))
            self.interruption = held.enter_context(Interruption(recipe.training.save_minutes * 60))
        # before anything is computed, because a run of another recipe is refused here
        self.identity = resume.run_of(recipe, self.inputs)
        self.newest = resume.newest(recipe, self.identity)
        bare = gpt.build(
            self.inputs.shape,
            recipe.parallel,
            head=objective.head,
            dtype=getattr(torch, recipe.model.dtype),
            seed=recipe.seed,
            attention=recipe.model.attention,
        )
        self.reference = self.validation_reference = None
        if objective.needs_reference:
            found = reference_policy.log_probs(recipe, self.inputs, bare)
            self.reference, self.validation_reference = found
        # a checkpoint would fill every parameter
        if self.newest is None:
            _say_read(*hf.load(bare, self.inputs.folder, self.inputs.shape))
        chunks = optimizer.wrap(bare, recipe.parallel)
        settings = StepSettings(
            recipe.objective, gpt.row_multiple(recipe.parallel), self.inputs.tokenizer.pad_id
        )
        made = optimizer.build(chunks, recipe.training, recipe.parallel)
        self.step = Step(chunks, made, objective, settings)
        say(f"computes   {backends.describe(recipe)}")
        # state that is already in host memory would have to be there twice to be written while training goes on
        behind = recipe.training.async_save and not recipe.parallel.offload_optimizer
        self.saver = Saver(self.output / "checkpoints", keep=recipe.training.keep, asynchronous=behind)

    # ------------------------------------------------------------ the loop

    def run(self) -> Summary:
        """Train from the newest checkpoint, or from the start, to the export."""
        settings, steps = self.recipe.training, self.inputs.steps
        start = self._resume()
        unique = unrolled = 0
        before = self.validate("validation before") if start == 0 else {}
        title = f"{self.step.objective.name} training"
        with (
            ProgressBar(title, steps, visible=self.first, start=start) as bar,
            Journal(self.output, writes=self.first, start_step=start) as journal,
            contextlib.closing(self.inputs.batches.prefetch(start, steps)) as batches,
        ):
            if before:
                journal.write(0, "validation", before)
            for number, batch in batches:
                around = self.around(self, number, batch) if self.around else contextlib.nullcontext()
                with self.heartbeat.watched(f"step {number}"), around:
                    self.last = self.train_step(number, batch)
                done = self.taken = number + 1
                unique, unrolled = unique + batch.unique, unrolled + batch.unrolled
                journal.write(number, "train", self.last)
                bar.advance(_note(self.last))
                self.saver.poll()
                if settings.validate_every and done % settings.validate_every == 0 and done < steps:
                    journal.write(done, "validation", self.validate())
                stop, due = self.interruption.agree() if self.interruption else (False, False)
                due = due or bool(settings.save_every and done % settings.save_every == 0)
                if stop or (due and done < steps):
                    self.save(done, wait=stop)
                if stop:
                    raise Stopped(f"{self.output}: stopped after step {done} of {steps}, as asked, and saved")
            after = self.validate("validation after")
            if after:
                journal.write(steps, "validation", after)
        if start < steps:
            self.save(steps)
        return Summary(steps, before, after, unique, unrolled, self.export(), self.last)

    def train_step(self, number: int, batch: GlobalBatch) -> dict[str, float]:
        """Take one step of the run.

        Args:
            number: of the step, from 0 on.
            batch: of the step.

        Returns:
            The metrics of `Step.update`, and those of speed and packing.

        Raises:
            UserError: the loss or the gradient norm is not finite.
        """
        began = time.perf_counter()
        settings = self.recipe.training
        rate = optimizer.learning_rate(
            number,
            self.inputs.steps,
            peak=settings.learning_rate,
            minimum=settings.min_learning_rate,
            warmup=settings.warmup,
            schedule=settings.schedule,
        )
        values = self.step.update(batch, self.reference, rate=rate)
        finite = math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])
        # a step that is not finite has updated nothing, and may be so because of the one before it
        if self.step.broken(newest=not finite):
            self._stop_at_weights(number - 1)
        if finite:
            self.left_out = 0
        else:
            self._leave_out(number, batch, values)
        seconds = time.perf_counter() - began
        return values | {
            "tokens_per_second": batch.unique / seconds,
            "unrolled_tokens_per_second": batch.unrolled / seconds,
            "unique_over_unrolled": batch.unique / batch.unrolled,
            "row_fill": batch.unique / batch.capacity(self.step.settings.multiple),
            "imbalance": batch.imbalance,
            "seconds": seconds,
            "data_wait": batch.waited,
        }

    def _leave_out(self, number: int, batch: GlobalBatch, values: dict[str, float]) -> None:
        """Say what is not finite in a step, which has changed no weight; end the run if there were too many."""
        self.left_out += 1
        allowed = self.recipe.training.skip_nonfinite
        what = (
            f"step {number}: the loss is {values['loss']}, the gradient norm {values['gradient_norm']}; "
            f"{self.step.blame(batch, self.reference)}"
        )
        if self.left_out > allowed:
            self.saver.wait()
            after = f"{allowed} steps before it were left out; " if allowed else ""
            raise UserError(
                f"{what}; {after}look at the weights of {self.recipe.model.path}, or lower training.learning_rate. "
                "Nothing of this step was saved"
            )
        say(f"left out   {what}")
        values["skipped"] = 1.0

    def _stop_at_weights(self, number: int) -> None:
        """End the run, because an update has left weights that are not finite."""
        broken = next(
            (
                name
                for chunk in self.step.chunks
                for name, weight in chunk.named_parameters()
                if not weight.isfinite().all()
            ),
            None,
        )
        every: list[str | None] = [None] * groups.world_size()
        dist.all_gather_object(every, broken)
        rank, name = next(((rank, name) for rank, name in enumerate(every) if name), (0, "a weight"))
        self.saver.wait()
        raise UserError(
            f"step {number}: its update left weights that are not finite ({name} on rank {rank}); lower "
            "training.learning_rate. Nothing of this step was saved"
        )

    def validate(self, title: str = "") -> dict[str, float]:
        """Compute the metrics over all validation data; with a title, show a progress bar."""
        batches = self.inputs.validation_batches
        if batches is None:
            return {}
        self._check_weights()
        self.heartbeat.now("the validation")
        with (
            ProgressBar(title, len(batches), visible=self.first and bool(title)) as bar,
            contextlib.closing(_watched(batches, bar)) as watched,
        ):
            return self.step.evaluate(watched, self.validation_reference)

    # ------------------------------------------------------------ saving

    def _check_weights(self) -> None:
        """End the run if the newest update has left weights that are not finite."""
        if self.step.broken(newest=True):
            self._stop_at_weights(self.taken - 1)

    def save(self, number: int, *, wait: bool = False) -> None:
        """Write a checkpoint after which step `number` comes next.

        Args:
            number: of the step.
            wait: whether to return only when it is there, as is always done after the last step.
        """
        self._check_weights()
        self.heartbeat.now(f"the checkpoint of step {number}")
        optimizer.settle(self.step.chunks, self.recipe.parallel)
        wait = wait or number == self.inputs.steps
        self.saver.save(number, self.step.chunks, self.step.optimizer, self.identity, wait=wait)
        if self.interruption:
            self.interruption.saved()

    def export(self) -> Path:
        """Write the trained model as a Hugging Face checkpoint, and return its folder."""
        self._check_weights()
        self.heartbeat.now("the export")
        optimizer.settle(self.step.chunks, self.recipe.parallel)
        read = self.inputs
        return publish.export_model(self.step.chunks, self.recipe, read.folder, read.tokenizer, read.steps)

    def _resume(self) -> int:
        """Load the newest checkpoint of this run, if there is one, and return the step to start with."""
        start, steps = 0, self.inputs.steps
        if self.newest is not None:
            start = state.load(self.newest, self.step.chunks, self.step.optimizer)
            optimizer.configure(self.step.optimizer, self.recipe.training)
            say(f"resuming   at step {start} of {steps} from {self.newest}")
        if start == steps:
            say("           the run is finished: nothing is trained, and the model is exported again")
        if self.first:
            resume.keep_recipe(self.recipe, start)
        return start


def _watched(batches: BatchLoader, bar: ProgressBar) -> Generator[GlobalBatch, None, None]:
    """Yield every batch, and advance the bar when the next one is asked for."""
    with contextlib.closing(batches.prefetch(0, len(batches))) as coming:
        for _, batch in coming:
            yield batch
            bar.advance()


def _say_read(read: int, whole: int) -> None:
    """Print how much of the weights was read by the process that read most; every process calls this."""
    every: list[Any] = [None] * groups.world_size()
    dist.all_gather_object(every, read)
    say(f"weights    {max(every) / 1e6:,.1f} MB of {whole / 1e6:,.1f} MB read by the process that reads most")


def _note(values: dict[str, float]) -> str:
    """Format the few numbers for which a progress bar has room."""
    parts = [f"loss {values['loss']:.4f}"]
    if "reward_accuracy" in values:
        parts.append(f"accuracy {values['reward_accuracy']:.2f}")
    parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)
