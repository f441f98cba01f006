"""Computes one optimizer step or one evaluation of a model, from the trees of a global batch to the metrics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from silva.engine.parallel import groups
from silva.engine.parallel.optimizer import prepare

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from silva.engine import objectives
from silva.engine.data.loader import GlobalBatch
from silva.engine.data.trees.packing import Piece, TreeBatch, pack_rows
from silva.engine.recipe.schema import Objective
from silva.engine.training.metrics import likelihood_sums, preference_sums, summarize
from silva.engine.training.passes import run_rows, sequence_values, share_from_last_stage
from silva.kernels.preference_loss import PreferenceLoss, Structure, preference_loss
from silva.kernels.preference_terms import TERMS


@dataclass(frozen=True)
class StepSettings:
    """Holds the settings of a step, beside model, optimizer and objective.

    Attributes:
        objective: the recipe's section, of which the loss reads its keys.
        multiple: what a row's number of tokens is a multiple of (`gpt.row_multiple`).
        pad_id: the token of a row's padding.
    """

    objective: Objective
    multiple: int
    pad_id: int


class Step:
    """Runs a model's steps.

    Every method except `rows` and `count` is collective.

    Attributes:
        chunks: the model of this rank, one wrapped module per virtual pipeline stage.
        optimizer: of `optimizer.build` over them.
        objective: what is minimised; may be exchanged between two steps.
        settings: see `StepSettings`.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: Any,
        objective: objectives.Objective,
        settings: StepSettings,
    ) -> None:
        self.chunks, self.optimizer = list(chunks), optimizer
        self.objective, self.settings = objective, settings
        # of the updates whose weights have not been looked at yet: a flag that is 1 if one is not finite, and its sum
        # over ranks in flight
        self._flags: deque[tuple[Tensor, Any]] = deque()

    # ------------------------------------------------------------ of global batches

    def update(
        self, batch: GlobalBatch, reference: NDArray[np.float32] | None, *, rate: float
    ) -> dict[str, float]:
        """Take one optimizer step over a global batch.

        Args:
            batch: of the training data.
            reference: (sequences of the data set and, for KTO, two for each comparison,) log-probs under the reference
                policy, if the objective needs them.
            rate: the learning rate.

        Returns:
            As `update_rows`.
        """
        kl = self.divergence(batch, reference) if self.objective.needs_kl else None
        rows = self.rows(batch.rows, reference)
        return self.update_rows(rows, self.count(batch), rate=rate, kl=kl)

    def evaluate(
        self, batches: Iterable[GlobalBatch], reference: NDArray[np.float32] | None
    ) -> dict[str, float]:
        """Compute the metrics over all batches together, by forward passes alone.

        Args:
            batches: of the validation data.
            reference: as in `update`, of the validation data.

        Returns:
            What `metrics.summarize` returns; empty without batches.
        """
        total: Tensor | None = None
        count = 0
        for batch in batches:
            kl = self.divergence(batch, reference) if self.objective.needs_kl else None
            units = self.count(batch)
            sums = self.pass_over(self.rows(batch.rows, reference), units, kl=kl, training=False)
            total = sums if total is None else total + sums
            count += units
        return summarize(total, count) if total is not None else {}

    def divergence(self, batch: GlobalBatch, reference: NDArray[np.float32] | None) -> Tensor:
        """Estimate KTO's KL: the mean log-ratio of all mismatched pairs of the global batch.

        The sum over ranks is made here and not in the loss, so that the loss does not depend on layout or packing.

        Args:
            batch: with mismatched pairs.
            reference: as in `update`.

        Returns:
            A float32 scalar, the same on every rank.
        """
        rows = self.rows(batch.mismatched, reference)
        total = torch.zeros(1, dtype=torch.float64, device=groups.device())
        for row, values in zip(rows, sequence_values(self.chunks, rows), strict=False):
            total += (values.double() - row.reference_logprob.to(values.device).double()).sum()
        return (share_from_last_stage(total)[0] / batch.mismatched_sequences).float()

    def rows(
        self, rows: Sequence[Sequence[Piece]], reference: NDArray[np.float32] | None = None
    ) -> list[TreeBatch]:
        """Pack this rank's rows of a global batch."""
        return pack_rows(
            rows, multiple=self.settings.multiple, pad_id=self.settings.pad_id, reference_logprob=reference
        )

    def count(self, batch: GlobalBatch) -> int:
        """Return the number that the batch's loss is divided by; every rank knows it without communication."""
        counts = {"token": batch.scored, "comparison": batch.comparisons, "side": batch.sides}
        return counts[self.objective.unit]

    # ------------------------------------------------------------ of packed rows

    def update_rows(
        self, rows: Sequence[TreeBatch], count: int, *, rate: float, kl: Tensor | None = None
    ) -> dict[str, float]:
        """Take one optimizer step over this rank's packed rows.

        Args:
            rows: the same number on every data-parallel rank.
            count: what the loss of all ranks' rows is divided by.
            rate: the learning rate.
            kl: of `divergence`, if the objective needs it.

        Returns:
            What `metrics.summarize` returns, "learning_rate", "gradient_norm" (before clipping) and, if the objective
            needs it, "kl"; the same on every rank. The model is left as it was unless loss and norm are finite.
        """
        self.clear_gradients()
        sums = self.pass_over(rows, count, kl=kl, training=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = prepare(self.optimizer)
        # copies the sums to the host, which no pass over a row does
        values = summarize(sums, count)
        if math.isfinite(values["loss"]) and math.isfinite(norm):
            self.optimizer.step_with_ready_grads()
            self._watch()
        values |= {"learning_rate": rate, "gradient_norm": norm}
        return values if kl is None else values | {"kl": float(kl)}

    @torch.no_grad()
    def _watch(self) -> None:
        """Start to find out whether the update has left every weight of every rank finite."""
        weights = [p for chunk in self.chunks for p in chunk.parameters()]
        largest = torch.stack([x.float() for x in torch._foreach_norm(weights, float("inf"))])
        flag = (~largest.isfinite()).any().float()
        work = dist.all_reduce(flag, async_op=True)
        self._flags.append((flag, work))

    def broken(self, *, newest: bool) -> bool:
        """Tell whether an update has left a weight of any rank that is not finite; the same on every rank.

        Args:
            newest: whether to wait for what is known of the newest update too. Without it, nothing waits that a later
                step has not waited for already.
        """
        found = False
        while len(self._flags) > (0 if newest else 1):
            flag, work = self._flags.popleft()
            work.wait()
            found = found or bool(flag.item())
        return found

    def blame(self, batch: GlobalBatch, reference: NDArray[np.float32] | None) -> str:
        """Say which rows of a global batch have log-probs or rewards that are not finite.

        The call is collective, and computes the batch's forward pass again.
        """
        values = sequence_values(self.chunks, self.rows(batch.rows, reference))
        mine = []
        for place, (pieces, found) in enumerate(zip(batch.rows, values, strict=False)):
            if not found.isfinite().all():
                ids = sorted(int(i) for piece in pieces for i in piece.sequence_ids)
                mine.append(
                    f"row {place} of rank {groups.rank()} (sequences {ids[0]} to {ids[-1]} of the data)"
                )
        every: list[list[str]] = [[] for _ in range(groups.world_size())]
        dist.all_gather_object(every, mine)
        rows = [row for each in every for row in each]
        if not rows:
            return "the log-probs or rewards of all rows are finite, so it is the gradient that is not"
        return (
            f"not finite: {', '.join(rows[:3])}{f' and {len(rows) - 3} more rows' if len(rows) > 3 else ''}"
        )

    def clear_gradients(self) -> None:
        """Fill the gradient buffers with zeros."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def pass_over(
        self, rows: Sequence[TreeBatch], count: int, *, kl: Tensor | None = None, training: bool
    ) -> Tensor:
        """Run forward (and backward, with `training`) over this rank's packed rows.

        Args:
            rows: as in `update_rows`.
            count: as in `update_rows`.
            kl: as in `update_rows`.
            training: whether gradients of loss / count are summed into the buffers.

        Returns:
            (8,) float64 sums over the rows of all ranks, in the order of `metrics.SUMS`; not divided by the count.
        """

        def loss(values: Tensor, row: TreeBatch) -> tuple[Tensor, Tensor]:
            result = self.objective.preference(
                values,
                row.reference_logprob,
                row.scored,
                row.comparisons,
                row.absolute,
                kl,
                self.settings.objective,
            )
            sums = (
                preference_sums(result, row.comparisons)
                if self.objective.pairwise
                else likelihood_sums(result.loss)
            )
            return result.loss.sum() / count, sums

        def fused(values: Tensor, row: TreeBatch) -> tuple[Tensor, Tensor]:
            found = self._launch(values, row, kl)
            return found.loss / count, found.sums

        with torch.set_grad_enabled(training):
            return run_rows(
                self.chunks,
                rows,
                loss,
                training=training,
                # a loss without a kernel of its own is differentiated by autograd, on a GPU too
                fused=fused if self.objective.name in TERMS else None,
            )

    def _launch(self, values: Tensor, row: TreeBatch, kl: Tensor | None) -> PreferenceLoss:
        return preference_loss(
            values,
            Structure(*(getattr(row, name) for name in Structure._fields)),
            self.objective.name,
            reference_logprob=row.reference_logprob if self.objective.needs_reference else None,
            kl=kl,
            **{name: getattr(self.settings.objective, name) for name in self.objective.keys},
        )
