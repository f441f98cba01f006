"""Provides what the benchmarks share: random checkpoints, data sources, timing in turns, and printed figures."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ultrainteract import Tree, group
from silva.engine.data import pipeline
from silva.engine.data.dataset import DataSet, prepare
from silva.engine.data.encoding import Unit
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Data, Source


def source(text: str, **more: Any) -> Source:
    """Read `path:format` or `path:format:field=column,...` as a recipe's data source.

    Raises:
        UserError: the text has another form, or format and columns are unknown to the recipe.
    """
    path, _, rest = text.partition(":")
    form, _, columns = rest.partition(":")
    pairs = [column.partition("=") for column in columns.split(",") if column]
    if not form or not all(equals and name and theirs for name, equals, theirs in pairs):
        raise UserError(f"{text}: write a data set as path:format or path:format:field=column,...")
    try:
        return Source(path=path, format=form, columns={name: theirs for name, _, theirs in pairs}, **more)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{text}: {str(error).splitlines()[2].strip()}") from None


def label(text: str, taken: Collection[str]) -> str:
    """Return a name for the data set of `source`'s text that is not among `taken`."""
    stem = re.sub(r"\W+", "_", Path(text.partition(":")[0]).name.split(".")[0]).strip("_") or "data"
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def read(
    sources: Sequence[Source], tokenizer: ChatTokenizer, settings: Data, *, unit: Unit, cache: Path
) -> DataSet:
    """Read sources as a run does, and print what was left out, by reason."""
    data, folders = prepare(sources, tokenizer, settings, unit=unit, cache=cache, seed=0)
    left_out = Report()
    for folder in folders:
        left_out.merge(pipeline.report(folder))
    for line in left_out.lines():
        print(line)
    return data


def synthetic(trees: Sequence[Tree], row_length: int) -> DataSet:
    """Return the trees whose comparisons each fit a row, and print how many do not."""
    drawn = [group(tree) for tree in trees]
    fitting = [
        g for g in drawn if all(g.merged_size(np.sort(pair))[0] <= row_length for pair in g.comparisons)
    ]
    if len(fitting) < len(drawn):
        print(
            f"{len(drawn) - len(fitting)} trees hold a comparison longer than a row of {row_length}: left out"
        )
    return DataSet.of(fitting)


def write_rows(path: Path, rows: Any) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(
    folder: Path,
    *,
    vocabulary: int,
    hidden: int,
    layers: int,
    reward: bool = False,
    seed: int = 0,
) -> int:
    """Save a random Llama checkpoint and return its number of parameters.

    The feed-forward size is 8/3 of `hidden` in multiples of 64. Heads have size 64 or smaller, and there are two query
    heads per key-value head.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    heads = max(2, hidden // 64)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": -(-8 * hidden // 3 // 64) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 1,
        "dtype": "float32",
    }
    config = LlamaConfig(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each run, repeated in turns.

    One run of each follows the other, `repeats` times, so that what disturbs one disturbs all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def between(ends: Sequence[float]) -> list[float]:
    """Return the seconds from each end to the next."""
    return [after - before for before, after in itertools.pairwise(ends)]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the median over repetitions of slow / fast, where both were measured one right after the other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def environment(**more: object) -> dict[str, object]:
    """Return what the figures depend on besides the code."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    } | more


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table whose numbers have four significant digits."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*map(_text, row))
    Console(width=200, soft_wrap=True).print(table)


def finish(figures: Mapping[str, object]) -> None:
    """Print one key=value line per figure."""
    for name, value in figures.items():
        print(f"{name}={_plain(value)}")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
