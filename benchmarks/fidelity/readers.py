"""Compares what readers get from exported models with what training computed, whatever pads and ends in a checkpoint.

transformers finds the token at which it reads a reward by the padding token. Checkpoints name one in the tokenizer, in
the config, in both or in neither, and often it is the EOS.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.fidelity import families, runs, theirs
from benchmarks.fidelity.cases import COMPLETIONS, PAIRS, Measured
from benchmarks.fidelity.families import FAMILIES
from benchmarks.fidelity.runs import Settings

Named = Literal["own", "eos", "none"]


@dataclass(frozen=True)
class Export:
    """Describes a run whose exported model is read by transformers, through the exported tokenizer and template.

    Attributes:
        family: whose checkpoint is trained.
        objective: of the recipe, "bt" or "sft".
        in_tokenizer: the padding token that the checkpoint's tokenizer names.
        in_config: the padding token that its config names.
        sections: further keys of the recipe.
        note: what is special about these.
    """

    family: str
    objective: str
    in_tokenizer: Named = "own"
    in_config: Named = "own"
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        """Return the name of the case."""
        pads = f"pad of tokenizer {self.in_tokenizer}, of config {self.in_config}"
        return f"export, {self.family}, {self.objective}, {pads}{self.note and f', {self.note}'}"


def exports() -> Iterator[Export]:
    """Yield every combination of what tokenizer and config name, with families of every kind."""
    for family in ("llama2", "llama3.1", "qwen2.5", "zephyr", "deepseek-r1-distill", "gemma2", "eurus"):
        yield Export(family, "bt")
        for in_tokenizer, in_config in product(("eos", "none"), repeat=2):
            yield Export(family, "bt", in_tokenizer, in_config)
    for family in ("zephyr", "qwen2.5"):
        for in_config in ("eos", "none"):
            yield Export(family, "sft", "eos", in_config)
    for append in (True, False):
        eurus = {"tokenizer": {"chat_template": "eurus", "append_eos": append}}
        yield Export("llama2", "bt", "eos", "eos", eurus, f"template eurus, append_eos {append}".lower())
        yield Export("llama2", "sft", "eos", "eos", eurus, f"template eurus, append_eos {append}".lower())


def read(case: Export, work: Path) -> Measured:
    """Train, export, and compare what transformers reads: one by one, and padded on either side.

    Args:
        case: what is run.
        work: an empty folder.

    Returns:
        What was found: `ours` and `theirs` are the mean reward of the chosen answers, or the loss.
    """
    rewards = case.objective == "bt"
    folder = families.checkpoint(case.family, work / "model", rewards=rewards)
    _name_padding(folder, case)
    rows, form = (PAIRS, "preference") if rewards else (COMPLETIONS, "prompt_completion")
    mine = runs.run(
        case.objective, rows, folder, Settings(), work / "silva", form=form, sections=case.sections
    )
    exported = work / "silva" / "run" / "export"
    chats = [
        [*row["prompt"], *row[side]]
        for row in rows
        for side in (("chosen", "rejected") if rewards else ("completion",))
    ]
    reader = AutoTokenizer.from_pretrained(exported)
    whole = [reader.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    if rewards:
        ours = [mine.after["reward_chosen"], mine.after["reward_rejected"]]
        ways = ["", "left", "right"]
        found = [theirs.rewards(exported, whole, padded=way) for way in ways]
        means = [[sum(values[side::2]) / len(rows) for side in (0, 1)] for values in found]
    else:
        ours = [mine.after["loss"]]
        prompts = [
            reader.apply_chat_template(
                chat[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            for chat in chats
        ]
        means = [[_loss(exported, whole, list(map(len, prompts)), way)] for way in ("", "left", "right")]
    ids = [[list(path.ids) for path in sequence] for sequence in mine.tokens]
    return Measured(
        ours=ours[0],
        theirs=means[0][0],
        tokens=sum(paths != [chat] for paths, chat in zip(ids, whole, strict=True)),
        losses=0.0,
        weights=0.0,
        export=max(abs(a - b) for mean in means for a, b in zip(mean, ours, strict=True)),
    )


def _name_padding(folder: Path, case: Export) -> None:
    """Change what a checkpoint names as its padding token."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    eos = FAMILIES[case.family].eos
    if case.in_tokenizer != "own":
        settings["pad_token"] = eos if case.in_tokenizer == "eos" else None
        file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    if case.in_config != "own":
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["pad_token_id"] = config["eos_token_id"] if case.in_config == "eos" else None
        file.write_text(json.dumps(config), encoding="utf-8")


@torch.no_grad()
def _loss(folder: Path, whole: Sequence[Sequence[int]], borders: Sequence[int], padded: str) -> float:
    """Compute the mean loss of the tokens behind the borders, one by one or in one padded batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reader = AutoTokenizer.from_pretrained(folder)
    if padded:
        batch = reader.pad({"input_ids": list(whole)}, padding_side=padded, return_tensors="pt")
        every = [
            logits[mask.bool()]
            for logits, mask in zip(model(**batch).logits, batch["attention_mask"], strict=True)
        ]
    else:
        every = [model(torch.tensor([list(ids)])).logits[0] for ids in whole]
    parts = [
        functional.cross_entropy(
            logits[border - 1 : -1].double(), torch.tensor(ids[border:]), reduction="sum"
        )
        for logits, ids, border in zip(every, whole, borders, strict=True)
    ]
    count = sum(len(ids) - border for ids, border in zip(whole, borders, strict=True))
    return float(sum(parts)) / count
