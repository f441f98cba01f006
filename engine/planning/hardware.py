"""GPUs a plan can be made for, and what share of their peaks a run is assumed to reach.

Figures are the vendor's, per GPU: dense bfloat16 without sparsity; NVLink and network in one direction. Sources:
NVIDIA's data sheets of the A100 (2021), H100 (2023), H200 (2023) and of the DGX A100, H100, H200 and B200, whose
network is one adapter per GPU; to the host, PCI Express 4 or 5 with 16 lanes. `memory` is what the driver leaves
of the nominal size, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """Per GPU; bytes, bytes per second, operations per second."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    host: float  # to and from the host's memory, in one direction
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 312e12, 39.3 * GIB, 1.555e12, 300e9, 25e9, 31.5e9),
        Gpu("a100-80g", 312e12, 79.0 * GIB, 2.039e12, 300e9, 25e9, 31.5e9),
        Gpu("h100-80g", 989e12, 79.0 * GIB, 3.35e12, 450e9, 50e9, 63e9),
        Gpu("h200", 989e12, 139.5 * GIB, 4.8e12, 450e9, 50e9, 63e9),
        Gpu("b200", 2250e12, 178.0 * GIB, 7.7e12, 900e9, 50e9, 63e9),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the peak, and what a process takes beside its tensors. None of them was measured for this project."""

    products: float = 0.65  # matrix products
    attention: float = 0.45  # the attention kernel's forward pass; partly masked tiles are in it
    attention_backward: float = 0.35
    memory: float = 0.75  # of the memory's bandwidth, where an operation only moves bytes
    links: float = 0.75  # of NVLink and network
    hidden: float = 0.8  # of the compute that overlapped communication can hide behind
    row_fill: float = 0.95  # of a packed row that is not padding
    context: float = 3.0 * GIB  # CUDA context, compiled kernels, NCCL and cuBLAS workspaces
    fragmentation: float = 0.05  # of activations and workspace, lost between the allocator's blocks
    headroom: float = 0.05  # of the GPU's memory, left for what a prediction does not know

    def lines(self) -> list[str]:
        return [
            f"matrix products {self.products:.0%} of peak, attention {self.attention:.0%} forward and "
            f"{self.attention_backward:.0%} backward, memory {self.memory:.0%}, links {self.links:.0%}",
            f"operations one after the other, kernel launches free; overlapped communication hides behind "
            f"{self.hidden:.0%} of one micro-batch",
            f"{self.context / GIB:.1f} GiB for CUDA context, NCCL and cuBLAS; {self.fragmentation:.0%} of "
            f"activations and workspace lost to fragmentation; {self.headroom:.0%} of the memory must stay free",
            f"rows {self.row_fill:.0%} full, micro-batches of equal cost; no time for reading "
            "data, validation, checkpoints, or the one pass for reference log-probs",
        ]
