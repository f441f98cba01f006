"""Runs TRL's trainers and transformers' models on rows of data, from the rows themselves to the trained weights."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks.fidelity.runs import Rows, Run, Settings, Tokens

# what TRL calls our objectives
_LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge", "nca": "nca_pair"}


def run(objective: str, rows: Rows, folder: Path, settings: Settings) -> Run:
    """Train with TRL.

    Args:
        objective: as Silva calls it.
        rows: as TRL takes them.
        folder: of the checkpoint.
        settings: of the run; TRL takes the whole batch as one micro-batch.

    Returns:
        What the run read and computed.
    """
    quiet = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as work,
        warnings.catch_warnings(),
        redirect_stdout(quiet),
        redirect_stderr(quiet),
    ):
        warnings.simplefilter("ignore")
        trainer = _trainer(objective, rows, folder, settings, Path(work))
        trainer.remove_callback(PrinterCallback)
        tokens = _tokens(objective, trainer.train_dataset)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return Run(tokens, losses, weights)


def _trainer(objective: str, rows: Rows, folder: Path, settings: Settings, work: Path) -> Any:
    shared: dict[str, Any] = {
        "output_dir": str(work),
        "per_device_train_batch_size": len(rows),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "adam_epsilon": settings.epsilon,
        "max_grad_norm": 1.0,
        "max_steps": settings.steps,
        "max_length": None,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = {"train_dataset": datasets.Dataset.from_list(list(rows)), "processing_class": tokenizer}
    if objective == "bt":
        scorer = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return RewardTrainer(scorer, args=RewardConfig(**shared), **data)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if objective == "sft":
        return SFTTrainer(policy, args=SFTConfig(**shared), **data)
    other = settings.reference
    reference = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32) if other else None
    if objective == "kto":
        return KTOTrainer(policy, reference, args=KTOConfig(**shared, beta=settings.beta), **data)
    config = DPOConfig(**shared, beta=settings.beta, loss_type=_LOSSES[objective])
    return DPOTrainer(policy, reference, args=config, **data)


def _tokens(objective: str, prepared: Any) -> list[list[Tokens]]:
    """Return the tokens that TRL has made of each row, chosen and rejected in turns."""
    found = []
    for row in prepared:
        if objective == "sft":
            found.append(Tokens(tuple(row["input_ids"]), tuple(label != -100 for label in row["labels"])))
        elif objective == "kto":
            found.append(_joined(row["prompt_ids"], row["completion_ids"]))
        else:
            sides = row["chosen_ids"], row["rejected_ids"]
            found += [_joined(row["prompt_ids"], s) if objective != "bt" else _joined(s, []) for s in sides]
    return [[tokens] for tokens in found]


def _joined(prompt: Sequence[int], completion: Sequence[int]) -> Tokens:
    return Tokens((*prompt, *completion), (*[False] * len(prompt), *[True] * len(completion)))


# ---------------------------------------------------------------- transformers


@torch.no_grad()
def log_probs(folder: Path, sequences: Sequence[Sequence[Tokens]]) -> list[float]:
    """Compute the log-prob of each sequence's scored tokens, each path by a forward pass of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for paths in sequences:
        total = 0.0
        for path in paths:
            logits = model(torch.tensor([path.ids])).logits[0, :-1].double()
            each = functional.log_softmax(logits, -1).gather(1, torch.tensor(path.ids[1:])[:, None])[:, 0]
            total += float(each[torch.tensor(path.scored[1:])].sum())
        found.append(total)
    return found


def dpo_loss(folder: Path, reference: Path, sequences: Sequence[Sequence[Tokens]], beta: float) -> float:
    """Compute DPO's mean loss over sequences, chosen and rejected in turns."""
    policy, base = (torch.tensor(log_probs(place, sequences)) for place in (folder, reference))
    ratios = (policy - base).reshape(-1, 2)
    return float(-functional.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean())


def sft_loss(folder: Path, sequences: Sequence[Sequence[Tokens]]) -> float:
    """Compute SFT's mean loss per scored token."""
    scored = sum(sum(path.scored) for paths in sequences for path in paths)
    return -sum(log_probs(folder, sequences)) / scored


@torch.no_grad()
def rewards(folder: Path, prompts: Sequence[Sequence[int]], *, padded: str = "") -> list[float]:
    """Compute the rewards of an exported model, in one batch if `padded` names a side, else one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    if not padded:
        return [float(model(torch.tensor([list(ids)])).logits) for ids in prompts]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad(
        {"input_ids": [list(ids) for ids in prompts]}, padding_side=padded, return_tensors="pt"
    )
    return model(**batch).logits[:, 0].tolist()
