"""`benchmarks/gpu.sh`: the record of results, how a run is continued, and a whole run on the CPU with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"date": "today"}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def record(tmp_path):
    from benchmarks.gpu_record import Record

    made = Record(tmp_path)
    made.begin(FACTS, smoke=True, device="cpu")
    return made


def session(folder: Path, part: str = "layers", seconds: float = 60.0):
    from benchmarks.gpu_session import Session

    return Session(Namespace(part=part, out=folder, seconds=seconds, smoke=True))


def again(folder: Path):
    """The next run of the same folder."""
    from benchmarks.gpu_record import Record

    found = Record(folder)
    found.begin(FACTS, smoke=True, device="cpu")
    return found


def never():
    raise AssertionError("this was measured already")


# ---------------------------------------------------------------- the record


def test_what_is_measured_is_not_measured_again(record, tmp_path):
    assert session(tmp_path).line("norm", lambda: {"ms": 1.5})
    assert session(tmp_path).line("norm", never)  # the same run
    again(tmp_path)
    assert session(tmp_path).line("norm", never)
    assert session(tmp_path).record.rows("layers") == [{"ms": 1.5}]


def test_a_failed_line_is_tried_once_in_each_run(record, tmp_path, capsys):
    def fails():
        raise SystemExit("another result:\nby far")

    assert not session(tmp_path).line("norm", fails)
    assert session(tmp_path).line("other", lambda: {"ms": 2.0})  # the next line is measured all the same
    assert not session(tmp_path).line("norm", never)
    (entry, _) = session(tmp_path).record.entries("layers")
    assert entry == {"part": "layers", "key": "norm", "run": 0, "failed": "SystemExit: another result:"}
    assert "by far" in capsys.readouterr().err  # the whole of it goes to the log
    again(tmp_path)
    assert session(tmp_path).line("norm", lambda: {"ms": 1.0})
    assert [entry["run"] for entry in session(tmp_path).record.entries("layers")] == [0, 1]
    assert not any("failed" in entry for entry in session(tmp_path).record.entries("layers"))


def test_rows_beside_a_failure_stay_and_are_tried_again(record, tmp_path):
    from benchmarks.gpu_session import Outcome

    assert session(tmp_path).lines("file", lambda: Outcome([{"passed": 3}], "1 tests: test_x"))
    again(tmp_path)
    assert session(tmp_path).lines("file", lambda: Outcome([{"passed": 4}], None))
    assert session(tmp_path).record.entries("layers") == [
        {"part": "layers", "key": "file", "run": 1, "rows": [{"passed": 4}]}
    ]


def test_without_time_a_line_is_left_for_the_next_run(record, tmp_path):
    assert not session(tmp_path, seconds=0).line("norm", never)
    assert session(tmp_path).record.entries("layers")[0]["failed"] == "no time was left; run this part again"
    again(tmp_path)
    assert session(tmp_path).line("norm", lambda: {"ms": 1.0})


def test_a_peer_that_was_missing_is_looked_for_in_each_run(record, tmp_path):
    session(tmp_path).missing("Liger", "not installed")
    again(tmp_path)
    assert session(tmp_path).line("Liger", lambda: {"ms": 1.0})
    session(tmp_path).missing("Liger", "not installed")  # measured: what was found stays
    assert session(tmp_path).record.rows("layers") == [{"ms": 1.0}]


def test_parts_are_forgotten_one_by_one(record):
    for part in ("layers", "step"):
        record.add(part, "a", rows=[{"ms": 1.0}])
    record.forget(["step"])
    assert record.rows("layers") == [{"ms": 1.0}]
    assert record.entries("step") == []


def test_results_of_two_devices_never_stand_in_one_file(record, tmp_path):
    from benchmarks.gpu_record import Record
    from silva.engine.errors import UserError

    for device, smoke in (("NVIDIA H200", False), ("cpu", False)):
        with pytest.raises(UserError, match="choose another --out"):
            Record(tmp_path).begin(FACTS, smoke=smoke, device=device)
    assert len(Record(tmp_path).data["runs"]) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_a_foreign_file_is_refused_and_kept(tmp_path, text):
    from benchmarks.gpu_record import Record
    from silva.engine.errors import UserError

    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="move it away"):
        Record(tmp_path)
    assert (tmp_path / "results.json").read_text() == text


def test_the_page_has_a_table_for_each_kind_of_row(record):
    from benchmarks.gpu_record import page

    record.add(
        "step",
        "a",
        rows=[{"table": "steps", "who": "x|y", "ms": 12345.6}, {"table": "steps", "GiB": 0.51234}],
    )
    record.add("step", "b", rows=[{"table": "kernels", "share": 1}])
    record.add("step", "c", failed="OutOfMemoryError: 3 GiB")
    record.add("plan", "d", missing="no rows")
    record.data["figures"]["mfu"] = 0.456789
    text = page(record, {"plan": "Prediction", "step": "A step"})
    assert text.startswith("# Silva on cpu\n\n**A smoke run")
    assert "- run 0: date today\n" in text
    assert "**steps**\n\n| who | ms | GiB |\n|---|---|---|\n| x/y | 12,346 |  |\n|  |  | 0.5123 |\n" in text
    assert "**kernels**\n\n| share |\n|---|\n| 1 |\n" in text
    assert "- failed: c: OutOfMemoryError: 3 GiB\n" in text
    assert text.index("## Prediction") < text.index("- missing: d: no rows") < text.index("## A step")
    assert "## Figures\n\n- mfu: 0.4568\n" in text


# ---------------------------------------------------------------- parts as processes


def run_part(monkeypatch, folder: Path, code: str, seconds: float = 30.0) -> list[dict]:
    """The entries of a part whose process runs `code`; its argv is [-c, part, folder, --seconds, n]."""
    import time

    from benchmarks import gpu
    from benchmarks.gpu_record import Record

    own = gpu.ended

    def ended(command, left, environment, log):
        return own([sys.executable, "-c", code, *command[5:]], left, environment, log)

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "ended", ended)
        gpu.run("layers", time.monotonic() + seconds, SimpleNamespace(out=folder, smoke=False))
    return Record(folder).entries("layers")


def test_a_process_that_dies_is_a_failed_line_with_its_last_words(record, monkeypatch, tmp_path):
    found = run_part(monkeypatch, tmp_path, "raise SystemExit('CUDA is gone')")
    assert [(e["key"], e["failed"]) for e in found] == [
        ("process", "exit code 1; log.txt ends: CUDA is gone")
    ]
    again(tmp_path)
    assert run_part(monkeypatch, tmp_path, "pass") == []  # went through: nothing is left of it


def test_a_process_is_killed_when_its_time_is_up(record, monkeypatch, tmp_path):
    found = run_part(monkeypatch, tmp_path, "import time; time.sleep(60)", seconds=2.0)
    assert found[0]["failed"].startswith("time was up")


def test_a_process_that_cannot_go_on_is_followed_by_a_fresh_one(record, monkeypatch, tmp_path):
    """As after an illegal memory access; unless nothing came of the last one, which would go on for ever."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu_record import GO_ON, Record\n"
        "r = Record(Path(sys.argv[2])); n = len(r.rows('layers'))\n"
        "r.add('layers', str(n), rows=[{'n': n}]) if n < 2 else None\n"
        "sys.exit(GO_ON)"
    )
    found = run_part(monkeypatch, tmp_path, code)
    assert [entry["key"] for entry in found] == ["0", "1", "process"]
    assert found[2]["failed"].startswith("exit code 75")


