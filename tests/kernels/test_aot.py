"""The ahead-of-time compiler on the kernels that ship, and on one that must not."""

import os
import re
import subprocess
import sys

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
# every kernel with the tiles of Mistral-7B; `python -m silva.kernels.aot` builds the other head sizes and GPUs
MAIN = "^(?!tree_attention)|D128 G4 bf16"


def run(*command: str) -> tuple[int, str, dict[str, int]]:
    """(exit code, output, figures of the last line)."""
    child = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True)
    output = child.stdout + child.stderr
    figures = (
        dict(re.findall(r"(\w+)=(\d+)", child.stdout.strip().splitlines()[-1]))
        if child.stdout.strip()
        else {}
    )
    return child.returncode, output, {name: int(value) for name, value in figures.items()}


def test_shipped_kernels_compile_for_hopper_without_spills():
    code, output, figures = run("-m", "silva.kernels.aot", "--target", "sm_90", "--only", MAIN)
    assert code == 0, output
    assert figures["faults"] == figures["spilling"] == figures["failed"] == figures["without_products"] == 0
    for kernel in ("forward", "query_gradient", "key_gradient"):
        # registers, spill loads, spill stores, shared memory, blocks, HGMMA, all matrix instructions, bulk copies
        [line] = re.findall(rf"tree_attention {kernel} D128 G4 bf16 \d+x\d+ w\d s\d +([\d ]+)", output)
        registers, _, _, shared, blocks, hgmma, products, copies = map(int, line.split())
        assert registers <= 255
        assert shared <= 227 << 10
        assert blocks >= 1
        assert products == hgmma > 0
        assert copies > 0


def test_a_spill_is_a_fault():
    code = """if True:
        import sys
        from silva.kernels import aot, tree_attention_tiles as table
        big = table.Tile(128, 128, 4, 2)
        table.SHIPPED["sm_90", 128, 2] = table.Tiles(big, big, big)
        sys.exit(aot.main(["--target", "sm_90", "--only", "forward D128 G4 bf16 128"]))
    """
    exit_code, output, figures = run("-c", code)
    assert exit_code == 1, output
    assert figures["spilling"] == figures["faults"] == 1


def test_a_build_that_fails_is_a_fault():
    code = """if True:
        import sys
        from silva.kernels import aot, tree_attention_tiles as table
        odd = table.Tile(48, 64, 4, 2)  # a block's sides are powers of two
        table.SHIPPED["sm_90", 128, 2] = table.Tiles(odd, odd, odd)
        sys.exit(aot.main(["--target", "sm_90", "--only", "forward D128 G4 bf16 48"]))
    """
    exit_code, output, figures = run("-c", code)
    assert exit_code == 1, output
    assert figures["failed"] == figures["faults"] == 1
