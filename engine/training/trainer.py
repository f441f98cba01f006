"""The one loop for every objective.

A step: the global batch of the plan -> this rank's rows -> forward and backward over packed trees -> gradients
divided by the *global* count -> AdamW. Everything a step does is a function of (recipe, step, state), so a run
that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups, optimizer

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from silva.engine import backends, checkpoint, publish, reference_policy
from silva.engine.config import Recipe, Source
from silva.engine.data import pipeline
from silva.engine.data.balance import CostModel, row_cost_model
from silva.engine.data.dataset import DataSet, hold_out, prepare
from silva.engine.data.encoding import Unit
from silva.engine.data.loader import BatchPlan, GlobalBatch
from silva.engine.data.packing import Piece, TreeBatch, pack_row
from silva.engine.data.report import Report
from silva.engine.errors import UserError
from silva.engine.metrics import Journal, likelihood_sums, preference_sums, summarize
from silva.engine.model import gpt, hf, hf_export
from silva.engine.objectives import OBJECTIVES
from silva.engine.passes import run_rows, sequence_values, share_from_last_stage
from silva.engine.progress import ProgressBar
from silva.kernels.preference_loss import HYPERPARAMETERS, Structure, preference_loss


@dataclass(slots=True)
class Summary:
    """What a finished run has to show."""

    steps: int
    before: dict[str, float]  # validation metrics of the model as it came; empty without validation data
    after: dict[str, float]
    unique_tokens: int  # of the steps this process ran
    unrolled_tokens: int
    export: Path
    last: dict[str, float] = field(default_factory=dict)  # training metrics of the last step


def train(recipe: Recipe) -> Summary:
    """Run a recipe from the checkpoint it names to the exported one, resuming where an earlier run stopped.

    Collective: called by every process of the world.

    Raises:
        UserError: recipe, data, checkpoint or layout are unusable.
    """
    with groups.joined(recipe.parallel, seed=recipe.seed):
        return Trainer(recipe).run()


class Trainer:
    """Model, data and optimizer of one run on this process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.objective = OBJECTIVES[recipe.objective.name]
        self.output = Path(recipe.output)
        self.first = groups.rank() == 0
        self.say(recipe.describe())
        self._check_outputs()
        backends.check(recipe)

        # everything a user can get wrong is found before the first large file is read
        self.model_folder = hf.fetch(recipe.model.path)
        self.shape = hf.read_shape(self.model_folder)
        gpt.check_layout(self.shape, recipe.parallel)
        self.tokenizer = publish.load_tokenizer(recipe, self.model_folder)
        if self.tokenizer.vocab_size > self.shape.vocab:
            raise UserError(
                f"{recipe.tokenizer_path}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                f"{recipe.model.path} only {self.shape.vocab}; they do not belong together"
            )
        self.data, self.validation = self._read_data()
        self.plan = self._plan(self.data, training=True)
        self.validation_plan = self._plan(self.validation, training=False) if self.validation else None
        self.steps = min(len(self.plan), recipe.training.max_steps or len(self.plan))

        dtype = getattr(torch, recipe.model.dtype)
        bare = gpt.build(
            self.shape,
            recipe.parallel,
            head=self.objective.head,
            dtype=dtype,
            seed=recipe.seed,
            attention=recipe.model.attention,
        )
        self.reference, self.validation_reference = self._reference(bare, dtype)
        self.newest = self._newest_checkpoint()
        if self.newest is None:  # a checkpoint fills every parameter
            self._say_read(*hf.load(bare, self.model_folder, self.shape))
        self.chunks: list[Any] = [*optimizer.wrap(bare, recipe.parallel)]
        self.optimizer = optimizer.build(self.chunks, recipe.training, recipe.parallel)
        self.say(f"computes   {backends.describe(recipe)}")
        saving = recipe.training
        # state that is on the host already would have to be there twice to be written behind training
        behind = saving.async_save and not recipe.parallel.offload_optimizer
        self.saver = checkpoint.Saver(self.output / "checkpoints", keep=saving.keep, asynchronous=behind)

    def _say_read(self, read: int, whole: int) -> None:
        every: list[Any] = [None] * groups.world_size()
        dist.all_gather_object(every, read)
        self.say(f"weights    each process read at most {max(every) / 1e6:,.1f} MB of {whole / 1e6:,.1f} MB")

    # ------------------------------------------------------------ the loop

    def run(self) -> Summary:
        settings = self.recipe.training
        start = self._resume()
        unique = unrolled = 0
        last: dict[str, float] = {}
        before = self.validate("validation before") if start == 0 else {}
        with (
            ProgressBar(
                f"{self.objective.name} training", self.steps, visible=self.first, start=start
            ) as bar,
            self._journal(start) as journal,
        ):
            if before:
                journal.write(0, "validation", before)
            for step, batch in self.plan.prefetch(start, self.steps):
                last = self.train_step(step, batch)
                unique, unrolled = unique + batch.unique, unrolled + batch.unrolled
                journal.write(step, "train", last)
                bar.advance(_note(last))
                self.saver.poll()
                done = step + 1
                if settings.validate_every and done % settings.validate_every == 0 and done < self.steps:
                    journal.write(done, "validation", self.validate())
                if settings.save_every and done % settings.save_every == 0 and done < self.steps:
                    self.save(done)
            after = self.validate("validation after")
            if after:
                journal.write(self.steps, "validation", after)
        if start < self.steps:
            self.save(self.steps)
        return Summary(self.steps, before, after, unique, unrolled, self.export(), last)

    def train_step(self, step: int, batch: GlobalBatch) -> dict[str, float]:
        """One optimizer step; returns its metrics (see `metrics.summarize`, plus speed and packing)."""
        began = time.perf_counter()
        settings = self.recipe.training
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.pass_over(batch, self.reference, training=True)
        rate = optimizer.learning_rate(
            step,
            self.steps,
            peak=settings.learning_rate,
            minimum=settings.min_learning_rate,
            warmup=settings.warmup,
            schedule=settings.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        _, gradient_norm, _ = self.optimizer.step()
        values = summarize(sums, self._count(batch))  # the step's one read-back: everything before is queued
        if not (math.isfinite(values["loss"]) and math.isfinite(gradient_norm)):
            self.saver.wait()
            raise UserError(
                f"step {step}: the loss is {values['loss']}, the gradient norm {float(gradient_norm)}; look at the "
                f"weights of {self.recipe.model.path}, or lower training.learning_rate. Nothing of this step was saved"
            )
        seconds = time.perf_counter() - began
        return values | {
            "learning_rate": rate,
            "gradient_norm": float(gradient_norm),
            "tokens_per_second": batch.unique / seconds,
            "unrolled_tokens_per_second": batch.unrolled / seconds,
            "unique_over_unrolled": batch.unique / batch.unrolled,
            "row_fill": batch.unique / batch.capacity(self._row_multiple()),
            "imbalance": batch.imbalance,
            "seconds": seconds,
            "data_wait": batch.waited,
        }

    def validate(self, title: str = "") -> dict[str, float]:
        """Metrics over all validation data; with a title, under a progress bar of its own."""
        if self.validation_plan is None:
            return {}
        total: Tensor | None = None
        count = 0
        with ProgressBar(title, len(self.validation_plan), visible=self.first and bool(title)) as bar:
            for _, batch in self.validation_plan.prefetch(0, len(self.validation_plan)):
                sums = self.pass_over(batch, self.validation_reference, training=False)
                total = sums if total is None else total + sums
                # `pass_over` divides the gradient's loss only: sums and counts add up over batches
                count += self._count(batch)
                bar.advance()
        return summarize(total, count) if total is not None else {}

    # ------------------------------------------------------------ one pass

    def pass_over(
        self, batch: GlobalBatch, reference: NDArray[np.float32] | None, *, training: bool
    ) -> Tensor:
        """Forward (and backward, with `training`) over a global batch; the (8,) metric sums over all ranks."""
        kl = self._divergence(batch, reference) if self.objective.needs_kl else None
        count = self._count(batch)

        def loss(values: Tensor, row: TreeBatch) -> tuple[Tensor, Tensor]:
            result = self.objective.preference(
                values,
                row.reference_logprob,
                row.scored,
                row.comparisons,
                row.absolute,
                kl,
                self.recipe.objective,
            )
            per_comparison = self.objective.unit != "token"
            sums = (
                preference_sums(result, row.comparisons) if per_comparison else likelihood_sums(result.loss)
            )
            return result.loss.sum() / count, sums

        def fused(values: Tensor, row: TreeBatch) -> tuple[Tensor, Tensor]:
            found = preference_loss(
                values,
                Structure(*(getattr(row, name) for name in Structure._fields)),
                self.objective.name,
                reference_logprob=row.reference_logprob,
                kl=kl,
                **{name: getattr(self.recipe.objective, name) for name in HYPERPARAMETERS},
            )
            return found.loss / count, found.sums

        rows = self.rows(batch.rows, reference)
        with torch.set_grad_enabled(training):
            return run_rows(self.chunks, rows, loss, training=training, fused=fused)

    def rows(self, rows: list[list[Piece]], reference: NDArray[np.float32] | None = None) -> list[TreeBatch]:
        """This rank's rows of a global batch, packed."""
        return [
            pack_row(
                pieces,
                multiple=self._row_multiple(),
                pad_id=self.tokenizer.pad_id,
                reference_logprob=reference,
            )
            for pieces in rows
        ]

    def _divergence(self, batch: GlobalBatch, reference: NDArray[np.float32] | None) -> Tensor:
        """KTO's KL estimate: one number per step, the mean log-ratio of all mismatched pairs of the global batch.

        Its collective lives here and not in the loss, which therefore does not change with layout or packing.
        """
        rows = self.rows(batch.mismatched, reference)
        total = torch.zeros(1, dtype=torch.float64, device=groups.device())
        for row, values in zip(rows, sequence_values(self.chunks, rows), strict=False):
            total += (values.double() - row.reference_logprob.to(values.device).double()).sum()
        return (share_from_last_stage(total)[0] / batch.mismatched_sequences).float()

    def _count(self, batch: GlobalBatch) -> int:
        """What the global batch's loss is divided by; known without communication."""
        return {"token": batch.scored, "comparison": batch.comparisons, "side": batch.sides}[
            self.objective.unit
        ]

    @property
    def _unit(self) -> Unit:
        """What a global batch is counted in."""
        return "sequence" if self.objective.unit == "token" else "comparison"

    def _row_multiple(self) -> int:
        return gpt.row_multiple(self.recipe.parallel)

    # ------------------------------------------------------------ set-up

    def _check_outputs(self) -> None:
        """Refuse before training what could not be written after it."""
        recipe = self.recipe
        for key, folder in (
            ("output", self.output),
            ("reference.cache", recipe.reference_cache),
            ("export.path", recipe.export_path),
        ):
            there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            if not there.is_dir():
                raise UserError(f"{key}: {folder} cannot be a folder, {there} is a file; choose another")
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserError(
                    f"{key}: {folder} cannot be written, {there} allows no writing; choose another"
                )
        hf_export.check_target(
            recipe.export_path, head=self.objective.head, reward_format=recipe.export.reward_format
        )

    def _read_data(self) -> tuple[DataSet, DataSet | None]:
        """Training and validation data. One process tokenizes what is not cached, then one on every node to
        which its files are not visible; the others map the files."""
        found: tuple[DataSet, DataSet | None] | None = None
        for my_turn in (self.first, groups.local_rank() == 0, True):
            if my_turn and found is None:
                found = self._prepare()
            groups.wait_for_all()
        assert found is not None
        return found

    def _prepare(self) -> tuple[DataSet, DataSet | None]:
        recipe, settings = self.recipe, self.recipe.data
        folders: list[Path] = []

        def prepared(sources: Sequence[Source]) -> DataSet:
            data, used = prepare(
                sources,
                self.tokenizer,
                settings,
                unit=self._unit,
                cache=recipe.data_cache,
                seed=recipe.seed,
                say=self.say if self.first else None,
            )
            folders.extend(used)
            return data

        data, held = prepared(settings.train), None
        if settings.validation:
            held = prepared(settings.validation)
        elif settings.validation_fraction:
            data, held = hold_out(data, settings.validation_fraction, recipe.seed)
        if self.first:
            self._show_data(data, held, folders)
        return data, held

    def _show_data(self, data: DataSet, held: DataSet | None, folders: Sequence[Path]) -> None:
        """What an epoch holds, and everything that was left out."""
        left_out = Report()
        contaminated: list[str] = []
        for folder in folders:
            left_out.merge(pipeline.report(folder))
            contaminated += pipeline.decontaminated(folder)
        for name, part in (("training", data), ("held out", held)):
            if part is not None:
                compared = f"{part.comparisons:,} comparisons, " if self._unit == "comparison" else ""
                self.say(f"{name:<10} {compared}{part.sequences:,} sequences in {len(part):,} trees")
        for line in left_out.lines():
            self.say(f"           {line}")
        if contaminated:
            listing = self.output / "decontaminated.jsonl"
            self.output.mkdir(parents=True, exist_ok=True)
            listing.write_text("".join(line + "\n" for line in contaminated), encoding="utf-8")
            self.say(f"           {len(contaminated)} instructions found in test sets: {listing}")

    def _plan(self, data: DataSet, *, training: bool) -> BatchPlan:
        recipe = self.recipe
        return BatchPlan(
            data,
            unit=self._unit,
            global_batch=recipe.training.global_batch,
            row_length=recipe.data.row_length,
            epochs=recipe.training.epochs if training else 1,
            shuffle=recipe.data.shuffle and training,
            seed=recipe.seed,
            mismatched=self.objective.needs_kl,
            rank=groups.data_rank(),
            ranks=groups.data_size(),
            # interleaved pipelines take micro-batches by the number of stages
            multiple=recipe.parallel.pipeline if recipe.parallel.virtual_pipeline else 1,
            cost=self._cost(),
        )

    def _cost(self) -> CostModel:
        """What data-parallel ranks are balanced by."""
        pair = self.recipe.data.pair_cost
        if pair is not None:
            return CostModel(token=1.0, pair=pair)
        shape = self.shape
        return row_cost_model(
            hidden=shape.hidden,
            layers=shape.layers,
            ffn=shape.ffn,
            heads=shape.heads,
            head_dim=shape.head_dim,
            kv_heads=shape.kv_heads,
            vocab=shape.vocab if self.objective.head == "lm" else 0,
        )

    def _reference(
        self, bare: Sequence[torch.nn.Module], dtype: torch.dtype
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Log-probs of training and validation data under the reference policy, from the cache or one pass."""
        if not self.objective.needs_reference:
            return None, None
        folder = hf.fetch(self.recipe.reference_path)
        if hf.read_shape(folder) != self.shape:
            raise UserError(
                f"{self.recipe.reference_path}: the reference policy has another shape than {self.recipe.model.path}; "
                "take a checkpoint of the same model"
            )
        weights = [reference_policy.weights_digest(folder) if self.first else ""]
        dist.broadcast_object_list(weights)
        loaded = False

        def of(data: DataSet | None, title: str) -> NDArray[np.float32] | None:
            if data is None:
                return None
            data = data.with_copies(np.ones(len(data), np.int64))  # once, however often an epoch takes it
            plan = self._plan(data, training=False)
            count = data.sequences + (2 * data.comparisons if plan.mismatched else 0)

            def compute() -> NDArray[np.float32]:
                nonlocal loaded
                if not loaded:
                    hf.load(bare, folder, self.shape)
                    loaded = True
                return self._sequence_logprobs(bare, plan, count, title)

            key = reference_policy.cache_key(weights[0], data.fingerprint, dtype, plan.mismatched)
            values, hit = reference_policy.cached(self.recipe.reference_cache, key, count, compute)
            self.say(f"reference  {count:,} log-probs {'from the cache' if hit else 'computed'}")
            return values

        return of(self.data, "reference log-probs"), of(self.validation, "reference, held out")

    def _sequence_logprobs(
        self, chunks: Sequence[Any], plan: BatchPlan, count: int, title: str
    ) -> NDArray[np.float32]:
        """(count,) log-probs of every sequence of a plan, by forward passes alone; the same on every rank."""
        found = torch.zeros(count, dtype=torch.float64, device=groups.device())
        with ProgressBar(title, len(plan), visible=self.first) as bar:
            for _, batch in plan.prefetch(0, len(plan)):
                mine = [*batch.rows, *batch.mismatched]
                values = sequence_values(chunks, self.rows(mine))
                for pieces, part in zip(mine, values, strict=False):  # no values before the last stage
                    ids = [torch.from_numpy(piece.sequence_ids) for piece in pieces]
                    if ids:
                        # a tree cut by the end of a batch has sequences in both: assigned, not added
                        found[torch.cat(ids).to(found.device)] = part.double()
                bar.advance()
        return self._merge_ranks(found)

    def _merge_ranks(self, found: Tensor) -> NDArray[np.float32]:
        """Combine what the data-parallel ranks computed: log-probs are negative, and 0 where nothing was."""
        if groups.is_last_stage():
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=groups.data_group())
        if groups.pipeline_size() > 1:
            dist.broadcast(found, src=groups.last_stage_rank(), group=groups.pipeline_group())
        return found.float().cpu().numpy()

    # ------------------------------------------------------------ saving

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with for its continuation to be the same run."""
        recipe = self.recipe
        return {
            **recipe.identity,
            "data": self.data.fingerprint,
            "global_batch": recipe.training.global_batch,
            "steps": self.steps,
            "seed": recipe.seed,
        }

    def save(self, step: int) -> None:
        """Write the checkpoint whose next step is `step`."""
        optimizer.settle(self.chunks, self.recipe.parallel)
        last = step == self.steps
        self.saver.save(step, self.chunks, self.optimizer, self.identity, wait=last)

    def _newest_checkpoint(self) -> Path | None:
        found = [checkpoint.checkpoints(self.output / "checkpoints")[-1:] if self.first else None]
        dist.broadcast_object_list(found)
        return found[0][0] if found[0] else None

    def _resume(self) -> int:
        """Load the newest checkpoint of this run, if there is one; the step to start with."""
        if self.newest is None:
            if self.first:
                self.output.mkdir(parents=True, exist_ok=True)
                (self.output / "recipe.yaml").write_text(self.recipe.dump())
            return 0
        step = checkpoint.load(self.newest, self.chunks, self.optimizer, self.identity)
        self.say(f"resuming   at step {step} of {self.steps} from {self.newest}")
        return step

    def export(self) -> Path:
        """Write the trained model as a Hugging Face checkpoint."""
        optimizer.settle(self.chunks, self.recipe.parallel)
        folder = publish.export_model(self.chunks, self.recipe, self.model_folder, self.tokenizer)
        self.say(f"exported   {folder}")
        return folder

    def _journal(self, start: int) -> Journal:
        return Journal(self.output, writes=self.first, start_step=start)

    def say(self, text: str) -> None:
        """Print on the first process."""
        if self.first:
            print(text, flush=True)


def _note(values: dict[str, float]) -> str:
    """The few numbers a progress bar has room for."""
    parts = [f"loss {values['loss']:.4f}"]
    if "reward_accuracy" in values:
        parts.append(f"accuracy {values['reward_accuracy']:.2f}")
    parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)