# ---------------------------------------------------------------- the parts "step" and "plan"


def test_steps_that_differ_are_no_result():
    from benchmarks import gpu_step

    gpu_step.check({"trees": (1.5, 2.0), "unrolled": (1.501, 2.005)})
    with pytest.raises(SystemExit, match=r"^losses differ: trees 1.5, unrolled 1.52$"):
        gpu_step.check({"trees": (1.5, 2.0), "unrolled": (1.52, 2.0)})
    with pytest.raises(SystemExit, match=r"^gradient norms differ"):
        gpu_step.check({"trees": (1.5, 2.0), "unrolled": (1.5, 2.1)})
    with pytest.raises(SystemExit, match=r"^losses differ"):
        gpu_step.check({"trees": (float("nan"), 2.0), "unrolled": (float("nan"), 2.0)})


def test_counted_operations_are_those_of_a_small_model_counted_by_hand():
    from benchmarks.gpu_comparisons import SMOKE, Counts

    shape = SMOKE.shape  # 2 layers, hidden 64, 4 + 2 heads of 16, feed-forward 128, vocabulary 512
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    expected = 6 * 2 * layer * 10 + 12 * 2 * 4 * 16 * 55 + 6 * 64 * 512 * 3
    assert Counts(tokens=10, pairs=55, scored=3).operations(shape) == expected


@pytest.mark.parametrize("objective", ["sft", "nca"])
def test_every_layout_of_a_step_holds_the_same_comparisons(objective):
    from benchmarks.gpu_comparisons import CASES, SMOKE

    case = CASES[objective](SMOKE)
    trees, unrolled, pairs = (case.counts(layout) for layout in ("trees", "unrolled", "transformers"))
    assert trees.tokens < unrolled.tokens == case.unrolled <= pairs.tokens
    assert trees.scored <= unrolled.scored == case.scored <= pairs.scored
    for layout in ("trees", "unrolled"):
        rows = case.rows[layout]
        assert sum(len(row.last) for row in rows) == case.sequences
        assert sum(int(row.scored.sum()) for row in rows) == case.scored
        assert sum(len(row.comparisons) for row in rows) == (case.units if objective == "nca" else 0)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        ("nvjet_hsh_128x256\naten::mm\nLinearBackward0", "products"),
        ("nvjet_hss_128x256\naten::mm\n_LinearLogProbBackward\nautograd::engine", "log-probs"),
        ("multi_tensor_apply_kernel\naten::_fused_adamw_\noptimizer", "optimizer"),
        ("forward_kernel\n_TreeAttention", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass>\naten::_flash_attention_forward", "attention"),
        ("_norm_kernel\n_Norm", "elementwise"),
        ("vectorized_elementwise_kernel\naten::add", "elementwise"),
        ("Memcpy DtoD (Device -> Device)\naten::copy_", "other"),
        ("unlinked", "other"),
    ],
)
def test_groups_of_kernels(names, group):
    from benchmarks.gpu_profile import group_of

    assert group_of(names) == group


