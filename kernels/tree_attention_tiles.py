"""Chooses tile shapes for the tree attention kernels: from the shipped table, or what tuning found on this machine.

The table holds shapes whose sm_90 binaries spill no register under Triton 3.6 and 3.9 (float32 with 256 columns does);
`silva.kernels.aot` checks it for the masks and groups of heads it names. Nothing is timed unless a user asks for it:
`benchmarks/bench_tree_attention.py --tune` times tiles, and writes the best ones to a file that later processes read.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from silva.kernels.dispatch import INTERPRETED

# heads in one tile: more would make lists long, because a tile then spans few tokens
MAX_PACK = 8


class Tile(NamedTuple):
    """Holds the tile of one kernel, and how the kernel is compiled for it.

    Attributes:
        rows: query tokens times packed heads.
        keys: of the tile.
        warps: of a program.
        stages: of the software pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Holds the tile of each of the three kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


class Problem(NamedTuple):
    """Holds what tiles are chosen by.

    Attributes:
        architecture: such as "sm_90"; "interpreter", or "other" where nothing is known.
        columns: head size, rounded up to a power of two.
        dtype: "bfloat16", "float16" or "float32".
        group: query heads per key head.
    """

    architecture: str
    columns: int
    dtype: str
    group: int

    @property
    def pack(self) -> int:
        """Return how many heads share a tile: the largest power of two that divides the group, up to `MAX_PACK`."""
        return min(self.group & -self.group, MAX_PACK)

    @property
    def descriptors(self) -> bool:
        """Tell whether the kernels' loops read through tensor descriptors: elsewhere they would not be pipelined."""
        return self.architecture in ("sm_90", "sm_100", "interpreter")

    @property
    def key(self) -> str:
        """Return the problem's name in the file of tuned tiles."""
        return " ".join(map(str, self))


def problem(device: torch.device, size: int, dtype: torch.dtype, group: int) -> Problem:
    """Return the problem that tiles are chosen by.

    Args:
        device: that the kernels run on.
        size: of a head.
        dtype: of the queries.
        group: query heads per key head.
    """
    columns = 1 << (size - 1).bit_length()
    return Problem(_architecture(device), columns, str(dtype).removeprefix("torch."), group)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip:
        return "interpreter" if INTERPRETED and device.type == "cpu" else "other"
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}.get(
        torch.cuda.get_device_capability(device), "other"
    )


# (architecture, columns, bytes of an element) -> tiles; a missing architecture is "other"
SHIPPED: dict[tuple[str, int, int], Tiles] = {
    ("sm_90", 64, 2): Tiles(Tile(64, 128, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    ("sm_90", 128, 2): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("sm_90", 256, 2): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 8, 2)),
    ("sm_80", 64, 2): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("sm_80", 128, 2): Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 3), Tile(64, 64, 8, 2)),
    ("sm_80", 256, 2): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("sm_100", 64, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm_100", 128, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    # these fit into 99 KiB of shared memory
    ("other", 64, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("other", 128, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
    ("other", 256, 2): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("other", 64, 4): Tiles(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 8, 1)),
    ("other", 128, 4): Tiles(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 8, 1)),
    # this one spills on sm_90, as did all others that were tried
    ("other", 256, 4): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
}
INTERPRETER_TILES = Tiles(Tile(64, 32, 4, 1), Tile(64, 16, 4, 1), Tile(32, 32, 4, 1))


# tuning tries these, and leaves out candidates that need more shared memory than there is
CANDIDATES = {
    "forward": [
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 3),
        Tile(64, 128, 4, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 2),
    ],
    "query_gradient": [Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(128, 64, 8, 2)],
    "key_gradient": [Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)],
}


def tiles(what: Problem) -> Tiles:
    """Return the tiles of each kernel for a problem: this machine's best where it was tuned, else the shipped ones."""
    if what.architecture == "interpreter":
        return INTERPRETER_TILES
    return tuned().get(what.key) or shipped_tiles(what)


def shipped_tiles(what: Problem) -> Tiles:
    """Return the tiles of the shipped table for a problem."""
    shape = max(what.columns, 64), 4 if what.dtype == "float32" else 2
    return SHIPPED.get((what.architecture, *shape)) or SHIPPED["other", *shape]


def tuning_file() -> Path:
    """Return the path of the file that tuning writes."""
    cache = (
        os.environ.get("SILVA_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "silva"
    )
    return Path(cache) / "tree_attention_tiles.json"


@functools.cache
def tuned() -> dict[str, Tiles]:
    """Read the file that tuning writes: `Problem.key` -> tiles; empty where there is none."""
    if not tuning_file().is_file():
        return {}
    found = json.loads(tuning_file().read_text())
    return {key: Tiles(*(Tile(*numbers) for numbers in rows)) for key, rows in found.items()}


def save_tuned() -> None:
    """Write `tuned()`, which tuning changes in place, to the file."""
    tuning_file().parent.mkdir(parents=True, exist_ok=True)
    temporary = tuning_file().with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(tuned(), indent=1))
    temporary.replace(tuning_file())
