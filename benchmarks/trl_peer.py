"""Runs TRL's DPOTrainer and RewardTrainer on comparisons that are tokens already, for `vs_trl`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from benchmarks import common


def score_labelled_only() -> None:
    """Let TRL's output matrix take the scored positions only, as on a GPU.

    Without Triton it goes over every position. What is replaced chooses the positions and nothing else.
    """
    trl.trainer.utils._use_triton = lambda device: True


class Collator:
    """Pads as TRL's own collators do: chosen above rejected, on the right, to the longest."""

    def __init__(self, *, mask: bool) -> None:
        self.mask = mask

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the examples as one batch."""

        def padded(name: str) -> torch.Tensor:
            lists = [torch.tensor(e[f"{side}_{name}"]) for side in ("chosen", "rejected") for e in examples]
            return torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)

        ids = padded("ids")
        lengths = torch.tensor([len(e[f"{s}_ids"]) for s in ("chosen", "rejected") for e in examples])
        found = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        if self.mask:
            found["completion_mask"] = padded("mask")
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                found[name] = torch.tensor([e[name] for e in examples])
        return found


class _Recorded:
    """Keeps the loss of every micro-batch, unrounded."""

    losses: list[float]

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Compute the loss as TRL does, and keep it."""
        loss = super().compute_loss(*arguments, **options)  # type: ignore[misc]
        self.losses.append(float(loss.detach()))
        return loss


class _Dpo(_Recorded, DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *unused: Any, **unused_too: Any) -> Any:
        # the data set holds tokens already
        return dataset


class _Reward(_Recorded, RewardTrainer):
    pass


class _Clock(transformers.TrainerCallback):
    """Keeps the time at which every step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *unused: Any, **unused_too: Any) -> None:
        """Keep the time."""
        self.ends.append(time.perf_counter())


class Trl:
    """Runs TRL on the same comparisons."""

    def __init__(
        self, objective: str, pairs: datasets.Dataset, micro_batch: int, model: Path, work: Path,
        options: argparse.Namespace,
    ) -> None:  # fmt: skip
        settings: dict[str, Any] = {
            "output_dir": str(work / "trl"),
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": options.batch // micro_batch,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "max_steps": options.steps + 1,
            "max_length": None,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
        }
        # TRL asks it for the padding token alone
        tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
        shared = {"train_dataset": pairs, "processing_class": tokenizer}
        self.trainer: Any
        if objective == "dpo":
            policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            config = DPOConfig(**settings, beta=0.1, precompute_ref_log_probs=True)
            self.trainer = _Dpo(policy, args=config, data_collator=Collator(mask=True), **shared)
        else:
            scorer = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
            reward = RewardConfig(**settings)
            self.trainer = _Reward(scorer, args=reward, data_collator=Collator(mask=False), **shared)
        self.trainer.remove_callback(PrinterCallback)
        self.clock = _Clock()
        self.trainer.add_callback(self.clock)
        self.accumulated = options.batch // micro_batch

    def run(self, steps: int) -> tuple[list[float], list[float]]:
        """Train for some steps.

        Returns:
            (losses, seconds of the steps after the first), collation included.
        """
        self.trainer.losses, self.clock.ends = [], []
        self.trainer.args.max_steps = steps
        self.trainer.train()
        losses = torch.tensor(self.trainer.losses, dtype=torch.float64).view(-1, self.accumulated).mean(1)
        return losses.tolist(), common.between(self.clock.ends)
