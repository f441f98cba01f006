"""The part of `gpu.py` about whole training steps: the engine on trees, on unrolled sequences, and transformers.

The engine's step is the one it trains with (`Step.update_rows`): forward, backward, clipping and AdamW over packed
rows, bfloat16 with float32 gradients, main weights and moments, nothing recomputed. Three ways over the same
comparisons (for SFT: over the same answers), with the same weights:

- trees: as the engine packs them;
- unrolled: every sequence a document of its own, rows packed by the engine too;
- transformers: its Mistral on two sequences at a time, padded on the right, with FlashAttention or torch's attention,
  logits of scored positions only, bfloat16 throughout, torch's fused AdamW. Padding stands behind every real token,
  so no mask is needed, which is the fastest way through its attention.

Losses and gradient norms have to agree. All learning rates are so small that no weight changes: every step is the
same step.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from silva.engine.parallel import groups, optimizer

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.utils import is_flash_attn_2_available

from benchmarks import common, kernel_common
from benchmarks.gpu_comparisons import CASES, FULL, SMOKE, SPREAD, Case, Size
from benchmarks.gpu_profile import shares
from benchmarks.gpu_record import Row
from benchmarks.gpu_session import Session, begin
from silva.engine.data.text.chat import TokenSequence
from silva.engine.model import gpt, hf
from silva.engine.model.hf_layout import ModelShape
from silva.engine.objectives import OBJECTIVES
from silva.engine.planning.hardware import GIB, GPUS, Gpu
from silva.engine.recipe.schema import Parallel, Recipe
from silva.engine.training.step import Step, StepSettings

# What a GPU calls itself, where its figures are known.
CARDS = {
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
}
BETA = 0.1
RATE = 1e-30  # changes no weight, and a learning rate of 0 is none
# Relative. Two bfloat16 passes over the same tokens in other rows: a token's log-prob is off by some 2^-8 of its
# logits' spread, 0.005, a sequence's, the sum of hundreds, by 0.1, a reward by 0.01, the loss, a mean over some tens
# of comparisons, by 0.002. A wrong mask, position or pair changes it by its own size.
LOSS_CLOSE = 5e-3
# Rounding is in every element of a gradient and has no direction: a percent of every element adds 1e-4 to the norm;
# a percent of every coefficient, by the rewards above, averages out as the loss's does. transformers' gradient is
# rounded to bfloat16 after every pair besides, 2^-9 each time.
NORM_CLOSE = 1e-2


# ---------------------------------------------------------------- who computes it


def random_model(shape: ModelShape, device: torch.device) -> Any:
    """transformers' Mistral in bfloat16, every time with the same weights."""
    config = MistralConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position,
        initializer_range=SPREAD / math.sqrt(shape.hidden),
        rms_norm_eps=shape.norm_eps,
        sliding_window=shape.window,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention_of_transformers()
        )


def attention_of_transformers() -> str:
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


