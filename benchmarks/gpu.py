"""Tests and measures Silva on one NVIDIA GPU; started by `gpu.sh`, which prepares the imports.

    benchmarks/gpu.sh [--parts NAME ...] [--out FOLDER] [--minutes 8.7] [--again]
    benchmarks/gpu.sh --smoke          the same code on a CPU with tiny sizes: tests the script, measures nothing

Every part is a process of its own with a share of the time, and writes each line to FOLDER/results.json as soon as it
is measured. What is there is not measured again, so the next run continues one that was cut short or was given other
parts; `--again` first forgets the named parts. At the end FOLDER/results.md is made from the JSON, and the figures are
printed as key=value.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from benchmarks.gpu_record import GO_ON, PAGE, Record, page
from benchmarks.installed import absent
from silva.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """Describes one part of the measurements.

    Attributes:
        title: its heading on the page of results.
        module: the module in `benchmarks` that runs it.
        seconds: its share of the time, for an H100 that has compiled nothing yet.
        interpreted: whether it runs in Triton's interpreter under --smoke.
        on_cpu: whether it runs on the CPU whatever the machine has.
    """

    title: str
    module: str
    seconds: int
    interpreted: bool = False
    on_cpu: bool = False


PARTS = {
    "tests": Part("Kernel tests, judged by float64", "gpu_kernels", 140, interpreted=True),
    "attention": Part("Tree attention", "gpu_kernels", 115, interpreted=True),
    "linear_logprob": Part("Log-probs without logits", "gpu_kernels", 60, interpreted=True),
    "preference_loss": Part("Preference loss", "gpu_kernels", 25, interpreted=True),
    "layers": Part("Norm, rotary positions, SwiGLU", "gpu_kernels", 45, interpreted=True),
    "step": Part("A training step", "gpu_step", 115),
    "plan": Part("The planner's prediction beside the measurement", "gpu_plan", 20, on_cpu=True),
}
# import names of what the parts need besides the standard library
NEEDED = ("torch", "triton", "megatron.core", "transformers", "tokenizers", "sentencepiece", "google.protobuf",
          "huggingface_hub", "pyarrow", "safetensors", "filelock", "pydantic", "yaml", "jinja2", "numpy", "psutil",
          "rich", "pytest", "hypothesis")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts.

    Returns:
        0; 1 where a line failed; 2 after one line that says what is wrong with the request.
    """
    options = parsed(arguments)
    try:
        check_packages()
        check_compiler()
        record = Record(options.out)
        if options.again:
            record.forget(options.parts)
        begin(options)
    except UserError as error:
        print(f"gpu: error: {error}", file=sys.stderr)
        return 2
    # a normal exit also ends the part's process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    unit = 60 * options.minutes / sum(PARTS[name].seconds for name in options.parts)
    share = 0.0
    try:
        for name in options.parts:
            share += PARTS[name].seconds * unit
            began = time.monotonic()
            run(name, started + share, options)
            print(f"   {name}: {time.monotonic() - began:.1f} s", flush=True)
    finally:
        record = Record(options.out)
        (options.out / PAGE).write_text(
            page(record, {n: p.title for n, p in PARTS.items()}), encoding="utf-8"
        )
    return closing(record, options)


class Parser(argparse.ArgumentParser):
    """Prints an error of the command line as one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage, and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME",
                        help=f"of: {', '.join(PARTS)}; default: all")  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: build/gpu, build/gpu-smoke with --smoke")
    parser.add_argument("--minutes", type=float, default=8.7, help="for all parts together; default: 8.7")
    parser.add_argument("--again", action="store_true", help="measure the named parts anew")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny sizes, nothing measured")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes: {options.minutes} is not above 0")
    # each part once, in the order of PARTS
    options.parts = [name for name in PARTS if name in options.parts]
    options.out = (options.out or ROOT / "build" / ("gpu-smoke" if options.smoke else "gpu")).absolute()
    return options


def check_packages() -> None:
    """Check that everything that the parts need is installed.

    Raises:
        UserError: something is not installed.
    """
    if missing := [name for name in NEEDED if absent(name)]:
        raise UserError(
            f"not installed: {', '.join(missing)}; without a network, fetch wheels elsewhere with `gpu.sh wheels "
            "FOLDER` and give them with --wheels FOLDER"
        )


def check_compiler() -> None:
    """Check that Triton can build its launcher; without it every kernel would fail.

    Raises:
        UserError: the C compiler or Python's headers are missing.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not compiler:
        raise UserError("Triton needs a C compiler: install gcc, or name one in CC")
    if not header.is_file():
        raise UserError(f"Triton needs Python's headers: {header} is missing (Debian: install python3-dev)")


