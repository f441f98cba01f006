"""Makes the map of every file in docs/architecture.md from the first lines of the files' docstrings: `make map`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "## Every file\n"
ROOMS = {
    "engine": "Commands, and what all rooms use",
    "engine/recipe": "Recipes",
    "engine/data": "Data: the pipeline over the next three rooms",
    "engine/data/reading": "Data: from files to conversations",
    "engine/data/text": "Data: from conversations to tokens",
    "engine/data/trees": "Data: trees, rows and their balance",
    "engine/model": "The model",
    "engine/model/families": "The families of models",
    "engine/parallel": "Processes and the optimizer",
    "engine/training": "Training",
    "engine/checkpoint": "Checkpoints",
    "engine/planning": "The planner",
    "kernels": "Kernels",
    "recipes/mini": "The demo",
    "benchmarks": "Benchmarks",
    "benchmarks/fidelity": "The comparison with transformers and TRL",
    "benchmarks/clients": "Servers of exported models",
}


def files() -> list[Path]:
    """The Python files of the product and its benchmarks that hold code, relative to the checkout."""
    found = [
        path
        for folder in ("engine", "kernels", "recipes", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    return sorted(path.relative_to(ROOT) for path in found if path.name != "__init__.py")


def made() -> str:
    """What follows `BEGIN`; KeyError where a file lies in a folder that has no name."""
    by_room: dict[str, list[str]] = {room: [] for room in ROOMS}
    for path in files():
        text = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
        by_room[str(path.parent)].append(f"| [`{path}`](../{path}) | {text.splitlines()[0]} |")
    lines = []
    for room, rows in by_room.items():
        lines += ["", f"### {ROOMS[room]}: `{room}/`", "", "| file | what it does |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    head, begin, _ = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + begin + made())


if __name__ == "__main__":
    main()
