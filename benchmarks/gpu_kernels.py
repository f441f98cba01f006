"""Runs the parts of `gpu.py` that are about kernels: their tests on the GPU, and each benchmark beside its peers."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_layers as layers
from benchmarks import bench_linear_logprob as linear
from benchmarks import bench_preference_loss as preference
from benchmarks import bench_tree_attention as attention
from benchmarks import kernel_common
from benchmarks.attention_peers import PEERS, Row, missing
from benchmarks.gpu_session import Outcome, Session, begin
from benchmarks.installed import absent

ROOT = Path(__file__).resolve().parents[1]
# files that launch kernels, and for each file a few tests that take the interpreter little time
TESTS = {
    "tree_attention": "scale_and_scores",
    "tree_blocks": "equal_shapes",
    "linear_logprob": "not_a_number",
    "preference_loss": "nothing_to_compare",
    "layers": "far_from_zero",
    "products": "transposed",
}
# tokens of the rows that are measured; a GPU of 80 GB holds all of them
SIZES = (8192, 16384)
# seconds that unfinished tests get to report what they have; xdist takes 7 of them to stop
REPORTING = 12
NAMES = ("trees", "documents", "pairs", "causal")
# files and rows that --smoke keeps: they take every path through this module, and the interpreter little time
SMOKE_TESTS, SMOKE_NAMES = ("tree_blocks", "layers"), ("trees", "causal")


# ---------------------------------------------------------------- tests


def tests(session: Session) -> None:
    """Run every file of tests in a process of its own, all at once.

    Nearly all of their time is compiling on the CPU.
    """
    session.summarize(
        lambda rows: {f"tests_{key}": sum(r[key] for r in rows) for key in ("passed", "failed", "skipped")}
    )
    with tempfile.TemporaryDirectory() as folder:
        todo = [
            name
            for name in (SMOKE_TESTS if session.smoke else TESTS)
            if not session.record.done("tests", name)
        ]
        began = time.monotonic()
        running = {name: start(name, Path(folder), session) for name in todo}
        try:
            while running and session.left > REPORTING:
                for name in [name for name, child in running.items() if child.poll() is not None]:
                    running.pop(name)
                    session.lines(name, lambda name=name: outcome(Path(folder) / f"{name}.xml", name, began))
                time.sleep(0.1)
        finally:
            for child in running.values():
                # pytest then reports what it has
                child.send_signal(signal.SIGINT)
        for name, child in running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, session.left - 1))
            session.lines(name, lambda name=name: cut(Path(folder) / f"{name}.xml", name, began))


def start(name: str, folder: Path, session: Session) -> subprocess.Popen[bytes]:
    """Start the tests of one file."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--color=no",
        "-p",
        "no:cacheprovider",
        f"tests/kernels/test_{name}.py",
    ]
    command += [f"--junitxml={folder / name}.xml", "--override-ini=junit_logging=no"]
    if session.smoke:
        command += ["-k", TESTS[name]]
    elif not absent("xdist"):
        # there may be more processes than cores, because the files end one after the other
        command += ["-n", str(max(1, len(os.sched_getaffinity(0)) // 3))]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def cut(report: Path, name: str, began: float) -> Outcome:
    """Return the outcome of a file that was not finished.

    Raises:
        SystemExit: pytest has written no report.
    """
    why = f"not finished after {time.monotonic() - began:.0f} s"
    if not report.exists():
        raise SystemExit(why)
    found = outcome(report, name, began)
    return Outcome(found.rows, f"{why}; {found.failed}" if found.failed else why)


def outcome(report: Path, name: str, began: float) -> Outcome:
    """Return the counts of one file, and the names of the tests that failed.

    Raises:
        SystemExit: the file could not be collected, or no test ran.
    """
    log = report.with_suffix(".log").read_text(errors="replace")
    sys.stderr.write(log)
    if not report.exists():
        raise SystemExit(f"pytest gave no report: {' '.join(log.split())[-200:]}")
    suite = next(xml.parse(report).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    names = [
        case.get("name", "")
        for case in suite.iter("testcase")
        if [*case.iter("failure"), *case.iter("error")]
    ]
    passed = count["tests"] - failed - count["skipped"]
    row = {"file": f"test_{name}.py", "where": "interpreter" if not torch.cuda.is_available() else "GPU"}
    row |= {"passed": passed, "failed": failed, "skipped": count["skipped"]}
    row |= {"seconds": round(time.monotonic() - began, 1)}
    if not passed and not failed:
        raise SystemExit("no test ran")
    return Outcome([row], f"{failed} tests: {', '.join(names)}" if failed else None)


# ---------------------------------------------------------------- benchmarks


def tree_attention(session: Session) -> None:
    """Measure tree attention."""
    smoke, device = session.smoke, kernel_common.device()
    command = ["--smoke"] if smoke else []
    options = attention.settings(command)
    check = {"row": "check", "tokens": 96 if smoke else 2048, "who": "silva"}
    session.summarize(attention_figures)
    session.line("float64", lambda: check | {"error over torch's": attention.check(options, check["tokens"])})
    for name in PEERS:
        if why := missing(name, device):
            session.missing(name, why)
    for size in (96,) if smoke else SIZES:
        packed = {row.name: row for row in attention.rows(size, [])}
        for name in SMOKE_NAMES if session.smoke else NAMES:
            attention_row(session, options, packed[name])


def attention_row(session: Session, options: argparse.Namespace, row: Row) -> None:
    """Measure every peer that can compute a row."""
    *leaves, grad = attention.tensors(options, len(row.end))
    leaves = [x.requires_grad_() for x in leaves]

    @functools.cache
    def truth() -> attention.Truth:
        return attention.Truth(row, leaves, grad)

    for name, kind in PEERS.items():
        if row.name in kind.rows and not missing(name, options.device):
            key = f"{row.name} {len(row.end)} {name}"
            session.line(key, lambda n=name: attention.compared(options, row, n, truth(), leaves, grad))


def attention_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return Silva's speed over the best peer's on each row, forward and backward together."""
    total: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if "backward_ms" in row:
            times = total.setdefault((row["row"], row["tokens"]), {})
            times[row["who"]] = row["forward_ms"] + row["backward_ms"]
    found = {}
    for (name, tokens), times in total.items():
        ours = times.pop("silva", None)
        flex = [time for who, time in times.items() if who.startswith("flex")]
        others = [time for who, time in times.items() if not who.startswith("flex")]
        for what, among in (("flex", flex), ("varlen_or_dense", others)):
            if ours and among:
                found[f"attention_{name}_{tokens}_times_faster_than_{what}"] = min(among) / ours
    return found


def linear_logprob(session: Session) -> None:
    """Measure log-probs without logits."""
    device = kernel_common.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    small = (25, 57, 13) if session.smoke else (252, 507, 123)
    session.summarize(linear_figures)
    session.line("float64", lambda: {"table": "check", "error": linear.check(small, dtype, device)})
    repeats = 1 if session.smoke else 10
    for shape in linear.SMOKE if session.smoke else linear.SHAPES:
        title = "x".join(map(str, shape))
        if session.record.done("linear_logprob", title):
            continue

        def check(peer: str, shape=shape) -> float:
            return linear.agreement(linear.Problem(shape, dtype, device), peer)

        peers = agreeing(session, linear.PEERS, lambda peer: linear.missing(peer, device), title, check)
        session.lines(title, lambda s=shape, p=peers: linear.time_shape(s, dtype, device, repeats, p))


def linear_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the time of the three products over that of Silva's log-probs, for the first shape."""
    times = [(row["shape"], row["what"], row["ms"]) for row in rows if "what" in row]
    first = {what: ms for shape, what, ms in times if shape == times[0][0]}
    return (
        {"linear_products_over_ours": first["products, all three"] / first["ours"]} if "ours" in first else {}
    )


def preference_loss(session: Session) -> None:
    """Measure the preference loss."""
    device = kernel_common.device()
    session.summarize(preference_figures)
    for shape in preference.SMOKE if session.smoke else preference.SHAPES:

        def measure(shape=shape) -> list[dict[str, Any]]:
            pairs = preference.Pairs(*shape, device)
            error = preference.check(pairs)
            return [
                row | {"error": error} for row in preference.time_shape(pairs, 1 if session.smoke else 20)
            ]

        session.lines("x".join(map(str, shape)), measure)
    if device.type != "cuda":
        session.missing("TRL, torch.compile", "runs on GPUs only")


def preference_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the time of TRL's loss over that of Silva's, for the first shape."""
    first = {row["what"]: row["ms"] for row in rows if row["shape"] == rows[0]["shape"]}
    return {"preference_loss_times_faster_than_trl": first["TRL, eager"] / first["ours"]} if first else {}


def fused_layers(session: Session) -> None:
    """Measure norm, rotary positions and SwiGLU."""
    device = kernel_common.device()
    session.summarize(layer_figures)
    size = layers.SMOKE if session.smoke else layers.Size()
    repeats = 1 if session.smoke else 20
    for kind in layers.OPERATIONS:
        if session.record.done("layers", kind.name):
            continue
        operation = kind(size, device)
        peers = agreeing(
            session, layers.PEERS, lambda peer: layers.missing(peer, device), kind.name, operation.check
        )
        session.lines(kind.name, lambda o=operation, p=peers: layers.time_operation(o, p, repeats))


def layer_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return Silva's speed over the best peer's for each operation."""
    found = {}
    rows = [row for row in rows if "both_ms" in row]
    for name in dict.fromkeys(row["operation"] for row in rows):
        times = {row["who"]: row["both_ms"] for row in rows if row["operation"] == name}
        others = [time for who, time in times.items() if who != "silva"]
        if "silva" in times and others:
            found[f"{name}_times_faster_than_best_peer"] = min(others) / times["silva"]
    return found


def agreeing(session: Session, peers: Any, missing: Any, title: str, check: Any) -> list[str]:
    """Return the peers that are installed and compute the same; put the others on record."""
    found = []
    for peer in peers:
        if why := missing(peer):
            session.missing(peer, why)
        elif session.line(
            f"{title}: check of {peer}",
            lambda p=peer: {"table": "check", "shape": title, "who": p, "error": check(p)},
        ):
            found.append(peer)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin(
        {
            "tests": tests,
            "attention": tree_attention,
            "linear_logprob": linear_logprob,
            "preference_loss": preference_loss,
            "layers": fused_layers,
        }
    )
