"""Compiles every shipped kernel without a GPU and reads the binaries.

`python -m silva.kernels.aot` prints the registers, spills, shared memory and matrix instructions of every binary.
They show ahead of time which kernel cannot be fast, because it spills, and which cannot run, because its tile does not
fit. The command ends with 1 where an sm_90 binary spills, where one that should multiply on the tensor cores does not
(those of 16-bit types by HGMMA, Hopper's own), or where a build fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from silva.kernels.build import Build

MODULES = (
    "silva.kernels.tree_blocks",
    "silva.kernels.tree_attention",
    "silva.kernels.linear_logprob",
    "silva.kernels.preference_loss",
    "silva.kernels.layers",
)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# the architecture whose shipped tiles may not spill
STRICT = "sm_90"
# (registers, shared memory in bytes) of a multiprocessor
RESOURCES = {"sm_80": (65536, 164 << 10), "sm_90": (65536, 228 << 10), "sm_100": (65536, 228 << 10)}
# bytes of shared memory that a block takes beside what it asks for
RESERVED = 1024
COLUMNS = ("registers", "spill_loads", "spill_stores", "shared", "blocks", "hgmma", "matrix", "copies")


def main(arguments: list[str] | None = None) -> int:
    """Compile the builds, print a table of them, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m silva.kernels.aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--only", default="", help="only builds whose name matches this regular expression")
    options = parser.parse_args(arguments)
    # interpreted kernels cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)
    # Triton 3.9 warns where this is not set
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    faults = 0
    totals = dict.fromkeys(("builds", "spilling", "failed", "without_products"), 0)
    for target in options.target:
        builds = [build for build in _collect(target) if re.search(options.only, build.name)]
        print(f"\n{target:60}" + "".join(f"{name:>13}" for name in COLUMNS), flush=True)
        for build in builds:
            found = _in_child(build, target)
            fault = _judge(build, target, found, totals)
            faults += bool(fault)
            cells = "".join(f"{found.get(name, ''):>13}" for name in COLUMNS)
            print(f"{build.name:60}{cells} {fault}", flush=True)
    print("\n" + " ".join(f"{name}={count}" for name, count in (totals | {"faults": faults}).items()))
    return int(faults > 0 or not totals["builds"])


def _collect(target: str) -> list[Build]:
    capability = int(target.removeprefix("sm_")) if target.startswith("sm_") else 0
    return [build for name in MODULES for build in importlib.import_module(name).aot_builds(capability)]


def _judge(build: Build, target: str, found: dict[str, Any], totals: dict[str, int]) -> str:
    """Count one result, and say what is wrong with it, if anything."""
    totals["builds"] += 1
    if "error" in found:
        totals["failed"] += 1
        return found["error"]
    faults = []
    if found["spill_loads"] or found["spill_stores"]:
        totals["spilling"] += 1
        if target == STRICT:
            faults.append("spills")
    # "matrix" counts Hopper's instructions and all others
    needed = "hgmma" if target == STRICT and build.products == "hgmma" else "matrix"
    if build.products and not found[needed]:
        totals["without_products"] += 1
        faults.append("no HGMMA" if needed == "hgmma" else "no tensor-core products")
    if found["blocks"] == 0:
        faults.append("no block fits on a multiprocessor")
    return ", ".join(faults)


def _in_child(build: Build, target: str) -> dict[str, Any]:
    """Run `_compile` in a fork, because some compilations abort the process."""
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                try:
                    found = _compile(build, target)
                except Exception:
                    # whatever a compiler raises is the result of this build
                    found = {"error": traceback.format_exc().strip().splitlines()[-1][:200]}
                answer.write(json.dumps(found).encode())
                answer.flush()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            return {"error": f"the compiler aborted with status {status}"}
        answer.seek(0)
        return json.loads(answer.read())


def _compile(build: Build, target: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = target.startswith("sm_")
    where = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    names = build.kernel.arg_names
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.signature[name] for name in names},
        constexprs=build.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    compiled = triton.compile(
        source, target=where, options={"num_warps": build.warps, "num_stages": build.stages}
    )
    if not nvidia:
        return _read_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    found = _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    registers, shared = RESOURCES[target]
    threads = 32 * compiled.metadata.num_warps
    allocated = -(-found["registers"] // 8) * 8 * threads
    found["blocks"] = min(registers // allocated, shared // (found["shared"] + RESERVED), 2048 // threads)
    return found


def _read_cubin(binary: bytes, shared: int) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(file: str, what: str) -> str:
        return subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        code, usage = dump(file.name, "--dump-sass"), dump(file.name, "--dump-resource-usage")
    registers = re.search(r"\bREG:(\d+)", usage)
    assert registers, usage
    return {
        "registers": int(registers[1]),
        "spill_loads": len(re.findall(r"\bLDL\b", code)),
        "spill_stores": len(re.findall(r"\bSTL\b", code)),
        "shared": shared,
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "matrix": len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", code)),
        "copies": len(re.findall(r"\b(?:UTMALDG|LDGSTS)\b", code)),
    }


def _read_amd(assembly: str, shared: int) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spill_loads": number("vgpr_spill_count"),
        "spill_stores": number("sgpr_spill_count"),
        "shared": shared,
        "blocks": min((64 << 10) // max(shared, 1), 16),
        "matrix": len(re.findall(r"\bv_mfma", assembly)),
        "copies": len(re.findall(r"\bbuffer_load|\bglobal_load", assembly)),
    }


if __name__ == "__main__":
    sys.exit(main())
