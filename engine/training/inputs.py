"""Reads what a run trains on, before any weight is read, so that mistakes in the inputs are found first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from silva.engine.parallel import groups

from silva.engine.data import pipeline
from silva.engine.data.dataset import DataSet, hold_out, prepare
from silva.engine.data.encoding import Unit
from silva.engine.data.loader import BatchLoader
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.trees.balance import CostModel
from silva.engine.errors import UserError
from silva.engine.model import flops, gpt, hf, hf_export
from silva.engine.model.families.shape import ModelShape
from silva.engine.objectives import OBJECTIVES, Objective
from silva.engine.progress import say
from silva.engine.recipe.schema import Recipe, Source


@dataclass(frozen=True)
class Inputs:
    """Holds a run's model folder, tokenizer, data and batches.

    Attributes:
        folder: of the checkpoint that training starts from.
        shape: of the model.
        tokenizer: of the recipe.
        data: the training data.
        validation: the validation data; None if there is none.
        batches: of the training data, for all epochs.
        validation_batches: of the validation data; None if there is none.
        steps: optimizer steps of the whole run.
    """

    folder: Path
    shape: ModelShape
    tokenizer: ChatTokenizer
    data: DataSet
    validation: DataSet | None
    batches: BatchLoader
    validation_batches: BatchLoader | None
    steps: int


def read(recipe: Recipe) -> Inputs:
    """Read shape, tokenizer and data of a recipe, and plan its batches.

    The call is collective.

    Args:
        recipe: of the run.

    Returns:
        The inputs.

    Raises:
        UserError: the model is of no known shape or does not fit the layout, tokenizer and model do not belong
            together, or the data are unusable.
    """
    folder = hf.fetch(recipe.model.path)
    shape = hf.read_shape(folder)
    hf_export.check_source(folder)
    gpt.check_layout(shape, recipe.parallel)
    tokenizer = load_tokenizer(recipe, folder)
    if tokenizer.vocab_size > shape.vocab:
        raise UserError(
            f"{recipe.tokenizer_path}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{recipe.model.path} only {shape.vocab}; they do not belong together"
        )
    if OBJECTIVES[recipe.objective.name].head == "reward":
        _say_padding(tokenizer, shape)
    data, validation = _read_data(recipe, tokenizer)
    for each in filter(None, (data, validation)):
        _check_lengths(recipe, shape, each)
    batches = batches_of(data, recipe, shape, training=True)
    if groups.rank() == 0:
        for line in _remarks(recipe, shape, data):
            say(f"           {line}")
    return Inputs(
        folder=folder,
        shape=shape,
        tokenizer=tokenizer,
        data=data,
        validation=validation,
        batches=batches,
        validation_batches=batches_of(validation, recipe, shape, training=False) if validation else None,
        steps=min(len(batches), recipe.training.max_steps or len(batches)),
    )


def _check_lengths(recipe: Recipe, shape: ModelShape, data: DataSet) -> None:
    """Refuse sequences at positions that such a model computes by the length of each sequence."""
    if shape.bounded and data.longest > shape.max_position:
        raise UserError(
            f"{recipe.model.path}: has dynamic rotary positions, which are defined up to {shape.max_position:,} tokens "
            f"(max_position_embeddings), and the longest sequence has {data.longest:,}; set data.max_length to "
            f"{shape.max_position}"
        )


def _remarks(recipe: Recipe, shape: ModelShape, data: DataSet) -> Iterator[str]:
    """Yield what is allowed and may not be meant."""
    objective, batch = OBJECTIVES[recipe.objective.name], recipe.training.global_batch
    unit = unit_of(objective)
    count = int((data.units(unit) * data.copies).sum())
    if batch > count:
        yield (
            f"training.global_batch is {batch:,}, and an epoch has {count:,} {unit}{'s' if count > 1 else ''}: every "
            "step takes all of them"
        )
    if data.longest > shape.max_position:
        yield (
            f"the longest sequence has {data.longest:,} tokens, {recipe.model.path} was made for "
            f"{shape.max_position:,} (max_position_embeddings); to leave longer ones out, set data.max_length and "
            "data.too_long=drop"
        )
    chosen, rejected = data.sides
    if objective.needs_kl and not (chosen and rejected):
        yield (
            f"all {chosen + rejected:,} judged completions are {'desirable' if chosen else 'undesirable'}; "
            f"{objective.name} learns from both kinds"
        )


def _say_padding(tokenizer: ChatTokenizer, shape: ModelShape) -> None:
    """Say where readers of the exported reward model have to do something that they would not expect."""
    padding = tokenizer.padding_within(shape.vocab)
    if padding is None:
        say(
            "padding    no token of the tokenizer can pad batches, because a conversation may end with each of them: "
            "transformers will score one conversation at a time"
        )
    elif padding[0] != tokenizer.own_padding:
        own = "none" if tokenizer.own_padding is None else repr(tokenizer.token(tokenizer.own_padding))
        say(
            f"padding    {padding[1]!r} will pad batches of the exported model: with the tokenizer's own ({own}), "
            "transformers would not find the last token of a conversation"
        )
    if tokenizer.plain and tokenizer.appends_eos:
        say(
            "padding    without a chat template, readers have to append the EOS to their text: rewards are read there"
        )


def load_tokenizer(recipe: Recipe, model_folder: Path) -> ChatTokenizer:
    """Load the recipe's tokenizer, by default the model's own."""
    return ChatTokenizer.load(
        recipe.tokenizer.path or str(model_folder),
        chat_template=recipe.tokenizer.chat_template,
        add_bos=recipe.tokenizer.add_bos,
        append_eos=recipe.tokenizer.append_eos,
    )


def check_outputs(recipe: Recipe) -> None:
    """Check before training that the outputs can be written.

    Raises:
        UserError: an output is a file, is in a folder where nothing can be written, or would replace a folder that no
            export wrote.
    """
    for key, folder, read_only in (
        ("output", Path(recipe.output), False),
        # what a run finds in a cache it does not have to write
        ("data.cache", recipe.data_cache, True),
        ("reference.cache", recipe.reference_cache, True),
        ("export.path", recipe.export_path, False),
    ):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"{key}: {folder} cannot be a folder, {there} is a file; choose another")
        if not read_only and not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{key}: {folder} cannot be written, {there} is not writable; choose another")
    head = OBJECTIVES[recipe.objective.name].head
    hf_export.check_target(recipe.export_path, head=head, reward_format=recipe.export.reward_format)


def batches_of(data: DataSet, recipe: Recipe, shape: ModelShape, *, training: bool) -> BatchLoader:
    """Cut data into this rank's global batches.

    Args:
        data: of the training or the validation.
        recipe: of the run.
        shape: of the model.
        training: whether the data are taken as often and in the order that the recipe says; otherwise once and in
            their own order.

    Returns:
        The batches.
    """
    objective = OBJECTIVES[recipe.objective.name]
    return BatchLoader(
        data,
        unit=unit_of(objective),
        global_batch=recipe.training.global_batch,
        row_length=recipe.data.row_length,
        epochs=recipe.training.epochs if training else 1,
        shuffle=recipe.data.shuffle and training,
        seed=recipe.seed,
        mismatched=objective.needs_kl,
        rank=groups.data_rank(),
        ranks=groups.data_size(),
        multiple=recipe.parallel.rows_multiple,
        cost=_cost(recipe, shape, objective),
    )


def unit_of(objective: Objective) -> Unit:
    """Return the unit in which a global batch is counted."""
    return "comparison" if objective.pairwise else "sequence"


def _cost(recipe: Recipe, shape: ModelShape, objective: Objective) -> CostModel:
    """Return the cost by which data-parallel ranks are balanced."""
    pair = recipe.data.pair_cost
    if pair is not None:
        return CostModel(token=1.0, pair=pair)
    return flops.row_cost(shape, objective.head)


def _read_data(recipe: Recipe, tokenizer: ChatTokenizer) -> tuple[DataSet, DataSet | None]:
    """Read training and validation data.

    First one process tokenizes what is not cached, then one process on every node that does not see its files. The
    others map the files.
    """
    found: tuple[DataSet, DataSet | None] | None = None
    for my_turn in (groups.rank() == 0, groups.local_rank() == 0, True):
        if my_turn and found is None:
            found = _prepare(recipe, tokenizer)
        groups.wait_for_all()
    assert found is not None
    return found


def _prepare(recipe: Recipe, tokenizer: ChatTokenizer) -> tuple[DataSet, DataSet | None]:
    settings, unit = recipe.data, unit_of(OBJECTIVES[recipe.objective.name])
    folders: list[Path] = []

    def prepared(sources: Sequence[Source]) -> DataSet:
        data, used = prepare(
            sources,
            tokenizer,
            settings,
            unit=unit,
            rewards=OBJECTIVES[recipe.objective.name].head == "reward",
            cache=recipe.data_cache,
            seed=recipe.seed,
            say=say if groups.rank() == 0 else None,
        )
        folders.extend(used)
        return data

    data, held = prepared(settings.train), None
    if settings.validation:
        held = prepared(settings.validation)
    elif settings.validation_fraction:
        data, held = hold_out(data, settings.validation_fraction, recipe.seed)
    if groups.rank() == 0:
        _show(data, held, folders, unit, Path(recipe.output))
    return data, held


def _show(data: DataSet, held: DataSet | None, folders: Sequence[Path], unit: Unit, output: Path) -> None:
    """Print how much data there is, and everything that was left out."""
    left_out = Report()
    contaminated: list[str] = []
    for folder in folders:
        left_out.merge(pipeline.report(folder))
        contaminated += pipeline.decontaminated(folder)
    for name, part in (("training", data), ("held out", held)):
        if part is not None:
            compared = f"{part.comparisons:,} comparisons, " if unit == "comparison" else ""
            say(f"{name:<10} {compared}{part.sequences:,} sequences in {len(part):,} trees")
    for line in left_out.lines():
        say(f"           {line}")
    if contaminated:
        listing = output / "decontaminated.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(line + "\n" for line in contaminated), encoding="utf-8")
        say(f"           {len(contaminated)} instructions found in test sets: {listing}")
