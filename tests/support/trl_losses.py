"""Calls TRL's own loss code on given log-probs.

TRL 1.16 computes its losses inside the trainers' `_compute_loss` and `compute_loss`; they are called here with a
stand-in trainer whose "model" returns the log-probs of a test. They average over the batch.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Accelerator:
    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def trainer(settings: Any, **keys: Any) -> Any:
    """A stand-in with what the loss code reads; `settings` has beta and label_smoothing."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **keys,
    )


def token_outputs(totals: Tensor, lengths: Tensor) -> tuple[Any, Tensor]:
    """A model output and the batch it belongs to: sequence i scores its last lengths[i] of S tokens.

    totals: (B,) log-prob of each sequence, spread evenly over its tokens. Returns (outputs, mask (B, S)).
    """
    size = int(lengths.max())
    mask = torch.arange(size + 1) > size - lengths[:, None]  # one leading prompt token, never scored
    per_token = (totals / lengths)[:, None] * mask[:, 1:]
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return outputs, mask


def dpo_loss(
    policy: Tensor, reference: Tensor, lengths: Tensor, loss_type: str, settings: Any
) -> tuple[Tensor, dict[str, list[float]]]:
    """DPOTrainer's mean loss and its metrics; each (2P,), all chosen, then all rejected."""
    from trl import DPOTrainer

    stand_in = trainer(
        settings,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
    )
    outputs, mask = token_outputs(policy, lengths)
    ref_chosen, ref_rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = DPOTrainer._compute_loss(stand_in, lambda **_: outputs, inputs, False)
    return loss, stand_in._metrics["train"]
