"""What a kernel module tells the ahead-of-time compiler: one compilation of one kernel, without a GPU."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Build(NamedTuple):
    """One shipped configuration. Every kernel module has `aot_builds(capability) -> list[Build]`."""

    name: str  # such as "tree_attention forward D128 64x64"
    kernel: Any  # the triton.jit function
    signature: dict[
        str, str
    ]  # argument -> "*bf16", "*i32", "i32", "fp32", "tensordesc<bf16[64, 128]>", "constexpr"
    constants: dict[str, Any]  # the constexpr arguments
    aligned: tuple[str, ...] = ()  # pointers and integers the launcher guarantees to be divisible by 16
    warps: int = 4
    stages: int = 2
    # tensor-core products it must contain: none, of any kind, or on sm_90 Hopper's own, which alone reach its full rate
    products: Literal["", "any", "hgmma"] = ""
