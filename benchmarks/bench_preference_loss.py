"""Measures a preference loss and its gradient in one launch, beside eager torch and torch.compile.

    python -m benchmarks.bench_preference_loss              on a GPU
    python -m benchmarks.bench_preference_loss --smoke      tests the benchmark itself on tiny shapes
                                                            (TRITON_INTERPRET=1 on a CPU runs the kernel itself)

All of them begin with per-position log-probs, which each peer gets in the form that it needs. TRL's formula sums
padded (2P, T) log-probs under a mask, then computes the sigmoid loss of its DPO trainer and its metrics; it runs
eagerly and under torch.compile. The project's own definition works on spans. Bytes are counted as 8 L: a log-prob is
read and a coefficient is written for each position.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, kernel_common
from benchmarks.kernel_common import MEBIBYTE
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Objective
from silva.kernels.dispatch import runs_kernels
from silva.kernels.preference_loss import PreferenceLoss, Structure, preference_loss
from silva.kernels.reference import sequence_sums

# (comparisons, scored tokens of each side): for the comparison with TRL, for one row, and for the bandwidth
SHAPES = [(256, 4096), (8, 1024), (8192, 4096)]
SMOKE = [(3, 20)]
BETA = 0.1


class Pairs:
    """Holds comparisons of two sequences that share nothing.

    Each comparison is a tree, and each position has one log-prob.
    """

    def __init__(self, comparisons: int, length: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        count = 2 * comparisons
        self.shape = (count, length)
        self.values = -torch.rand(count * length, device=device, generator=generator)
        self.values.requires_grad_()
        sums = self.values.detach().view(self.shape).sum(1)
        self.reference = sums + torch.randn(count, device=device, generator=generator)
        self.mask = torch.ones(self.shape, device=device)
        line = torch.arange(count + 1, dtype=torch.int32, device=device)
        tree = torch.arange(comparisons + 1, dtype=torch.int32, device=device)
        self.span = line[:-1].repeat_interleave(length)
        self.structure = Structure(
            span_start=line * length,
            span_pointer=line,
            span_index=line[:-1].contiguous(),
            comparisons=line[:-1].reshape(-1, 2),
            tree_start=torch.stack([2 * tree, 2 * tree, tree], 1),
            scored=torch.full((count,), length, dtype=torch.int32, device=device),
            absolute=torch.zeros(comparisons, dtype=torch.bool, device=device),
        )
        self._compiled = torch.compile(self._trl_loss, dynamic=False)

    def ours(self) -> PreferenceLoss:
        """Launch the kernel, which gives the loss and its gradient."""
        return preference_loss(
            self.values, self.structure, "dpo", reference_logprob=self.reference, beta=BETA
        )

    def definition(self) -> Tensor:
        """Compute the gradient by the project's torch definition, forward and backward."""
        s = self.structure
        sums = sequence_sums(self.values, self.span, s.span_pointer, s.span_index)
        settings = Objective(name="dpo", beta=BETA)
        found = OBJECTIVES["dpo"].preference(
            sums, self.reference, s.scored, s.comparisons, s.absolute, None, settings
        )
        return torch.autograd.grad(found.loss.sum(), self.values)[0]

    def _trl_loss(self, values: Tensor) -> Tensor:
        """Compute what TRL 1.16's DPOTrainer.compute_loss computes from per-token log-probs on.

        Chosen and rejected sequences alternate.
        """
        sums = (values.view(self.shape) * self.mask).sum(1)
        chosen, rejected = sums[::2], sums[1::2]
        reference_chosen, reference_rejected = self.reference[::2], self.reference[1::2]
        chosen_logratios, rejected_logratios = chosen - reference_chosen, rejected - reference_rejected
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen_logratios - rejected_logratios)).sum()
        chosen_rewards, rejected_rewards = (
            BETA * chosen_logratios.detach(),
            BETA * rejected_logratios.detach(),
        )
        (chosen_rewards > rejected_rewards).float().mean()
        (chosen_rewards - rejected_rewards).mean()
        return loss

    def trl(self) -> Tensor:
        """Compute the gradient by TRL's formula, eagerly."""
        return torch.autograd.grad(self._trl_loss(self.values), self.values)[0]

    def compiled(self) -> Tensor:
        """Compute the gradient by TRL's formula under torch.compile."""
        return torch.autograd.grad(self._compiled(self.values), self.values)[0]


def check(pairs: Pairs) -> float:
    """Return the largest relative difference between the coefficients, the kernel's and TRL's, and those of float64.

    Raises:
        SystemExit: the difference is more than float32's rounding of sums over the responses.
    """
    exact = Pairs.__new__(Pairs)
    exact.__dict__ |= vars(pairs)
    exact.values = pairs.values.detach().double().requires_grad_()
    exact.reference = pairs.reference.double()
    truth = exact.definition()
    found = [pairs.trl()]
    found += [pairs.ours().coefficient] if runs_kernels(pairs.values) else []
    found += [pairs.compiled()] if pairs.values.is_cuda else []
    error = max(float((x.double() - truth).abs().max() / truth.abs().max()) for x in found)
    # the margin is a difference of sums of T terms of size 1/2
    if error > 1e-6 * BETA * pairs.shape[1] + 1e-5:
        raise SystemExit(f"wrong coefficients at {pairs.shape}: error {error}")
    return error


def time_shape(pairs: Pairs, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each implementation with its time, bandwidth and peak memory."""
    runs = {"TRL, eager": pairs.trl, "definition, eager": pairs.definition}
    if runs_kernels(pairs.values):
        runs = {"ours": pairs.ours} | runs
    if pairs.values.is_cuda:
        runs["TRL, torch.compile"] = pairs.compiled
    peaks = {name: kernel_common.peak_bytes(run) for name, run in runs.items()}
    times = kernel_common.milliseconds(runs, repeats)
    return [
        {
            "shape": f"{pairs.shape[0] // 2}x{pairs.shape[1]}",
            "what": name,
            "ms": times[name],
            "GB/s": 8 * pairs.values.numel() / times[name] / 1e6,
            "MiB": peaks[name] / MEBIBYTE,
        }
        for name in runs
    ]


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_preference_loss", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    device = kernel_common.device()
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("no GPU found; on a CPU only --smoke runs")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    errors = []
    for shape in SMOKE if options.smoke else SHAPES:
        pairs = Pairs(*shape, device)
        errors.append(check(pairs))
        rows += time_shape(pairs, 2 if options.smoke else options.repeats)
    common.show(f"{device.type}, float32", list(rows[0]), [list(row.values()) for row in rows])
    figures: dict[str, Any] = {"error": max(errors)}
    first = {row["what"]: row["ms"] for row in rows if row["shape"] == rows[0]["shape"]}
    if "ours" in first:
        figures["times_faster_than_trl"] = first["TRL, eager"] / first["ours"]
        figures["gb_per_second"] = max(row["GB/s"] for row in rows if row["what"] == "ours")
    kernel_common.report(figures, rows, options.out)


if __name__ == "__main__":
    main()
