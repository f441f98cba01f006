"""From conversations to tokens: one group of text becomes one front-coded tree, under the recipe's length rule."""

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
    """Tokenizes groups. `settings`: the length rule, what is scored, the row a comparison has to fit."""

    tokenizer: ChatTokenizer
    settings: Data
    unit: Unit

    def __call__(self, group: Group, report: Report) -> TokenGroup | None:
        """The group with every sequence tokenized and cut to length; None if nothing of it is left.

        Raises:
            UserError: a conversation the template cannot render, or one that does not fit under
                `too_long: refuse`.
        """
        sequences: list[TokenSequence] = []
        place: list[int] = []  # conversation -> index into `sequences`
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
        """The comparison's (chosen, rejected) among `sequences`; None, counted, if it cannot be trained on."""
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
        scored[0] = False  # nothing is left that predicts the first token
        if not scored.any():
            report.skip(f"sequence with no scored token left in {limit} tokens", origin)
            return None
        report.truncate(f"sequence cut to {limit} tokens ({rule})", origin)
        return TokenSequence(sequence.tokens[kept], scored)


def instructions(group: Group) -> list[str]:
    """The first user message of each conversation, each text once; the first is what a group is held out and
    drawn by."""
    firsts = (
        next(message.content for message in conversation if message.role == "user")
        for conversation in group.conversations
    )
    return list(dict.fromkeys(firsts))
