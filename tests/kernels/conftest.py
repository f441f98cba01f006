"""Where kernel tests run: on the GPU where there is one, else in Triton's interpreter, in a process of their own.

`TRITON_INTERPRET=1` has to stand before Triton is imported and would slow every other test down. So a file of this
folder is one item, which runs the file in a child process with the variable set. While working on a kernel:
`TRITON_INTERPRET=1 python -m pytest tests/kernels/test_x.py -k name`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

IN_PROCESS = {"test_reference.py", "test_aot.py", "test_compiled_once.py"}  # they launch no kernel
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class InterpretedItem(pytest.Item):
    """All tests of one file, in a child."""

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "--color=no", "-p", "no:cacheprovider", str(self.path)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=self.config.rootpath
        )
        if child.returncode:
            raise AssertionError(f"{' '.join(command)}\n{child.stdout}{child.stderr}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        return str(excinfo.value)


class InterpretedFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedItem.from_parent(self, name="interpreted")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if INTERPRETED or torch.cuda.is_available() or module_path.name in IN_PROCESS:
        return None  # pytest's own way
    return InterpretedFile.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device whose tensors the kernels take."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or integers far out of range: an element that no kernel wrote cannot hide."""

    def poison(make):
        def poisoned_make(*arguments, **options):
            tensor = make(*arguments, **options)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(-(2**30))
            return tensor

        return poisoned_make

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
