"""Trains the model that a recipe describes.

    python -m silva.engine.train RECIPE [key.path=value ...]

The command trains in one process; torchrun starts the same module in several.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from silva.engine.cli import run
from silva.engine.progress import say
from silva.engine.recipe.file import packaged

# torch takes seconds to import: a mistake on the command line is told before
if TYPE_CHECKING:
    from silva.engine.training.trainer import Summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe that the command line names.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit code: 0, or 2 after one line that says what is wrong with the input.
    """
    parser = argparse.ArgumentParser(
        prog="silva.engine.train",
        description="Train what a recipe says, resuming if it was interrupted, and export the model.",
    )
    parser.add_argument("recipe", help=f"a .yaml file, or one of: {', '.join(packaged())}")
    parser.add_argument("override", nargs="*", help="key.path=value, e.g. training.max_steps=20")
    options = parser.parse_args(arguments)

    def work() -> None:
        from silva.engine.recipe.loading import load
        from silva.engine.training.trainer import train

        report(train(load(options.recipe, options.override)))

    return run(work)


def report(summary: Summary) -> None:
    """Print the closing lines of a run, as `key=value` pairs."""
    for name, values in (("before", summary.before), ("after", summary.after), ("last_step", summary.last)):
        if values:
            say(" ".join(f"{name}_{key}={value:.6g}" for key, value in values.items()))
    if summary.unrolled_tokens:
        say(f"unique_over_unrolled={summary.unique_tokens / summary.unrolled_tokens:.4f}")
    say(f"steps={summary.steps} export={summary.export}")


if __name__ == "__main__":
    sys.exit(main())
