"""Saves a run's checkpoints: megatron-core's distributed format, published atomically, written behind training.

A checkpoint is a folder `step-00000120` with the model, the optimizer and a `run.json` that tells which run it belongs
to. The number is the step that comes next. The state is staged in host memory, a forked process of every rank writes
its part, and the checkpoint is published when all of them are done.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from silva.engine.checkpoint import plain_files, state, writer
from silva.engine.checkpoint.index import PARTIAL, PREFIX, checkpoints, publish
from silva.engine.errors import UserError


class Saver:
    """Writes a run's checkpoints into one folder, one at a time.

    Every method is collective.

    Args:
        folder: of all the run's checkpoints.
        keep: how many checkpoints are kept, the newest ones.
        asynchronous: whether training may go on while a checkpoint is written.

    Attributes:
        write: what writes a rank's files; a test may exchange it.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self.write: writer.Write = writer.write_files
        # forks a writer, and finishes a checkpoint when the writers of all ranks are done
        self._calls = AsyncCallsQueue()
        # the checkpoint that is being written
        self._target = folder

    def save(
        self,
        step: int,
        chunks: Sequence[Any],
        optimizer: Any,
        run: dict[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Stage the state of model and optimizer, and have it written; the state may change after the call.

        The checkpoint is written under another name and renamed when it is complete, so a killed run leaves no half
        checkpoint. The call first waits for an earlier checkpoint that is still being written.

        Args:
            step: the step that comes next.
            chunks: the model of this rank, one module per virtual pipeline stage.
            optimizer: of `get_megatron_optimizer`.
            run: what says which run it is, as JSON; `index.described` gives it back.
            wait: whether to return only when the checkpoint is published, as a saver that is not asynchronous always
                does.

        Raises:
            UserError: the checkpoint, or the one before it, could not be written.
        """
        self.wait()
        self._target = self.folder / f"{PREFIX}{step:08d}"
        partial_folder = self._new_partial()
        saved = state.sharded(chunks, optimizer, loading=False)
        content = {name: value for name, value in state.metadata().items() if name != "dp_cp_group"}
        request = writer.request(partial_folder, saved, content, self.write, forked=self.asynchronous)
        request.add_finalize_fn(partial(self._publish, partial_folder, self._target, {"step": step, **run}))
        if not self.asynchronous:
            self._finishing(partial(writer.execute, request))
            return
        self._calls.schedule_async_request(request)
        if wait:
            self.wait()

    def poll(self) -> None:
        """Publish the checkpoint in flight if every rank has written its part; costs nothing if there is none.

        Raises:
            UserError: the checkpoint could not be written.
        """
        if self._calls.get_num_unfinalized_calls():
            self._finishing(self._calls.maybe_finalize_async_calls)

    def wait(self) -> None:
        """Return when no checkpoint is in flight.

        Raises:
            UserError: the checkpoint could not be written.
        """
        while self._calls.get_num_unfinalized_calls():
            # many short collectives: a single one would exceed its time limit while it waits for the slowest writer
            self._finishing(self._calls.maybe_finalize_async_calls)
            time.sleep(0.01)

    def _new_partial(self) -> Path:
        """Make an empty folder with a new name, because writers of a killed run may still write into theirs."""

        def make() -> Path:
            found = self.folder / f"{self._target.name}.{secrets.token_hex(4)}{PARTIAL}"
            for stale in self.folder.glob(f"{PREFIX}*{PARTIAL}"):
                shutil.rmtree(stale, ignore_errors=True)
            found.mkdir(parents=True)
            return found

        partial_folder: Path = groups.from_first(make)
        return partial_folder

    def _publish(self, partial_folder: Path, final: Path, identity: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            publish(partial_folder, final, identity)
            for old in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def _finishing(self, work: Callable[[], Any]) -> None:
        try:
            # torch's index is written when the writers of all ranks are done
            with plain_files.in_use():
                work()
        # raised on every rank, with the reasons on the first one
        except CheckpointException as error:
            raise UserError(
                f"{self._target}: the checkpoint could not be written ({state.reasons(error)}); earlier "
                "checkpoints are whole: look at disk space and memory, then start the run again to resume"
            ) from error
