"""Defines what a recipe may say: every section and key, with its type, bounds and default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from silva.engine.errors import UserError
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.file import to_yaml

Name = Annotated[str, Field(min_length=1)]
# at least one
Count = Annotated[int, Field(ge=1, lt=2**31)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Refuses a string for a number, a bool for an integer, and unknown keys; does not change once it is validated."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _known_objective(name: str) -> str:
    """Refuse a name that is not in the table of objectives."""
    if name not in OBJECTIVES:
        *most, last = map(repr, OBJECTIVES)
        raise PydanticCustomError("objective", "{names}", {"names": f"{', '.join(most)} or {last}"})
    return name


class Objective(Section):
    """Says what is minimised.

    The loss `name` reads some of the other keys; the rest keep their defaults.
    """

    name: Annotated[str, AfterValidator(_known_objective)]
    # the lambda of ORPO's paper; SimPO's paper uses 2 to 10
    beta: Positive = 0.1
    lambda_desirable: NonNegative = 1.0
    lambda_undesirable: NonNegative = 1.0
    # true: log-ratios are means per token, as in TRL and HALOs; false: they are sums
    ipo_average: bool = True
    # the share of flipped labels that cdpo assumes
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    # the target margin of simpo
    gamma: NonNegative = 0.5
    # the margin of bt_margin
    margin: NonNegative = 0.0


class Model(Section):
    """Says which checkpoint training starts from, and how it is computed."""

    # a Hugging Face folder, or a hub name
    path: Name
    dtype: Dtype = "bfloat16"
    # flash: FlashAttention for rows without a branching tree
    attention: Literal["tree", "flash"] = "tree"


class Tokenizer(Section):
    """Says how text becomes tokens."""

    # None: model.path
    path: Name | None = None
    # None: the tokenizer's own; otherwise "eurus", the path of a .jinja file, or the template itself; "none": prompts
    # and completions are text without a template
    chat_template: Name | None = None
    # None: as the template says
    add_bos: bool | None = None
    # None: where the template ends an answer by no control token
    append_eos: bool | None = None


class Source(Section):
    """Names one source of training or validation data."""

    # a data file, a folder of them, a saved `datasets` folder, or a hub name
    path: Name
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
    # the first rows that are read; None: all
    limit: Count | None = None
    # How much of the source an epoch takes, drawn by the seed: `count` sequences (or comparisons), or else `weight`
    # times all of them.
    count: Count | None = None
    weight: Positive = 1.0
    # whether the comparisons get the absolute-reward term of bt_dr
    absolute: bool = False
    # whether ultrainteract_pair also compares actions of different turns (as for Eurus' reward model)
    single_turn_pairs: bool = False
    # what the paper's N is, whose square has to be at most 10: the tree's turns, or its different actions
    single_turn_limit: Literal["depth", "actions"] = "depth"
    # seed of the draw if an instruction has more of these comparisons than are taken
    single_turn_seed: Number = 0
    # from the format's name of a field to this source's name of it
    columns: dict[str, str] = {}


class EvaluationSet(Section):
    """Names one test set."""

    # whatever a source's path may be
    path: Name
    split: Name = "test"
    # the fields that, in this order, make up the text of a row
    fields: Annotated[list[Name], Field(min_length=1)]


class Decontaminate(Section):
    """Says how to find training instructions that occur in a test set.

    They are left out, with everything that answers them.
    """

    against: Annotated[list[EvaluationSet], Field(min_length=1)]
    # ngram: the instruction shares an n-gram of words with a test text; substring: it contains a whole test text
    mode: Literal["ngram", "substring"] = "ngram"
    # number of words; read in mode ngram
    ngram: Count = 8
    # An n-gram that this share of a source's instructions or of a test set's texts have is boilerplate, which is named
    # and is no match; of few texts it takes a third of them, and always 5. 1: there is no boilerplate. Read in mode
    # ngram.
    boilerplate: Fraction = 0.01


class Data(Section):
    """Says what data a run reads, and how."""

    train: Annotated[list[Source], Field(min_length=1)]
    validation: list[Source] = []
    # share of the groups that is held out of `train`
    validation_fraction: BelowOne = 0.0
    # Which messages are scored. completion: everything behind the prompt, as in TRL; turns: the assistant's messages
    # behind it; last: the last one; all: all of the assistant's; auto: as usual for the source's format
    score: Literal["auto", "completion", "turns", "last", "all"] = "auto"
    # most tokens of one row
    row_length: Count = 4096
    # most tokens of one sequence; None: row_length
    max_length: Count | None = None
    too_long: Literal["refuse", "drop", "truncate_left", "truncate_right"] = "refuse"
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    shuffle: bool = True
    decontaminate: Decontaminate | None = None
    # the cost of one (token, ancestor) pair relative to one token, by which ranks are balanced; None: by model FLOPs
    pair_cost: NonNegative | None = None
    # the folder of tokenized data; None: <output>/data
    cache: Name | None = None
    # number of processes that tokenize; None: one per core
    workers: Count | None = None


class Training(Section):
    """Says how a run trains, and when it validates and saves."""

    epochs: Count = 1
    max_steps: Count | None = None
    # comparisons per step; for sft, sequences
    global_batch: Count
    learning_rate: Positive
    min_learning_rate: NonNegative = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # share of the steps
    warmup: Fraction = 0.1
    weight_decay: NonNegative = 0.0
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    epsilon: Positive = 1e-8
    # the largest norm of the global gradient
    clip: Positive = 1.0
    # So many steps in a row whose loss or gradient is not finite are left out: they change no weight. One more ends the
    # run.
    skip_nonfinite: Number = 0
    # number of steps; 0: never
    validate_every: Number = 0
    # a checkpoint is written after so many steps (0: not by steps), and after so many minutes (0: not by time)
    save_every: Number = 0
    save_minutes: NonNegative = 15.0
    # number of checkpoints
    keep: Count = 2
    # A job ends if a step takes so many minutes, or if a process gives no sign of life for as long (at most 2 minutes);
    # 0: never. Processes that torchrun has not started together are not watched.
    hang_minutes: NonNegative = 30.0
    # whether training goes on while a checkpoint is written
    async_save: bool = True


class Parallel(Section):
    """Says how a run is split over processes: its layout."""

    tensor: Count = 1
    pipeline: Count = 1
    # number of the model's chunks per pipeline stage
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    # layers of each stage (with virtual_pipeline: of each chunk), in the order a token passes them; None: equally many
    stage_layers: Annotated[list[Number], Field(min_length=2)] | None = None
    # number of processes that share the tokens of each row
    context: Count = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    # whether main weights and moments are kept in host memory between steps
    offload_optimizer: bool = False
    overlap: bool = False
    recompute: Literal["none", "selective", "full"] = "none"

    @property
    def chunks(self) -> int:
        """Return the number of chunks of the model: its pipeline stages, or the parts of interleaved stages."""
        return self.pipeline * (self.virtual_pipeline or 1)

    @property
    def rows_multiple(self) -> int:
        """Return what the number of a step's rows has to be a multiple of: interleaved pipelines need one per stage."""
        return self.pipeline if self.virtual_pipeline else 1

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for keys that contradict each other, whatever the model and the number of processes."""
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
        """Raise UserError for the first of `problems`, because a layout may be made without a recipe file."""
        for key, problem in self.problems():
            raise UserError(f"parallel.{key}: {problem}")


class Reference(Section):
    """Names the reference policy, and where its log-probs are kept."""

    # None: model.path
    path: Name | None = None
    # None: <output>/reference
    cache: Name | None = None


# the keys with which a run may go on after a change; with another one, the steps taken would mean nothing for the rest
Changeable = Literal[
    "training.learning_rate",
    "training.min_learning_rate",
    "training.schedule",
    "training.warmup",
    "training.weight_decay",
    "training.beta1",
    "training.beta2",
    "training.epsilon",
    "training.clip",
    "training.skip_nonfinite",
    "training.epochs",
    "training.max_steps",
    "data.validation",
]


class Resume(Section):
    """Says what may differ from the recipe with which a run began."""

    change: list[Changeable] = []
    # whether the bytes of a checkpoint are compared with those that were written before it is gone on from
    verify: bool = True


class Export(Section):
    """Says how the trained model is written."""

    # None: <output>/export
    path: Name | None = None
    # None: model.dtype
    dtype: Dtype | None = None
    reward_format: Literal["sequence_classification", "eurus", "both"] = "both"
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(KB|MB|GB)$")] = "5GB"
    # whether the exported model is compared with the trained one through transformers; None: if the host's memory holds
    # it
    verify: bool | None = None


class Recipe(Section):
    """Holds a whole recipe.

    The properties give the paths and types whose default depends on another key.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: Name
    objective: Objective
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    training: Training
    parallel: Parallel = Parallel()
    reference: Reference = Reference()
    resume: Resume = Resume()
    export: Export = Export()

    @property
    def tokenizer_path(self) -> str:
        """Return the tokenizer's path, by default the model's."""
        return self.tokenizer.path or self.model.path

    @property
    def reference_path(self) -> str:
        """Return the reference policy's path, by default the model's."""
        return self.reference.path or self.model.path

    @property
    def data_cache(self) -> Path:
        """Return the folder of tokenized data."""
        return Path(self.data.cache) if self.data.cache else Path(self.output) / "data"

    @property
    def reference_cache(self) -> Path:
        """Return the folder of the reference policy's log-probs."""
        return Path(self.reference.cache) if self.reference.cache else Path(self.output) / "reference"

    @property
    def export_path(self) -> Path:
        """Return the folder to which the trained model is written."""
        return Path(self.export.path) if self.export.path else Path(self.output) / "export"

    @property
    def export_dtype(self) -> Dtype:
        """Return the number type in which the trained model is written, by default the one it is trained in."""
        return self.export.dtype or self.model.dtype

    def dump(self) -> str:
        """Write the resolved recipe as YAML with every key; `load` of it gives an equal recipe."""
        return to_yaml(self.model_dump())

    def describe(self) -> str:
        """Return the lines that a run prints at its start."""
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
