"""Measures whole training steps: the engine's on trees and on unrolled sequences, and those of transformers.

This is the part "step" of `gpu.py`. The engine's step is the one it trains with (`Step.update_rows`): forward,
backward, clipping and AdamW over packed rows, bfloat16 with float32 gradients, main weights and moments, nothing
recomputed. There are three ways to compute the same comparisons (for SFT the same answers) with the same weights:

- trees: rows are as the engine packs them;
- unrolled: every sequence is a document of its own, and the engine packs these into rows too;
- transformers: its Mistral computes two sequences at a time, padded on the right, with FlashAttention or torch's
  attention, logits of scored positions only, bfloat16 throughout, and torch's fused AdamW. Padding comes after every
  real token, so no mask is needed, which is the fastest way through its attention.

Losses and gradient norms have to agree. All learning rates are so small that no weight changes, so that every step is
the same step.
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
from silva.engine.data.trees.group import TokenSequence
from silva.engine.model import gpt, hf
from silva.engine.model.families.shape import ModelShape
from silva.engine.objectives import OBJECTIVES
from silva.engine.planning.hardware import GIB, GPUS, Gpu
from silva.engine.recipe.schema import Parallel, Recipe
from silva.engine.training.step import Step, StepSettings

# the planner's name of each GPU whose figures are known, by the name that the GPU gives itself
CARDS = {
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
}
BETA = 0.1
# it changes no weight, and a recipe takes no learning rate of 0
RATE = 1e-30
# This bound is relative. Two bfloat16 passes compute the same tokens in different rows. A token's log-prob is then off
# by some 2^-8 of its logits' spread, which is 0.005; a sequence's, which is the sum of hundreds, by 0.1; a reward by
# 0.01; and the loss, which is a mean over some tens of comparisons, by 0.002. A wrong mask, position or pair changes
# the loss by its own size.
LOSS_CLOSE = 5e-3
# This bound is relative too. Rounding is in every element of a gradient and has no direction: an error of a percent in
# every element adds 1e-4 to the norm. An error of a percent in every coefficient, which the error of the rewards above
# makes, averages out as the loss's does. transformers' gradient is also rounded to bfloat16 after every pair, by 2^-9
# each time.
NORM_CLOSE = 1e-2


# ---------------------------------------------------------------- who computes it


def random_model(shape: ModelShape, device: torch.device) -> Any:
    """Return transformers' Mistral in bfloat16, every time with the same weights."""
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
    """Return the name of the attention that transformers uses."""
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


class Engine:
    """Runs the engine's step over rows that are packed already, with a model from memory."""

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
        """Run one step, and return loss and gradient norm."""
        self.made.objective, self.made.settings = OBJECTIVES[case.objective], self.settings[case.objective]
        found = self.made.update_rows(case.rows[layout], case.count, rate=RATE)
        return found["loss"], found["gradient_norm"]


