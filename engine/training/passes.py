"""Runs rows through the model, with megatron-core's schedules behind two functions.

Without pipeline parallelism, a schedule is a loop over micro-batches (one packed row each); with it, it is the 1F1B
schedule, interleaved or not. Callers of this file pass rows and get numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from silva.engine.parallel import groups

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from silva.engine.data.trees.packing import TreeBatch, to_device
from silva.engine.data.trees.row_share import share_of
from silva.engine.model import gpt
from silva.engine.training.metrics import SUMS
from silva.kernels.dispatch import runs_kernels
from silva.kernels.document_attention import documents
from silva.kernels.reference import sequence_sums

RowLoss = Callable[[Tensor, TreeBatch], tuple[Tensor, Tensor]]


def run_rows(
    chunks: Sequence[Any],
    rows: Sequence[TreeBatch],
    loss: RowLoss,
    *,
    training: bool,
    fused: RowLoss | None = None,
) -> Tensor:
    """Run one pass over this rank's rows.

    The call is collective.

    Args:
        chunks: the model of this rank, one module per virtual pipeline stage.
        rows: the same number on every data-parallel rank.
        loss: called on the last stage with (values (N,) per sequence, row); returns the row's loss, already
            divided by the global count, and its (8,) vector of metric sums.
        training: whether gradients are computed and summed into the model's buffers.
        fused: as `loss`, but called with what the head gives, (L,) log-probs or (N,) rewards; used where kernels run.

    Returns:
        The (8,) metric sums over all rows of all ranks, the same on every rank.
    """
    found = _schedule(
        chunks, rows, partial(_training_step, loss=loss, fused=fused), forward_only=not training
    )
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=groups.device())
    for part in found:
        sums += part
    return share_from_last_stage(sums)


def share_from_last_stage(sums: Tensor) -> Tensor:
    """Sum over data-parallel ranks what the last stages hold, and give it to every stage.

    The call is collective, and writes the sums to its argument.
    """
    if groups.is_last_stage():
        dist.all_reduce(sums, group=groups.data_group())
    if groups.pipeline_size() > 1:
        dist.broadcast(sums, src=groups.last_stage_rank(), group=groups.pipeline_group())
    return sums


@torch.no_grad()
def sequence_values(chunks: Sequence[Any], rows: Sequence[TreeBatch]) -> list[Tensor]:
    """Compute log-probs or rewards of all sequences, by forward passes alone.

    The call is collective.

    Args:
        chunks: the model of this rank, one module per virtual pipeline stage.
        rows: the same number on every data-parallel rank.

    Returns:
        For each row, (N,) values of its sequences; an empty list on stages before the last one.
    """
    return _schedule(chunks, rows, _collecting_step, forward_only=True, collect_non_loss_data=True)


def _schedule(chunks: Sequence[Any], rows: Sequence[TreeBatch], step: Any, **options: Any) -> list[Tensor]:
    iterators = [iter(rows) for _ in chunks]
    for chunk in chunks:
        chunk.train(not options["forward_only"])
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        # an upper bound: stages exchange the true lengths
        seq_length=max(len(row.tokens) for row in rows),
        micro_batch_size=1,
        **options,
    )


def _training_step(
    rows: Iterator[TreeBatch], chunk: Any, *, loss: RowLoss, fused: RowLoss | None
) -> tuple[Tensor, Any]:
    row, how = _next(rows, chunk)

    def last_stage(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if fused is not None and runs_kernels(output):
            value, sums = fused(output, row)
        else:
            value, sums = loss(_per_sequence(output, row, chunk), row)
        # a token count of 0, because the loss is already divided by the global count and megatron-core must only sum
        return value, torch.zeros((), dtype=torch.int, device=value.device), sums

    return gpt.forward(chunk, row, **how), last_stage


def _collecting_step(rows: Iterator[TreeBatch], chunk: Any) -> tuple[Tensor, Any]:
    row, how = _next(rows, chunk)

    def last_stage(output: Tensor, non_loss_data: bool = True) -> Tensor:
        return _per_sequence(output, row, chunk)

    return gpt.forward(chunk, row, **how), last_stage


def _next(rows: Iterator[TreeBatch], chunk: Any) -> tuple[TreeBatch, dict[str, Any]]:
    """Take the next row, copy it to this process's device, and add the arguments that the host computes from it.

    Returns:
        The row, and keyword arguments of `gpt.forward`: with context parallelism the share of the row that is computed
        here; otherwise its documents, if FlashAttention is asked for and can take the row.
    """
    row, device = next(rows), groups.device()
    how: dict[str, Any] = {}
    if groups.context_size() > 1:
        window = gpt.window_of(chunk)
        how["share"] = share_of(row, groups.context_rank(), groups.context_size(), window=window).to(device)
    elif gpt.attention_of(chunk) == "flash":
        used = int(row.last.max()) + 1 if len(row.last) else 0
        plain = documents(row.subtree_end, used)
        how["documents"] = plain and plain._replace(starts=to_device(plain.starts, device))
    return row.to(device), how


def _per_sequence(output: Tensor, row: TreeBatch, chunk: Any) -> Tensor:
    """Return (N,) values: the reward head's output as it is, or log-probs summed over each sequence's spans."""
    if gpt.head_of(chunk) == "reward":
        return output
    return sequence_sums(output, row.span, row.span_pointer, row.span_index)
