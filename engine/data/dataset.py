"""Holds the trees a run trains on: a view of tokenized shards, mixed from sources and split by instruction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from silva.engine.data import pipeline, store
from silva.engine.data.encoding import Encoder, Unit
from silva.engine.data.reading.formats import FORMATS, Score
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.text.decontaminate import Decontaminator
from silva.engine.data.trees.group import TokenGroup
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Data, Source

Numbers = NDArray[np.int64]


class DataSet:
    """Holds trees in reading order, and decodes a tree when it is asked for.

    Sequences and comparisons are numbered through over all trees.

    Args:
        shards: where the trees lie.
        trees: (len,) int64, the numbers of the trees over all shards; None takes all.
        copies: (len,) int64, how often an epoch takes each tree; None takes each once.

    Attributes:
        trees: (len,) int64, the numbers of the trees over all shards.
        copies: (len,) int64, how often an epoch takes each tree.
        sequences: total over the trees, each tree counted once.
        comparisons: total over the trees, each tree counted once.
        tokens: (len,) int64, tokens of each merged tree.
        fingerprint: hex digest of every token, scored flag and comparison, and of how often each tree is taken.
    """

    def __init__(
        self, shards: Sequence[store.Shard], trees: Numbers | None = None, copies: Numbers | None = None
    ) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self.trees: Numbers = np.arange(self._starts[-1]) if trees is None else trees
        self.copies: Numbers = np.ones(len(self.trees), np.int64) if copies is None else copies
        self._counts: dict[Unit, Numbers] = {
            "sequence": self._gather([s.sequences for s in self._shards]),
            "comparison": self._gather([s.comparisons for s in self._shards]),
        }
        self.tokens = self._gather([s.tokens for s in self._shards])
        self.sequences, self.comparisons = (int(counts.sum()) for counts in self._counts.values())
        self._first = {unit: np.cumsum(counts) - counts for unit, counts in self._counts.items()}
        digest = hashlib.blake2b(self.digests.tobytes() + self.copies.tobytes(), digest_size=16)
        self.fingerprint = digest.hexdigest()

    @classmethod
    def of(cls, groups: Iterable[TokenGroup]) -> DataSet:
        """Return a data set that is held in memory."""
        return cls([store.Shard(store.to_batch(list(groups)))])

    @classmethod
    def joined(cls, parts: Sequence[DataSet]) -> DataSet:
        """Return a data set of all trees of the parts, one part after the other."""
        starts = np.cumsum([0, *(part._starts[-1] for part in parts)])
        return cls(
            [shard for part in parts for shard in part._shards],
            np.concatenate([part.trees + start for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.copies for part in parts]),
        )

    def __len__(self) -> int:
        """Return the number of different trees."""
        return len(self.trees)

    def group(self, k: int) -> TokenGroup:
        """Return tree `k`, with the numbers of its first sequence and comparison in this data set."""
        number = int(self.trees[k])
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        found = self._shards[shard][number - int(self._starts[shard])]
        found.first_sequence = int(self._first["sequence"][k])
        found.first_comparison = int(self._first["comparison"][k])
        return found

    def units(self, unit: Unit) -> Numbers:
        """Return the number of sequences or comparisons of each tree, (len,) int64."""
        return self._counts[unit]

    def order(self, epoch: int, *, shuffle: bool, seed: int) -> Numbers:
        """Return the trees of one epoch in the order of training.

        Args:
            epoch: counts from 0; every epoch takes each tree as often as its copies say.
            shuffle: whether the order is drawn, anew for each epoch.
            seed: of the draw.

        Returns:
            (sum of copies,) int64, indices of trees.
        """
        taken = np.repeat(np.arange(len(self)), self.copies)
        return np.random.default_rng([seed, 0, epoch]).permutation(taken) if shuffle else taken

    @property
    def longest(self) -> int:
        """Return the tokens of the longest path; 0 without trees."""
        return int(self._gather([s.longest for s in self._shards]).max(initial=0))

    @property
    def sides(self) -> tuple[int, int]:
        """Return how many chosen and how many rejected sides the comparisons have, each tree counted once."""
        chosen, rejected = (
            int(self._gather([s.sides[:, side] for s in self._shards]).sum()) for side in (0, 1)
        )
        return chosen, rejected

    @property
    def instructions(self) -> NDArray[np.uint8]:
        """Return the digests of the first user messages, (len, 16) uint8."""
        return self._gather([s.instruction for s in self._shards])

    @property
    def digests(self) -> NDArray[np.uint8]:
        """Return the digests of the trees, (len, 16) uint8."""
        return self._gather([s.digest for s in self._shards])

    def where(self, chosen: NDArray[np.bool_] | Numbers) -> DataSet:
        """Return a data set of the chosen trees, which are named by a mask (len,) or by rising indices."""
        return DataSet(self._shards, self.trees[chosen], self.copies[chosen])

    def with_copies(self, copies: Numbers) -> DataSet:
        """Return a data set that takes each tree `copies` (len,) times an epoch; trees with 0 copies are left out."""
        some = copies > 0
        return DataSet(self._shards, self.trees[some], copies[some])

    def _gather(self, parts: list[NDArray]) -> NDArray:
        return np.concatenate(parts)[self.trees] if parts else np.zeros(0, np.int64)


def prepare(
    sources: Sequence[Source],
    tokenizer: ChatTokenizer,
    settings: Data,
    *,
    unit: Unit,
    rewards: bool = False,
    cache: Path,
    seed: int,
    say: pipeline.Say | None = None,
) -> tuple[DataSet, list[Path]]:
    """Mix all sources, which are tokenized now or found in the cache.

    Args:
        sources: what is mixed, in this order.
        tokenizer: turns conversations into tokens.
        settings: the recipe's rules on length, bad rows, scoring and decontamination.
        unit: "sequence" for SFT, "comparison" for everything else.
        rewards: whether conversations get rewards, read at their ends, and no message is scored.
        cache: where tokenized sources are kept.
        seed: of the draw, where a source gives only part of its trees.
        say: told of every source that has to be tokenized.

    Returns:
        The mixture, and the folder of shards of each source.

    Raises:
        UserError: unreadable or malformed data, a conversation that does not fit under `too_long: refuse`, a source
            that holds less than its `count`, or nothing left to train on.
    """
    decontaminator = Decontaminator(settings.decontaminate) if settings.decontaminate else None
    folders = []
    for source in sources:
        encoder = Encoder(tokenizer, settings, unit, None if rewards else scored(settings, source, unit))
        task = pipeline.SourceTask(source, encoder, decontaminator)
        folders.append(pipeline.build(task, cache, workers=settings.workers, say=say))
    return mixture(sources, folders, unit=unit, seed=seed), folders


def scored(settings: Data, source: Source, unit: Unit) -> Score:
    """Return which messages of a source are scored."""
    return FORMATS[source.format].auto(unit) if settings.score == "auto" else settings.score


def mixture(sources: Sequence[Source], folders: Sequence[Path], *, unit: Unit, seed: int) -> DataSet:
    """Mix the trees of finished folders, of each source as many as its `count` or `weight` says.

    Args:
        sources: what is mixed, in this order.
        folders: of shards, one for each source; see `pipeline.build`.
        unit: what `count` and `weight` count.
        seed: of the draw, where a source gives only part of its trees.

    Raises:
        UserError: a source that holds less than its `count`, or nothing left to train on.
    """
    parts = [DataSet(pipeline.shards(folder)) for folder in folders]
    if not any(map(len, parts)):
        left_out = Report()
        for folder in folders:
            left_out.merge(pipeline.report(folder))
        names, why = ", ".join(source.path for source in sources), "; ".join(left_out.lines())
        raise UserError(f"{names}: no {unit}s left to train on ({why})")
    return DataSet.joined(
        [_share(part, source, unit, seed) for part, source in zip(parts, sources, strict=True)]
    )


def _share(data: DataSet, source: Source, unit: Unit, seed: int) -> DataSet:
    """Take an epoch's part of a source: whole trees, until `count` or `weight` times its units are reached.

    Which trees a fraction takes depends on their instructions and the seed alone.
    """
    units = data.units(unit)
    total = int(units.sum())
    if source.count is None and source.weight == 1:
        return data
    if source.count is not None and source.count > total:
        raise UserError(
            f"data source {source.path}: count is {source.count}, but it gives {total} {unit}s; "
            "lower it, or take it several times with weight"
        )
    whole, wanted = (0, source.count) if source.count else divmod(round(source.weight * total), max(1, total))
    places = _places(data.instructions, b"draw %d" % seed)
    order = np.lexsort((np.arange(len(data)), places))
    before = np.cumsum(units[order]) - units[order]
    copies = np.full(len(data), whole)
    copies[order[before < wanted]] += 1
    return data.with_copies(copies)


def hold_out(data: DataSet, fraction: float, seed: int) -> tuple[DataSet, DataSet]:
    """Split trees into a training part and a held-out part, so that no instruction is in both.

    An instruction's side depends only on the instruction itself and the seed, so SFT and preference stages that keep
    different rows of one data set hold out the same instructions. The held-out share is therefore about, not exactly,
    `fraction`.

    Args:
        data: what is split.
        fraction: share of the instructions to hold out.
        seed: of the draw.

    Returns:
        (train, held out); the held-out trees are taken once each.

    Raises:
        UserError: nothing is left on one side.
    """
    held = _places(data.instructions, b"%d" % seed) < fraction
    if not held.any() or held.all():
        raise UserError(
            f"data.validation_fraction: {fraction} of {len(data)} instruction(s) leaves nothing "
            f"{'to train on' if held.all() else 'to hold out'}; give more data or another fraction"
        )
    rest, out = data.where(~held), data.where(held)
    # a held-out tree is evaluated once, however often an epoch of its source would take it
    return rest, out.with_copies(np.ones(len(out), np.int64))


def _places(instructions: NDArray[np.uint8], key: bytes) -> NDArray[np.float64]:
    """Compute (n,) numbers in [0, 1), one per instruction, as good as random and the same in every run."""
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in instructions)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