def recipe(objective: str, size: Size) -> Recipe:
    """Return a recipe of an objective for the settings of both contenders."""
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
    """Holds sequences that are padded together: B of T tokens, L of them scored.

    Attributes:
        tokens: (B, T) int64.
        source: (L,) int64, where the hidden states that predict scored tokens are among the B x T.
        target: (L,) int64, the scored tokens.
        owner: (L,) int64, the sequence of each scored token.
        scored: (B,) int64, scored tokens of each sequence.
        reference: (B,) float32, reference log-probs; empty for SFT.
    """

    tokens: Tensor
    source: Tensor
    target: Tensor
    owner: Tensor
    scored: Tensor
    reference: Tensor

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], reference: Tensor, device: torch.device) -> Batch:
        """Pad sequences together and move them to a device."""

        def padded(arrays: Sequence[NDArray[Any]]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence([*map(torch.from_numpy, arrays)], batch_first=True)

        tokens = padded([each.tokens.astype(np.int64) for each in sequences])
        owner, place = padded([each.scored for each in sequences])[:, 1:].nonzero(as_tuple=True)
        source, target = owner * tokens.shape[1] + place, tokens[owner, place + 1]
        scored = torch.bincount(owner, minlength=len(sequences))
        return cls(*(x.to(device) for x in (tokens, source, target, owner, scored, reference)))


class Plain:
    """Runs transformers on two sequences at a time, which are on the device before the step begins."""

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
        """Run one step, and return loss and gradient norm."""
        if case.objective not in self._batches:
            self._batches[case.objective] = [Batch.of(*pair, self.device) for pair in case.pairs]
        total = torch.zeros((), device=self.device)
        for batch in self._batches[case.objective]:
            loss = self._loss(case.objective, batch) / case.count
            loss.backward()
            total += loss.detach()
        with record_function("optimizer"):
            gradients = [p.grad for p in self.model.parameters()]
            # the norm is taken in float32, because in bfloat16 it has three digits
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
    """Measure the engine, then transformers.

    The engine comes first: what it leaves behind in memory is not counted against transformers.
    """
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
    """Holds the engine or transformers, which is built where a line needs it.

    Attributes:
        engine: whether it is the engine.
        before: bytes of the GPU's tensors that are not its own.
    """

    def __init__(self, kind: type[Engine] | type[Plain], size: Size, device: torch.device) -> None:
        self.engine = kind is Engine
        self._build: Callable[[], Any] = partial(kind, size, device)
        self._built: Any = None
        self._began = False
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}
        self.before = allocated()

    def layouts(self, case: Case) -> list[str]:
        """Return the layouts that it computes."""
        return [*case.rows] if self.engine else ["transformers"]

    def run(self, case: Case, layout: str) -> tuple[float, float]:
        """Run one step, and return loss and gradient norm."""
        if self._built is None:
            if self._began:
                raise SystemExit("could not be built: see the line before")
            self._began = True
            if self.engine:
                groups.initialize(Parallel())
            self._built = self._build()
        return self._built.step(case, layout)

    def first(self, case: Case, layout: str) -> tuple[float, float]:
        """Return loss and gradient norm of this process's first step of a layout, which compiles what it needs."""
        key = case.objective, layout
        if key not in self._seen:
            self._seen[key] = self.run(case, layout)
        return self._seen[key]

    def release(self) -> None:
        """Give back the memory of what was built."""
        self._built = None
        if self.engine:
            groups.shutdown()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(session: Session, contender: Contender, case: Case, size: Size) -> list[Row]:
    """Return a row for each layout, after losses and gradient norms were checked.

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
    """Return a row for each layout with the shares of the groups of kernels in one profiled step."""
    found = []
    for layout in contender.layouts(case):
        contender.first(case, layout)
        seconds, share = shares(partial(contender.run, case, layout))
        row = {"table": "kernels", "objective": case.objective, "layout": layout, "kernel_seconds": seconds}
        found.append(row | {f"{name}_share": part for name, part in share.items()})
    return found


def check(results: Mapping[str, tuple[float, float]]) -> None:
    """Check that losses and gradient norms are no further apart than rounding.

    Raises:
        SystemExit: they are further apart.
    """
    for what, values, close in (
        ("losses", {name: loss for name, (loss, _) in results.items()}, LOSS_CLOSE),
        ("gradient norms", {name: norm for name, (_, norm) in results.items()}, NORM_CLOSE),
    ):
        low, high = min(values.values()), max(values.values())
        if not high - low < close * abs(high):
            raise SystemExit(f"{what} differ: {', '.join(f'{n} {v:.6g}' for n, v in values.items())}")


def describe(case: Case, layout: str, size: Size, seconds: float, trees: float | None) -> dict[str, Any]:
    """Return the counts and the speed of one layout.

    Args:
        case: the objective's step.
        layout: its name.
        size: of the model.
        seconds: of a step.
        trees: seconds of the trees' step, or None where it has not been measured.
    """
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
    """Return the figures that the floors are about."""
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
    """Return the bytes of tensors on the GPU, and 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def restart_peak() -> None:
    """Restart the measurement of `peak` on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Return the bytes of tensors at the worst moment; on a CPU, those of the whole process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def used() -> int:
    """Return the bytes of the GPU that are in use, by whatever process."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def finish() -> None:
    """Wait until the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def card(name: str) -> Gpu | None:
    """Return the figures of the GPU of this name, or None where they are unknown."""
    return GPUS[CARDS[name]] if name in CARDS else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin({"step": step})
