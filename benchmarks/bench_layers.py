"""Compares the fused layer operations (norms, rotary positions, SwiGLU) with torch, torch.compile and Liger.

    python -m benchmarks.bench_layers               on a GPU: one row of 8,192 tokens of a 7B model, bfloat16
    python -m benchmarks.bench_layers --smoke       tests the benchmark itself on tiny shapes (TRITON_INTERPRET=1 on a
                                                    CPU runs the kernels themselves)

Bytes are counted as the fewest possible: inputs, outputs and gradients once each. Every result is first compared with
the float64 definition.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, kernel_common
from benchmarks.installed import absent
from silva.kernels import layers, reference

EPSILON = 1e-5
# relative, in the norm: it allows two or three roundings of 2^-9 each, and twice that where the interpreter truncates
CLOSE = 1e-2


class Size(NamedTuple):
    """Holds the sizes of one row and of the model's layers."""

    tokens: int = 8192
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    ffn: int = 14336


SMOKE = Size(12, 40, 4, 2, 8, 24)


class Run(NamedTuple):
    """Holds one way to compute an operation, on tensors of its own, because some peers write into what they are given.

    Attributes:
        call: computes the outputs from the inputs.
        inputs: of the operation.
        grads: gradients of the outputs.
    """

    call: Callable[..., Sequence[Tensor]]
    inputs: list[Tensor]
    grads: Sequence[Tensor] = ()


