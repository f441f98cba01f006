"""The trees a run trains on: a view of tokenized shards, mixed from sources, split by instruction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from silva.engine.data import pipeline, store
from silva.engine.data.encoding import Encoder, Unit
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.text.decontaminate import Decontaminator
from silva.engine.data.trees.group import TokenGroup
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Data, Source

Numbers = NDArray[np.int64]


class DataSet:
    """Trees in reading order, their sequences and comparisons numbered through; decoded when asked for.

    Attributes:
        sequences, comparisons: totals over the trees, each counted once.
        tokens: (len,) tokens of each merged tree.
        fingerprint: hex digest of every token, scored flag and comparison, and how often each tree is taken.
    """

    def __init__(
        self, shards: Sequence[store.Shard], trees: Numbers | None = None, copies: Numbers | None = None
    ) -> None:
        """
        Args:
            shards: where the trees lie.
            trees: (len,) their numbers over all shards; None: all.
            copies: (len,) how often an epoch takes each; None: once.
        """
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
        """A data set held in memory."""
        return cls([store.Shard(store.to_batch(list(groups)))])

    @classmethod
    def joined(cls, parts: Sequence[DataSet]) -> DataSet:
        """All trees of the parts, one part behind the other."""
        starts = np.cumsum([0, *(part._starts[-1] for part in parts)])
        return cls(
            [shard for part in parts for shard in part._shards],
            np.concatenate([part.trees + start for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.copies for part in parts]),
        )

    def __len__(self) -> int:
        """Number of different trees."""
        return len(self.trees)

    def group(self, k: int) -> TokenGroup:
        """Tree `k` with its numbers in this data set."""
        number = int(self.trees[k])
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        found = self._shards[shard][number - int(self._starts[shard])]
        found.first_sequence = int(self._first["sequence"][k])
        found.first_comparison = int(self._first["comparison"][k])
        return found

    def units(self, unit: Unit) -> Numbers:
        """(len,) sequences or comparisons of each tree."""
        return self._counts[unit]

    def order(self, epoch: int, *, shuffle: bool, seed: int) -> Numbers:
        """The trees of one epoch; as many of each as its copies, whatever the epoch."""
        taken = np.repeat(np.arange(len(self)), self.copies)
        return np.random.default_rng([seed, 0, epoch]).permutation(taken) if shuffle else taken

    @property
    def instructions(self) -> NDArray[np.uint8]:
        """(len, 16) digests of the first user messages."""
        return self._gather([s.instruction for s in self._shards])

    @property
    def digests(self) -> NDArray[np.uint8]:
        """(len, 16) digests of the trees."""
        return self._gather([s.digest for s in self._shards])

    def where(self, chosen: NDArray[np.bool_] | Numbers) -> DataSet:
        """The chosen trees, as a mask or as rising numbers."""
        return DataSet(self._shards, self.trees[chosen], self.copies[chosen])

    def with_copies(self, copies: Numbers) -> DataSet:
        """The same trees, taken `copies` (len,) times an epoch; those taken no time are left out."""
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
    cache: Path,
    seed: int,
    say: pipeline.Say | None = None,
) -> tuple[DataSet, list[Path]]:
    """The mixture of all sources, tokenized now or found in the cache, and the folders it lies in.

    Args:
        unit: "sequence" for SFT, "comparison" for everything else.
        cache: where tokenized sources are kept.
        seed: of the draw, where a source gives only part of its trees.
        say: told of every source that has to be tokenized.

    Raises:
        UserError: unreadable or malformed data, a conversation that does not fit under `too_long: refuse`,
            a source that holds less than its `count`, or nothing left to train on.
    """
    decontaminator = Decontaminator(settings.decontaminate) if settings.decontaminate else None
    encoder = Encoder(tokenizer, settings, unit)
    folders = [
        pipeline.build(
            pipeline.SourceTask(source, encoder, decontaminator), cache, workers=settings.workers, say=say
        )
        for source in sources
    ]
    return mixture(sources, folders, unit=unit, seed=seed), folders


def mixture(sources: Sequence[Source], folders: Sequence[Path], *, unit: Unit, seed: int) -> DataSet:
    """The trees of finished folders, of each source as many as its `count` or `weight` says."""
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
    """The part of a source that an epoch takes: whole trees, until `count` or `weight` x its units are reached.

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
    """Split trees into (train, held out) by their instruction, so that none stands on both sides.

    An instruction's place depends on itself and the seed alone: SFT and preference stages that keep different rows
    of one data set hold out the same instructions. The held-out share is therefore about, not exactly, `fraction`.

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
    return rest, out.with_copies(np.ones(len(out), np.int64))  # judged once each


def _places(instructions: NDArray[np.uint8], key: bytes) -> NDArray[np.float64]:
    """(n,) numbers in [0, 1), one per instruction, as good as random and the same in every run."""
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in instructions)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
