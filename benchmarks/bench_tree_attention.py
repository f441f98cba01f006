"""Measures what the block lists of tree attention cost and save (`--plan`, no GPU), and its speed on a GPU.

    python -m benchmarks.bench_tree_attention --plan [--data FOLDER_OF_MINT_TREES TOKENIZER]
    python -m benchmarks.bench_tree_attention [--tune] [--out results.json]

TFLOP/s count the products that a query and a key that it sees need, 4 D H forward and 10 D H backward (H heads of size
D), for every peer. A kernel that visits more, or unrolls trees into sequences, gets no credit for it. Nothing is timed
before the kernel's output and gradients agree with float64 on a small row. `--smoke` runs the same code on tiny rows
in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import kernel_common, ultrainteract
from benchmarks.attention_peers import PEERS, Peer, Row, missing, ours
from silva.kernels import tree_attention as kernels
from silva.kernels import tree_attention_tiles, tree_blocks
from silva.kernels.reference import tree_attention as definition
from silva.kernels.tree_attention_tiles import CANDIDATES, Problem, Tiles
from silva.kernels.tree_blocks import FULL, SKIPPED

# timed runs of a peer on a GPU
REPEATS = 30
# (length, number of tokens above it) of each run; a run with none above it begins a tree
Runs = list[tuple[int, int]]


# ---------------------------------------------------------------- rows


def row(name: str, runs: Runs, size: int) -> Row:
    """Lay out runs of tokens in a row.

    Args:
        name: the kind of row.
        runs: in depth-first order.
        size: tokens of the row; runs are cut there, and the rest is padded with tokens that see only themselves.
    """
    position = np.concatenate([np.arange(depth, depth + length) for length, depth in runs])[:size]
    position = np.concatenate([position, np.zeros(size - len(position), position.dtype)])
    end = np.empty(size, np.int32)
    open_tokens: list[int] = []
    for token, depth in enumerate(position):
        end[open_tokens[depth:]] = token
        open_tokens[depth:] = [token]
    end[open_tokens] = size
    return Row(name, torch.from_numpy(end), torch.from_numpy(position.astype(np.int32)))


def ultrainteract_trees(size: int) -> Runs:
    """Return the runs of as many synthetic UltraInteract trees with interaction as fill `size` tokens."""
    found: Runs = []
    # the mean tree has more than 2,000 tokens
    for group in ultrainteract.groups(size // 1000 + 1):
        found += zip((group.length - group.shared).tolist(), group.shared.tolist(), strict=True)
    return [run for run in found if run[0]]


def rows(size: int, mint: list[Runs]) -> list[Row]:
    """Return a row of each kind: documents, pairs, trees, MINT's trees where they are given, and one causal text."""
    random = np.random.default_rng(0)
    many = range(size // 100 + 1)
    documents = [(int(random.integers(200, 2000)), 0) for _ in many]
    pairs = [
        run
        for _ in many
        for prompt in [int(random.integers(100, 400))]
        for run in [
            (prompt, 0),
            (int(random.integers(100, 600)), prompt),
            (int(random.integers(100, 600)), prompt),
        ]
    ]
    trees = ultrainteract_trees(size)
    found = [row(n, r, size) for n, r in [("documents", documents), ("pairs", pairs), ("trees", trees)]]
    if mint:
        found.append(row("mint", [run for tree in mint for run in tree], size))
    return [*found, row("causal", [(size, 0)], size)]


def mint_trees(folder: Path, tokenizer: Path) -> list[Runs]:
    """Read trees of multi-turn trajectories over one prompt, merged token by token."""
    import sentencepiece

    encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode
    trees = []
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rt") as lines:
            for line in [line for _, line in zip(range(40), lines, strict=False)]:
                task = json.loads(line)
                texts = [
                    task["prompt"] + "".join(turn["content"] for turn in one["turns"])
                    for one in task["trajectories"]
                ]
                trees.append(merged(sorted(encode(texts))))
    return trees


def merged(sequences: list[list[int]]) -> Runs:
    """Merge sorted sequences into the runs of one tree.

    In sorted order, what a sequence shares with any sequence before it, it also shares with the one just before it.
    """
    runs: Runs = []
    before: list[int] = []
    for sequence in sequences:
        same = [a == b for a, b in zip(before, sequence, strict=False)]
        shared = same.index(False) if False in same else len(same)
        if shared < len(sequence):
            runs.append((len(sequence) - shared, shared))
        before = sequence
    return runs


# ---------------------------------------------------------------- plan


def plan(options: argparse.Namespace, mint: list[Runs]) -> dict[str, Any]:
    """Compare the tiles visited with the tiles that hold a visible pair, which are counted from the mask itself.

    Returns:
        The largest of each ratio.
    """
    worst: dict[str, float] = {}
    print(
        f"{'row':28}{'kernel':16}{'tile':>8}{'visited/needed':>16}{'visited area/true':>19}{'full':>7}{'KiB':>8}"
    )
    for group in (1, options.heads // options.kv_heads):
        what = Problem("sm_90", options.size, "bfloat16", group)
        for size in options.sizes:
            for packed in rows(size, mint):
                blocks = tree_blocks.tree_blocks(packed.end, kernels.tile_shapes(what))
                for field, shape in zip(Tiles._fields, kernels.tile_shapes(what), strict=True):
                    kind = tree_blocks.classify(blocks, shape)
                    visited, needed = int((kind != SKIPPED).sum()), needed_tiles(packed.end, shape)
                    full = int((kind == FULL).sum()) / visited
                    area = visited * shape.queries * shape.keys / packed.area
                    kib = sum(x.numel() * x.element_size() for x in blocks.lists[shape]) / 1024
                    name = f"{packed.name} {size} group {group}"
                    tile = f"{shape.queries}x{shape.keys}"
                    print(
                        f"{name:28}{field:16}{tile:>8}{visited / needed:16.3f}{area:19.3f}{full:7.2f}{kib:8.0f}"
                    )
                    for key, value in [
                        ("visited_over_needed", visited / needed),
                        (f"area_{packed.name}", area),
                    ]:
                        worst[key] = max(worst.get(key, 0.0), value)
    return {key: round(value, 4) for key, value in worst.items()}


def needed_tiles(end: Tensor, shape: tree_blocks.TileShape) -> int:
    """Count the tiles that hold a visible pair."""
    j = torch.arange(len(end))
    width = -(-len(end) // shape.keys) * shape.keys
    count = 0
    for first in range(0, len(end), shape.queries):
        i = j[first : first + shape.queries, None]
        sees = ((j <= i) & (i < end)).any(0)
        count += int(torch.nn.functional.pad(sees, (0, width - len(end))).view(-1, shape.keys).any(1).sum())
    return count


# ---------------------------------------------------------------- speed


def check(options: argparse.Namespace, size: int) -> float:
    """Return the largest error of output and gradients, divided by that of torch in the same dtype.

    Both errors are against float64.

    Raises:
        SystemExit: the error is more than twice that of torch.
    """
    packed = rows(size, [])[2]
    end = packed.end.to(options.device)
    q, k, v, grad = tensors(options, size)
    results = []
    for attend, dtype in [
        (kernels.tree_attention, q.dtype),
        (definition, q.dtype),
        (definition, torch.float64),
    ]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, end)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    ratios = [
        float(((found.double() - true).norm() / (same.double() - true).norm()).detach())
        for found, same, true in zip(*results, strict=True)
    ]
    if max(ratios) > 2:
        raise SystemExit(f"tree attention is wrong: {max(ratios):.1f} times torch's error")
    return max(ratios)


def tensors(options: argparse.Namespace, size: int) -> list[Tensor]:
    """Draw queries, keys, values and the gradient of the output, each (size, heads, head size) bfloat16."""
    generator = torch.Generator(options.device).manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    make = {"generator": generator, "device": options.device, "dtype": torch.bfloat16}
    return [torch.randn(size, count, options.size, **make) for count in heads]


class Truth:
    """Holds Silva's output and gradients of one row, with which peers must agree.

    `check` has validated Silva's kernel on a small row.
    """

    # the results of both are in bfloat16, and each is some 5e-3 from float64 in this norm
    CLOSE = 2e-2

    def __init__(self, packed: Row, leaves: list[Tensor], grad: Tensor) -> None:
        self.leaves, self.grad = leaves, grad
        out = ours(packed, *leaves[:2]).attend(*leaves)
        self.results = [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def compare(self, peer: Peer, *, backward: bool) -> float:
        """Return the largest relative difference, in the norm, of a peer's output and gradients.

        Raises:
            SystemExit: the difference is more than rounding.
        """
        found, grad = [x.detach() for x in self.leaves], self.grad
        if peer.index is not None:
            # where a token is in several sequences, only the first of them gets the gradient
            order = torch.sort(peer.index, stable=True)
            first = torch.ones_like(peer.index, dtype=torch.bool)
            first[order.indices[1:]] = order.values[1:] != order.values[:-1]
            grad = grad[peer.index] * first[:, None, None]
            found = [x[peer.index] for x in found]
        found = [x.requires_grad_(backward) for x in found]
        out = peer.attend(*found)
        results = [out.detach(), *(torch.autograd.grad(out, found, grad) if backward else ())]
        expected = [x.double() for x in self.results[: len(results)]]
        results = [x.double() for x in results]
        if peer.index is not None:
            expected[0] = expected[0][peer.index]
            results[1:] = [torch.zeros_like(e).index_add(0, peer.index, x)
                           for e, x in zip(expected[1:], results[1:], strict=True)]  # fmt: skip
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True))
        if not worst < self.CLOSE:
            raise SystemExit(f"another result than Silva's: {worst:.2g} apart")
        return worst


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call in milliseconds."""
    return kernel_common.milliseconds({"": call}, REPEATS if torch.cuda.is_available() else 1)[""]


def measure(
    options: argparse.Namespace, packed: Row, name: str, peer: Peer, leaves: list[Tensor], grad: Tensor
) -> dict[str, Any]:
    """Measure the times of one peer on one row, forward and backward."""
    flops = 4 * options.size * options.heads * packed.area
    # on a CPU FlexAttention has no backward pass, and its forward pass says so
    backward = not (name == "flex" and not grad.is_cuda)
    index = slice(None) if peer.index is None else peer.index
    leaves, grad = [x.detach()[index].requires_grad_(backward) for x in leaves], grad[index]
    found = {"row": packed.name, "tokens": len(packed.end), "who": name}
    found["forward_ms"] = milliseconds(lambda: peer.attend(*leaves))
    found["forward_tflops"] = flops / found["forward_ms"] / 1e9
    if backward:
        out = peer.attend(*leaves)
        found["backward_ms"] = milliseconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
        found["backward_tflops"] = 2.5 * flops / found["backward_ms"] / 1e9
    if name == "silva":
        end, group = packed.end.to(grad.device), options.heads // options.kv_heads
        found["lists_ms"] = milliseconds(
            lambda: kernels.attention_blocks(end, group=group, size=options.size, dtype=grad.dtype)
        )
    return found


def show(found: dict[str, Any]) -> None:
    """Print one measured row."""
    words = (f"{n}={v:.4g}" if isinstance(v, float) else f"{v!s:>15}" for n, v in found.items())
    print(" ".join(words), flush=True)


def compared(
    options: argparse.Namespace, packed: Row, name: str, truth: Truth, leaves: list[Tensor], grad: Tensor
) -> dict[str, Any]:
    """Measure one peer after checking its result.

    Raises:
        SystemExit: its result differs from Silva's.
    """
    peer = PEERS[name].make(packed, leaves[0], leaves[1])
    backward = grad.is_cuda or name != "flex"
    apart = {} if name == "silva" else {"apart": truth.compare(peer, backward=backward)}
    return measure(options, packed, name, peer, leaves, grad) | apart


def speed(options: argparse.Namespace, mint: list[Runs]) -> list[dict[str, Any]]:
    """Measure every peer on every row that it can compute."""
    results = []
    for size in options.sizes:
        *leaves, grad = tensors(options, size)
        leaves = [x.requires_grad_() for x in leaves]
        for packed in rows(size, mint):
            truth = Truth(packed, leaves, grad)
            for name, kind in PEERS.items():
                if packed.name in kind.rows and not missing(name, options.device):
                    results.append(compared(options, packed, name, truth, leaves, grad))
                    show(results[-1])
    return results


def tune(options: argparse.Namespace) -> None:
    """Find the fastest candidate of each kernel on trees, and write it where the kernels look for it."""
    from triton.runtime.errors import OutOfResources

    packed = rows(options.sizes[-1], [])[2]
    *leaves, grad = tensors(options, len(packed.end))
    leaves = [x.requires_grad_() for x in leaves]
    what = tree_attention_tiles.problem(
        grad.device, options.size, grad.dtype, options.heads // options.kv_heads
    )
    best = tree_attention_tiles.tiles(what)
    for field in Tiles._fields:
        timed = []
        for tile in CANDIDATES[field]:
            tree_attention_tiles.tuned()[what.key] = best._replace(**{field: tile})
            try:
                attend = ours(packed, *leaves[:2])
                found = measure(options, packed, "tuning", attend, leaves, grad)
                show(found)
            except OutOfResources:
                continue
            timed.append((found["forward_ms" if field == "forward" else "backward_ms"], tile))
        best = best._replace(**{field: min(timed)[1]})
    tree_attention_tiles.tuned()[what.key] = best
    tree_attention_tiles.save_tuned()


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line and fill in what it leaves open."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="tile counts only; no GPU needed")
    parser.add_argument("--smoke", action="store_true", help="tiny rows, to see that everything runs")
    parser.add_argument("--tune", action="store_true", help="first find and keep the fastest tiles")
    parser.add_argument("--sizes", type=int, nargs="+", help="row lengths")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--data", type=Path, nargs=2, metavar=("MINT", "TOKENIZER"))
    parser.add_argument("--out", type=Path, help="write results here as JSON")
    options = parser.parse_args(arguments)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.smoke:
        options.heads, options.kv_heads, options.size = 2, 1, 16
    options.sizes = options.sizes or (
        [96] if options.smoke else [4096] if options.plan else [4096, 8192, 16384, 32768]
    )
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = settings(arguments)
    mint = mint_trees(*options.data) if options.data else []
    if options.plan:
        figures: dict[str, Any] = plan(options, mint)
        results: list[dict[str, Any]] = []
    else:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        print(f"{name}, torch {torch.__version__}, python {platform.python_version()}")
        figures = {"error_over_torch": round(check(options, 96 if options.smoke else 2048), 3)}
        if options.tune:
            tune(options)
        for peer in PEERS:
            if why := missing(peer, options.device):
                print(f"missing: {peer}: {why}")
        results = speed(options, mint)
        for found in results:
            if found["who"] == "silva":
                key = f"{found['row']}_{found['tokens']}"
                figures |= {f"{key}_forward_tflops": round(found["forward_tflops"], 4)}
                figures |= {f"{key}_backward_tflops": round(found["backward_tflops"], 4)}
    if options.out:
        options.out.write_text(json.dumps({"figures": figures, "results": results}, indent=1) + "\n")
    print(" ".join(f"{key}={value}" for key, value in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
