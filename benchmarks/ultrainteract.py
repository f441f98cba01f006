"""Draws synthetic preference trees with UltraInteract's published statistics, as rows, as text and as tokens.

What is drawn depends on the seed alone.

**Published** (arXiv 2404.02078, Table 1, which is also in the data set's README) are, for each line, the instructions,
the trajectories that end after 1 to 5 turns, the tokens per trajectory, and the pairs. Lines without interaction hold
several single-turn pairs per instruction. Their "trajectories per instruction" are not used: for coding the table says
5.5, but its own counts give 92,618 / 8,495 = 10.9.

**Derived** are the mean lengths. A trajectory of t turns is an instruction, t actions and t - 1 observations. With I,
A, O for their mean lengths, a task's line without interaction gives I + A, and its line with interaction gives
(tokens - (I + A)) / (turns - 1) = A + O. A turn of an interactive line has a pair with probability pairs / turns; the
expected number of pairs is the published one. A tree without a pair is not drawn, because pair data does not hold it.

**Assumed**, because it is not published, is the following:
- the split: an action is 0.68 of I + A and 0.56 of A + O (means over the rows in the data set's README, Mistral's
  tokenizer); where both are known the smaller is taken, so that no part is negative; logic has no line without
  interaction and takes A and O from math without tools;
- lengths are log-normal about their means with SIGMA = 0.5, independent of each other and of the depth;
- tokens are uniform: no two texts share anything. Real actions often start alike, so real trees share a little more;
- UltraFeedback has 63,967 prompts x 4 completions and 340K pairs (the Eurus paper), with 185 and 305 tokens (arXiv
  2310.01377, means over prompts and completions); UltraSafety has 3,000 prompts with one pair each, and lengths as
  UltraFeedback's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from silva.engine.data.reading.augment import single_turn_pairs
from silva.engine.data.reading.messages import Conversation, Message
from silva.engine.data.trees.group import TokenGroup, TokenSequence

SIGMA = 0.5
# tokens of the shortest text
SHORTEST = 4
ACTION_OF_FIRST_TURN, ACTION_OF_LATER_TURN = 0.68, 0.56
# token ids; words are numbers, and "0" has the id WORDS
UNKNOWN, BOS, EOS, OPEN, CLOSE, WORDS = range(6)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Line:
    """Holds one line of Table 1, and the mean lengths derived from it.

    Attributes:
        name: of the line.
        turns: trajectories that end after 1, 2, ... turns.
        tokens: per trajectory.
        pairs: number of pairs.
        instructions: number of instructions.
        instruction: mean tokens of an instruction, derived.
        action: mean tokens of an action, derived.
        observation: mean tokens of an observation, derived.
    """

    name: str
    turns: tuple[int, ...]
    tokens: float
    pairs: int
    instructions: int
    instruction: float = 0.0
    action: float = 0.0
    observation: float = 0.0


@dataclass(frozen=True)
class Tree:
    """Holds one instruction and its (chosen, rejected) conversations.

    Attributes:
        name: of the line or data set.
        pairs: (chosen, rejected) conversations.
        absolute: whether the pairs get the absolute-reward term, which those of UltraInteract do.
        depth: number of turns.
    """

    name: str
    pairs: tuple[tuple[Conversation, Conversation], ...]
    absolute: bool
    depth: int = 1


# fmt: off
_SINGLE = (
    Line("math, tool, single turn", (16_154,), 439.1, 13_217, 2_757),
    Line("math, single turn", (16_348,), 538.1, 12_624, 2_083),
    Line("coding, single turn", (92_618,), 1_070.4, 78_634, 8_495),
)
_INTERACTIVE = (
    Line("math, tool", (10_440, 4_122, 1_898, 904, 5_564), 1_750.0, 42_780, 22_928),
    Line("math", (10_708, 3_521, 1_459, 723, 6_228), 1_521.9, 44_750, 22_639),
    Line("coding", (13_265, 2_584, 987, 379, 3_248), 1_728.5, 18_106, 20_463),
    Line("logic, tool", (1_685, 298, 72, 8, 23), 1_299.8, 1_750, 2_086),
    Line("logic", (2_453, 1_674, 340, 0, 0), 1_266.7, 7_958, 4_467),
)
# fmt: on


def table() -> tuple[Line, ...]:
    """Return Table 1 with the mean lengths derived from it."""
    single = [_with_lengths(line, line.tokens * ACTION_OF_FIRST_TURN, 0.0) for line in _SINGLE]
    lines = list(single)
    for line, first in zip(_INTERACTIVE[:3], _SINGLE, strict=True):
        # this is A + O
        later = (line.tokens - first.tokens) / (mean_turns(line) - 1)
        action = min(ACTION_OF_FIRST_TURN * first.tokens, ACTION_OF_LATER_TURN * later)
        lines.append(_with_lengths(line, action, later - action))
    like = lines[4]
    lines += [_with_lengths(line, like.action, like.observation) for line in _INTERACTIVE[3:]]
    return tuple(lines)


def mean_turns(line: Line) -> float:
    """Return the mean number of turns per trajectory."""
    return sum(t * count for t, count in enumerate(line.turns, start=1)) / sum(line.turns)


def _with_lengths(line: Line, action: float, observation: float) -> Line:
    turns = mean_turns(line)
    instruction = line.tokens - turns * action - (turns - 1) * observation
    return replace(line, instruction=instruction, action=action, observation=observation)


# ---------------------------------------------------------------- drawing


class _Writer:
    """Draws texts and trees."""

    def __init__(self, seed: int, vocabulary: int, scale: float) -> None:
        self.random = np.random.default_rng(seed)
        self.words, self.scale = vocabulary - WORDS, scale

    def text(self, mean: float) -> str:
        """Draw a text whose length is `mean` tokens on average, before `scale`."""
        length = self.random.lognormal(-(SIGMA**2) / 2, SIGMA) * mean * self.scale
        return " ".join(map(str, self.random.integers(0, self.words, max(SHORTEST, round(length))).tolist()))

    def interactive(self, line: Line, paired: tuple[bool, ...]) -> Tree:
        """Draw a tree of `len(paired)` turns: the incorrect action of each turn goes on, the correct one ends."""
        path: Conversation = (Message("user", self.text(line.instruction)),)
        pairs = []
        for has_pair in paired:
            correct, incorrect = (Message("assistant", self.text(line.action)) for _ in range(2))
            if has_pair:
                pairs.append(((*path, correct), (*path, incorrect)))
            path = (*path, incorrect, Message("user", self.text(line.observation)))
        return Tree(line.name, tuple(pairs), True, len(paired))

    def single(self, name: str, instruction: float, action: float, pairs: int) -> Tree:
        """Draw an instruction with `pairs` pairs of a correct and an incorrect action, all of them different."""
        user = Message("user", self.text(instruction))

        def answer() -> Conversation:
            return user, Message("assistant", self.text(action))

        drawn = [(answer(), answer()) for _ in range(pairs)]
        return Tree(name, tuple(drawn), True)

    def feedback(self, pairs: int) -> Tree:
        """Draw a tree of UltraFeedback's form: `pairs` of the 6 pairs of 4 completions."""
        user = Message("user", self.text(185))
        answers = [(user, Message("assistant", self.text(305))) for _ in range(4)]
        every = list(itertools.combinations(answers, 2))
        kept = sorted(self.random.permutation(len(every))[:pairs].tolist())
        return Tree("ultrafeedback", tuple(every[k] for k in kept), False)


