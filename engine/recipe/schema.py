"""Recipes: one YAML file says everything about a run, typed and checked before anything is loaded.

    recipe = load("mini-sft", ["training.max_steps=20"])

A recipe may name a `base` (a file relative to it, or a packaged recipe's bare name) and then states only what
differs: sections are merged key by key, lists are replaced whole. On the command line `key.path=value` sets
one key, with the value read as YAML and list entries named by index (`data.train.0.limit=100`).

What a user can get wrong ends in one `UserError` line: the file, the key, what was found, what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from silva.engine.errors import UserError
from silva.engine.recipe_file import Key, packaged, read, show, to_yaml

__all__ = ["OBJECTIVE_KEYS", "Recipe", "Source", "load", "packaged"]

# The keys of `objective` that each objective reads. Any other key set to something else than its default is
# refused: a beta in an sft recipe is a mistake, not a preference.
OBJECTIVE_KEYS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("beta",),
    "ipo": ("beta", "ipo_average"),
    "cdpo": ("beta", "label_smoothing"),
    "hinge": ("beta",),
    "nca": ("beta",),
    "kto": ("beta", "lambda_desirable", "lambda_undesirable"),
    "simpo": ("beta", "gamma"),
    "orpo": ("beta",),
    "bt": (),
    "bt_margin": ("margin",),
    "bt_dr": (),
}

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # at least one
Number = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Strict: a string is no number, a bool no integer, an unknown key an error. Frozen once checked."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Objective(Section):
    name: Literal[
        "sft", "dpo", "ipo", "cdpo", "hinge", "nca", "kto", "simpo", "orpo", "bt", "bt_margin", "bt_dr"
    ]
    beta: Positive = 0.1  # orpo: its paper's lambda; simpo: its paper uses 2 to 10
    lambda_desirable: NonNegative = 1.0
    lambda_undesirable: NonNegative = 1.0
    ipo_average: bool = True  # log-ratios as means per token (TRL, HALOs); false: as sums
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # the share of flipped labels cdpo assumes
    gamma: NonNegative = 0.5  # simpo's target margin
    margin: NonNegative = 0.0  # bt_margin's


class Model(Section):
    path: Name  # a Hugging Face folder, or a hub name
    dtype: Dtype = "bfloat16"
    attention: Literal["tree", "flash"] = "tree"  # flash: FlashAttention for rows without a branching tree


class Tokenizer(Section):
    path: Name | None = None  # None: model.path
    # None: the tokenizer's own. Else "eurus", the path of a .jinja file, or the template itself.
    chat_template: Name | None = None
    add_bos: bool | None = None  # None: as the tokenizer's own configuration says
    append_eos: bool = True


class Source(Section):
    path: Name  # a data file, a folder of them, a saved `datasets` folder, or a hub name
    format: Literal[
        "ultrainteract_sft",
        "ultrainteract_pair",
        "ultrafeedback",
        "ultrasafety",
        "hh_rlhf",
        "preference",
        "unpaired",
        "messages",
        "prompt_completion",
        "gsm8k_solutions",
        "mint",
        "nodes",
        "oasst",
    ]
    split: Name = "train"
    limit: Count | None = None  # rows, from the first on
    # How much of it an epoch takes, drawn by the seed: so many sequences (comparisons), or a multiple of all
    count: Count | None = None
    weight: Positive = 1.0
    absolute: bool = False  # the comparisons get bt_dr's absolute-reward term
    single_turn_pairs: bool = (
        False  # ultrainteract_pair: also actions of different turns (Eurus' reward model)
    )
    single_turn_seed: Number = 0  # of the draw, where an instruction has more of them than are taken
    columns: dict[str, str] = {}  # the format's name of a field: this source's name of it


class EvaluationSet(Section):
    path: Name  # anything a source's path may be
    split: Name = "test"
    fields: Annotated[list[Name], Field(min_length=1)]  # together the text of a row, in this order


class Decontaminate(Section):
    """Training instructions that occur in a test set are left out, with everything that answers them."""

    against: Annotated[list[EvaluationSet], Field(min_length=1)]
    mode: Literal["ngram", "substring"] = "ngram"  # shares an n-gram of words; contains a whole test text
    ngram: Count = 8  # words; read in mode ngram


class Data(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    validation: list[Source] = []
    validation_fraction: BelowOne = 0.0  # of the groups, held out of `train`
    score: Literal["last", "all"] = "last"  # which assistant messages are scored
    row_length: Count = 4096
    max_length: Count | None = None  # of one sequence; None: row_length
    too_long: Literal["refuse", "drop", "truncate_left", "truncate_right"] = "refuse"
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    shuffle: bool = True
    decontaminate: Decontaminate | None = None
    # what one (token, ancestor) pair costs beside one token, to balance ranks by; None: by the model's FLOPs
    pair_cost: NonNegative | None = None
    cache: Name | None = None  # where tokenized data is kept; None: <output>/data
    workers: Count | None = None  # processes that tokenize; None: one per core


class Training(Section):
    epochs: Count = 1
    max_steps: Count | None = None
    global_batch: Count  # comparisons; sequences for sft
    learning_rate: Positive
    min_learning_rate: NonNegative = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.1  # of the steps
    weight_decay: NonNegative = 0.0
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    epsilon: Positive = 1e-8
    clip: Positive = 1.0  # norm of the global gradient
    validate_every: Number = 0  # steps; 0: never
    save_every: Number = 0  # steps; 0: at the end only
    keep: Count = 2  # checkpoints
    async_save: bool = True  # training goes on while a checkpoint is written


class Parallel(Section):
    tensor: Count = 1
    pipeline: Count = 1
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None  # model chunks per pipeline stage
    # layers of each stage (with virtual_pipeline: of each chunk), in the order a token passes them; None: equally many
    stage_layers: Annotated[list[Number], Field(min_length=2)] | None = None
    context: Count = 1  # processes that share the tokens of each row
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    offload_optimizer: bool = False  # main weights and moments wait in host memory between steps
    overlap: bool = False
    recompute: Literal["none", "selective", "full"] = "none"


class Reference(Section):
    path: Name | None = None  # None: model.path
    cache: Name | None = None  # None: <output>/reference


class Export(Section):
    path: Name | None = None  # None: <output>/export
    dtype: Dtype | None = None  # None: model.dtype
    reward_format: Literal["sequence_classification", "eurus", "both"] = "both"
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(KB|MB|GB)$")] = "5GB"


class Recipe(Section):
    """A whole recipe. The properties give the paths and types whose default is another key."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: Name
    objective: Objective
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    training: Training
    parallel: Parallel = Parallel()
    reference: Reference = Reference()
    export: Export = Export()

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer.path or self.model.path

    @property
    def reference_path(self) -> str:
        return self.reference.path or self.model.path

    @property
    def data_cache(self) -> Path:
        return Path(self.data.cache) if self.data.cache else Path(self.output) / "data"

    @property
    def reference_cache(self) -> Path:
        return Path(self.reference.cache) if self.reference.cache else Path(self.output) / "reference"

    @property
    def export_path(self) -> Path:
        return Path(self.export.path) if self.export.path else Path(self.output) / "export"

    @property
    def export_dtype(self) -> Dtype:
        return self.export.dtype or self.model.dtype

    def dump(self) -> str:
        """The resolved recipe as YAML, every key stated: `load` of it gives an equal recipe."""
        return to_yaml(self.model_dump())

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be of this model; how it is computed does not matter."""
        return {
            "objective": self.objective.model_dump(),
            "model": self.model.model_dump(exclude={"attention"}),
        }

    def describe(self) -> str:
        """A few lines for the start of a run."""
        objective, model, training, layout = self.objective, self.model, self.training, self.parallel
        keys = ", ".join(f"{key} {getattr(objective, key)}" for key in OBJECTIVE_KEYS[objective.name])
        unit = "sequences" if objective.name == "sft" else "comparisons"
        epochs = f"{training.epochs} epoch{'s' if training.epochs > 1 else ''}"
        steps = f", at most {training.max_steps} steps" if training.max_steps else ""
        sources = ", ".join(
            f"{source.path} ({source.format}{f', first {source.limit} rows' if source.limit else ''})"
            for source in self.data.train
        )
        return "\n".join(
            (
                f"objective  {objective.name}{f' ({keys})' if keys else ''}",
                f"model      {model.path} ({model.dtype})",
                f"data       {sources}",
                f"training   {epochs}{steps}, {training.global_batch} {unit} per step, learning rate "
                f"{training.learning_rate:g} ({training.schedule}, warm-up {training.warmup:g})",
                f"layout     tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}",
                f"output     {self.output}",
            )
        )


def load(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe in a file, or the packaged one of that bare name, with `key.path=value` overrides.

    Inputs (model, tokenizer, template, reference, data) that start with "./" or "../" in a file are relative
    to that file; everything else, outputs and overrides included, is as given. Raises UserError for anything
    that is wrong.
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
    """What the types cannot say, as (key, problem)."""
    yield from _objective_problems(recipe.objective, recipe.data)
    yield from _layout_problems(recipe.parallel, recipe.data)
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
    used = OBJECTIVE_KEYS[objective.name]
    for key, field in Objective.model_fields.items():
        value = getattr(objective, key)
        if key not in ("name", *used) and value != field.default:
            uses = ", ".join(used) or "no key"
            yield (
                ("objective", key),
                f"found {show(value)}, but {objective.name} does not use it; it uses: {uses}",
            )
    for part, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            if source.format == "unpaired" and objective.name != "kto":
                yield (
                    ("data", part, index, "format"),
                    f"found 'unpaired', judged single rows; {objective.name} needs pairs (only kto does not)",
                )
    if objective.name == "bt_dr" and not any(source.absolute for source in data.train):
        yield (
            ("objective", "name"),
            "found 'bt_dr' without a source marked `absolute: true`; mark those that get the "
            "absolute-reward term, or use bt",
        )


def _layout_problems(parallel: Parallel, data: Data) -> Iterator[tuple[Key, str]]:
    """What the recipe alone tells; what depends on the model's shape is checked where the model is built."""
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield (
            ("parallel", "virtual_pipeline"),
            f"found {parallel.virtual_pipeline} with pipeline 1; allowed: only with pipeline > 1",
        )
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if parallel.stage_layers is not None and len(parallel.stage_layers) != stages:
        yield (
            ("parallel", "stage_layers"),
            f"found {len(parallel.stage_layers)} numbers; allowed: one for each of pipeline x virtual_pipeline = "
            f"{stages} chunks of the model",
        )
    if parallel.offload_optimizer and not parallel.distributed_optimizer:
        yield (
            ("parallel", "offload_optimizer"),
            "found true with distributed_optimizer false; allowed: only with distributed_optimizer true",
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield ("parallel", "sequence_parallel"), "found true with tensor 1; allowed: only with tensor > 1"


# ---------------------------------------------------------------- wording of errors


def _explain(error: ValidationError) -> tuple[Key, str]:
    """The key and the problem of the first of pydantic's errors, in our words."""
    # A misspelt key often leaves a required one missing: name the misspelling.
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
    """The section a key path leads to."""
    section: type[Section] = Recipe
    for name in key:
        if isinstance(name, str):
            annotation = section.model_fields[name].annotation
            section = next(kind for kind in (*get_args(annotation), annotation) if isinstance(kind, type))
    return section


def _nearest(name: str, allowed: Sequence[str]) -> str:
    """'; did you mean ...?', from the keys here or, for a key at the wrong place, from any section."""
    near = difflib.get_close_matches(name, allowed, n=1)
    if not near:
        for outer, field in Recipe.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section) and name in kind.model_fields:
                near = [f"{outer}.{name}"]
    return f"; did you mean {near[0]}?" if near else ""
