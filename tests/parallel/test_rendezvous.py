"""Worlds that cannot come together: each ends in one error that says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from silva.engine.parallel import rendezvous

import pytest

from silva.engine.errors import UserError

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture
def variables(monkeypatch):
    for name in (*WHOLE, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)

    def give(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_needs_no_variables(values, variables):
    variables(**values)
    assert rendezvous.world() == (0, 1)


@pytest.mark.parametrize("name", WHOLE)
def test_a_missing_variable_is_named(name, variables):
    variables(**{key: value for key, value in (WHOLE | {"RANK": "1"}).items() if key != name})
    with pytest.raises(UserError, match=f"but no {name}: start the program with torchrun"):
        rendezvous.world()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"RANK": "2"}, "RANK counts from 0"),
        ({"RANK": "-1"}, "RANK=-1, which is no number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, which is no number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT up to 65535"),
    ],
)
def test_values_that_cannot_be(values, told, variables):
    variables(**WHOLE | values)
    with pytest.raises(UserError, match=told):
        rendezvous.world()


def test_a_port_in_use(variables):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables(**WHOLE | {"MASTER_PORT": str(port)})
        with pytest.raises(UserError, match=f"port {port} .* is in use on this host"):
            rendezvous.join(0, 2)


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_a_first_process_that_does_not_answer(host, variables, monkeypatch):
    monkeypatch.setattr(rendezvous, "SECONDS", 0)
    variables(**WHOLE | {"MASTER_ADDR": host, "MASTER_PORT": str(_unused())})
    with pytest.raises(UserError, match="did not answer for 0 seconds"):
        rendezvous.join(1, 2)


def test_others_that_do_not_come(variables, monkeypatch):
    monkeypatch.setattr(rendezvous, "SECONDS", 1)
    variables(**WHOLE | {"MASTER_PORT": str(_unused())})
    with pytest.raises(UserError, match="2 processes of the world did not find each other"):
        rendezvous.join(0, 2)


def test_a_command_says_it_in_one_line(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in WHOLE}
    command = [sys.executable, "-m", "silva.engine.train", "mini-sft", f"output={tmp_path}"]
    ended = subprocess.run(command, env=environment | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith("silva: error: found WORLD_SIZE=2, but no RANK")


def _unused() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
    return port
