"""Exports the newest checkpoint of a run as a Hugging Face checkpoint.

    python -m silva.engine.export RECIPE [key.path=value ...]

It serves a run that was interrupted, or exports in another number type or format. The layout may be any.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from silva.engine.cli import run
from silva.engine.progress import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what the command line asks for.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit code: 0, or 2 after one line that says what is wrong with the input.
    """
    parser = argparse.ArgumentParser(
        prog="silva.engine.export",
        description="Write the newest checkpoint of a run as a Hugging Face folder.",
    )
    parser.add_argument("recipe", help="the recipe of the run")
    parser.add_argument(
        "override", nargs="*", help="key.path=value, e.g. export.path=folder export.dtype=bfloat16"
    )
    options = parser.parse_args(arguments)

    def work() -> None:
        # torch takes seconds to import: a mistake on the command line is told before
        from silva.engine.recipe.loading import load
        from silva.engine.training.publish import export_checkpoint

        say(f"export={export_checkpoint(load(options.recipe, options.override))}")

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
