"""Compares tokens, losses, weights and exports with transformers and TRL, and prints one table.

    python -m benchmarks.fidelity [--only TEXT ...]

Every scored turn of every family of chat models is compared with the ids that transformers' chat template gives for the
conversation up to that turn. Then both sides train small models from the same rows for a few steps of AdamW: TRL's
trainers from the rows as TRL takes them, Silva from a recipe. What Silva exports is read by transformers and has to
give the loss (or the rewards) that Silva computes of the trained model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import transformers

from benchmarks import common
from benchmarks.fidelity import cases, families, readers

# largest differences of a loss and of a weight: both sides compute in float32, in another order
LOSS, WEIGHT, EXPORT = 1e-5, 2e-5, 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons and print them.

    Returns:
        The exit code: 1 if anything differs by more than rounding.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold one of these texts")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    def chosen(name: str) -> bool:
        return not options.only or any(text in name for text in options.only)

    rows: list[tuple[object, ...]] = []
    tokens, losses, weights, exports = 0, [0.0], [0.0], [0.0]
    with tempfile.TemporaryDirectory() as folder:
        for name in families.FAMILIES:
            model = families.checkpoint(name, Path(folder) / name)
            for turn in cases.turns(name, model, Path(folder) / f"{name}-exported"):
                if chosen(turn.name):
                    found = cases.mismatched([[turn.ours]], [[turn.theirs]])
                    tokens += found
                    rows.append((turn.name, len(turn.ours.ids), len(turn.theirs.ids), found, "", "", ""))
        for number, case in enumerate([*cases.trainings(), *cases.answered(), *readers.exports()]):
            if chosen(case.name):
                place = Path(folder) / f"case-{number}"
                with _silent():
                    measured = _measure(case, place)
                tokens += measured.tokens
                losses.append(measured.losses)
                weights.append(measured.weights)
                exports.append(measured.export or 0.0)
                shown = "" if measured.export is None else measured.export
                rows.append(
                    (
                        case.name,
                        measured.ours,
                        measured.theirs,
                        measured.tokens,
                        measured.losses,
                        measured.weights,
                        shown,
                    )
                )
    columns = ("case", "ours", "theirs", "tokens differ", "loss differs", "weights differ", "export differs")
    common.show("tokens of a turn, or loss of the first step", columns, rows)
    common.finish(
        {
            "cases": len(rows),
            "worst_token_mismatch": tokens,
            "worst_loss_difference": max(losses),
            "worst_weight_difference": max(weights),
            "worst_export_difference": max(exports),
        }
    )
    exact = max(losses) < LOSS and max(weights) < WEIGHT and max(exports) < EXPORT
    return 0 if tokens == 0 and exact else 1


def _measure(case: cases.Training | cases.Answers | readers.Export, place: Path) -> cases.Measured:
    if isinstance(case, cases.Training):
        return cases.train(case, place)
    return cases.answer(case, place) if isinstance(case, cases.Answers) else readers.read(case, place)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what runs print, forked processes included, out of the table."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nothing, stream)
        yield
    finally:
        sys.stdout.flush()
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
