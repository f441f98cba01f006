"""`benchmarks.layouts` compares and counts: what it says of tiny runs is checked, and a wrong layout is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_layouts():
    done = run("-m", "benchmarks.layouts", "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("max_difference=")
    found = dict(
        word.split("=", 1) for line in done.stdout.splitlines() for word in line.split() if "=" in word
    )
    # zero would mean that a layout was compared with itself
    assert 0 < float(found["max_difference"]) < 1e-5
    assert int(found["layouts"]) == 5
    # Two ranks: each sends every float32 gradient once, and a few bytes for norms and metrics. The distributed
    # optimizer sends half of it as gradients, half as parameters.
    gradients = 4 * int(found["parameters"]) / 1e3
    assert gradients < float(found["dp2_plain_kilobytes"]) < 1.001 * gradients
    assert gradients < float(found["dp2_kilobytes"]) < 1.001 * gradients
    for name in ("tp2_sp", "pp2_uneven", "cp2"):
        assert float(found[f"{name}_kilobytes"]) > 100
        assert float(found[f"{name}_seconds"]) > 0


def test_a_layout_that_differs_is_an_error():
    """With keys taken in the order they were dealt in, not in the row's."""
    broken = (
        "import sys; from benchmarks import layouts; from silva.engine.parallel import context\n"
        "whole = context._WholeRow.apply\n"
        "context._WholeRow.apply = lambda key, value, dealt, place, group: whole(key, value, dealt, dealt, group)\n"
        "sys.argv = ['layouts', '--smoke', '--only', 'cp2']; layouts.main()"
    )
    done = run("-c", broken)
    assert done.returncode == 1
    assert "max_difference=" in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("not equal to one process: cp2 ")
