"""Loads recipes: one YAML file says everything about a run, and is validated before anything else is loaded.

    recipe = load("mini-sft", ["training.max_steps=20"])

A recipe may name a `base` (a file relative to it, or a packaged recipe's bare name) and then states only what differs:
sections are merged key by key, lists are replaced as a whole. On the command line `key.path=value` sets one key; the
value is read as YAML, and list entries are named by their index (`data.train.0.limit=100`).

A user's mistake ends in one `UserError` line: the file, the key, what was found, what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import NoReturn, get_args

from pydantic import ValidationError

from silva.engine.errors import UserError
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.file import Key, read, show
from silva.engine.recipe.schema import Data, Objective, Recipe, Section


def load(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and validate it.

    Inputs (model, tokenizer, template, reference, data) that start with "./" or "../" in a file are relative to that
    file; all other paths, outputs and overrides included, stay as they are given.

    Args:
        path_or_name: a recipe file, or the bare name of a packaged recipe.
        overrides: each `key.path=value`.

    Returns:
        The recipe.

    Raises:
        UserError: anything in it is wrong.
    """
    raw, origins, file = read(path_or_name, overrides)

    def refuse(key: Key, problem: str) -> NoReturn:
        around = [origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins]
        inside = [origin for other, origin in origins.items() if other[: len(key)] == key]
        origin = [*around, *inside, str(file)][0]
        name = ".".join(map(str, key))
        raise UserError(f"{origin}: {name}: {problem}")

    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        refuse(*_explain(error))
    for key, problem in _impossible(recipe):
        refuse(key, problem)
    return recipe


# ---------------------------------------------------------------- checks that need more than one key


def _impossible(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Yield (key, problem) for what the types cannot check."""
    yield from _objective_problems(recipe.objective, recipe.data)
    yield from ((("parallel", key), problem) for key, problem in recipe.parallel.problems())
    data, training = recipe.data, recipe.training
    for part, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            if source.count is not None and source.weight != 1:
                yield (
                    ("data", part, index, "weight"),
                    f"found {source.weight} beside count; set one of the two",
                )
    if data.validation and data.validation_fraction:
        yield (
            ("data", "validation_fraction"),
            f"found {data.validation_fraction} beside data.validation; set one of the two",
        )
    if training.validate_every and not (data.validation or data.validation_fraction):
        yield (
            ("training", "validate_every"),
            f"found {training.validate_every} without validation data; set data.validation or "
            "data.validation_fraction, or leave it 0",
        )
    if data.max_length is not None and data.max_length > data.row_length:
        yield (
            ("data", "max_length"),
            f"found {data.max_length}; allowed: at most data.row_length, {data.row_length}",
        )
    if training.min_learning_rate > training.learning_rate:
        yield (
            ("training", "min_learning_rate"),
            f"found {training.min_learning_rate}; allowed: at most learning_rate, {training.learning_rate}",
        )


def _objective_problems(objective: Objective, data: Data) -> Iterator[tuple[Key, str]]:
    row = OBJECTIVES[objective.name]
    used = row.keys
    for key, field in Objective.model_fields.items():
        value = getattr(objective, key)
        if key not in ("name", *used) and value != field.default:
            uses = ", ".join(used) or "no key"
            yield (
                ("objective", key),
                f"found {show(value)}, but {objective.name} does not use it; it uses: {uses}",
            )
    if row.head == "reward" and data.score != "auto":
        yield (
            ("data", "score"),
            f"found {data.score!r}, but {objective.name} scores no message: rewards are read where conversations end",
        )
    for part, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            if source.format == "unpaired" and "has_chosen" not in row.inputs:
                single = " and ".join(
                    name for name, each in OBJECTIVES.items() if "has_chosen" in each.inputs
                )
                yield (
                    ("data", part, index, "format"),
                    f"found 'unpaired', judged single rows; {objective.name} needs pairs (only {single} does not)",
                )
    if "absolute" in row.inputs and not any(source.absolute for source in data.train):
        yield (
            ("objective", "name"),
            f"found {objective.name!r} without a source marked `absolute: true`; mark those that get the "
            "absolute-reward term, or use bt",
        )


# ---------------------------------------------------------------- wording of errors


def _explain(error: ValidationError) -> tuple[Key, str]:
    """Return the key and the problem of one of pydantic's errors, in our words."""
    # a misspelt key often leaves a required one missing; the misspelling is then the error to name
    problems = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    first = problems[0]
    key: Key = first["loc"]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        allowed = list(_section(key[:-1]).model_fields)
        return key, f"unknown key{_nearest(str(key[-1]), allowed)}; allowed here: {', '.join(allowed)}{more}"
    if first["type"] == "missing":
        return key, f"missing, and it has no default{more}"
    wording = {"model_type": "a section of `key: value` lines", "too_short": "at least one entry"}
    allowed_values = wording.get(first["type"]) or first["msg"].replace("Input should be ", "")
    return key, f"found {show(first['input'])}; allowed: {allowed_values}{more}"


def _section(key: Key) -> type[Section]:
    """Return the section that a key path leads to."""
    section: type[Section] = Recipe
    for name in key:
        if isinstance(name, str):
            annotation = section.model_fields[name].annotation
            section = next(kind for kind in (*get_args(annotation), annotation) if isinstance(kind, type))
    return section


def _nearest(name: str, allowed: Sequence[str]) -> str:
    """Return "; did you mean ...?" with a key of this section or, for a key in the wrong place, of another one."""
    near = difflib.get_close_matches(name, allowed, n=1)
    if not near:
        for outer, field in Recipe.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section) and name in kind.model_fields:
                near = [f"{outer}.{name}"]
    return f"; did you mean {near[0]}?" if near else ""
