"""Finds training instructions that occur in test sets: by shared n-grams of words, or as exact substrings.

Eurus, arXiv 2404.02078, appendix A.3, uses 8-gram matching of UltraInteract's instructions against the test sets, and
for LeetCode BigCode's exact substring matching.

Eight words may be boilerplate: "Solve the following math problem step by step" opens every prompt of a source. What
many instructions of one source, or many texts of one test set, have in common says nothing about any of them. Such
n-grams are no match, and are named.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.reading.files import Row, open_rows
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Decontaminate, EvaluationSet

# A word is a run of letters and digits; in scripts without spaces each character is one.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# odd, so that multiplying by it loses nothing modulo 2**64
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Match(NamedTuple):
    """Holds where an instruction was found: the test set's path, and the n-gram or test text that is in both."""

    name: str
    text: str


class Common(NamedTuple):
    """Holds words that many texts have in common, how many have them, and the number of all texts."""

    text: str
    having: int
    texts: int


class Decontaminator:
    """Holds the test sets in a form that many processes can share.

    In mode "ngram", an instruction matches if it shares `ngram` successive words with a test text; letter case and
    everything between words are ignored. A text of fewer words is compared as a whole: it matches only an instruction
    of the same words. In mode "substring", an instruction matches if it holds a whole test text; letter case and the
    amount of white space are ignored.

    Args:
        settings: the test sets and the mode.

    Attributes:
        fingerprint: hex digest of the test texts and settings.
        boilerplate: (test set's path, words) that many texts of a test set have in common; they are no match.

    Raises:
        UserError: a test set that cannot be opened, has no row, or a row without one of the fields.
    """

    def __init__(self, settings: Decontaminate) -> None:
        self._ngram = settings.ngram if settings.mode == "ngram" else 0
        self._names = [each.path for each in settings.against]
        texts = [(number, text) for number, each in enumerate(settings.against) for text in _texts(each)]
        self._share = settings.boilerplate
        self.boilerplate: list[tuple[str, Common]] = []
        described = (settings.mode, self._ngram, self._share, self._names)
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16)
        digest.update(repr(texts).encode())
        self.fingerprint = digest.hexdigest()
        if self._ngram:
            hashes = [_hashes(_words(text), self._ngram) for _, text in texts]
            kept = []
            for number, name in enumerate(self._names):
                own = [place for place, (owner, _) in enumerate(texts) if owner == number]
                counts = Counter(hashed for place in own for hashed in set(hashes[place].tolist()))
                found = self._common(counts, len(own), [(texts[place][1], hashes[place]) for place in own])
                self.boilerplate += [(name, common) for common in found]
                limit = _limit(len(own), self._share)
                kept += [
                    each[[counts[h] < limit for h in each.tolist()]] for each in (hashes[p] for p in own)
                ]
            owners = np.repeat([number for number, _ in texts], [len(each) for each in kept])
            self._hashes, first = np.unique(np.concatenate(kept), return_index=True)
            self._owners = owners[first].astype(np.int32)
            return
        folded = dict.fromkeys((_folded(text), number) for number, text in texts)
        self._length = min(len(text) for text, _ in folded)
        # test texts by their first `_length` characters
        self._by_start: dict[str, list[tuple[str, int]]] = {}
        for entry in folded:
            self._by_start.setdefault(entry[0][: self._length], []).append(entry)

    def match(self, instruction: str, ignored: Collection[int] = ()) -> Match | None:
        """Return the first place in the instruction that occurs in a test set; None if none does.

        Args:
            instruction: of a tree.
            ignored: hashes of n-grams that are no match; see `SourceWords.boilerplate`.
        """
        return self._shared_words(instruction, ignored) if self._ngram else self._held_text(instruction)

    def shared(self, instruction: str) -> list[int]:
        """Return the hashes of the n-grams that an instruction shares with test sets, each once; none by substring."""
        if not self._ngram:
            return []
        hashes = np.unique(_hashes(_words(instruction), self._ngram))
        return hashes[self._known(hashes)].tolist()

    def _known(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        if not len(self._hashes):
            return np.zeros(len(hashes), bool)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return self._hashes[places] == hashes

    def _common(
        self, counts: Mapping[int, int], texts: int, examples: Iterable[tuple[str, NDArray[np.uint64]]]
    ) -> list[Common]:
        """Return the words of the n-grams that too many texts have; neighbouring n-grams are joined."""
        limit = _limit(texts, self._share)
        left = {hashed for hashed, count in counts.items() if count >= limit}
        found = []
        for text, hashes in examples:
            if not left:
                break
            words, start = _words(text), None
            marked = [hashed in left for hashed in hashes.tolist()]
            for place, common in enumerate([*marked, False]):
                if common and start is None:
                    start = place
                elif not common and start is not None:
                    run = hashes[start:place].tolist()
                    left.difference_update(run)
                    said = " ".join(words[start : place - 1 + self._ngram])
                    found.append(Common(said, max(counts[hashed] for hashed in run), texts))
                    start = None
        return found

    def _shared_words(self, instruction: str, ignored: Collection[int]) -> Match | None:
        words = _words(instruction)
        hashes = _hashes(words, self._ngram)
        hits = np.flatnonzero(self._known(hashes))
        hits = hits[[hashed not in ignored for hashed in hashes[hits].tolist()]] if ignored else hits
        if not len(hits):
            return None
        places = np.searchsorted(self._hashes, hashes)
        first = int(hits[0])
        name = self._names[self._owners[places[first]]]
        return Match(name, " ".join(words[first : first + self._ngram]))

    def _held_text(self, instruction: str) -> Match | None:
        folded = _folded(instruction)
        for start in range(len(folded) - self._length + 1):
            for text, number in self._by_start.get(folded[start : start + self._length], ()):
                if folded.startswith(text, start):
                    return Match(self._names[number], text)
        return None


class SourceWords:
    """Counts, over the instructions of one source, the n-grams that they share with test sets.

    Args:
        decontaminator: holds the test sets.
    """

    def __init__(self, decontaminator: Decontaminator) -> None:
        self._decontaminator = decontaminator
        self._counts: Counter[int] = Counter()
        # an instruction with each of them
        self._examples: dict[int, str] = {}
        self._instructions = 0

    def add(self, instruction: str) -> None:
        """Count an instruction."""
        self._instructions += 1
        for hashed in self._decontaminator.shared(instruction):
            self._counts[hashed] += 1
            self._examples.setdefault(hashed, instruction)

    def boilerplate(self) -> tuple[list[int], list[Common]]:
        """Return the hashes of the n-grams that too many of the instructions have, and their words."""
        decontaminator = self._decontaminator
        limit = _limit(self._instructions, decontaminator._share)
        hashes = sorted(hashed for hashed, count in self._counts.items() if count >= limit)
        texts = dict.fromkeys(self._examples[hashed] for hashed in hashes)
        examples = ((text, _hashes(_words(text), decontaminator._ngram)) for text in texts)
        return hashes, decontaminator._common(self._counts, self._instructions, examples)


def _limit(texts: int, share: float) -> float:
    """Return how many of some texts make an n-gram boilerplate: of few a third, of many the share, but at least 5.

    The same test text may stand in a few instructions in other words, and is then no boilerplate.
    """
    return math.inf if share >= 1 else max(5, math.ceil(min(texts / 3, 10 + share * texts)))


def _texts(test: EvaluationSet) -> Iterator[str]:
    """Yield the chosen fields of each row as one text."""
    rows = 0
    for row in open_rows(test.path, test.split):
        rows += 1
        yield "\n".join(_field(row, name, test.path) for name in test.fields)
    if not rows:
        raise UserError(f"data.decontaminate: {test.path} holds no rows")


def _field(row: Row, name: str, path: str) -> str:
    if row.fields is None:
        raise UserError(f"data.decontaminate: {path}, {row.origin}: {row.problem} {row.detail}".rstrip())
    value = row.fields.get(name)
    if not isinstance(value, str) or not _words(value):
        found = "it has " + ", ".join(row.fields) if value is None else f"found {value!r:.80}"
        raise UserError(
            f"data.decontaminate: {path}, {row.origin}: no words under field {name}; {found}; "
            "set data.decontaminate.against.*.fields"
        )
    return value


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hashes(words: Sequence[str], ngram: int) -> NDArray[np.uint64]:
    """Compute (max(1, W - ngram + 1),) 64-bit hashes of all n-grams of W words, or of the whole where W < ngram."""
    each = np.array(
        [
            int.from_bytes(
                hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
            )
            for word in words
        ],
        np.uint64,
    )
    length = min(ngram, len(words))
    whole = np.full(max(1, len(words) - ngram + 1), length, np.uint64)
    for offset in range(length):
        whole = whole * _BASE + each[offset : offset + len(whole)]
    return whole
