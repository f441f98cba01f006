"""Lists the GPUs a plan can be made for, and the shares of their peaks that a run is assumed to reach.

Figures are the vendor's, per GPU: dense bfloat16 without sparsity; NVLink and network in one direction. Sources are
NVIDIA's data sheets of the A100 (2021), H100 (2023), H200 (2023) and of the DGX A100, H100, H200 and B200, whose
network is one adapter per GPU. The link to the host is PCI Express 4 or 5 with 16 lanes. `memory` is what the driver
leaves of the nominal size, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """Holds the figures of one kind of GPU.

    Attributes:
        name: what `--gpu` calls it.
        flops: operations per second.
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        nvlink: bytes per second in one direction.
        network: bytes per second in one direction.
        host: to and from the host's memory, bytes per second in one direction.
        per_node: GPUs of a node.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    host: float
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
    """Holds shares of the peak, and what a process takes beside its tensors; none was measured for this project.

    Attributes:
        products: share of `Gpu.flops` that matrix products reach.
        attention: the same of the attention kernel's forward pass; the loss to partly masked tiles is in it.
        attention_backward: the same of its backward pass.
        memory: share of the memory's bandwidth, where an operation only moves bytes.
        links: share of the rate of NVLink and network.
        hidden: share of the compute that overlapped communication can hide behind.
        row_fill: share of a packed row that is not padding.
        context: bytes of the CUDA context, compiled kernels, and the workspaces of NCCL and cuBLAS.
        fragmentation: share of activations and workspace that is lost between the allocator's blocks.
        headroom: share of the GPU's memory that is left for what a prediction does not know.
    """

    products: float = 0.65
    attention: float = 0.45
    attention_backward: float = 0.35
    memory: float = 0.75
    links: float = 0.75
    hidden: float = 0.8
    row_fill: float = 0.95
    context: float = 3.0 * GIB
    fragmentation: float = 0.05
    headroom: float = 0.05

    def lines(self) -> list[str]:
        """Return the assumptions as sentences for a reader of the plan."""
        return [
            f"matrix products {self.products:.0%} of peak, attention {self.attention:.0%} forward and "
            f"{self.attention_backward:.0%} backward, memory {self.memory:.0%}, links {self.links:.0%}",
            f"operations run one after the other, kernel launches take no time; overlapped communication hides behind "
            f"{self.hidden:.0%} of one micro-batch",
            f"{self.context / GIB:.1f} GiB for CUDA context, NCCL and cuBLAS; {self.fragmentation:.0%} of "
            f"activations and workspace lost to fragmentation; {self.headroom:.0%} of the memory must stay free",
            f"rows {self.row_fill:.0%} full, micro-batches of equal cost; no time is counted for reading "
            "data, validation, checkpoints, or the one pass for reference log-probs",
        ]
