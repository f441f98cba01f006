"""Tokenizes groups of conversations: each becomes one front-coded tree, under the recipe's length rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from silva.engine.data.reading.formats import Score
from silva.engine.data.reading.messages import Conversation
from silva.engine.data.reading.parsed import Kind as Unit
from silva.engine.data.reading.source import Comparison, Group
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.text.chat_template import CannotRender
from silva.engine.data.trees.group import ABSENT, TokenGroup, TokenSequence, front_code, instruction_digest
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Data

# the paths of one sequence; see `TokenGroup`
Paths = list[TokenSequence]


@dataclass(frozen=True)
class Encoder:
    """Tokenizes groups.

    Attributes:
        tokenizer: turns one conversation into tokens.
        settings: the length rule, and the row length that a comparison has to fit.
        unit: "sequence" for SFT data, "comparison" for preference data.
        score: which messages are scored; None: none, because rewards are read at the ends of conversations.
    """

    tokenizer: ChatTokenizer
    settings: Data
    unit: Unit
    score: Score | None

    def __call__(self, group: Group, report: Report) -> TokenGroup | None:
        """Tokenize every sequence of a group and cut it to length.

        Args:
            group: the conversations of one tree.
            report: counts what is left out or cut.

        Returns:
            The tree; None if nothing of it is left.

        Raises:
            UserError: a conversation that the template cannot render (unless such rows are skipped), or one that does
                not fit under `too_long: refuse`, or a comparison whose two sides do not fit one row under it.
        """
        sequences = _Sequences(self, group, report)
        digest = instruction_digest(instructions(group)[0])
        if self.unit == "sequence":
            alone = [sequences.place(k, given) for k, given in enumerate(group.given)]
            kept = [
                k for k in alone if k != ABSENT and self._fits([sequences.paths[k]], group.origin, report)
            ]
            return _tree([sequences.paths[k] for k in kept], [], [], digest) if kept else None
        pairs, absolute = [], []
        for comparison in group.comparisons:
            pair = self._pair(comparison, sequences, group.origin, report)
            if pair is not None:
                pairs.append(pair)
                absolute.append(comparison.absolute)
        if not pairs:
            return None
        used = sorted({side for pair in pairs for side in pair if side != ABSENT})
        renumber = {old: new for new, old in enumerate(used)} | {ABSENT: ABSENT}
        pairs = [(renumber[chosen], renumber[rejected]) for chosen, rejected in pairs]
        return _tree([sequences.paths[k] for k in used], pairs, absolute, digest)

    def _pair(
        self, comparison: Comparison, sequences: _Sequences, origin: str, report: Report
    ) -> tuple[int, int] | None:
        """Return the (chosen, rejected) sequences; None, counted, if they cannot be trained on."""
        sides = [
            None if side is None else sequences.place(side, comparison.given)
            for side in (comparison.chosen, comparison.rejected)
        ]
        if ABSENT in sides:
            report.skip("comparison with a side that was left out", origin)
            return None
        named = [sequences.paths[side] for side in sides if side is not None]
        if len(named) == 2 and _equal(*named):
            report.skip("chosen and rejected are the same tokens", origin)
            return None
        if not self._fits(named, origin, report):
            return None
        chosen, rejected = (ABSENT if side is None else side for side in sides)
        return chosen, rejected

    def _fits(self, sides: Sequence[Paths], origin: str, report: Report) -> bool:
        """Tell whether one or two sequences fit one row; if not, that is counted or refused."""
        tokens = [path.tokens for paths in sides for path in paths]
        size = sum(map(len, tokens)) - sum(front_code(tokens)[1])
        limit = self.settings.row_length
        if size <= limit:
            return True
        if self.settings.too_long == "refuse":
            what = "chosen and rejected take" if len(sides) == 2 else "the answers of a conversation take"
            raise UserError(
                f"{origin}: {what} {size} tokens together and have to lie in one row of {limit} (data.row_length); "
                "raise it, or set data.too_long to drop"
            )
        what = "comparison whose two sequences do" if len(sides) == 2 else "conversation whose answers do"
        report.skip(f"{what} not fit a row of {limit}", origin)
        return False

    def encode(self, conversation: Conversation, given: int, origin: str, report: Report) -> Paths:
        """Tokenize one conversation and cut it to length.

        Args:
            conversation: what is tokenized.
            given: messages of the prompt.
            origin: place of the row.
            report: counts what is left out or cut.

        Returns:
            Its paths; empty, counted, if nothing of it is left.

        Raises:
            UserError: as `__call__`.
        """
        try:
            if self.score is None:
                encoded = self.tokenizer.whole(conversation)
            else:
                encoded = self.tokenizer.encode(conversation, score=self.score, given=given)
        except CannotRender as error:
            if self.settings.on_bad_row == "skip":
                report.skip("conversation that the chat template cannot render", origin)
                return []
            raise UserError(f"{origin}: {error}, or set data.on_bad_row=skip") from error
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        for note in dict.fromkeys(encoded.notes):
            report.note(note, origin)
        if not encoded.paths:
            report.skip("conversation of which no message is to be trained on", origin)
        kept = [self._cut(path, origin, report) for path in encoded.paths]
        if self.settings.too_long == "drop" and None in kept:
            return []
        if self.score is None and self._ends_with_padding(kept, origin, report):
            return []
        return [path for path in kept if path is not None]

    def _ends_with_padding(self, paths: Sequence[TokenSequence | None], origin: str, report: Report) -> bool:
        """Tell whether transformers would read the reward of a conversation in front of its last token."""
        padding = self.tokenizer.padding
        if padding is None or all(path is None or path.tokens[-1] != padding for path in paths):
            return False
        token = self.tokenizer.token(padding)
        if self.settings.on_bad_row == "skip":
            report.skip(f"conversation that ends with the padding token {token}", origin)
            return True
        raise UserError(
            f"{origin}: a conversation ends with {token!r}, which pads batches of the exported reward model, so "
            "transformers would read the reward in front of it; repair the row, or set data.on_bad_row=skip"
        )

    def _cut(self, path: TokenSequence, origin: str, report: Report) -> TokenSequence | None:
        """Apply the recipe's `too_long` rule to one path."""
        length, rule = len(path.tokens), self.settings.too_long
        limit = self.settings.max_length or self.settings.row_length
        if length <= limit:
            return path
        if rule == "refuse":
            raise UserError(
                f"{origin}: a conversation of {length} tokens is longer than the {limit} that fit (data.max_length, "
                "data.row_length); raise them, or set data.too_long to drop, truncate_left or truncate_right"
            )
        if rule == "drop":
            report.skip(f"sequence longer than {limit} tokens", origin)
            return None
        kept = slice(length - limit, length) if rule == "truncate_left" else slice(0, limit)
        scored = path.scored[kept].copy()
        # nothing is left that predicts the first token
        scored[0] = False
        if self.score is not None and not scored.any():
            report.skip(f"sequence with no scored token left in {limit} tokens", origin)
            return None
        report.truncate(f"sequence cut to {limit} tokens ({rule})", origin)
        return TokenSequence(path.tokens[kept], scored)