class Engine:
    """The engine's step over rows that are packed already and a model from memory."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.settings = {
            name: StepSettings(recipe(name, size).objective, gpt.ROW_MULTIPLE, pad_id=0) for name in CASES
        }
        made = recipe("sft", size)
        with tempfile.TemporaryDirectory() as folder:
            random_model(size.shape, device).save_pretrained(folder)
            shape = hf.read_shape(folder)
            if shape != size.shape:
                raise SystemExit(f"the checkpoint has another shape: {shape}, not {size.shape}")
            bare = gpt.build(shape, made.parallel, head="lm", dtype=torch.bfloat16)
            hf.load(bare, folder, shape)
        chunks = optimizer.wrap(bare, made.parallel)
        built = optimizer.build(chunks, made.training, made.parallel)
        update = built.step

        def recorded() -> Any:
            with record_function("optimizer"):
                return update()

        built.step = recorded
        self.made = Step(chunks, built, OBJECTIVES["sft"], self.settings["sft"])

    def step(self, case: Case, layout: str) -> tuple[float, float]:
        """Loss and gradient norm."""
        self.made.objective, self.made.settings = OBJECTIVES[case.objective], self.settings[case.objective]
        found = self.made.update_rows(case.rows[layout], case.count, rate=RATE)
        return found["loss"], found["gradient_norm"]


def recipe(objective: str, size: Size) -> Recipe:
    training = {"global_batch": 1, "learning_rate": RATE, "schedule": "constant", "warmup": 0.0}
    return Recipe.model_validate(
        {
            "output": "unused",
            "objective": {"name": objective} | ({} if objective == "sft" else {"beta": BETA}),
            "model": {"path": "unused", "dtype": "bfloat16"},
            "data": {
                "train": [{"path": "unused", "format": "ultrainteract_pair"}],
                "row_length": size.row_length,
            },
            "training": training,
        }
    )


class Batch(NamedTuple):
    """Sequences that are padded together: B of T tokens, L of them scored."""

    tokens: Tensor  # (B, T) int64
    source: Tensor  # (L,) int64, where the hidden states of scored tokens stand among the B x T
    target: Tensor  # (L,) int64
    owner: Tensor  # (L,) int64, the sequence
    scored: Tensor  # (B,) int64
    reference: Tensor  # (B,) float32; empty for sft

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], reference: Tensor, device: torch.device) -> Batch:
        def padded(arrays: Sequence[NDArray[Any]]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence([*map(torch.from_numpy, arrays)], batch_first=True)

        tokens = padded([each.tokens.astype(np.int64) for each in sequences])
        owner, place = padded([each.scored for each in sequences])[:, 1:].nonzero(as_tuple=True)
        source, target = owner * tokens.shape[1] + place, tokens[owner, place + 1]
        scored = torch.bincount(owner, minlength=len(sequences))
        return cls(*(x.to(device) for x in (tokens, source, target, owner, scored, reference)))


class Plain:
    """transformers, two sequences at a time; they lie on the device before the step begins."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.device = device
        self.model = random_model(size.shape, device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.settings = {name: recipe(name, size).objective for name in CASES}
        self.pair = torch.tensor([[0, 1]], device=device)
        self.absolute = torch.zeros(1, dtype=torch.bool, device=device)
        self._batches: dict[str, list[Batch]] = {}

    def step(self, case: Case, layout: str = "") -> tuple[float, float]:
        """Loss and gradient norm."""
        if case.objective not in self._batches:
            self._batches[case.objective] = [Batch.of(*pair, self.device) for pair in case.pairs]
        total = torch.zeros((), device=self.device)
        for batch in self._batches[case.objective]:
            loss = self._loss(case.objective, batch) / case.count
            loss.backward()
            total += loss.detach()
        with record_function("optimizer"):
            gradients = [p.grad for p in self.model.parameters()]
            # in float32: a norm in bfloat16 has three digits
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            norm = torch.stack(norms).norm()
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm)

    def _loss(self, objective: str, batch: Batch) -> Tensor:
        hidden = self.model.model(input_ids=batch.tokens).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1).index_select(0, batch.source)).float()
        values = -torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")
        sums = values.new_zeros(len(batch.tokens)).index_add(0, batch.owner, values)
        found = OBJECTIVES[objective].preference(
            sums, batch.reference, batch.scored, self.pair, self.absolute, None, self.settings[objective]
        )
        return found.loss.sum()


# ---------------------------------------------------------------- measuring


def step(session: Session) -> None:
    """Engine first: what it leaves behind in memory is not counted against transformers."""
    device = kernel_common.device()
    session.summarize(figures)
    size = SMOKE if session.smoke else FULL
    cases = [make(size) for make in CASES.values()]
    for kind in (Engine, Plain):
        contender = Contender(kind, size, device)
        for case in cases:
            key = f"{case.objective}, {kind.__name__.lower()}"
            session.lines(key, partial(measure, session, contender, case, size))
            session.lines(f"{key}: kernels", partial(kernels, contender, case))
        contender.release()


