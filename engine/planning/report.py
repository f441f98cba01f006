"""Prints predictions as tables, with the explanations a reader needs beside them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from silva.engine.planning.built import Job, Stage
from silva.engine.planning.hardware import GIB
from silva.engine.planning.memory import PARTS
from silva.engine.planning.predict import Prediction, Setting, advice, as_overrides
from silva.engine.planning.step_time import replicas
from silva.engine.recipe.schema import Recipe

WARNING = "A prediction, not a measurement: nothing here has run on a GPU. What it assumes stands below."


def show_setting(console: Console, setting: Setting, shape_source: str) -> None:
    """Print what the plan is made for: model, cluster and step."""
    recipe, work, gpu = setting.recipe, setting.workload, setting.gpu
    shape = setting.shape
    console.print(
        f"model      {shape_source}: {shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads over "
        f"{shape.kv_heads}, feed-forward {shape.ffn}, vocabulary {shape.vocab}"
    )
    console.print(
        f"cluster    {setting.gpus} x {gpu.name}: {gpu.memory / GIB:.0f} GiB, {gpu.flops / 1e12:.0f} TFLOP/s, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s, NVLink {gpu.nvlink / 1e9:.0f} GB/s, network {gpu.network / 1e9:.0f} GB/s"
    )
    console.print(
        f"step       {recipe.objective.name}, {recipe.training.global_batch} "
        f"{'sequences' if recipe.objective.name == 'sft' else 'comparisons'}: "
        f"{recipe.training.global_batch * work.unrolled:,.0f} tokens unrolled, {work.sharing:.2f} of them in trees, "
        f"a token sees {work.depth:,.0f} ({work.source})"
    )


def show_prediction(console: Console, setting: Setting, prediction: Prediction) -> None:
    """Print one layout: memory by stage, time by cause, advice."""
    console.print(
        f"layout     {' '.join(as_overrides(prediction, setting.recipe)) or 'as the recipe says'}\n"
    )
    _memory_table(console, setting, prediction)
    _time_table(console, prediction)
    fullest = prediction.fullest
    verdict = "fits" if prediction.fits else "does NOT fit"
    console.print(
        f"{verdict}: {fullest.total / GIB:.1f} of {setting.gpu.memory / GIB:.1f} GiB on the fullest stage; "
        f"most of it: {fullest.dominant}, {getattr(fullest, fullest.dominant) / GIB:.1f} GiB"
    )
    host = max(stage.host for stage in prediction.stages)
    if host:
        node = min(setting.gpu.per_node, setting.gpus)
        console.print(
            f"host memory for the optimizer: {host / GIB:.1f} GiB a GPU, {node * host / GIB:,.0f} GiB a node"
        )
    for line in advice(setting, prediction):
        console.print(f"  - {line}")


def _memory_table(console: Console, setting: Setting, prediction: Prediction) -> None:
    table = Table(title="memory of one GPU, GiB", title_justify="left")
    for name in ("stage", "layers", "in flight", *PARTS, "total", "free"):
        table.add_column(name, justify="right")
    # equal neighbours share a line: first stage, last stage, cells
    rows: list[tuple[int, int, list[str]]] = []
    for place, (stage, each) in enumerate(zip(prediction.stages, prediction.budgets, strict=True)):
        cells = [
            str(sum(chunk.layers for chunk in stage.chunks)),
            str(each.in_flight),
            *(f"{getattr(each, part) / GIB:.2f}" for part in PARTS),
            f"{each.total / GIB:.1f}",
            f"{(setting.gpu.memory - each.total) / GIB:.1f}",
        ]
        if rows and rows[-1][2] == cells:
            rows[-1] = (rows[-1][0], place, cells)
        else:
            rows.append((place, place, cells))
    for first, last, cells in rows:
        table.add_row(str(first) if first == last else f"{first} - {last}", *cells)
    console.print(table)


def _time_table(console: Console, prediction: Prediction) -> None:
    time = prediction.time
    table = Table(title="time of one step", title_justify="left")
    for name, justify in (("", "left"), ("seconds", "right"), ("share", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for part in time.PARTS:
        seconds = getattr(time, part)
        table.add_row(part.replace("_", " "), f"{seconds:.3f}", f"{seconds / time.total:.0%}")
    table.add_row("step", f"{time.total:.3f}", "100%", style="bold")
    console.print(table)
    console.print(
        f"{time.rows} rows a step, {time.micro_batches} micro-batches a replica; "
        f"{time.tokens_per_second:,.0f} tokens/s of trees; model FLOPs utilisation {prediction.utilisation:.1%}"
    )


def show_search(console: Console, setting: Setting, found: Sequence[Prediction]) -> None:
    """Print the layouts that a search found, the best one first, and advice on that one."""
    table = Table(title="best layouts, each built whole", title_justify="left")
    for name in ("", "TP", "CP", "PP", "virtual", "DP", "recompute", "row", "micro-batches", "GiB", "s/step", "bubble",
                 "tokens/s", "MFU"):  # fmt: skip
        table.add_column(name, justify="right")
    for number, each in enumerate(found, 1):
        layout, time = each.job.parallel, each.time
        table.add_row(
            str(number), str(layout.tensor), str(layout.context), str(layout.pipeline),
            str(layout.virtual_pipeline or "-"), str(replicas(each.job)), layout.recompute, str(each.job.row_length),
            str(time.micro_batches), f"{each.fullest.total / GIB:.1f}", f"{time.total:.2f}",
            f"{time.bubble / time.total:.0%}", f"{time.tokens_per_second:,.0f}", f"{each.utilisation:.1%}",
        )  # fmt: skip
    console.print(table)
    for number, each in enumerate(found, 1):
        console.print(f"{number}. {' '.join(as_overrides(each, setting.recipe))}")
    for line in advice(setting, found[0]):
        console.print(f"  - {line}")


def show_rank(console: Console, job: Job, rank: int, stage: Stage) -> None:
    """Print a dry run of one rank."""
    layout = job.parallel
    sizes = {
        "tensor": layout.tensor,
        "context": layout.context,
        "data": replicas(job),
        "pipeline": layout.pipeline,
    }
    parts, left = [], rank
    for name, size in sizes.items():
        left, place = divmod(left, size)
        parts.append(f"{name} {place} of {size}")
    console.print(f"rank {rank} of {job.world}: {', '.join(parts)}")
    for number, chunk in enumerate(stage.chunks):
        console.print(
            f"  chunk {number}: {chunk.layers} layers, {chunk.parameters:,} parameters; forward gives "
            f"{[*chunk.output]}, backward reached {chunk.reached} of {chunk.tensors} parameter tensors"
        )
    console.print(
        f"  parameters {stage.parameters / GIB:.3f} GiB, gradients {stage.gradients / GIB:.3f}, "
        f"optimizer {stage.optimizer / GIB:.3f}, kept per micro-batch "
        f"{sum(chunk.saved for chunk in stage.chunks) / GIB:.3f}"
    )


def show_assumptions(console: Console, setting: Setting) -> None:
    """Print that this is a prediction, and what it assumes."""
    console.print(f"\n{WARNING}")
    for line in setting.assumptions.lines():
        console.print(f"  - {line}")


def closing_line(prediction: Prediction) -> str:
    """Return the prediction of one layout as `key=value`, for a program to read."""
    fullest = prediction.fullest
    return (
        f"fits={str(prediction.fits).lower()} gib={fullest.total / GIB:.2f} dominant={fullest.dominant} "
        f"step_seconds={prediction.time.total:.3f} tokens_per_second={prediction.time.tokens_per_second:.0f} "
        f"mfu={prediction.utilisation:.3f}"
    )


def describe_layout(prediction: Prediction, recipe: Recipe) -> str:
    """Return the layout as `key=value`, in one line."""
    return " ".join(as_overrides(prediction, recipe))
