"""The command: what it prints, what it refuses, and that a search's layouts are the engine's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import ultrainteract
from silva.engine import plan
from silva.engine.data import store
from silva.engine.data.trees import tree
from silva.engine.model import gpt
from silva.engine.model.families.shape import ModelShape
from silva.engine.planning import workload
from silva.engine.planning.hardware import GIB, Gpu
from silva.engine.planning.predict import Setting, as_overrides, build_stages, predict
from silva.engine.planning.search import _compose, layouts, measure_layers, search, smallest_cluster
from silva.engine.recipe.loading import load
from silva.engine.recipe.schema import Parallel

SHAPE = ModelShape(
    layers=6, hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=640, vocab=4000, rope_theta=1e4, norm_eps=1e-5,
    tied=False, window=None, architecture="llama", max_position=4096,
)  # fmt: skip
# two to a node keeps the number of layouts small
GPU = Gpu(
    "test", flops=1e12, memory=3.42 * GIB, bandwidth=1e11, nvlink=1e10, network=1e9, host=1e9, per_node=2
)


def values(text: str) -> dict[str, str]:
    """The `key=value` of the last line."""
    return dict(pair.split("=", 1) for pair in text.splitlines()[-1].split())


@pytest.fixture(scope="module")
def setting() -> Setting:
    recipe = load("eurus-7b-nca", ["data.row_length=2048", "data.max_length=1024"])
    load_of_step = workload.assumed(recipe, length=512, ratio=0.4)
    return Setting(recipe, SHAPE, load_of_step, GPU, gpus=4)


# ---------------------------------------------------------------- the command


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = plan.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_packaged_recipe_is_planned_without_its_checkpoint(capsys):
    code, out, _ = run(
        capsys, "eurus-7b-rm", "--gpus", "8", "data.row_length=4096", "parallel.recompute=full"
    )
    assert code == 0
    found = values(out)
    assert found["fits"] == "true"
    # 7.1e9 weights over two: 2 + 4 bytes each, and 12 spread over the four data-parallel ranks
    static = 7.1e9 / 2 * (2 + 4 + 12 / 4) / GIB
    assert static < float(found["gib"]) < static + 12
    assert "nothing here has run on a GPU" in out


def test_a_model_too_large_is_said_to_be(capsys):
    code, out, _ = run(
        capsys,
        "eurus-70b-sft",
        "--gpus",
        "8",
        "parallel.pipeline=1",
        "data.row_length=4096",
        "--gpu",
        "a100-40g",
    )
    assert code == 0
    assert values(out)["fits"] == "false"
    assert values(out)["dominant"] == "optimizer"
    assert "--search looks for layouts that fit" in out


def test_a_shape_from_a_file(capsys, tmp_path):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 333,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for shape in (tmp_path, tmp_path / "config.json"):
        code, out, _ = run(capsys, "eurus-7b-sft", "--dry-run", "1", "--shape", str(shape))
        assert code == 0
        layers = 4 * (64 * (64 * 2 + 32 * 2) + 3 * 64 * 96) / 2 + 4 * 2 * 64
        assert int(values(out)["parameters"]) == layers + 2 * 334 / 2 * 64 + 64
        assert "backward reached 27 of 27 parameter tensors" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["eurus-7b-sft", "model.path=nowhere/at-all"],
            "model.path: nowhere/at-all is no folder with a config.json",
        ),
        (["eurus-7b-sft", "--shape", "gpt-9"], "--shape: gpt-9 is no folder"),
        (["eurus-7b-sft", "--dry-run", "2"], "--dry-run: found rank 2; allowed: 0 to 1"),
        (["eurus-7b-sft", "--gpus", "3"], "does not divide the number of processes, 3"),
        (["eurus-70b-sft", "--gpus", "30"], "parallel.pipeline is 4, which does not divide 30 GPUs"),
        (
            ["eurus-7b-sft", "--gpus", "6", "parallel.pipeline=3"],
            "32 layers cannot be split into 3 equal parts",
        ),
        (["eurus-7b-sft", "--data", "recipes"], "--data: recipes holds no tokenized trees"),
    ],
)
def test_mistakes_end_in_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


# ---------------------------------------------------------------- the workload


def test_tokens_and_depths_are_the_trees(tmp_path):
    found = ultrainteract.groups(40, scale=0.1)
    store.write(tmp_path / "0.arrow", found[:25])
    store.write(tmp_path / "1.arrow", found[25:])
    recipe = load("eurus-7b-nca")
    measured = workload.of_data(recipe, tmp_path)
    merged = [tree.merge(group) for group in found]
    pairs = sum(len(group.comparisons) for group in found)
    assert measured.unique == pytest.approx(sum(map(len, merged)) / pairs)
    assert measured.unrolled == pytest.approx(sum(t.unrolled for t in merged) / pairs)
    assert measured.depth == pytest.approx(np.concatenate([t.position for t in merged]).mean() + 1)
    # what is assumed without data comes near the mean depth of such trees
    length = round(measured.unrolled / 2)
    assumed = workload.assumed(recipe, length=length, ratio=measured.sharing)
    assert assumed.depth == pytest.approx(measured.depth, rel=0.15)
    assert assumed.unique == pytest.approx(measured.unique, rel=0.01)


# ---------------------------------------------------------------- the search


@pytest.fixture(scope="module")
def probes(setting):
    return measure_layers(setting)


def test_composed_stages_are_the_built_ones(setting, probes):
    some = [layout for layout in layouts(setting) if layout.pipeline <= 2][::5]
    assert {layout.recompute for layout in some} == {"none", "selective", "full"}
    assert {layout.tensor for layout in some} == {1, 2}
    assert any(layout.virtual_pipeline for layout in some)
    assert {layout.offload_optimizer for layout in some} == {False, True}
    for layout in some:
        job = setting.job(layout)
        for place, real in enumerate(build_stages(job)):
            composed = _compose(probes[layout.tensor, layout.context, layout.recompute, 2048], job, place)
            for name in ("parameters", "gradients", "optimizer", "host"):
                assert getattr(composed, name) == pytest.approx(getattr(real, name), rel=0.01), (layout, name)
            for ours, theirs in zip(composed.chunks, real.chunks, strict=True):
                assert ours.parameters == theirs.parameters
                assert ours.saved == pytest.approx(theirs.saved, rel=0.02), layout
                assert ours.forward.flops == pytest.approx(theirs.forward.flops, rel=1e-6)
                assert ours.backward.flops == pytest.approx(theirs.backward.flops, rel=1e-6)
                assert ours.backward.traffic == pytest.approx(theirs.backward.traffic, rel=0.02)
                assert ours.backward.wire == pytest.approx(theirs.backward.wire, rel=0.02)


def test_stages_that_cannot_be_equal_are_cut_with_fewer_layers_at_the_ends(setting):
    four = {tuple(layout.stage_layers or ()) for layout in layouts(setting) if layout.pipeline == 4}
    assert four == {(1, 2, 2, 1)}
    assert not any(layout.stage_layers for layout in layouts(setting) if layout.pipeline == 2)
    assert not any(layout.stage_layers for layout in layouts(setting) if layout.virtual_pipeline)


def test_an_optimizer_on_the_host_makes_room(setting, probes):
    here = setting.job(Parallel(tensor=1))
    there = setting.job(Parallel(tensor=1, offload_optimizer=True))
    for_good = [predict(setting, job, build_stages(job)) for job in (here, there)]
    assert for_good[1].fullest.total <= for_good[0].fullest.total
    assert for_good[1].time.optimizer > for_good[0].time.optimizer
    assert for_good[1].stages[0].host == pytest.approx(for_good[0].stages[0].optimizer, rel=0.01)


def test_a_search_finds_layouts_that_fit_fastest_first(setting, probes):
    found = search(setting, probes, 3)
    assert found
    assert all(each.fits for each in found)
    seconds = [each.time.total for each in found]
    assert seconds == sorted(seconds)
    for each in found:
        gpt.check_layout(SHAPE, each.job.parallel)
        pasted = load(
            "eurus-7b-nca",
            ["data.row_length=2048", "data.max_length=1024", *as_overrides(each, setting.recipe)],
        )
        assert pasted.parallel == each.job.parallel
        assert setting.job(pasted.parallel, pasted.data.row_length) == each.job


def test_no_layout_fits_and_how_many_gpus_would_do(setting):
    large = replace(SHAPE, hidden=1024, heads=16, head_dim=64, ffn=2816, vocab=32000)
    recipe = load("eurus-7b-nca", ["data.row_length=2048", "data.max_length=2048"])
    cramped = replace(setting, recipe=recipe, shape=large, gpus=1, gpu=replace(GPU, memory=3.7 * GIB))
    probes = measure_layers(cramped)
    assert search(cramped, probes, 3) == []
    fewest = smallest_cluster(cramped, probes)
    assert fewest is not None
    assert fewest > 1
    assert search(replace(cramped, gpus=fewest), probes, 1)
    assert search(replace(cramped, gpus=fewest // 2), probes, 1) == []
