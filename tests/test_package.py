"""What `pip install .` gives, and that the top-level folders take nobody else's name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "kernels", "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, from a copy: building in the checkout would leave its build folder there, and reuse it."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder)  # with any __pycache__, which must not get in
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    build = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", "out", "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (built,) = (source / "out").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module_recipe_and_the_mini_data(wheel):
    names = set(wheel.namelist())
    for folder in FOLDERS:
        wanted = {
            f"silva/{path.relative_to(ROOT).as_posix()}"
            for pattern in ("*.py", "*.yaml", "*.jsonl.gz")
            for path in (ROOT / folder).rglob(pattern)
        }
        assert wanted - names == set()
    assert "silva/engine/data/trees/tree.py" in names
    assert "silva/recipes/mini-sft.yaml" in names
    assert "silva/recipes/mini/pair.jsonl.gz" in names


def test_the_wheel_holds_nothing_else(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == {"silva", "silva-0.1.0.dist-info"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_the_installed_package_finds_its_recipes(wheel, tmp_path):
    wheel.extractall(tmp_path)
    printed = python(
        "from silva.engine.recipe.loading import load; recipe = load('mini-sft'); print(recipe.data.train[0].path)",
        cwd=tmp_path,
        path=tmp_path,
    )
    assert Path(printed) == tmp_path / "silva/recipes/mini/sft.jsonl.gz"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_package_of_the_same_name_wins_over_our_folder(name, tmp_path):
    """From the checkout's root, which `python -c` puts first on the path, and after `silva` was imported."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("WHO = 'theirs'\n")
    assert python(f"import silva.engine.errors, {name}; print({name}.WHO)", path=tmp_path) == "theirs"


def test_transformers_does_not_take_our_folder_for_its_kernels_package():
    """Our folder must change nothing about whether Hugging Face's `kernels` is there."""
    question = (
        "from importlib.metadata import distributions; from transformers.utils import is_kernels_available as ask;"
        "installed = any(d.name == 'kernels' for d in distributions()); print(ask(), installed)"
    )
    answer, installed = python(question).split()
    assert answer == "False" or installed == "True"


def python(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> str:
    """The output of `python -c code`, the working directory being first on its path."""
    unwanted = ("PYTHONPATH", "PYTHONSAFEPATH")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
