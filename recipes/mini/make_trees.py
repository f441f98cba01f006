"""Makes the mini data set: preference trees of arithmetic word problems in UltraInteract's schema.

    python -m silva.recipes.mini.make_trees [--out FOLDER] [--problems N] [--seed S]

Every problem has one tree, with a correct and an incorrect action at every turn. The correct one ends its branch; the
incorrect one is expanded by an observation (what a real Python interpreter printed, and a critique) and a new pair,
five turns at most (arXiv 2404.02078, section 2). Every action is executed: no row is written unless the chosen action
prints the answer and the rejected one does not.

Every eighth problem is held out. Problem i depends only on the seed, i and the problems before it, so a smaller data
set is the beginning of a larger one.
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from silva.recipes.mini import actions, problems
from silva.recipes.mini.interpreter import Interpreter, code_of, is_correct
from silva.recipes.mini.problems import Dice, Problem

PROBLEMS = 800
HOLD_OUT_EVERY = 8
DEPTHS = ((1, 0.45), (2, 0.25), (3, 0.13), (4, 0.09), (5, 0.08))
# Characters that an incorrect action may print; "12" * 60 prints too many to read.
LONGEST_OUTPUT = 70
FILES = ("pair", "sft", "pair_heldout", "sft_heldout")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """Holds a correct and an incorrect action, and what the environment and the critique say to the latter."""

    chosen: str
    rejected: str
    observation: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Holds an incorrect action, because later turns may repeat it or keep its style."""

    draft: actions.Draft
    text: str
    printed: str
    critique: str


def grow(problem: Problem, dice: Dice, interpreter: Interpreter) -> list[Turn]:
    """Make the tree of a problem.

    Args:
        problem: that the actions solve.
        dice: chooses the actions.
        interpreter: executes every action.

    Returns:
        The turns of the tree, five at most.

    Raises:
        AssertionError: an action that should be correct is not.
    """
    turns: list[Turn] = []
    attempts: list[_Attempt] = []
    for _ in range(dice.weighted(DEPTHS)):
        before = attempts[-1].draft if attempts and dice.chance(0.5) else None
        chosen = actions.correct(problem, dice, like=before)
        _check_correct(chosen.text(), problem, interpreter)
        if attempts and dice.chance(0.2):
            again = attempts[-1]
            critique = f"This is the same answer again. {again.critique}"
            attempt = _Attempt(again.draft, again.text, again.printed, critique)
        else:
            attempt = _fail(problem, chosen, [a.text for a in attempts], dice, interpreter)
            attempts.append(attempt)
        observation = f"Out: {attempt.printed}\nYour answer is wrong.\n{attempt.critique}"
        turns.append(Turn(chosen.text(), attempt.text, observation))
    return turns


def _fail(
    problem: Problem, chosen: actions.Draft, known: list[str], dice: Dice, interpreter: Interpreter
) -> _Attempt:
    """Draw actions until the interpreter says that one is wrong, and it is none of `known`."""
    while True:
        right = chosen if dice.chance(0.6) else actions.correct(problem, dice)
        spoiled = actions.spoil(right, dice.weighted(actions.MISTAKES), problem, dice)
        if spoiled is None:
            continue
        draft, critique = spoiled
        text = draft.text()
        printed = interpreter.run(code_of(text))
        if text not in known and len(printed) <= LONGEST_OUTPUT and not is_correct(printed, problem.answer):
            return _Attempt(draft, text, printed, critique)


def _check_correct(action: str, problem: Problem, interpreter: Interpreter) -> None:
    """Raise AssertionError where an action that should be correct is not: a fault of this generator."""
    printed = interpreter.run(code_of(action))
    if not is_correct(printed, problem.answer):
        raise AssertionError(f"expected {problem.answer}, {printed!r} was printed by\n{action}")


def pair_rows(instruction: str, turns: list[Turn]) -> Iterator[Row]:
    """Yield UltraInteract_pair rows, one per turn; `trajectory` is everything before the two actions."""
    parent = _digest(instruction)
    trajectory = [{"from": "user", "value": instruction}]
    for number, turn in enumerate(turns, start=1):
        yield {
            "id": f"{parent}_{len(turns)}_{number}",
            "parent_id": parent,
            "task": "Math_PoT",
            "dataset": "mini",
            "trajectory": list(trajectory),
            "chosen": turn.chosen,
            "rejected": turn.rejected,
        }
        trajectory.append({"from": "assistant", "value": turn.rejected})
        trajectory.append({"from": "user", "value": turn.observation})


def sft_rows(instruction: str, turns: list[Turn]) -> Iterator[Row]:
    """Yield UltraInteract_sft rows, one per correct action; `instruction` is the history as one text."""
    parent = _digest(instruction)
    history = instruction
    for number, turn in enumerate(turns, start=1):
        yield {
            "id": f"{_digest(history + turn.chosen)}_{len(turns)}_{number}",
            "parent_id": parent,
            "task": "Math_PoT",
            "dataset": "mini",
            "instruction": history,
            "response": turn.chosen,
        }
        history = "\n".join((history, turn.rejected, turn.observation))


def forest(seed: int) -> Iterator[tuple[Problem, list[Turn]]]:
    """Yield trees without end, no two with the same instruction."""
    seen: set[str] = set()
    index = 0
    with Interpreter() as interpreter:
        while True:
            dice = Dice(f"{seed}:{index}")
            problem = problems.draw(dice)
            while problem.instruction in seen:
                problem = problems.draw(dice)
            seen.add(problem.instruction)
            yield problem, grow(problem, dice, interpreter)
            index += 1


def make(count: int, seed: int) -> dict[str, list[Row]]:
    """Make the rows of `count` problems, by file stem (`FILES`)."""
    rows: dict[str, list[Row]] = {stem: [] for stem in FILES}
    for index, (problem, turns) in enumerate(islice(forest(seed), count)):
        suffix = "_heldout" if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 else ""
        rows[f"pair{suffix}"] += pair_rows(problem.instruction, turns)
        rows[f"sft{suffix}"] += sft_rows(problem.instruction, turns)
    return rows


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows as gzipped JSON lines, without name or time: the bytes depend on the rows (and on zlib) alone."""
    text = "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    # not gzip.compress: the operating system byte of its header differs between Python versions
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(text.encode())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Makes the mini data set of preference trees.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="of which every eighth is held out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stem, rows in make(arguments.problems, arguments.seed).items():
        path = arguments.out / f"{stem}.jsonl.gz"
        write(rows, path)
        trees = len({row["parent_id"] for row in rows})
        print(f"{path}: {len(rows)} rows, {trees} trees, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
