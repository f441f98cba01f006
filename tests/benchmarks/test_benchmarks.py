"""The benchmarks' own checks hold on tiny inputs, their synthetic trees have the published statistics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common, ultrainteract

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(output: str) -> dict[str, str]:
    """The key=value figures a benchmark ends with."""
    words = [word for line in output.splitlines() for word in line.split()]
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_tree_step():
    found = figures(run("tree_step", "--smoke"))
    assert float(found["max_loss_diff"]) < 1e-9
    assert float(found["max_grad_diff"]) < 1e-9
    assert 2 < float(found["flop_ratio"]) < 4
    assert float(found["ratio"]) > 0
    assert float(found["ratio_over_flops"]) == pytest.approx(
        float(found["ratio"]) / float(found["flop_ratio"]), rel=1e-2
    )


def test_tree_step_on_a_file_with_a_malformed_row(tmp_path):
    tokenizer = ultrainteract.save_tokenizer(tmp_path / "tokenizer", 512)
    drawn = ultrainteract.trees(3, vocabulary=512, scale=0.05)
    rows = [json.dumps(row) for row in ultrainteract.rows(drawn)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"id": 3}']) + "\n")
    path = str(tmp_path / "rows.jsonl")
    output = run("tree_step", "--smoke", path, "--tokenizer", str(tokenizer), "--objective", "bt_dr")
    left_out = "skipped: the row has no parent_id, trajectory, chosen, rejected"
    assert f"{left_out}: 1 (first: rows.jsonl:{len(rows) + 1})" in output
    found = figures(output)
    assert int(found["comparisons"]) == len(rows)
    assert max(float(found["max_loss_diff"]), float(found["max_grad_diff"])) < 1e-9


def test_vs_trl():
    """Exits with an error where a loss differs by more than 1e-4."""
    found = figures(run("vs_trl", "--smoke", "--only", "interactive"))
    assert float(found["max_loss_diff"]) < 1e-4
    assert float(found["interactive_dpo_ratio"]) > 0
    assert float(found["interactive_bt_ratio"]) > 0


def test_tree_sharing():
    found = figures(run("tree_sharing", "--smoke"))
    for name in ("ultrainteract", "ultrainteract_interactive", "ultrainteract_rm"):
        assert 1 < float(found[f"{name}_ratio"]) <= float(found[f"{name}_sides_ratio"])
        assert 1 < float(found[f"{name}_tile_ratio"]) < 4
        assert 0.5 < float(found[f"{name}_row_fill"]) <= 1
        assert float(found[f"{name}_imbalance_1"]) == 1
        assert 1 <= float(found[f"{name}_imbalance_8"]) <= float(found[f"{name}_imbalance_64"])


def test_a_mistake_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tree_sharing", "absent.jsonl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "path:format" in done.stderr


# ---------------------------------------------------------------- shapes


def test_lengths_give_the_published_tokens_per_trajectory():
    published = [439.1, 538.1, 1070.4, 1750.0, 1521.9, 1728.5, 1299.8, 1266.7]
    for line, tokens in zip(ultrainteract.table(), published, strict=True):
        turns = np.arange(1, len(line.turns) + 1)
        of_each = line.instruction + turns * line.action + (turns - 1) * line.observation
        assert np.average(of_each, weights=line.turns) == pytest.approx(tokens)
        assert min(line.instruction, line.action) > 0
        assert line.observation >= 0


def test_trees_come_in_published_numbers():
    """The published total of pairs is expected; 2,000 trees hold their share of it and of every depth."""
    kinds = ultrainteract._kinds("all")
    pairs = [form if isinstance(form, int) else sum(form) for _, _, form in kinds]
    weights = np.array([weight for weight, *_ in kinds])
    assert weights @ pairs == pytest.approx(219_819)
    trees = ultrainteract.trees(2000, scale=0.02)
    assert sum(len(tree.pairs) for tree in trees) == pytest.approx(
        2000 * (weights @ pairs) / weights.sum(), rel=0.02
    )
    deep = sum(w for w, _, form in kinds if not isinstance(form, int) and len(form) == 5) / weights.sum()
    assert np.mean([tree.depth == 5 for tree in trees]) == pytest.approx(deep, rel=0.02)


def test_drawing_is_deterministic():
    assert ultrainteract.reward_trees(20, seed=3, scale=0.1) == ultrainteract.reward_trees(
        20, seed=3, scale=0.1
    )
    assert ultrainteract.reward_trees(20, seed=3, scale=0.1) != ultrainteract.reward_trees(
        20, seed=4, scale=0.1
    )


@pytest.mark.parametrize("make", ["trees", "short_prompts"])
def test_rows_and_groups_are_the_same_tokens(tmp_path, make):
    """What the engine reads and tokenizes from the rows is what `group` makes."""
    from silva.engine.data.dataset import DataSet
    from silva.engine.data.text.chat import ChatTokenizer
    from silva.engine.recipe.schema import Data, Source

    trees = getattr(ultrainteract, make)(9, vocabulary=512, scale=0.05)
    path = common.write_rows(tmp_path / "rows.jsonl", ultrainteract.rows(trees))
    tokenizer = ChatTokenizer.load(
        str(ultrainteract.save_tokenizer(tmp_path / "t", 512)),
        chat_template=None,
        add_bos=None,
        append_eos=False,
    )
    source = Source(path=str(path), format="ultrainteract_pair", absolute=True)
    read = common.read([source], tokenizer, Data(train=[source]), unit="comparison", cache=tmp_path / "cache")
    assert np.array_equal(read.digests, DataSet.of(map(ultrainteract.group, trees)).digests)
