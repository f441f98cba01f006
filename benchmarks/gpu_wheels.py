"""Fetches the wheels that `gpu.sh --wheels` installs on a machine without a network.

    benchmarks/gpu.sh wheels FOLDER [--present FILE]

They are what the project depends on, pytest, pytest-xdist, hypothesis and Liger, for the target's Python on x86-64
Linux. torch, Triton, CUDA and what comes with torch anyway are left out. FILE lists what else the target has, as
`pip list` prints it there; that is left out too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("pytest>=8", "pytest-xdist", "hypothesis>=6.100", "liger-kernel")
# torch, and those of torch's own requirements of which the project asks no newer version
WITH_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*|sympy|mpmath|networkx|setuptools")
# packages for saved data sets and hub names, and for a run's journal: no part of the script runs code that uses them
UNUSED = ("datasets", "tensorboard")
# pip matches each name as it stands, so every version has to be listed
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)]
PLATFORMS += [f"manylinux{name}_x86_64" for name in (1, 2010, 2014)]


def main(arguments: list[str] | None = None) -> int:
    """Fetch the wheels and print their sizes.

    Returns:
        0; 2 after one line that names a file or folder that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="gpu.sh wheels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the target; default: 3.12")
    parser.add_argument("--present", type=Path, help="names of packages the target has")
    options = parser.parse_args(arguments)
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", options.python]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    try:
        present = names(options.present.read_text(encoding="utf-8")) if options.present else set()
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu.sh wheels: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    wanted = [
        f"{name}=={version}"
        for name, version in resolved(target)
        if name not in present and not WITH_TORCH.fullmatch(name)
    ]
    if wanted:
        pip("download", "--no-deps", "--dest", str(options.folder), *target, *wanted)
    sizes = {file.name: file.stat().st_size for file in options.folder.glob("*.whl")}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        print(f"{sizes[name] / 2**20:8.2f} MiB  {name}")
    print(f"wheels={len(sizes)} mib={sum(sizes.values()) / 2**20:.1f}")
    return 0


def resolved(target: list[str]) -> list[tuple[str, str]]:
    """Choose the versions of everything together, so that they fit each other; nothing is installed.

    Returns:
        (name, version) of every package.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [line for line in project["dependencies"] if not names(line) & set(UNUSED)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--report", str(report), "--target", folder]
        pip("install", *options, *target, *wanted, *BESIDE)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return sorted((normal(item["name"]), item["version"]) for item in found)


def pip(*arguments: str) -> None:
    """Run pip.

    Raises:
        SystemExit: pip failed, after saying why.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        *arguments,
    ]
    if subprocess.run(command).returncode:
        raise SystemExit(2)


def names(text: str) -> set[str]:
    """Return every word that may be a package's name."""
    return {normal(word) for word in re.findall(r"[A-Za-z0-9][\w.-]*", text)}


def normal(name: str) -> str:
    """Return a package's name in its normalized form."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
