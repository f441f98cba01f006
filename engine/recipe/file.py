"""Reads recipe files: YAML, `base` inheritance and `key.path=value` overrides, before any check of the keys.

The result is plain nested dicts and lists, with a record of where every key was set, so that an error can name it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from silva.engine.errors import UserError, shown

# The recipes lie beside the engine both in a checkout (engine/, recipes/) and installed (silva/engine/, ...).
PACKAGED = Path(__file__).resolve().parents[2] / "recipes"
COMMAND_LINE = "command line"

Key = tuple[str | int, ...]
# the file, or the command line, that set a key
Origins = dict[Key, str]


def packaged() -> list[str]:
    """Return the names of the packaged recipes that can be run (`*-base` recipes are only inherited from)."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml") if not path.stem.endswith("-base"))


def read(path_or_name: str, overrides: Sequence[str]) -> tuple[dict[str, Any], Origins, Path]:
    """Read a recipe, merge it over its bases and set the overrides.

    Args:
        path_or_name: a recipe file, or the name of a packaged recipe.
        overrides: each `key.path=value`.

    Returns:
        The keys, where each was set, and the recipe's file.

    Raises:
        UserError: a file is missing or no YAML, the bases form a circle, or an override names a key that cannot exist.
    """
    file = _locate(path_or_name, Path(), asker="")
    origins: Origins = {}
    raw = _read(file, origins, ())
    for override in overrides:
        _override(raw, override, origins)
    return raw, origins, file


