"""Compares an exported model with the trained one, through the reader that most users have: transformers.

A few rows are read again from the recipe's data and rendered by the exported tokenizer and template. The ids must be
those of training, and the exported model's log-probs or rewards those of the model in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from silva.engine.data.dataset import scored
from silva.engine.data.encoding import Encoder
from silva.engine.data.loader import piece
from silva.engine.data.reading.messages import Conversation
from silva.engine.data.reading.source import SourceReader
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.text.chat_template import CannotRender, split
from silva.engine.data.trees.group import TokenGroup
from silva.engine.data.trees.packing import Piece, pack_rows
from silva.engine.data.trees.splitting import Part
from silva.engine.errors import UserError
from silva.engine.model import gpt
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Recipe
from silva.engine.training.inputs import unit_of
from silva.engine.training.passes import sequence_values

# trees, and their tokens together, that are compared; a model of 7B parameters takes seconds for them
_TREES, _TOKENS = 4, 1024
# Largest difference of a log-prob per scored token, and of a reward relative to 1 + its size. In float32 both sides
# differ by the order of sums; in bfloat16 also by where they round, which is hundredths in deep models.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


@dataclass
class Rows:
    """Holds what is compared.

    Attributes:
        source: where the rows come from.
        held_out: whether they are validation data.
        trees: as training tokenizes them.
        conversations: of the same rows.
    """

    source: str
    held_out: bool
    trees: list[TokenGroup] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)


@dataclass(frozen=True)
class Verified:
    """Holds what a comparison found.

    Attributes:
        lines: what was compared and what was found, for people.
        problem: why the exported model is not the trained one; None if it is.
    """

    lines: list[str]
    problem: str | None = None


def fits(folder: Path) -> bool:
    """Tell whether an exported model fits into this host's memory in float32, with room for everything else."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    in_float32 = stored * (4 // getattr(torch, dtype).itemsize)
    return in_float32 < 0.7 * psutil.virtual_memory().available


def compare(chunks: Sequence[Any], recipe: Recipe, tokenizer: ChatTokenizer, folder: Path) -> Verified:
    """Compare an exported model with the trained one.

    The call is collective.

    Args:
        chunks: the trained model of this rank.
        recipe: of the run.
        tokenizer: of the run.
        folder: of the exported model, which the first process reads.

    Returns:
        What was found, on every process.
    """
    if recipe.export.verify is False:
        return Verified(["not compared with the trained model: export.verify is false"])

    def prepare() -> Rows | Verified:
        if recipe.export.verify is None and not fits(folder):
            return Verified(["not compared: the model does not fit into this host's memory"])
        return _rows(recipe, tokenizer)

    rows = groups.from_first(prepare)
    if isinstance(rows, Verified):
        return rows
    ours = _values(chunks, recipe, rows.trees, tokenizer.pad_id)

    def read() -> Verified:
        # transformers would draw a bar of its own among the run's lines
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            return _against_reader(recipe, tokenizer, folder, rows, ours)
        finally:
            if bars:
                transformers.utils.logging.enable_progress_bar()

    verified: Verified = groups.from_first(read)
    return verified


# ---------------------------------------------------------------- what is compared


def _rows(recipe: Recipe, tokenizer: ChatTokenizer) -> Rows | Verified:
    """Read the first short trees of the validation data, or else of the training data."""
    objective = OBJECTIVES[recipe.objective.name]
    settings, unit = recipe.data, unit_of(objective)
    source = (settings.validation or settings.train)[0]
    found = Rows(source.path, bool(settings.validation))
    score = None if objective.head == "reward" else scored(settings, source, unit)
    encoder = Encoder(tokenizer, settings, unit, score)
    reader, report = SourceReader(source, unit, settings.on_bad_row), Report()
    # rows of one tree need not be adjacent: those that come first are enough of a tree
    first = [row for row, _ in zip(reader.rows(report), range(8 * _TREES), strict=False)]
    left = _TOKENS
    for group in reader.groups(first, report):
        tree = encoder(group, report)
        if tree is None or sum(len(path.tokens) for path in tree.paths()) > left:
            continue
        left -= sum(len(path.tokens) for path in tree.paths())
        found.trees.append(tree)
        found.conversations += group.conversations
        if len(found.trees) == _TREES:
            break
    if not found.trees:
        return Verified(
            [f"not compared: none of the first rows of {source.path} is shorter than {_TOKENS} tokens"]
        )
    return found


def _values(
    chunks: Sequence[Any], recipe: Recipe, trees: Sequence[TokenGroup], pad_id: int
) -> list[list[float]]:
    """Compute the log-probs or rewards of the trees' sequences with the trained model; the same on every rank."""
    rows: list[list[Piece]] = []
    for tree in trees:
        needs = [tree.paths_of(k) for k in range(len(tree))]
        rows.append([piece(Part.whole(tree, np.arange(len(tree)), needs))])
    rows += [[] for _ in range(-len(rows) % recipe.parallel.rows_multiple)]
    # every data-parallel rank computes the same rows, because schedules are collective
    packed = pack_rows(rows, multiple=gpt.row_multiple(recipe.parallel), pad_id=pad_id)
    found: list[Any] = [[values.double().tolist() for values in sequence_values(chunks, packed)]]
    if groups.pipeline_size() > 1:
        dist.broadcast_object_list(found, src=groups.last_stage_rank(), group=groups.pipeline_group())
    values: list[list[float]] = found[0][: len(trees)]
    return values


