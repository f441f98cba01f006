"""Tokenizes groups of conversations: each becomes one front-coded tree, under the recipe's length rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from silva.engine.data.reading.parsed import Kind as Unit
from silva.engine.data.reading.source import Comparison, Group
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer, TokenSequence
from silva.engine.data.trees.group import ABSENT, TokenGroup, front_code, instruction_digest
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Data


@dataclass(frozen=True)
class Encoder:
    """Tokenizes groups.

    Attributes:
        tokenizer: turns one conversation into tokens.
        settings: the length rule, what is scored, and the row length that a comparison has to fit.
        unit: "sequence" for SFT data, "comparison" for preference data.
    """

    tokenizer: ChatTokenizer
    settings: Data
    unit: Unit

    def __call__(self, group: Group, report: Report) -> TokenGroup | None:
        """Tokenize every sequence of a group and cut it to length.

        Args:
            group: the conversations of one tree.
            report: counts what is left out or cut.

        Returns:
            The tree; None if nothing of it is left.

        Raises:
            UserError: a conversation that the template cannot render, or one that does not fit under
                `too_long: refuse`.
        """
        sequences: list[TokenSequence] = []
        # index into `sequences` of each conversation; ABSENT where the conversation was dropped
        place: list[int] = []
        for conversation in group.conversations:
            try:
                whole = self.tokenizer.encode(conversation, score=self.settings.score)
            except UserError as error:
                raise UserError(f"{group.origin}: {error}") from error
            fitting = self._fit(whole, group.origin, report)
            place.append(ABSENT if fitting is None else len(sequences))
            if fitting is not None:
                sequences.append(fitting)
        digest = instruction_digest(instructions(group)[0])
        if self.unit == "sequence":
            return TokenGroup.of(sequences, instruction=digest) if sequences else None
        kept = [
            (pair, comparison.absolute)
            for comparison in group.comparisons
            if (pair := self._pair(comparison, place, sequences, group.origin, report)) is not None
        ]
        if not kept:
            return None
        used = sorted({side for pair, _ in kept for side in pair if side != ABSENT})
        renumber = {old: new for new, old in enumerate(used)} | {ABSENT: ABSENT}
        return TokenGroup.of(
            [sequences[k] for k in used],
            [(renumber[chosen], renumber[rejected]) for (chosen, rejected), _ in kept],
            [absolute for _, absolute in kept],
            digest,
        )

    def _pair(
        self,
        comparison: Comparison,
        place: Sequence[int],
        sequences: Sequence[TokenSequence],
        origin: str,
        report: Report,
    ) -> tuple[int, int] | None:
        """Return (chosen, rejected) as indices into `sequences`; None, counted, if they cannot be trained on."""
        settings = self.settings
        named = [side for side in (comparison.chosen, comparison.rejected) if side is not None]
        if any(place[side] == ABSENT for side in named):
            report.skip("comparison with a sequence that was dropped for its length", origin)
            return None
        chosen, rejected = (
            ABSENT if side is None else place[side] for side in (comparison.chosen, comparison.rejected)
        )
        tokens = [sequences[place[side]].tokens for side in named]
        if len(tokens) == 2 and np.array_equal(tokens[0], tokens[1]):
            report.skip("chosen and rejected are the same tokens", origin)
            return None
        size = sum(map(len, tokens)) - sum(front_code(tokens)[1])
        if size <= settings.row_length:
            return chosen, rejected
        if settings.too_long == "refuse":
            raise UserError(
                f"{origin}: chosen and rejected take {size} tokens together and have to lie in one row of "
                f"{settings.row_length} (data.row_length); raise it, or set data.too_long to drop"
            )
        report.skip(f"comparison whose two sequences do not fit a row of {settings.row_length}", origin)
        return None

    def _fit(self, sequence: TokenSequence, origin: str, report: Report) -> TokenSequence | None:
        """Apply the recipe's `too_long` rule to one sequence."""
        length, rule = len(sequence.tokens), self.settings.too_long
        limit = self.settings.max_length or self.settings.row_length
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
        # nothing is left that predicts the first token
        scored[0] = False
        if not scored.any():
            report.skip(f"sequence with no scored token left in {limit} tokens", origin)
            return None
        report.truncate(f"sequence cut to {limit} tokens ({rule})", origin)
        return TokenSequence(sequence.tokens[kept], scored)


def instructions(group: Group) -> list[str]:
    """Return the first user message of each conversation, each text once.

    Whether a group is held out or drawn depends on the first of them alone.
    """
    firsts = (
        next(message.content for message in conversation if message.role == "user")
        for conversation in group.conversations
    )
    return list(dict.fromkeys(firsts))
