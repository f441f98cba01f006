"""The two heads: log-probs of scored positions from a vocabulary-parallel head, and a scalar reward.

S tokens of the row, L scored positions, N sequences, V vocabulary, H hidden size; tp tensor-parallel
processes, each holding V / tp rows of the output matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

LOGITS_AT_ONCE = (
    1 << 24
)  # elements: 64 MiB of float32 logits exist at any time, however many positions are scored
# std of a fresh reward head: the `initializer_range` that transformers, and so TRL, draws it with
REWARD_STD = 0.02


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type reductions run in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _position_chunks(positions: int, rows: int) -> list[slice]:
    step = max(1, LOGITS_AT_ONCE // max(1, rows))
    return [slice(start, start + step) for start in range(0, positions, step)]


class VocabularyParallelLogProb(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] where `weight` is split by rows over a process group.

    Logits exist for a few positions at a time; the backward pass computes them again. The gradient of
    `hidden` is this process's share: the caller sums it over the group.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup, start: int
    ) -> Tensor:
        """hidden (L, H), weight (R, H) the rows from `start`, target (L,) -> (L,) in float32 at least."""
        wide = _wide(hidden.dtype)
        positions, rows = hidden.shape[0], weight.shape[0]
        # the largest logit here, the sum of exponentials relative to it, the target's logit (0 elsewhere)
        highest = torch.full((positions,), -torch.inf, dtype=wide, device=hidden.device)
        total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        local = target - start
        here = (local >= 0) & (local < rows)
        for part in _position_chunks(positions, rows) if rows else []:
            logits = (hidden[part] @ weight.T).to(wide)
            highest[part] = logits.amax(-1)
            total[part] = (logits - highest[part, None]).exp().sum(-1)
            own = logits.gather(1, local[part, None].clamp(0, rows - 1)).squeeze(1)
            chosen[part] = torch.where(here[part], own, 0)
        if group.size() > 1 and positions:
            top = highest.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * (highest - top).exp(), chosen])
            dist.all_reduce(sums, group=group)
            highest, (total, chosen) = top, sums
        normaliser = highest + total.log()
        ctx.save_for_backward(hidden, weight, local, here, normaliser)
        return chosen - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, here, normaliser = ctx.saved_tensors
        rows = weight.shape[0]
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=normaliser.dtype, device=weight.device)
        for part in _position_chunks(hidden.shape[0], rows) if rows else []:
            logits = (hidden[part] @ weight.T).to(normaliser.dtype)
            slope = -(logits - normaliser[part, None]).exp()
            hit = here[part, None].to(slope.dtype)
            slope.scatter_add_(1, local[part, None].clamp(0, rows - 1), hit)
            slope = (slope * grad[part, None]).to(hidden.dtype)
            grad_hidden[part] = slope @ weight
            grad_weight += slope.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


class LogProbHead(ColumnParallelLinear):
    """The output matrix; gives log-probs of chosen targets instead of logits.

    Same parameter, checkpoint key and tensor-parallel attributes as the layer it takes the place of. It has
    to be *called*: with overlapped parameter gathering megatron-core waits for the weight in a forward hook.
    """

    def __init__(self, replaced: ColumnParallelLinear, vocabulary: int) -> None:
        """
        Args:
            replaced: the layer whose weight this one takes over; None where the embedding's is used.
            vocabulary: number of real tokens; rows beyond are padding and take no part in the softmax.
        """
        super().__init__(
            replaced.input_size,
            replaced.output_size,
            config=replaced.config,
            init_method=replaced.config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=replaced.tp_group,
        )
        self.weight = replaced.weight
        self.first_row = self.tp_group.rank() * self.output_size_per_partition
        self.real_rows = min(max(vocabulary - self.first_row, 0), self.output_size_per_partition)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        *,
        source: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            input_: (S, 1, H), or (S / tp, 1, H) with sequence parallelism.
            weight: (V / tp, H), the embedding's where they are tied.
            source, target: (L,) int, the token whose hidden state predicts, and what; None: logits.

        Returns:
            (L,) log-probs, float32 at least; without a target (S, 1, V / tp) logits.
        """
        if source is None or target is None:
            return super().forward(input_, weight)[0]
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return VocabularyParallelLogProb.apply(
            hidden[:, 0][source.long()], weight[: self.real_rows], target, self.tp_group, self.first_row
        )


class RewardHead(torch.nn.Module):
    """Reward R = w . h at a sequence's last token, without bias; the same on every tensor-parallel process.

    A fresh weight is drawn as transformers draws the `score` layer of a sequence classifier. Zeros would be
    calmer, but then the first step teaches the model under the head nothing.
    """

    def __init__(self, config: TransformerConfig, group: ProcessGroup, seed: int) -> None:
        super().__init__()
        self.config, self.group = config, group
        # drawn on the CPU in float32 from its own generator: equal on every process, layout and dtype
        weight = torch.empty(1, config.hidden_size, dtype=torch.float32).normal_(
            std=REWARD_STD, generator=torch.Generator().manual_seed(seed)
        )
        self.weight = torch.nn.Parameter(
            weight.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
        )

    def forward(self, hidden: Tensor, last: Tensor) -> Tensor:
        """hidden (S, 1, H), sequence-parallel (S / tp, 1, H), last (N,) int -> (N,), float32 at least."""
        if self.config.sequence_parallel:
            # every process does the same work on the gathered row, so its gradient is split, not summed
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.group
            )
        wide = _wide(hidden.dtype)
        return F.linear(hidden[:, 0][last.long()].to(wide), self.weight.to(wide)).squeeze(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What megatron-core's distributed checkpoints store: the whole weight, once."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=None if metadata is None else metadata["dp_cp_group"],
        )
