"""Computes and writes what a run reports: one vector of sums per step, as JSONL and TensorBoard events."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from silva.engine import file_errors
from silva.engine.errors import UserError
from silva.engine.objectives import Preference
from silva.engine.progress import say

SUMS = ("loss", "chosen_reward", "rejected_reward", "margin", "correct", "chosen", "rejected", "pairs")


def preference_sums(result: Preference, comparisons: Tensor) -> Tensor:
    """Sum the metrics of one row.

    Absent sides are not counted; margin and accuracy are over comparisons with both sides. Equal rewards count as half
    right, so that a policy that still equals its reference has the accuracy of chance (in TRL it has 0).

    Args:
        result: what the loss returned for the row.
        comparisons: (P, 2) integer, (chosen, rejected); -1 for an absent side.

    Returns:
        (8,) float64 sums in the order of `SUMS`, on the device; nothing is copied to the host here.
    """
    has_chosen, has_rejected = (comparisons[:, side] >= 0 for side in (0, 1))
    both = has_chosen & has_rejected
    chosen, rejected = result.chosen_reward.detach().double(), result.rejected_reward.detach().double()
    zero = torch.zeros_like(chosen)
    return torch.stack(
        [
            result.loss.detach().double().sum(),
            torch.where(has_chosen, chosen, zero).sum(),
            torch.where(has_rejected, rejected, zero).sum(),
            torch.where(both, chosen - rejected, zero).sum(),
            torch.where(
                both, 0.5 * ((chosen > rejected).double() + (chosen >= rejected).double()), zero
            ).sum(),
            has_chosen.double().sum(),
            has_rejected.double().sum(),
            both.double().sum(),
        ]
    )


def likelihood_sums(loss: Tensor) -> Tensor:
    """Return the vector of `preference_sums` for an objective without comparisons."""
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=loss.device)
    sums[0] = loss.detach().double().sum()
    return sums


def summarize(sums: Tensor, count: int) -> dict[str, float]:
    """Compute means from the global sums, which only here are copied to the host.

    Args:
        sums: (8,) summed over rows and ranks, in the order of `SUMS`.
        count: what the loss is divided by (tokens, comparisons or sides of the global batch).

    Returns:
        "loss" and, as far as there are such sides and comparisons, "reward_chosen", "reward_rejected", "reward_margin"
        and "reward_accuracy".
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    means = {"loss": total["loss"] / count}
    if total["chosen"]:
        means["reward_chosen"] = total["chosen_reward"] / total["chosen"]
    if total["rejected"]:
        means["reward_rejected"] = total["rejected_reward"] / total["rejected"]
    if total["pairs"]:
        means["reward_margin"] = total["margin"] / total["pairs"]
        means["reward_accuracy"] = total["correct"] / total["pairs"]
    return means


def _before(path: Path, step: int) -> list[str]:
    """Return the lines of the steps before one; a line that a kill has torn is of a step that is repeated anyway.

    If lines of other steps are lost, the file is kept under another name, which is said.
    """
    kept, trained = [], set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            number, kind = entry["step"], entry["kind"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(number, int) and number < step:
            kept.append(line)
            if kind == "train":
                trained.add(number)
    if len(trained) < step and path.exists():
        aside = path.with_suffix(".damaged.jsonl")
        shutil.copyfile(path, aside)
        say(
            f"damaged    {path}: the lines of {step - len(trained)} of {step} steps are lost; kept as {aside.name}"
        )
    return kept


class Journal:
    """Writes `metrics.jsonl` and TensorBoard events to a run's folder; does nothing on ranks that do not write.

    A resumed run drops the lines of the steps that it repeats, so that every step is in the file once.

    Args:
        folder: of the run.
        writes: whether this rank writes.
        start_step: the first step that this process runs.
    """

    def __init__(self, folder: Path, *, writes: bool, start_step: int) -> None:
        self._file = None
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        with file_errors.named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = _before(self._path, start_step)
            # written beside it and renamed, so that a kill loses no history
            repaired = self._path.with_suffix(".partial")
            repaired.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            repaired.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write one line `{"step", "kind", ...}`; kind is "train" or "validation".

        JSON has no numbers that are not finite: their names are listed under "not_finite".
        """
        if self._file is None:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line: dict[str, object] = {"step": step, "kind": kind, **finite}
        if len(finite) < len(values):
            line["not_finite"] = [name for name in values if name not in finite]
        with file_errors.named(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in finite.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        for opened in (self._file, self._board):
            try:
                with file_errors.named(self._path):
                    opened.close()
            except UserError:
                # what a full disk has refused before, it refuses again
                if error is None:
                    raise
