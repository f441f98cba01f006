"""Defines what a recipe may say: every section and key, with its type, bounds and default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from silva.engine.errors import UserError
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.file import to_yaml

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]  # at least one
Number = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Refuses a string for a number, a bool for an integer, and unknown keys; frozen once checked."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _known_objective(name: str) -> str:
    """Refuse a name that is not in the table of objectives."""
    if name not in OBJECTIVES:
        *most, last = map(repr, OBJECTIVES)
        raise PydanticCustomError("objective", "{names}", {"names": f"{', '.join(most)} or {last}"})
    return name


class Objective(Section):
    """What is minimised. The loss that `name` says reads some of the keys; the others keep their defaults."""

    name: Annotated[str, AfterValidator(_known_objective)]
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

    @property
    def chunks(self) -> int:
        """Count the chunks that the model is cut into: its pipeline stages, or the parts of interleaved ones."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for keys that do not go together, whatever the model and the number of processes."""
        if self.virtual_pipeline is not None and self.pipeline == 1:
            yield (
                "virtual_pipeline",
                f"found {self.virtual_pipeline} with pipeline 1; allowed: only with pipeline > 1",
            )
        if self.stage_layers is not None and len(self.stage_layers) != self.chunks:
            yield (
                "stage_layers",
                f"found {len(self.stage_layers)} numbers; allowed: one for each of pipeline x virtual_pipeline = "
                f"{self.chunks} chunks of the model",
            )
        if self.offload_optimizer and not self.distributed_optimizer:
            yield (
                "offload_optimizer",
                "found true with distributed_optimizer false; allowed: only with distributed_optimizer true",
            )
        if self.sequence_parallel and self.tensor == 1:
            yield "sequence_parallel", "found true with tensor 1; allowed: only with tensor > 1"

    def check(self) -> None:
        """Raise UserError for the first of `problems`: a layout may be made without a recipe file."""
        for key, problem in self.problems():
            raise UserError(f"parallel.{key}: {problem}")


class Reference(Section):
    path: Name | None = None  # None: model.path
    cache: Name | None = None  # None: <output>/reference


class Export(Section):
    path: Name | None = None  # None: <output>/export
    dtype: Dtype | None = None  # None: model.dtype
    reward_format: Literal["sequence_classification", "eurus", "both"] = "both"
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(KB|MB|GB)$")] = "5GB"


class Recipe(Section):
    """Holds a whole recipe. The properties give the paths and types whose default is another key."""

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
        keys = ", ".join(f"{key} {getattr(objective, key)}" for key in OBJECTIVES[objective.name].keys)
        unit = "comparisons" if OBJECTIVES[objective.name].pairwise else "sequences"
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
