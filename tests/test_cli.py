"""How a program ends where something is wrong: one line, and never a process that waits for others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from silva.engine.parallel import groups

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from worlds import world

from silva.engine import cli
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Parallel


def refuse() -> None:
    raise UserError("this\nfile")


def crash() -> None:
    raise ZeroDivisionError("a mistake of ours")


def test_bad_input_is_one_line(capsys):
    assert cli.run(refuse) == 2
    assert capsys.readouterr().err == "silva: error: this file\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(crash)


@pytest.mark.parametrize(
    ("work", "code", "said"), [(refuse, 2, "error: this file"), (crash, 1, "a mistake of ours")]
)
def test_a_process_of_a_world_ends_at_once(work: Callable[[], None], code: int, said: str, capfd):
    """Even where leaving the world would wait for the others, as NCCL does for a collective that they stand in."""
    child = os.fork()
    if child == 0:
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        dist.destroy_process_group = lambda *unused: time.sleep(600)
        cli.run(work)
        os._exit(77)  # it came back
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert said in capfd.readouterr().err


def fail() -> str:
    dist.destroy_process_group = lambda *unused: pytest.fail("waits for the others")
    try:
        with groups.joined(Parallel()):
            raise UserError("no room here")
    except UserError as error:
        return str(error)


def test_a_process_that_fails_does_not_leave_the_world():
    assert world(2, fail) == ["no room here"] * 2


def fail_and_try_again() -> bool:
    with pytest.raises(UserError), groups.joined(Parallel()):
        raise UserError("no room here")
    return dist.is_initialized()


def test_a_single_process_does():
    assert world(1, fail_and_try_again) == [False]


@pytest.mark.parametrize("module", ["engine.train", "engine.export", "engine.plan", "recipes.mini.demo"])
@pytest.mark.parametrize("argument", ["--help", "--no-such-option"])
def test_the_command_line_is_read_before_torch_is_imported(module, argument):
    program = (
        f"import sys; from silva.{module} import main\n"
        f"try: main([{argument!r}])\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == f"{0 if argument == '--help' else 2} []"