class Contender:
    """The engine or transformers, built where a line needs it."""

    def __init__(self, kind: type[Engine] | type[Plain], size: Size, device: torch.device) -> None:
        self.engine = kind is Engine
        self._build: Callable[[], Any] = partial(kind, size, device)
        self._built: Any = None
        self._began = False
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}
        self.before = allocated()  # bytes of others

    def layouts(self, case: Case) -> list[str]:
        return [*case.rows] if self.engine else ["transformers"]

    def run(self, case: Case, layout: str) -> tuple[float, float]:
        """Loss and gradient norm of a step."""
        if self._built is None:
            if self._began:
                raise SystemExit("could not be built: see the line before")
            self._began = True
            if self.engine:
                groups.initialize(Parallel())
            self._built = self._build()
        return self._built.step(case, layout)

    def first(self, case: Case, layout: str) -> tuple[float, float]:
        """Of this process's first step of a layout, which compiles what it needs."""
        key = case.objective, layout
        if key not in self._seen:
            self._seen[key] = self.run(case, layout)
        return self._seen[key]

    def release(self) -> None:
        self._built = None
        if self.engine:
            groups.shutdown()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(session: Session, contender: Contender, case: Case, size: Size) -> list[Row]:
    """A row for each layout, behind the check of losses and gradient norms.

    Raises:
        SystemExit: they differ, among themselves or from what is in the record.
    """
    layouts = contender.layouts(case)
    results = {layout: contender.first(case, layout) for layout in layouts}
    known = {
        row["layout"]: row
        for row in session.record.rows("step")
        if row["table"] == "steps" and row["objective"] == case.objective and row["layout"] not in results
    }
    check({name: (row["loss"], row["gradient_norm"]) for name, row in known.items()} | results)
    peaks: dict[str, float] = {}

    def timed(layout: str) -> None:
        restart_peak()
        contender.run(case, layout)
        finish()
        peaks[layout] = peak()

    turns = common.in_turns({layout: partial(timed, layout) for layout in layouts}, size.repeats)
    seconds = {layout: statistics.median(each) for layout, each in turns.items()}
    trees = seconds.get("trees") or known.get("trees", {}).get("seconds")
    return [
        describe(case, layout, size, seconds[layout], trees)
        | {"peak_GiB": (peaks[layout] - contender.before) / GIB}
        | ({"device_GiB": used() / GIB} if contender.engine and torch.cuda.is_available() else {})
        | {"loss": results[layout][0], "gradient_norm": results[layout][1]}
        for layout in layouts
    ]


def kernels(contender: Contender, case: Case) -> list[Row]:
    """One profiled step of each layout."""
    found = []
    for layout in contender.layouts(case):
        contender.first(case, layout)
        seconds, share = shares(partial(contender.run, case, layout))
        row = {"table": "kernels", "objective": case.objective, "layout": layout, "kernel_seconds": seconds}
        found.append(row | {f"{name}_share": part for name, part in share.items()})
    return found


def check(results: Mapping[str, tuple[float, float]]) -> None:
    """Raises SystemExit where losses or gradient norms are further apart than rounding."""
    for what, values, close in (
        ("losses", {name: loss for name, (loss, _) in results.items()}, LOSS_CLOSE),
        ("gradient norms", {name: norm for name, (_, norm) in results.items()}, NORM_CLOSE),
    ):
        low, high = min(values.values()), max(values.values())
        if not high - low < close * abs(high):
            raise SystemExit(f"{what} differ: {', '.join(f'{n} {v:.6g}' for n, v in values.items())}")


def describe(case: Case, layout: str, size: Size, seconds: float, trees: float | None) -> dict[str, Any]:
    """Counts and speed of one layout; `trees`: seconds of the trees' step, where it has been measured."""
    counts = case.counts(layout)
    operations = counts.operations(size.shape)
    gpu = card(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    found: dict[str, Any] = {"table": "steps", "objective": case.objective, "layout": layout}
    passes = case.passes(layout)
    found |= {
        "attention": "silva" if layout in case.rows else attention_of_transformers(),
        "units": case.units,
    }
    found |= {"rows": len(passes), "longest": max(passes), "padded": sum(passes), **counts._asdict()}
    found |= {"sequence_tokens": case.unrolled, "seconds": seconds}
    found |= {"tokens/s": counts.tokens / seconds, "sequence_tokens/s": case.unrolled / seconds}
    found |= {"TFLOP": operations / 1e12, "TFLOP/s": operations / 1e12 / seconds}
    found |= {"MFU": operations / seconds / gpu.flops} if gpu else {}
    if trees is not None:
        more = operations / case.counts("trees").operations(size.shape)
        found |= {
            "trees_faster": seconds / trees,
            "FLOP_ratio": more,
            "over_FLOP_ratio": seconds / trees / more,
        }
    return found


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the floors are about."""
    found: dict[str, float] = {}
    for row in rows:
        if row["table"] == "steps":
            name = f"step_{row['objective']}_{row['layout']}"
            found |= {f"{name}_mfu": row["MFU"]} if "MFU" in row else {}
            if row["layout"] != "trees" and "trees_faster" in row:
                found[f"{name}_over_trees"] = row["trees_faster"]
                found[f"{name}_over_trees_over_flops"] = row["over_FLOP_ratio"]
    return found


# ---------------------------------------------------------------- memory and the device


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def restart_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Bytes of tensors at the worst moment; on a CPU of the whole process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def used() -> int:
    """Bytes of the GPU that are taken, by whatever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def card(name: str) -> Gpu | None:
    """The figures of the GPU of this name."""
    return GPUS[CARDS[name]] if name in CARDS else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin({"step": step})
