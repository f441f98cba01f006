"""Measures speed and memory of reading and tokenizing a large preference data set.

    python -m benchmarks.data_pipeline [--copies 160] [--workers 2]

The data are the shipped mini set, in which every row is repeated `--copies` times with another instruction each (160
copies are 245K comparisons). The peer is what pair trainers do before their first step: transformers renders the chat
template and tokenizes both sides of every row, here of a sample of rows, on one core, with the same tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from silva.engine.data import pipeline
from silva.engine.data.dataset import DataSet, scored
from silva.engine.data.encoding import Encoder
from silva.engine.data.reading.source import SourceReader
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.recipe.schema import Data, Source
from silva.recipes.mini.make_model import make

MINI = Path(__file__).resolve().parents[1] / "recipes" / "mini"
# one in so many trees is checked
CHECK_EVERY = 97


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="Reading and tokenizing a large preference data set.")
    parser.add_argument("--copies", type=int, default=160, help="of the mini data set")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.copies, options.workers)


def measure(folder: Path, copies: int, workers: int) -> None:
    """Build the cache, check it, and print the figures."""
    model, cache = folder / "model", folder / "cache"
    make(MINI, model, seed=0)
    rows = write_rows(folder / "pair.jsonl", copies)
    tokenizer = ChatTokenizer.load(str(model))
    source = Source(path=str(rows), format="ultrainteract_pair")
    settings = Data(train=[source], row_length=4096)
    encoder = Encoder(tokenizer, settings, "comparison", scored(settings, source, "comparison"))
    job = pipeline.SourceTask(source, encoder)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    reader, worker = peak_memory_of_building(job, cache, workers)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    built = pipeline.build(job, cache)
    data = DataSet(pipeline.shards(built))
    reopened = time.perf_counter() - began
    check(data, source, tokenizer)

    unrolled = sum(int(data.group(k).length.sum()) for k in range(len(data)))
    unique = int(data.tokens.sum())
    peer = peer_tokens_per_second(rows, model)
    print(f"{data.comparisons:,} comparisons in {len(data):,} trees, {workers} workers; the cache is checked")
    print(f"peer: transformers' chat template and tokenizer, one core: {peer:,.0f} unrolled tokens/s")
    figures = {
        "unrolled_tokens": unrolled,
        "unique_tokens": unique,
        "seconds": f"{seconds:.1f}",
        "tokens_per_second_per_worker": f"{unrolled / seconds / workers:.0f}",
        "over_peer": f"{unrolled / seconds / workers / peer:.2f}",
        "reopen_seconds": f"{reopened:.2f}",
        "bytes_per_unique_token": f"{sum(p.stat().st_size for p in built.iterdir()) / unique:.2f}",
        "megabytes_before": before // 1024,
        "megabytes_reader": reader // 1024,
        "megabytes_worker": worker // 1024,
    }
    print(" ".join(f"{key}={value}" for key, value in figures.items()))


def write_rows(path: Path, copies: int) -> Path:
    """Write every row of the mini data set `copies` times, with another instruction each."""
    with gzip.open(MINI / "pair.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    with path.open("w") as out:
        for copy in range(copies):
            for row in rows:
                name, depth, turn = row["id"].rsplit("_", 2)
                first, *rest = row["trajectory"]
                changed = {
                    "id": f"{name}-{copy}_{depth}_{turn}",
                    "parent_id": f"{row['parent_id']}-{copy}",
                    "trajectory": [first | {"value": f"Variant {copy}. {first['value']}"}, *rest],
                }
                out.write(json.dumps(row | changed) + "\n")
    return path


def peak_memory_of_building(job: pipeline.SourceTask, cache: Path, workers: int) -> tuple[int, int]:
    """Build the cache in a process of its own.

    Returns:
        Peak KiB of that process, and of its largest worker.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        pipeline.build(job, cache, workers=workers, say=print)
        whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        theirs.send(tuple(resource.getrusage(who).ru_maxrss for who in whose))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def check(data: DataSet, source: Source, tokenizer: ChatTokenizer) -> None:
    """Check that both sides of every comparison come back token by token, in every `CHECK_EVERY`-th tree.

    Raises:
        SystemExit: the cache holds other tokens.
    """
    reader, report = SourceReader(source, "comparison", "refuse"), Report()
    groups = reader.groups(reader.rows(report), report)
    for k, group in enumerate(groups):
        if k % CHECK_EVERY:
            continue
        stored = data.group(k)
        for pair, comparison in zip(stored.comparisons, group.comparisons, strict=True):
            for side, place in zip(pair, (comparison.chosen, comparison.rejected), strict=True):
                [expected] = tokenizer.encode(group.conversations[place or 0], score="last").paths
                if not np.array_equal(stored.sequence(int(side)).tokens, expected.tokens):
                    raise SystemExit(f"tree {k}: the cache holds other tokens than reading in memory gives")


def peer_tokens_per_second(rows: Path, model: Path, sample: int = 1000) -> float:
    """Return how many tokens per second the peer renders and tokenizes."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    with rows.open() as file:
        found = [json.loads(line) for _, line in zip(range(sample), file, strict=False)]
    began, tokens = time.perf_counter(), 0
    for row in found:
        history = [
            {"role": "assistant" if turn["from"] == "gpt" else "user", "content": turn["value"]}
            for turn in row["trajectory"]
        ]
        for side in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": row[side]}
            text = tokenizer.apply_chat_template([*history, answer], tokenize=False)
            tokens += len(tokenizer(text)["input_ids"])
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