def trees(
    count: int, *, seed: int = 0, vocabulary: int = 32_000, scale: float = 1.0, only: str = "all"
) -> list[Tree]:
    """Draw trees of UltraInteract's pairs; kinds of trees have their published proportions, as nearly as possible.

    Args:
        count: number of trees.
        seed: of the draw.
        vocabulary: number of token ids.
        scale: of all lengths.
        only: "all", or "interactive": the lines with interaction alone, which make up 115K of the 220K pairs.
    """
    writer = _Writer(seed, vocabulary, scale)
    kinds = _kinds(only)
    chosen = _spread(np.array([weight for weight, *_ in kinds]), count, writer.random)
    return [
        writer.single(line.name, line.instruction, line.action, form)
        if isinstance(form, int)
        else writer.interactive(line, form)
        for _, line, form in (kinds[k] for k in chosen)
    ]


def reward_trees(count: int, *, seed: int = 0, vocabulary: int = 32_000, scale: float = 1.0) -> list[Tree]:
    """Draw Eurus' reward-model mixture: pairs and single-turn pairs of UltraInteract, UltraFeedback, UltraSafety."""
    kinds = _kinds("all")
    weights = np.array([sum(weight for weight, *_ in kinds), 63_967, 3_000])
    share = np.bincount(_spread(weights, count, np.random.default_rng(seed)), minlength=3)
    found = []
    for tree in trees(int(share[0]), seed=seed, vocabulary=vocabulary, scale=scale):
        more = tuple(single_turn_pairs(tree.pairs, seed))
        found.append(Tree(tree.name, (*tree.pairs, *more), True, tree.depth))
    writer = _Writer(seed + 1, vocabulary, scale)
    fifths = _spread(np.array([6 - 340_000 / 63_967, 340_000 / 63_967 - 5]), int(share[1]), writer.random)
    found += [writer.feedback(5 + int(k)) for k in fifths]
    found += [Tree("ultrasafety", writer.single("", 185, 305, 1).pairs, False) for _ in range(share[2])]
    return [found[k] for k in writer.random.permutation(len(found))]


