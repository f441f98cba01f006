"""Defines the two heads: log-probs of scored positions from a vocabulary-parallel head, and a scalar reward.

A row has S tokens, L scored positions and N sequences; V is the vocabulary, H the hidden size. Each of the tp
tensor-parallel processes holds V / tp rows of the output matrix.
"""

from __future__ import annotations

from typing import Any

import torch
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

from silva.kernels.linear_logprob import linear_logprob

# standard deviation of a fresh reward head: the `initializer_range` of transformers, which TRL uses too
REWARD_STD = 0.02


class LogProbHead(ColumnParallelLinear):
    """Holds the output matrix, and computes log-probs of chosen targets instead of logits.

    It has the parameter, checkpoint key and tensor-parallel attributes of the layer that it replaces. It has to be
    *called*: with overlapped parameter gathering, megatron-core waits for the weight in a forward hook.

    Args:
        replaced: the layer whose weight this one takes over; that weight is None where the embedding's is used.
        vocabulary: number of real tokens; the rows after them are padding and take no part in the softmax.
    """

    def __init__(self, replaced: ColumnParallelLinear, vocabulary: int) -> None:
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
        """Compute log-probs of the targets, or logits without targets.

        Args:
            input_: (S, 1, H), or (S / tp, 1, H) with sequence parallelism.
            weight: (V / tp, H), the embedding's where the two are tied; else None.
            source: (L,) int, index of the token whose hidden state predicts; None for logits.
            target: (L,) int, the token that is predicted; None for logits.

        Returns:
            (L,) log-probs of at least float32; without a target (S, 1, V / tp) logits.
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
        return linear_logprob(
            hidden[:, 0][source.long()],
            weight,
            target,
            group=self.tp_group,
            first_row=self.first_row,
            real_rows=self.real_rows,
        )


class RewardHead(torch.nn.Module):
    """Computes the reward R = w . h at a sequence's last token, without bias, alike on every tensor-parallel process.

    A fresh weight is drawn as transformers draws the `score` layer of a sequence classifier. With zeros, the model
    under the head would get no gradient in the first step.

    Args:
        config: of the model.
        group: the tensor-parallel processes.
        seed: of a fresh weight.
    """

    def __init__(self, config: TransformerConfig, group: ProcessGroup, seed: int) -> None:
        super().__init__()
        self.config, self.group = config, group
        # drawn on the CPU in float32 from a generator of its own: equal on every process, with every layout and dtype
        weight = torch.empty(1, config.hidden_size, dtype=torch.float32).normal_(
            std=REWARD_STD, generator=torch.Generator().manual_seed(seed)
        )
        self.weight = torch.nn.Parameter(
            weight.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
        )

    def forward(self, hidden: Tensor, last: Tensor) -> Tensor:
        """Compute the rewards of a row's sequences.

        Args:
            hidden: (S, 1, H), or (S / tp, 1, H) with sequence parallelism.
            last: (N,) int, index of each sequence's last token.

        Returns:
            (N,) rewards of at least float32.
        """
        if self.config.sequence_parallel:
            # every process computes the same on the gathered row, so the gradient is split, not summed
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.group
            )
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden[:, 0][last.long()].to(wide), self.weight.to(wide)).squeeze(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what megatron-core's distributed checkpoints store: the whole weight, once."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=None if metadata is None else metadata["dp_cp_group"],
        )