# ---------------------------------------------------------------- the reader


def _against_reader(
    recipe: Recipe, tokenizer: ChatTokenizer, folder: Path, rows: Rows, ours: list[list[float]]
) -> Verified:
    name = f"transformers {transformers.__version__}"
    of = (
        f"{len(rows.conversations)} conversations of the {'validation' if rows.held_out else 'training'} data"
    )
    reader = AutoTokenizer.from_pretrained(folder)
    others, guarded = _other_ids(tokenizer, reader, rows.conversations)
    if others:
        return Verified(
            [],
            f"{folder}: {name} reads other ids from {others} of {of} ({rows.source}) through the exported "
            "tokenizer and template than training read",
        )
    lines = [f"{of}: the same token ids through the exported tokenizer and chat template"]
    if guarded:
        lines.append(
            f"{guarded} more spell control tokens in a prompt, which training reads as plain characters"
        )
    head = OBJECTIVES[recipe.objective.name].head
    found = _rewards(folder, reader, rows.trees) if head == "reward" else _log_probs(folder, rows.trees)
    allowed = max(_ALLOWED[recipe.model.dtype], _ALLOWED[recipe.export_dtype])
    for how, values in found.items():
        worst = max(
            abs(mine - theirs) / size
            for tree, mines, theirses in zip(rows.trees, ours, values, strict=True)
            for mine, theirs, size in zip(mines, theirses, _sizes(tree, mines, head), strict=True)
        )
        what = "rewards, relative to 1 + their size" if head == "reward" else "log-probs per scored token"
        lines.append(f"{what}, {how}: they differ by at most {worst:.1e} (allowed: {allowed:g})")
        # also where a value is not a number
        if not worst <= allowed:
            return Verified(lines, f"{folder}: with {name}, {lines[-1]}")
    return Verified([f"Compared with {name}:", *lines])


def _other_ids(
    tokenizer: ChatTokenizer, reader: Any, conversations: Sequence[Conversation]
) -> tuple[int, int]:
    """Count the conversations of which the reader has other ids, and those of which it has to have others."""
    others = guarded = 0
    for conversation in conversations:
        try:
            if tokenizer.template.render_guarded(conversation).mark:
                guarded += 1
                continue
            ours = tokenizer.whole(conversation).paths[0].tokens.tolist()
        # such a row was left out of training, too
        except CannotRender:
            continue
        context, said = split(conversation)
        if tokenizer.plain:
            theirs = reader("".join(message.content for message in said))["input_ids"]
            # text has no template that would write the EOS
            ours = ours[: len(theirs)] if ours[-1] == tokenizer.eos_id else ours
        else:
            fields = [message.fields() for message in said]
            theirs = reader.apply_chat_template(fields, tokenize=True, return_dict=False, **context)
        others += ours != theirs
    return others, guarded


def _sizes(tree: TokenGroup, values: Sequence[float], head: str) -> list[float]:
    if head == "reward":
        return [1 + abs(value) for value in values]
    return [
        float(max(1, sum(int(tree.path(k).scored.sum()) for k in tree.paths_of(sequence))))
        for sequence in range(len(tree))
    ]


@torch.no_grad()
def _log_probs(folder: Path, trees: Sequence[TokenGroup]) -> dict[str, list[list[float]]]:
    """Compute the log-prob of each sequence, every path by a forward pass of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def of(tree: TokenGroup, path: int) -> float:
        tokens = torch.from_numpy(tree.path(path).tokens).long()
        scored_ones = torch.from_numpy(tree.path(path).scored[1:])
        logits = model(tokens[None]).logits[0, :-1].double()
        each = functional.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
        return float(each[scored_ones].sum())

    values = [[sum(of(tree, k) for k in tree.paths_of(n)) for n in range(len(tree))] for tree in trees]
    return {"each sequence alone": values}


@torch.no_grad()
def _rewards(folder: Path, reader: Any, trees: Sequence[TokenGroup]) -> dict[str, list[list[float]]]:
    """Compute the reward of each sequence alone and, if the model has a padding token, in padded batches."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ids = [[tree.path(k).tokens.tolist() for k in range(len(tree))] for tree in trees]
    found = {"each sequence alone": [[float(model(torch.tensor([x])).logits) for x in tree] for tree in ids]}
    if model.config.pad_token_id is not None:
        for side in ("left", "right"):
            found[f"in a batch padded on the {side}"] = [
                model(**reader.pad({"input_ids": tree}, padding_side=side, return_tensors="pt"))
                .logits[:, 0]
                .tolist()
                for tree in ids
            ]
    return found


def refuse(verified: Verified) -> None:
    """Raise UserError if the exported model is not the trained one."""
    if verified.problem is not None:
        raise UserError(
            f"{verified.problem}. The checkpoint is whole; report this with the recipe, or set export.verify=false to "
            "export without the comparison"
        )
