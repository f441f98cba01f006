"""Describes one compilation of one kernel without a GPU, which kernel modules list for the ahead-of-time compiler."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Build(NamedTuple):
    """Holds one shipped configuration; every kernel module has `aot_builds(capability) -> list[Build]`.

    Attributes:
        name: such as "tree_attention forward D128 64x64".
        kernel: the `triton.jit` function.
        signature: type of each argument: "*bf16", "*i32", "i32", "fp32", "tensordesc<bf16[64, 128]>", "constexpr".
        constants: values of the constexpr arguments.
        aligned: the pointers and integers that the launcher guarantees to be divisible by 16.
        warps: of a program.
        stages: of the software pipeline.
        products: tensor-core products that the binary must contain: none, those of any kind, or on sm_90 Hopper's own,
            which alone reach its full rate.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 2
    products: Literal["", "any", "hgmma"] = ""
