"""Says which keys of a recipe make a run what it is, and compares a run's recipe with the one it was started with.

A run that goes on from a checkpoint is the run that wrote it only if every step would have been the same. So every key
of a recipe has a kind, and a key without one is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from silva.engine.recipe.file import show
from silva.engine.recipe.schema import Changeable, Recipe, Section

# identity: another value makes another run.
# free: how and where the same run is computed, logged and saved.
# Anything else names what a run reads through the key, which is compared by its content: a folder may be moved, but
# what is in it may not change.
Kind = Literal["identity", "free", "data", "validation", "tokenizer", "model", "reference", "steps"]

KINDS: dict[str, Kind] = {
    "seed": "identity",
    "output": "free",
    "objective.name": "identity",
    "objective.beta": "identity",
    "objective.lambda_desirable": "identity",
    "objective.lambda_undesirable": "identity",
    "objective.ipo_average": "identity",
    "objective.label_smoothing": "identity",
    "objective.gamma": "identity",
    "objective.margin": "identity",
    "model.path": "model",
    "model.dtype": "identity",
    "model.attention": "free",
    "tokenizer.path": "tokenizer",
    "tokenizer.chat_template": "tokenizer",
    "tokenizer.add_bos": "tokenizer",
    "tokenizer.append_eos": "tokenizer",
    "data.train": "data",
    "data.validation": "validation",
    "data.validation_fraction": "data",
    "data.score": "data",
    "data.row_length": "data",
    "data.max_length": "data",
    "data.too_long": "data",
    "data.on_bad_row": "data",
    "data.shuffle": "identity",
    "data.decontaminate": "data",
    "data.pair_cost": "free",
    "data.cache": "free",
    "data.workers": "free",
    "training.epochs": "steps",
    "training.max_steps": "steps",
    "training.global_batch": "identity",
    "training.learning_rate": "identity",
    "training.min_learning_rate": "identity",
    "training.schedule": "identity",
    "training.warmup": "identity",
    "training.weight_decay": "identity",
    "training.beta1": "identity",
    "training.beta2": "identity",
    "training.epsilon": "identity",
    "training.clip": "identity",
    "training.skip_nonfinite": "identity",
    "training.validate_every": "free",
    "training.save_every": "free",
    "training.save_minutes": "free",
    "training.keep": "free",
    "training.hang_minutes": "free",
    "training.async_save": "free",
    "parallel.tensor": "free",
    "parallel.pipeline": "free",
    "parallel.virtual_pipeline": "free",
    "parallel.stage_layers": "free",
    "parallel.context": "free",
    "parallel.sequence_parallel": "free",
    "parallel.distributed_optimizer": "free",
    "parallel.offload_optimizer": "free",
    "parallel.overlap": "free",
    "parallel.recompute": "free",
    "reference.path": "reference",
    "reference.cache": "free",
    "resume.change": "free",
    "resume.verify": "free",
    "export.path": "free",
    "export.dtype": "free",
    "export.reward_format": "free",
    "export.max_shard_size": "free",
    "export.verify": "free",
}
# the keys that `resume.change` may name
CHANGEABLE: tuple[str, ...] = get_args(Changeable)


def names(section: type[Section] = Recipe, name: str = "") -> Iterator[str]:
    """Yield the dotted name of every key of a recipe; a list, such as `data.train`, is one key."""
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from names(kind, f"{name}{key}.")
        else:
            yield f"{name}{key}"


def of(recipe: Recipe, contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept with a checkpoint, and compared by `differences`; it can be written as JSON.

    Args:
        recipe: of the run.
        contents: of each kind of key that is compared by content, what the run reads: a digest or a number.
    """
    return {"recipe": recipe.model_dump(mode="json"), "contents": dict(contents)}


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, allowed: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, str]:
    """Compare a run with the one that wrote a checkpoint.

    Args:
        old: of `of`, when the checkpoint was written.
        new: of `of`, now.
        allowed: keys that may differ.
        only: keys that are compared; none: all.

    Returns:
        For every key that differs and must not: what it was and what it is.
    """
    found: dict[str, str] = {}
    others: dict[Kind, str] = {}
    explained: set[Kind] = set()
    for name in names():
        kind, before, now = KINDS[name], _value(old["recipe"], name), _value(new["recipe"], name)
        if kind == "free" or (only and name not in only):
            continue
        # what a path leads to decides, not how the recipe names it
        same = before == now if kind == "identity" else old["contents"].get(kind) == new["contents"].get(kind)
        if same:
            continue
        if before == now:
            others.setdefault(kind, name)
        elif name in allowed:
            explained.add(kind)
        for part, was, is_now in _parts(name, before, now) if name not in allowed else ():
            found[part] = f"was {show(was)}, is {show(is_now)}"
    if "data" in others:
        explained.add("steps")
    # where no key differs that says so, the same names lead to something else
    return found or {
        name: "is the same, but what it leads to has changed"
        for kind, name in others.items()
        if kind not in explained
    }


def _value(recipe: Mapping[str, Any], name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _parts(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, before, now) of the innermost values that differ."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        for key in before:
            yield from _parts(f"{name}.{key}", before[key], now[key])
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, (was, is_now) in enumerate(zip(before, now, strict=True)):
            yield from _parts(f"{name}.{place}", was, is_now)
    elif before != now:
        yield name, before, now