def test_kernels_are_counted_once_under_the_operation_that_launched_them(monkeypatch):
    """On a GPU's profile: labels have stretches on the GPU too, and a kernel may have no operation."""
    import torch

    from benchmarks import gpu_profile

    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def on_cpu(name, parent=None, kernels=()):
        return SimpleNamespace(
            name=name, device_type=cpu, cpu_parent=parent, kernels=kernels, self_cpu_time_total=1.0
        )

    def on_gpu(name, microseconds, label=False):
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=cuda, time_range=elapsed, is_user_annotation=label)

    def kernel(name, microseconds):
        return SimpleNamespace(name=name, duration=microseconds)

    label = on_cpu("optimizer", kernels=[kernel("optimizer", 30.0)])
    events = [
        label,
        on_cpu("aten::_fused_adamw_", label, [kernel("adam", 20.0)]),
        on_gpu("optimizer", 30.0, label=True),
        on_gpu("adam", 20.0),
        on_gpu("nobody's", 5.0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [*gpu_profile.parts(events)] == [("adam\naten::_fused_adamw_\noptimizer", 20.0), ("unlinked", 5.0)]


def test_without_a_measured_step_there_is_nothing_to_predict(record, tmp_path):
    from benchmarks import gpu_plan

    gpu_plan.plan(session(tmp_path, "plan"))
    assert [e["missing"] for e in session(tmp_path).record.entries("plan")] == [
        "the part step has no rows of the engine"
    ]


# ---------------------------------------------------------------- the command


def gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks/gpu.sh"), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--parts", "steps"], {}, "'steps'"),
        (["--minutes", "0"], {}, "--minutes: 0.0 is not above 0"),
        (["--wheels"], {}, "--wheels: give the folder"),
        (["--wheels", "/dev/null"], {}, "/dev/null holds no *.whl"),
        (["--out", "/dev/null"], {}, "/dev/null cannot be written"),
        ([], {"PYTHON": "/absent/python"}, "/absent/python: no such program"),
        ([], {"SILVA_SITE": "/dev/null/x"}, "/dev/null/x cannot be written"),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, "torch finds no NVIDIA GPU"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, environment, says):
    done = gpu(
        *(arguments or ["--out", str(tmp_path)]), **{"SILVA_SITE": str(tmp_path / "site")} | environment
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "error: " in line
    assert says in line


def test_a_whole_run_and_a_second_one_that_measures_nothing(tmp_path):
    from benchmarks.gpu import PARTS

    # time enough for a machine with much else to do
    options = ["--smoke", "--minutes", "20", "--out", str(tmp_path / "out")]
    done = gpu(*options, SILVA_SITE=str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout + (tmp_path / "out/log.txt").read_text()
    lines = done.stdout.splitlines()
    assert {"smoke=true", "device=cpu", "failed=0", "tests_failed=0"} <= set(lines)
    assert not [line for line in lines if line.startswith("failed:")]
    first = json.loads((tmp_path / "out/results.json").read_text())
    assert {entry["part"] for entry in first["entries"] if entry.get("rows")} == set(PARTS)
    steps = {(r["objective"], r["layout"]): r for r in rows(first, "step") if r["table"] == "steps"}
    layouts = ("trees", "unrolled", "transformers")
    assert set(steps) == {(objective, layout) for objective in ("sft", "nca") for layout in layouts}
    for row in rows(first, "step"):
        if row["table"] == "kernels":
            assert sum(value for name, value in row.items() if name.endswith("_share")) == pytest.approx(1)
    for row in rows(first, "plan"):
        if row["what"] == "step":
            assert row["measured"] == steps[row["objective"], row["layout"]]["seconds"]
            assert row["measured/predicted"] == pytest.approx(row["measured"] / row["predicted"])
    page = (tmp_path / "out/results.md").read_text()
    for part in PARTS.values():
        assert f"## {part.title}\n" in page

    done = gpu(*options, "--parts", "step", SILVA_SITE=str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout
    second = json.loads((tmp_path / "out/results.json").read_text())
    assert len(second["runs"]) == 2
    measured = [[e for e in found["entries"] if "rows" in e] for found in (first, second)]
    assert measured[0] == measured[1]  # the number of the run that measured it is in each


def rows(results: dict, part: str) -> list[dict]:
    return [row for entry in results["entries"] if entry["part"] == part for row in entry.get("rows", ())]