class Operation:
    """Holds an operation, its inputs and everything that computes it.

    Attributes:
        name: of the operation.
        passes: elements that the forward and the backward pass move, as multiples of one part of the inputs.
        unit: the number of parts that the inputs consist of.
        size: of the row and the layers.
        device: of all tensors.
        inputs: drawn at random.
        grads: gradients of the outputs, drawn at random.
    """

    name: str
    passes: tuple[int, int]

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.size, self.device = size, device
        generator = torch.Generator(device).manual_seed(0)
        self.inputs = [
            torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in self.shapes()
        ]
        outputs = self.definition(*self.inputs)
        self.grads = [torch.randn(y.shape, device=device, dtype=dtype, generator=generator) for y in outputs]

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the inputs."""
        raise NotImplementedError

    def definition(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Compute the operation in torch, in any float type."""
        raise NotImplementedError

    def ours(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Compute the operation with Silva's kernels."""
        raise NotImplementedError

    def liger(self) -> Run:
        """Return Liger's way to compute the operation."""
        raise NotImplementedError

    def bytes(self) -> tuple[float, float]:
        """Return the bytes that the forward pass moves, and those that forward and backward pass move together."""
        size = sum(x.nbytes for x in self.inputs if x.dim() > 1)
        forward, backward = self.passes
        return size * forward / self.unit, size * (forward + backward) / self.unit

    unit = 1

    def run(self, peer: str) -> Run:
        """Return one peer's way to compute the operation, on fresh tensors."""
        calls = {
            "silva": self.ours,
            "torch": self.definition,
            "torch.compile": torch.compile(self.definition, dynamic=False),
        }
        made = self.liger() if peer == "Liger" else Run(calls[peer], self.inputs)
        inputs = [x.detach().clone().requires_grad_() for x in made.inputs]
        return Run(made.call, inputs, [g.clone() for g in self.grads])

    def both(self, run: Run) -> list[Tensor]:
        """Run the forward and the backward pass, and return the outputs and the gradients of the inputs."""
        outputs = run.call(*run.inputs)
        return [*outputs, *torch.autograd.grad(outputs, run.inputs, run.grads)]

    def check(self, peer: str) -> float:
        """Return the largest relative error, in the norm, of a peer's outputs and gradients.

        Raises:
            SystemExit: the error is more than rounding.
        """
        wide = [x.detach().double().requires_grad_() for x in self.inputs]
        outputs = self.definition(*wide)
        truth = [*outputs, *torch.autograd.grad(outputs, wide, [g.double() for g in self.grads])]
        found = self.both(self.run(peer))
        found = [*found[: len(outputs)], *self.joined(found[len(outputs) :])]
        error = max(
            float((a.double() - b.detach()).norm() / b.detach().norm())
            for a, b in zip(found, truth, strict=True)
        )
        if not error < CLOSE:
            raise SystemExit(f"{self.name}, {peer}: wrong: {error:.2g} from float64")
        return error

    def joined(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return a peer's gradients as those of `inputs`."""
        return gradients


class Norm(Operation):
    """Measures the RMS norm."""

    name, passes = "rms_norm", (2, 3)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the hidden states and of the weight."""
        return [(self.size.tokens, 1, self.size.hidden), (self.size.hidden,)]

    def definition(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Compute the norm with the reference."""
        return [reference.rms_norm(*inputs, EPSILON)]

    def ours(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Compute the norm with Silva's kernel."""
        return [layers.rms_norm(*inputs, EPSILON)]

    def liger(self) -> Run:
        """Return Liger's norm."""
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return Run(lambda x, w: [LigerRMSNormFunction.apply(x, w, EPSILON, 0.0, "llama", False)], self.inputs)


class Rotary(Operation):
    """Measures rotary positions on the queries and keys of one layer.

    The angles are given, as they are in every layer but the first.
    """

    name, passes = "rotary", (2, 2)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of queries and keys, after making the positions and their angles."""
        size = self.size
        self.position = torch.arange(size.tokens, dtype=torch.int32, device=self.device) % 1000
        self.frequency = 1e4 ** -(torch.arange(0, size.head, 2, device=self.device) / size.head)
        self.angles = layers.rotary_angles(self.position, self.frequency)
        return [(size.tokens, heads, size.head) for heads in (size.heads, size.kv_heads)]

    def definition(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Rotate queries and keys by the definition."""
        cos, sin = (x[:, None] for x in self.angles)
        found = []
        for x in inputs:
            first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            found.append(turned.to(x.dtype))
        return found

    def ours(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Rotate queries and keys with Silva's kernel."""
        return [layers.rotary(x, self.position, self.frequency, angles=self.angles) for x in inputs]

    def liger(self) -> Run:
        """Return Liger's rotation."""
        from liger_kernel.ops.rope import LigerRopeFunction

        cos, sin = (torch.cat([x, x], -1)[None] for x in self.angles)

        def call(q: Tensor, k: Tensor) -> Sequence[Tensor]:
            found = LigerRopeFunction.apply(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)
            return [x[0].transpose(0, 1) for x in found]

        return Run(call, self.inputs)


class NormRotary(Rotary):
    """Measures Qwen3's norm of every head and its rotation; Liger takes them one after the other."""

    name, passes = "norm_rotary", (2, 3)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of queries, keys and the weights of their norms."""
        return [*super().shapes(), (self.size.head,), (self.size.head,)]

    def definition(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Normalise and rotate queries and keys by the definitions."""
        query, key, *weights = inputs
        return super().definition(
            *(reference.rms_norm(x, w, EPSILON) for x, w in zip((query, key), weights, strict=True))
        )

    def ours(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Normalise and rotate queries and keys with Silva's kernel."""
        query, key, *weights = inputs
        return [
            layers.rotary(x, self.position, self.frequency, angles=self.angles, norm=(w, EPSILON))
            for x, w in zip((query, key), weights, strict=True)
        ]

    def liger(self) -> Run:
        """Return Liger's norm and rotation."""
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        turn = super().liger().call

        def call(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Sequence[Tensor]:
            return turn(
                *(
                    LigerRMSNormFunction.apply(x, w, EPSILON, 0.0, "llama", False)
                    for x, w in ((q, q_weight), (k, k_weight))
                )
            )

        return Run(call, self.inputs)


class SwiGLU(Operation):
    """Measures SwiGLU."""

    name, passes, unit = "swiglu", (3, 5), 2

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of gate and up in one tensor."""
        return [(self.size.tokens, 1, 2 * self.size.ffn)]

    def definition(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Compute SwiGLU by its definition."""
        gate, up = inputs[0].chunk(2, -1)
        return [F.silu(gate) * up]

    def ours(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Compute SwiGLU with Silva's kernel."""
        return [layers.swiglu(*inputs)]

    def liger(self) -> Run:
        """Return Liger's SwiGLU, whose gate and up are tensors of their own, as two projections give them."""
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return Run(lambda gate, up: [LigerSiLUMulFunction.apply(gate, up)], [*self.inputs[0].chunk(2, -1)])

    def joined(self, gradients: list[Tensor]) -> list[Tensor]:
        """Join the gradients of gate and up."""
        return [torch.cat(gradients, -1)]


OPERATIONS: tuple[type[Operation], ...] = (Norm, Rotary, NormRotary, SwiGLU)
# each peer and the module that it needs
PEERS = {"silva": "triton", "torch": "torch", "torch.compile": "torch", "Liger": "liger_kernel"}


def missing(peer: str, device: torch.device) -> str | None:
    """Return why a peer cannot be measured, or None."""
    if peer in ("torch.compile", "Liger") and device.type != "cuda":
        return "runs on GPUs only"
    return absent(PEERS[peer])


def time_operation(operation: Operation, peers: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Return one row for each peer with its median times in milliseconds; the peers run in turns."""
    made = {name: operation.run(name) for name in peers}
    forward = {name: (lambda run=run: run.call(*run.inputs)) for name, run in made.items()}
    both = {name: (lambda run=run: operation.both(run)) for name, run in made.items()}
    moved = operation.bytes()
    with torch.no_grad():
        times = [kernel_common.milliseconds(forward, repeats)]
    times.append(kernel_common.milliseconds(both, repeats))
    return [
        {
            "operation": operation.name,
            "who": name,
            "forward_ms": times[0][name],
            "forward_GB/s": moved[0] / times[0][name] / 1e6,
            "both_ms": times[1][name],
            "both_GB/s": moved[1] / times[1][name] / 1e6,
        }
        for name in peers
    ]


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_layers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    device = kernel_common.device()
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("no GPU found; on a CPU only --smoke runs")
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"error": 0.0}
    for kind in OPERATIONS:
        operation = kind(SMOKE if options.smoke else Size(), device)
        peers = []
        for name in PEERS:
            if why := missing(name, device):
                print(f"{name}: {why}")
            else:
                figures["error"] = max(figures["error"], operation.check(name))
                peers.append(name)
        rows += time_operation(operation, peers, 2 if options.smoke else options.repeats)
        figures[f"{kind.name}_gb_per_second"] = next(
            r["both_GB/s"] for r in rows if r["operation"] == kind.name and r["who"] == "silva"
        )
    common.show(f"{device.type}, bfloat16", list(rows[0]), [list(row.values()) for row in rows])
    kernel_common.report(figures, rows, options.out)


if __name__ == "__main__":
    main()