def short_prompts(count: int, *, seed: int = 0, vocabulary: int = 32_000, scale: float = 1.0) -> list[Tree]:
    """Draw pairs that share only a short prompt, with the lengths of GSM8K's model solutions: 67 and 133 tokens."""
    writer = _Writer(seed, vocabulary, scale)
    return [writer.single("short prompt", 67, 133, 1) for _ in range(count)]


def enough(make: Callable[[int], list[Tree]], comparisons: int) -> list[Tree]:
    """Return what `make` gives for the least number of trees that hold so many comparisons."""
    for count in itertools.count(1):
        made = make(count)
        if sum(len(tree.pairs) for tree in made) >= comparisons:
            break
    return made


def _kinds(only: str) -> list[tuple[float, Line, int | tuple[bool, ...]]]:
    """Return every kind of tree.

    Returns:
        (number of trees in UltraInteract, line, pairs of a single turn or which turns have a pair) of each kind.
    """
    lines = table()
    kinds: list[tuple[float, Line, int | tuple[bool, ...]]] = []
    for line in lines[:3] if only == "all" else ():
        least = line.pairs // line.instructions
        more = line.pairs / line.instructions - least
        kinds += [(line.instructions * (1 - more), line, least), (line.instructions * more, line, least + 1)]
    for line in lines[3:]:
        chance = line.pairs / (mean_turns(line) * line.instructions)
        for depth, count in enumerate(line.turns, start=1):
            for paired in itertools.product((True, False), repeat=depth):
                have = sum(paired)
                if have and count:
                    kinds.append((count * chance**have * (1 - chance) ** (depth - have), line, paired))
    return kinds


def _spread(weights: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw indices in proportion to `weights` (systematic sampling).

    Returns:
        (count,) indices, in random order.
    """
    ends = np.cumsum(weights) / weights.sum()
    places = (np.arange(count) + random.random()) / max(1, count)
    return random.permutation(np.minimum(np.searchsorted(ends, places, "right"), len(weights) - 1))


# ---------------------------------------------------------------- forms


def groups(
    count: int, *, seed: int = 0, vocabulary: int = 32_000, scale: float = 1.0, only: str = "interactive"
) -> list[TokenGroup]:
    """Draw trees as tokens; arguments are as in `trees`, by default of the lines with interaction."""
    drawn = trees(count, seed=seed, vocabulary=vocabulary, scale=scale, only=only)
    return [group(tree) for tree in drawn]


def group(tree: Tree) -> TokenGroup:
    """Return the tree as the engine tokenizes it with the tokenizer of `save_tokenizer`."""
    place: dict[Conversation, int] = {}
    pairs = [
        (place.setdefault(chosen, len(place)), place.setdefault(rejected, len(place)))
        for chosen, rejected in tree.pairs
    ]
    digest = hashlib.blake2b(tree.pairs[0][0][0].content.encode(), digest_size=16).digest()
    return TokenGroup.of([_encode(c) for c in place], pairs, [tree.absolute] * len(pairs), digest)


def _encode(conversation: Conversation) -> TokenSequence:
    parts = [np.array([BOS], np.int32)]
    for message in conversation:
        words = np.array(message.content.split(), np.int32) + WORDS
        before, after = ([OPEN], [CLOSE]) if message.role == "user" else ([], [EOS])
        parts += [np.array(before, np.int32), words, np.array(after, np.int32)]
    tokens = np.concatenate(parts)
    answer = len(parts[-2]) + 1
    return TokenSequence(tokens, np.arange(len(tokens)) >= len(tokens) - answer)


def rows(drawn: Sequence[Tree]) -> Iterator[dict[str, Any]]:
    """Yield trees as rows of format `ultrainteract_pair`."""
    for number, tree in enumerate(drawn):
        for chosen, rejected in tree.pairs:
            turn = sum(message.role == "user" for message in chosen)
            yield {
                "id": f"{number:08x}_{tree.depth}_{turn}",
                "parent_id": f"{number:08x}",
                "trajectory": [{"from": m.role, "value": m.content} for m in chosen[:-1]],
                "chosen": chosen[-1].content,
                "rejected": rejected[-1].content,
            }


def save_tokenizer(folder: Path, vocabulary: int = 32_000) -> Path:
    """Save the tokenizer of these texts, for which a word is one token."""
    special = {"<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS, "[INST]": OPEN, "[/INST]": CLOSE}
    words = special | {str(word): WORDS + word for word in range(vocabulary - WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
