"""From recipe sources to tokenized groups: reading, tokenizing, the length rule, holding out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.chat import ChatTokenizer, TokenSequence
from silva.engine.data.formats import Group, Report, read_groups
from silva.engine.data.packing import ABSENT
from silva.engine.data.tree import merged_size
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.config import Data, Source

Unit = Literal["sequence", "comparison"]


@dataclass(slots=True)
class TokenGroup:
    """The tokenized sequences of one tree and what is compared among them."""

    sequences: list[TokenSequence]
    comparisons: NDArray[np.int32]  # (P, 2) (chosen, rejected) indices into `sequences`, -1: absent
    absolute: NDArray[np.bool_]  # (P,)
    instruction: str = ""  # the first user message: what is held out, is held out by it
    first_sequence: int = 0  # number of `sequences[0]` in the data set
    first_comparison: int = 0


class DataSet:
    """Groups in reading order, their sequences and comparisons numbered through.

    Attributes:
        groups: the trees.
        sequences, comparisons: totals.
        fingerprint: hex digest of every token, scored flag and comparison: equal data has equal fingerprints.
    """

    def __init__(self, groups: Iterable[TokenGroup]) -> None:
        self.groups = list(groups)
        self.sequences = self.comparisons = 0
        digest = hashlib.blake2b(digest_size=16)
        for group in self.groups:
            group.first_sequence, group.first_comparison = self.sequences, self.comparisons
            self.sequences += len(group.sequences)
            self.comparisons += len(group.comparisons)
            for sequence in group.sequences:
                digest.update(np.int64(len(sequence.tokens)).tobytes())
                digest.update(sequence.tokens.tobytes() + sequence.scored.tobytes())
            digest.update(group.comparisons.tobytes() + group.absolute.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.groups)


def prepare(
    sources: Sequence[Source], tokenizer: ChatTokenizer, settings: Data, *, unit: Unit, report: Report
) -> DataSet:
    """Read, tokenize and length-check all sources.

    Args:
        unit: "sequence" for SFT, "comparison" for everything else.
        report: receives every row that was skipped or truncated, with its reason.

    Raises:
        UserError: unreadable or malformed data, a conversation that does not fit under `too_long: refuse`,
            or nothing left to train on.
    """
    groups = []
    for source in sources:
        for group in read_groups(source, kind=unit, on_bad_row=settings.on_bad_row, report=report):
            tokenized = _tokenize(group, tokenizer, settings, unit, report)
            if tokenized is not None:
                groups.append(tokenized)
    if not groups:
        names = ", ".join(source.path for source in sources)
        skipped = "; ".join(report.lines()) or "the files hold no rows"
        raise UserError(f"{names}: no {unit}s left to train on ({skipped})")
    return DataSet(groups)


def hold_out(data: DataSet, fraction: float, seed: int) -> tuple[DataSet, DataSet]:
    """Split groups into (train, held out) by their instruction, so that none stands on both sides.

    An instruction's place depends on itself and the seed alone: SFT and preference stages that keep different rows
    of one data set hold out the same instructions. The held-out share is therefore about, not exactly, `fraction`.

    Raises:
        UserError: nothing is left on one side.
    """

    def place(instruction: str) -> float:
        digest = hashlib.blake2b(instruction.encode(), digest_size=8, key=str(seed).encode()).digest()
        return int.from_bytes(digest, "big") / 2**64

    held = [place(group.instruction) < fraction for group in data.groups]
    if not any(held) or all(held):
        raise UserError(
            f"data.validation_fraction: {fraction} of {len(data)} instruction(s) leaves nothing "
            f"{'to train on' if all(held) else 'to hold out'}; give more data or another fraction"
        )
    return (
        DataSet(g for g, out in zip(data.groups, held, strict=True) if not out),
        DataSet(g for g, out in zip(data.groups, held, strict=True) if out),
    )


def _tokenize(
    group: Group, tokenizer: ChatTokenizer, settings: Data, unit: Unit, report: Report
) -> TokenGroup | None:
    """The group with every sequence tokenized and cut to length; None if nothing of it is left."""
    limit = settings.max_length or settings.row_length
    instruction = next(m.content for m in group.conversations[0] if m.role == "user")
    sequences: list[TokenSequence] = []
    place: list[int] = []  # conversation -> index into `sequences`, -1: dropped
    for conversation in group.conversations:
        try:
            whole = tokenizer.encode(conversation, score=settings.score)
        except UserError as error:
            raise UserError(f"{group.origin}: {error}") from error
        fitting = _fit(whole, limit, settings.too_long, group.origin, report)
        place.append(len(sequences) if fitting is not None else ABSENT)
        if fitting is not None:
            sequences.append(fitting)
    if unit == "sequence":
        none = np.zeros((0, 2), np.int32), np.zeros(0, bool)
        return TokenGroup(sequences, *none, instruction) if sequences else None

    pairs, absolute = [], []
    for comparison in group.comparisons:
        named = [side for side in (comparison.chosen, comparison.rejected) if side is not None]
        if any(place[side] == ABSENT for side in named):
            report.skip("comparison with a sequence that was dropped for its length", group.origin)
            continue
        sides = [ABSENT if side is None else place[side] for side in (comparison.chosen, comparison.rejected)]
        if len(named) == 2 and np.array_equal(sequences[sides[0]].tokens, sequences[sides[1]].tokens):
            report.skip("chosen and rejected are the same tokens", group.origin)
            continue
        size = merged_size([sequences[k] for k in sides if k != ABSENT])
        if size > settings.row_length:
            if settings.too_long == "refuse":
                raise UserError(
                    f"{group.origin}: chosen and rejected take {size} tokens together and have to lie in one row of "
                    f"{settings.row_length} (data.row_length); raise it, or set data.too_long to drop"
                )
            report.skip(
                f"comparison whose two sequences do not fit a row of {settings.row_length}", group.origin
            )
            continue
        pairs.append(sides)
        absolute.append(comparison.absolute)
    if not pairs:
        return None
    used = sorted({side for pair in pairs for side in pair if side != ABSENT})
    renumber = {old: new for new, old in enumerate(used)} | {ABSENT: ABSENT}
    return TokenGroup(
        [sequences[k] for k in used],
        np.array([[renumber[side] for side in pair] for pair in pairs], np.int32),
        np.array(absolute, bool),
        instruction,
    )


def _fit(sequence: TokenSequence, limit: int, rule: str, origin: str, report: Report) -> TokenSequence | None:
    """Apply the recipe's `too_long` rule to one sequence."""
    length = len(sequence.tokens)
    if length <= limit:
        return sequence
    if rule == "refuse":
        raise UserError(
            f"{origin}: a conversation of {length} tokens is longer than the {limit} that fit (data.max_length, "
            "data.row_length); raise them, or set data.too_long to drop, truncate_left or truncate_right"
        )
    if rule == "drop":
        report.skip(f"sequence longer than {limit} tokens", origin)
        return None
    kept = slice(length - limit, length) if rule == "truncate_left" else slice(0, limit)
    scored = sequence.scored[kept].copy()
    scored[0] = False  # nothing is left that predicts the first token
    if not scored.any():
        report.skip(f"sequence with no scored token left in {limit} tokens", origin)
        return None
    report.truncate(f"sequence cut to {limit} tokens ({rule})", origin)
    return TokenSequence(sequence.tokens[kept], scored)