def to_yaml(keys: dict[str, Any]) -> str:
    """Write keys as YAML, in the order given; `read` reads it back as the same keys."""
    return yaml.dump(keys, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def show(value: object) -> str:
    """Return a value as text for an error: on one line, at most 80 characters."""
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else shown(value)


# ---------------------------------------------------------------- files and bases


def _locate(name: str, folder: Path, asker: str) -> Path:
    """Find the file of a recipe argument or of a `base`.

    Args:
        name: a path relative to `folder`, or a packaged recipe's name.
        folder: of the file that names it.
        asker: what comes before the name in an error, such as the file whose `base` it is.

    Returns:
        The file.

    Raises:
        UserError: there is no such file.
    """
    is_path = name.endswith((".yaml", ".yml")) or os.sep in name
    file = folder / name if is_path else PACKAGED / f"{name}.yaml"
    if file.is_file():
        return file
    near = difflib.get_close_matches(Path(name).stem, packaged(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"packaged recipes: {', '.join(packaged())}"
    found = "no such file" if is_path else "no packaged recipe has this name, and it is no .yaml file"
    raise UserError(f"{asker}{name}: {found}; {hint}")


def _read(file: Path, origins: Origins, chain: tuple[str, ...]) -> dict[str, Any]:
    """Read one file and merge it over its bases; `chain` holds the files whose bases led here."""
    chain = (*chain, os.path.realpath(file))
    if chain[-1] in chain[:-1]:
        names = " -> ".join(os.path.basename(link) for link in chain[chain.index(chain[-1]) :])
        raise UserError(f"{file}: base: the bases form a circle: {names}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    own = _parse(text, f"{file}: ")
    if not isinstance(own, dict):
        raise UserError(f"{file}: found {show(own)}; a recipe is `key: value` lines")
    base = own.pop("base", None)
    inherited: dict[str, Any] = {}
    if isinstance(base, str):
        inherited = _read(_locate(base, file.parent, asker=f"{file}: base: "), origins, chain)
    elif base is not None:
        raise UserError(
            f"{file}: base: found {show(base)}; allowed: a recipe file, or a packaged recipe's name"
        )
    _resolve(own, file)
    return _merge(inherited, own, str(file), origins, ())


def _resolve(raw: dict[str, Any], file: Path) -> None:
    """Make inputs that start with "./" or "../" absolute, relative to the file that states them, in place.

    Sections of a wrong type are left as they are, and refused by later checks.
    """
    folder = os.path.dirname(os.path.abspath(file))

    def fix(section: Any, key: str) -> None:
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and value.startswith(("./", "../")):
            section[key] = os.path.normpath(os.path.join(folder, value))

    for name in ("model", "tokenizer", "reference"):
        fix(raw.get(name), "path")
    fix(raw.get("tokenizer"), "chat_template")
    data = raw.get("data")
    data = data if isinstance(data, dict) else {}
    decontaminate = data.get("decontaminate")
    against = decontaminate.get("against") if isinstance(decontaminate, dict) else None
    for sources in (data.get("train"), data.get("validation"), against):
        for source in sources if isinstance(sources, list) else ():
            fix(source, "path")


def _merge(
    under: dict[str, Any], over: dict[str, Any], origin: str, origins: Origins, at: Key
) -> dict[str, Any]:
    """Merge `over` over `under`: dicts are merged key by key, anything else is replaced."""
    merged = dict(under)
    for name, value in over.items():
        key = (*at, name)
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merge(merged[name], value, origin, origins, key)
        else:
            merged[name] = value
            _record(origins, key, origin)
    return merged


def _record(origins: Origins, key: Key, origin: str) -> None:
    """Record that `origin` set all of `key`, and drop what was recorded for keys inside it."""
    for stale in [other for other in origins if other[: len(key)] == key]:
        del origins[stale]
    origins[key] = origin


# ---------------------------------------------------------------- overrides


def _override(raw: dict[str, Any], text: str, origins: Origins) -> None:
    """Set one `key.path=value` in `raw`; the value, read as YAML, replaces what was there."""
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(f"{COMMAND_LINE}: {text}: this is no `key.path=value`; e.g. training.max_steps=20")
    parsed = _parse(value, f"{COMMAND_LINE}: {name}: the value is ")
    *path, last = name.split(".")
    node: Any = raw
    key: Key = ()
    for part in path:
        step = _step(node, part, key, name)
        key = (*key, step)
        if isinstance(node, dict) and node.get(step) is None:
            node[step] = {}
        node = node[step]
    step = _step(node, last, key, name)
    node[step] = parsed
    _record(origins, (*key, step), COMMAND_LINE)


def _step(node: Any, part: str, at: Key, name: str) -> str | int:
    """Return the dict key or list index that one `part` of the override `name` means in `node`, found at `at`."""
    here = ".".join(map(str, at))
    if not isinstance(node, dict | list):
        raise UserError(f"{COMMAND_LINE}: {name}: {here} is {show(node)}, which has no keys of its own")
    if isinstance(node, dict) and (node or not part.isdigit()):
        return part
    # the node is a list, or it is empty and the part is an index
    if part.isdigit() and int(part) < len(node):
        return int(part)
    allowed = f"0 to {len(node) - 1}" if node else f"none, it is empty; set it whole: '{here}=[{{...}}]'"
    raise UserError(f"{COMMAND_LINE}: {name}: found index {part} of {here}; allowed: {allowed}")


# ---------------------------------------------------------------- YAML


def _parse(text: str, said: str) -> Any:
    """Return what YAML says; an error begins with `said`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{said}not valid YAML: {_yaml_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{said}nested too deeply for a recipe") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + " ".join(str(getattr(error, "problem", None) or error).split())


class _Loader(yaml.SafeLoader):
    """Loads YAML as PyYAML's safe loader does, but with the scalars of YAML 1.2.

    So 5e-7 is a number, `no` and `on` are words, and 1:30 is text. Repeated keys are errors (PyYAML keeps the last
    one), and so are aliases (a recipe has `base` for that).
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed in a recipe", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Refuse scalars that are not what their tag says, such as `!!int abc`, and numbers of thousands of digits."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError) as error:
            problem = f"{shown(node.value)} is no {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse repeated keys."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
# drops those of YAML 1.1
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
