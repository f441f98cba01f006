"""Property 1: packed trees give the loss and the gradient of the unrolled sequences, float64, to 1e-9.

However the trees are cut, packed into rows, spread over ranks and put in order.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups, optimizer

import numpy as np
import pytest
import tiny
import torch
from worlds import world

from benchmarks import random_models, ultrainteract
from silva.engine.data.dataset import DataSet
from silva.engine.data.loader import BatchLoader
from silva.engine.data.reading.messages import Message
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.trees.balance import CostModel
from silva.engine.data.trees.group import TokenGroup, TokenSequence
from silva.engine.data.trees.packing import Piece, TreeBatch, pack_row
from silva.engine.data.trees.tree import merge
from silva.engine.model import gpt, hf
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Objective, Parallel, Training
from silva.engine.training.step import Step, StepSettings

OBJECTIVE_NAMES = ["sft", "dpo", "ipo", "nca", "kto", "simpo", "bt", "bt_dr"]
Tree = tuple[list[TokenSequence], list[tuple[int, int]]]


def packed(trees: list[Tree]) -> TreeBatch:
    """The trees as the engine trains on them."""
    pieces = [
        Piece(
            random_models.merge_in_order(s),
            np.arange(len(s)),
            np.array(c, np.int32),
            np.arange(len(c)) % 2 == 0,
        )
        for s, c in trees
    ]
    return pack_row(pieces, multiple=8, pad_id=0)


def unrolled(trees: list[Tree]) -> TreeBatch:
    """Every sequence a document of its own, nothing shared."""
    none = np.zeros((0, 2), np.int32), np.zeros(0, bool)
    alone = [merge(TokenGroup.of([one])) for sequences, _ in trees for one in sequences]
    pieces = [Piece(tree, np.arange(1), *none) for tree in alone]
    row = pack_row(pieces, multiple=8, pad_id=0)
    starts = np.cumsum([0, *(len(s) for s, _ in trees)])
    pairs = [
        (c + start, r + start)
        for (_, compared), start in zip(trees, starts, strict=False)
        for c, r in compared
    ]
    row.comparisons = torch.tensor(pairs, dtype=torch.int32)
    row.absolute = torch.tensor([i % 2 == 0 for _, compared in trees for i in range(len(compared))])
    return row


def loss_and_gradient(model: Path, rows: list[TreeBatch], name: str) -> tuple[float, list[torch.Tensor]]:
    """Sum and gradient of a step that consists of these rows."""
    objective, settings = OBJECTIVES[name], Objective(name=name)
    layout = Parallel(distributed_optimizer=False)
    shape = hf.read_shape(model)
    bare = gpt.build(shape, layout, head=objective.head, dtype=torch.float64)
    hf.load(bare, model, shape)
    chunks = optimizer.wrap(bare, layout)
    made = optimizer.build(chunks, Training(global_batch=1, learning_rate=1.0), layout)
    step = Step(chunks, made, objective, StepSettings(settings, multiple=8, pad_id=0))
    count = sum(int(row.scored.sum()) if name == "sft" else len(row.comparisons) for row in rows)
    step.clear_gradients()
    sums = step.pass_over(rows, count, kl=torch.tensor(0.3), training=True)
    return float(sums[0]), [p.main_grad.clone() for p in chunks[0].parameters()]


def compare(model: Path, trees: list[Tree], names: list[str]) -> list[tuple[str, float, float]]:
    """(objective, relative difference of the loss, of the gradient), packed against unrolled."""
    groups.initialize(Parallel())
    rows = packed(trees), unrolled(trees)
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        generator.manual_seed(0)
        # a reference near the policy's own scale, so that no objective is saturated
        row.reference_logprob = -row.scored * 5.0 + torch.randn(len(row.last), generator=generator)
    found = []
    for name in names:
        one, other = (loss_and_gradient(model, [row], name) for row in rows)
        found.append((name, *apart(one, other)))
    return found


def apart(
    one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]
) -> tuple[float, float]:
    """Relative differences of losses and of gradients."""
    difference = torch.stack([(x - y).norm() for x, y in zip(one[1], other[1], strict=True)]).norm()
    size = torch.stack([gradient.norm() for gradient in other[1]]).norm()
    return abs(one[0] - other[0]) / abs(other[0]), float(difference / size)


def check(model: Path, trees: list[Tree], names: list[str] = OBJECTIVE_NAMES) -> None:
    assert len(packed(trees).tokens) < len(unrolled(trees).tokens)  # something is shared
    for name, loss, gradient in world(1, compare, model, trees, names)[0]:
        assert loss < 1e-9, name
        assert gradient < 1e-9, name


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.mark.parametrize("seed", range(3))
def test_random_trees(model, seed):
    """Random branching, shared first tokens of responses, scored history, equal sequences, one-token responses."""
    random = np.random.default_rng(seed)
    trees: list[Tree] = []
    for _ in range(random.integers(2, 5)):
        sequences: list[TokenSequence] = []
        for _ in range(random.integers(2, 7)):
            tokens, scored = random.integers(0, 300, random.integers(2, 40)), np.zeros(0, bool)
            if sequences:  # branch off an earlier sequence at a random depth
                stem = sequences[random.integers(len(sequences))].tokens
                tokens = np.concatenate([stem[: random.integers(1, len(stem) + 1)], tokens[1:]])
            scored = random.random(len(tokens)) < 0.6
            scored[0], scored[-1] = False, len(tokens) > 1
            sequences.append(TokenSequence(tokens.astype(np.int32), scored))
        sequences.append(sequences[0])
        pairs = [tuple(random.permutation(len(sequences))[:2].tolist()) for _ in range(4)]
        trees.append((sequences, pairs))
    check(model, trees)


def tokenizer(model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(str(model), chat_template=None, add_bos=None, append_eos=True)


def conversations(model: Path, texts: list[list[str]], most: int = 600) -> list[TokenSequence]:
    """Alternating user and assistant texts, tokenized, cut to `most` tokens from the right."""
    roles = ["user", "assistant"]
    made = []
    for text in texts:
        messages = [Message(roles[i % 2], part) for i, part in enumerate(text)]
        [sequence] = tokenizer(model).encode(messages, score="all").paths
        made.append(TokenSequence(sequence.tokens[:most], sequence.scored[:most]))
    return made


def lines(file: Path, count: int) -> list[dict]:
    with gzip.open(file, "rt") as source:
        return [json.loads(line) for _, line in zip(range(count), source, strict=False)]


def test_gsm8k_solutions(model, inputs):
    trees: list[Tree] = []
    for row in lines(inputs / "gsm8k" / "example_model_solutions.jsonl.gz", 3):
        texts = [value["solution"] for value in row.values() if isinstance(value, dict)]
        trees.append((conversations(model, [[row["question"], t] for t in texts]), [(0, 1), (2, 3), (0, 3)]))
    check(model, trees, ["dpo", "kto", "bt_dr"])


def test_mint_trajectories(model, inputs):
    trees: list[Tree] = []
    for row in lines(inputs / "mint_trees" / "mint_gsm8k_open15.jsonl.gz", 1):
        texts = []
        for trajectory in row["trajectories"][:5]:
            turns = [turn["content"] for turn in trajectory["turns"] if turn["content"].strip()]
            # the prompt's own examples are long: its end is enough of a shared stem
            texts.append([row["prompt"][-700:], *turns[: len(turns) - 1 + len(turns) % 2]])
        trees.append((conversations(model, texts, most=900), [(0, 1), (2, 3), (4, 1)]))
    check(model, trees, ["sft", "nca", "bt_dr"])


def test_game_of_24(model, inputs):
    trees: list[Tree] = []
    for row in lines(inputs / "tot_game24" / "trees.jsonl.gz", 2):
        nodes = {node["id"]: node for node in row["nodes"]}
        leaves = [n for n in nodes.values() if n["parent"] is not None and n.get("correct") is not None][:8]
        leaves = leaves or [n for n in nodes.values() if n["depth"] == 3][:8]
        texts = [[row["input"], leaf["text"] or "-"] for leaf in leaves]
        trees.append((conversations(model, texts), [(0, 1), (2, 3)]))
    check(model, trees, ["ipo", "nca", "bt"])


def step_rows(data: DataSet, reference: np.ndarray, name: str, **layout: Any) -> list[TreeBatch]:
    """The rows of all ranks of one step, one behind the other, the last micro-batches first."""
    settings = {"unit": "sequence" if name == "sft" else "comparison", "global_batch": 9, "shuffle": True}
    cost = CostModel(token=40.0, pair=1.0)
    rows = []
    for rank in range(layout.get("ranks", 1)):
        rows += BatchLoader(data, rank=rank, cost=cost, **settings, **layout)[1].rows
    return [pack_row(row, multiple=8, pad_id=0, reference_logprob=reference) for row in reversed(rows)]


LAYOUTS = [
    {"ranks": 1, "row_length": 190},  # trees cut to fit their rows
    {"ranks": 4, "row_length": 2000},  # several rows a rank
    {
        "ranks": 12,
        "row_length": 2000,
        "multiple": 2,
    },  # more ranks than trees: cut so that none waits; empty rows
]


def compare_layouts(model: Path, names: list[str]) -> list[tuple[str, float, float, int]]:
    """As `compare`, each layout against one row with the whole step; and the tokens of the layout's rows."""
    groups.initialize(Parallel())
    data = DataSet.of(ultrainteract.groups(12, seed=2, vocabulary=300, scale=0.05))
    lengths = np.concatenate([data.group(k).scored for k in range(len(data))])
    reference = (-5.0 * lengths + np.random.default_rng(0).standard_normal(len(lengths))).astype(np.float32)
    found = []
    for name in names:
        whole = step_rows(data, reference, name, row_length=100_000)
        assert len(whole) == 1
        expected = loss_and_gradient(model, whole, name)
        for layout in LAYOUTS:
            rows = step_rows(data, reference, name, **layout)
            step = loss_and_gradient(model, rows, name)
            found.append((name, *apart(step, expected), sum(len(row.tokens) for row in rows)))
    return found


def test_cuts_rows_and_ranks_change_nothing(model):
    names = ["sft", "dpo", "kto", "bt_dr"]
    found = world(1, compare_layouts, model, names)[0]
    assert len(found) == len(names) * len(LAYOUTS)
    for name, loss, gradient, _ in found:
        assert loss < 1e-9, name
        assert gradient < 1e-9, name
    assert len({tokens for name, _, _, tokens in found if name == "dpo"}) == len(LAYOUTS)