class _Sequences:
    """Holds the sequences of a group, each tokenized once: a conversation behind one prompt.

    Attributes:
        paths: of each sequence.
    """

    def __init__(self, encoder: Encoder, group: Group, report: Report) -> None:
        self._encoder, self._group, self._report = encoder, group, report
        self._places: dict[tuple[int, int], int] = {}
        self.paths: list[Paths] = []

    def place(self, conversation: int, given: int) -> int:
        """Return the number of a conversation's sequence; ABSENT if it was left out."""
        # where the prompt ends matters only to what is scored behind it
        key = (conversation, given if self._encoder.score in ("completion", "turns") else 0)
        if key not in self._places:
            said = self._group.conversations[conversation]
            paths = self._encoder.encode(said, given, self._group.origin, self._report)
            self._places[key] = len(self.paths) if paths else ABSENT
            if paths:
                self.paths.append(paths)
        return self._places[key]


def _tree(
    sequences: Sequence[Paths], pairs: Sequence[tuple[int, int]], absolute: Sequence[bool], digest: bytes
) -> TokenGroup:
    paths = [path for each in sequences for path in each]
    owner = [k for k, each in enumerate(sequences) for _ in each]
    return TokenGroup.of(paths, pairs, absolute, digest, owner)


def _equal(left: Paths, right: Paths) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(one.tokens, other.tokens) for one, other in zip(left, right, strict=True)
    )


def instructions(group: Group) -> list[str]:
    """Return the instruction of a group, or else the first user message of each conversation, each text once.

    Whether a group is held out or drawn depends on the first of them alone.
    """
    if group.instruction:
        return [group.instruction]
    return list(dict.fromkeys(map(first_user, group.conversations)))


def first_user(conversation: Conversation) -> str:
    """Return the text of a conversation's first user message."""
    return next(message.content for message in conversation if message.role == "user")
