"""Processes that are stopped, or hang, in a world of several: who says so, and how soon."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

from silva.engine.parallel.heartbeat import Heartbeat

import pytest
import torch.distributed as dist

SECONDS = 3.0


class Process:
    """A rank, forked; what it prints on stderr goes to a file."""

    def __init__(self, rank: int, size: int, port: int, kind: str, log: Path) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                sys.stderr = log.open("w")
                rank_of_world(rank, size, port, kind)
                code = 0
            finally:
                os._exit(code)

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def lines(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("silva")]


def rank_of_world(rank: int, size: int, port: int, kind: str) -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    world = dist.PrefixStore("world", store)
    dist.init_process_group("gloo", store=world, rank=rank, world_size=size)
    with Heartbeat(dist.PrefixStore("own", store.clone()), rank, size, SECONDS) as heartbeat:
        if kind == f"stop early {rank}":
            os.kill(os.getpid(), signal.SIGSTOP)
        for step in range(3):
            with heartbeat.watched(f"step {step}"):
                if step == 2 and kind == f"stop {rank}":
                    # what is sent has to arrive first
                    time.sleep(SECONDS / 2)
                    os.kill(os.getpid(), signal.SIGSTOP)
                if step == 2 and kind == f"hang {rank}":
                    stuck()
                if kind == "slow":
                    time.sleep(SECONDS * 0.7)
                dist.barrier()
        if kind == "slow" and rank == 0:
            time.sleep(2 * SECONDS)
    dist.destroy_process_group()


def stuck() -> None:
    time.sleep(60)


@pytest.fixture
def started(tmp_path):
    made: list[Process] = []

    def begin(size: int, kind: str) -> list[Process]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        made.extend(Process(rank, size, port, kind, tmp_path / f"{rank}.log") for rank in range(size))
        return made

    yield begin
    for process in made:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def lines(processes: list[Process]) -> list[str]:
    return [line for process in processes for line in process.lines()]


def test_a_stopped_process_is_named_and_the_others_end(started):
    processes = started(3, "stop 1")
    assert [processes[0].code(), processes[2].code()] == [1, 1]
    [line] = lines(processes)
    pid, host = processes[1].pid, socket.gethostname()
    assert line.startswith(f"silva: error: rank 1, process {pid} on {host}, ")
    assert "no sign of life" in line
    assert "; it was at step 2, in " in line
    assert "test_heartbeat.py:" in line
    assert line.endswith("The job ends; started again, it goes on from its newest checkpoint")


def test_a_process_that_is_stopped_before_its_first_sign_is_named(started):
    processes = started(3, "stop early 2")
    assert [process.code() for process in processes[:2]] == [1, 1]
    [line] = lines(processes)
    assert line.startswith(
        "silva: error: rank 2, process unknown on an unknown host, has given no sign of life"
    )


def test_a_stopped_process_that_serves_the_store_is_noticed_too(started):
    processes = started(3, "stop 0")
    assert [process.code() for process in processes[1:]] == [1, 1]
    found = lines(processes)
    assert len(found) == 2
    assert all("the world's store at 127.0.0.1 (MASTER_ADDR) has not answered for" in line for line in found)


@pytest.mark.parametrize("rank", [0, 2])
def test_of_a_job_that_hangs_the_process_is_named_that_the_others_wait_for(rank, started):
    processes = started(3, f"hang {rank}")
    assert [process.code() for process in processes] == [1, 1, 1]
    [line] = lines(processes)
    assert f"rank {rank}, process {processes[rank].pid}" in line
    assert "has not got on for 0.05 minutes; it was at step 2, in" in line
    assert " stuck < " in line


def test_processes_that_get_on_are_left_alone(started):
    """Long steps, and a process that leaves long after the others."""
    processes = started(3, "slow")
    assert [process.code() for process in processes] == [0, 0, 0]
    assert lines(processes) == []


def test_a_job_that_is_stopped_as_a_whole_goes_on_afterwards(started):
    processes = started(2, "slow")
    time.sleep(1)
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * SECONDS)
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    assert [process.code() for process in processes] == [0, 0], lines(processes)