def begin(options: argparse.Namespace) -> None:
    """Begin a run, in a process of its own, because this one must hold no memory of the GPU.

    Raises:
        UserError: there is no GPU, or the results in the folder are of another device.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_session", str(options.out), *["--smoke"] * options.smoke]
    found = subprocess.run(
        command, env=environment(None, options), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    if found.returncode:
        raise UserError((found.stderr.strip().splitlines() or ["the GPU does not answer"])[-1])


def environment(name: str | None, options: argparse.Namespace) -> dict[str, str]:
    """Return the environment variables for the process of a part, or for that of `begin` where `name` is None."""
    found = dict(os.environ)
    found.pop("TRITON_INTERPRET", None)
    part = PARTS[name] if name else None
    if options.smoke or (part and part.on_cpu):
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if options.smoke and part and part.interpreted:
            found["TRITON_INTERPRET"] = "1"
    return found


def run(name: str, until: float, options: argparse.Namespace) -> None:
    """Run one part, in as many processes as it takes.

    Args:
        name: of the part.
        until: the moment at which its time is up, in seconds of the monotonic clock.
        options: the command line.
    """
    part = PARTS[name]
    while True:
        left = until - time.monotonic()
        if left < 1:
            Record(options.out).add(name, "process", failed="no time was left; run this part again")
            return
        print(f"== {name}: {part.title}, at most {left:.0f} s", flush=True)
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{part.module}", name, str(options.out)]
        command += ["--seconds", f"{left - 2:.0f}", *["--smoke"] * options.smoke]
        before = len(Record(options.out).data["entries"])
        code = ended(command, left, environment(name, options), options.out / "log.txt")
        record = Record(options.out)
        if code == GO_ON and len(record.data["entries"]) > before:
            continue
        if code:
            why = "time was up" if code == -signal.SIGKILL else f"exit code {code}"
            last = [line for line in (options.out / "log.txt").read_text().splitlines() if line.strip()][-1:]
            record.add(name, "process", failed=f"{why}; log.txt ends: {' '.join(last)[:300]}")
        else:
            # an earlier run may have been cut short there
            record.drop(name, "process")
        return


def ended(command: list[str], seconds: float, environment: dict[str, str], log: Path) -> int:
    """Run a command, and kill it and its children when their time is up or this process ends.

    Returns:
        The exit code; that of SIGKILL where the time was up.
    """
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {' '.join(command)}\n")
        file.flush()
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file, start_new_session=True)
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                # this also ends what the process left behind
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def closing(record: Record, options: argparse.Namespace) -> int:
    """Print what is left undone, then the figures, and return the exit code."""
    entries = [entry for name in options.parts for entry in record.entries(name)]
    for why in ("missing", "failed"):
        for entry in entries:
            if why in entry:
                print(f"{why}: {entry['part']}: {entry['key']}: {entry[why]}")
    failed = sum("failed" in entry for entry in entries)
    figures = {"smoke": str(options.smoke).lower(), "device": record.data["device"].replace(" ", "_")}
    figures |= record.data["figures"]
    figures |= {"lines": sum(len(entry.get("rows", ())) for entry in entries)}
    figures |= {"missing": sum("missing" in entry for entry in entries), "failed": failed}
    figures |= {"results": options.out / "results.json"}
    for name, value in figures.items():
        print(f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
