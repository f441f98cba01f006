"""Hugging Face checkpoints in and out, and every way a checkpoint can be wrong."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import world

from benchmarks import random_models
from silva.engine.errors import UserError
from silva.engine.model import gpt, hf, hf_export, hf_layout
from silva.engine.recipe.schema import Parallel


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def edit(folder: Path, **changes: object) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------ export


def load_and_export(
    source: Path, folder: Path, layout: dict, head: gpt.Head = "lm", **options: object
) -> None:
    chunks, shape = random_models.build(source, Parallel(**layout), head=head)
    options = {"dtype": torch.float32, "max_shard_size": "90KB"} | options
    hf_export.export(chunks, shape, source=source, folder=folder, head=head, **options)


@pytest.mark.parametrize(
    ("kind", "size", "layout"),
    [
        ("llama", 1, {}),
        ("llama-tied", 4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
        ("llama-wide-heads", 4, {"tensor": 2, "pipeline": 2}),
        ("mistral", 4, {"tensor": 2}),  # and two data-parallel copies, of which one writes
        ("mistral", 2, {"pipeline": 2, "virtual_pipeline": 2}),
        ("mistral-no-window", 4, {"tensor": 4}),  # one key-value head on four processes
        ("mistral-nemo", 2, {"tensor": 2}),
        ("llama3-tied", 2, {"pipeline": 2}),
        ("llama-yarn", 1, {}),
        ("llama-biased", 4, {"tensor": 2, "pipeline": 2}),
        ("qwen2", 4, {"tensor": 4}),
        ("qwen2-tied", 4, {"tensor": 4, "sequence_parallel": True}),  # half a key-value head's bias on each
        ("qwen2-window", 1, {}),
        ("qwen3", 4, {"tensor": 2, "pipeline": 2}),
        ("qwen3-biased", 2, {"tensor": 2}),
        ("phi3", 4, {"tensor": 4}),
        ("phi3-no-window", 4, {"tensor": 4, "sequence_parallel": True}),
    ],
)
def test_import_then_export_is_the_identity(kind, size, layout, tmp_path):
    import transformers

    source, folder = random_models.checkpoint(tmp_path / "source", kind), tmp_path / "made" / "export"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    world(size, load_and_export, source, folder, layout)
    before, after = tensors(source), tensors(folder)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert [*folder.parent.iterdir()] == [folder]
    # transformers reads it, all of it, and finds the same model
    name = random_models.NAMES[kind.partition("-")[0]]
    again, report = getattr(transformers, f"{name}ForCausalLM").from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, random_models.model(kind)(tokens).logits)
    assert hf.read_shape(folder) == hf.read_shape(source)


def bytes_read(folder: Path, layout: dict[str, Any]) -> tuple[int, int]:
    parallel = Parallel(**layout)
    groups.initialize(parallel)
    shape = hf.read_shape(folder)
    return hf.load(gpt.build(shape, parallel, head="lm", dtype=torch.float32), folder, shape)


def test_a_process_reads_its_own_part_only(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")
    whole = sum(t.nbytes for t in tensors(folder).values())
    assert world(1, bytes_read, folder, {}) == [(whole, whole)]
    for size, layout in ((2, {"tensor": 2}), (2, {"pipeline": 2}), (4, {"tensor": 2, "pipeline": 2})):
        found = world(size, bytes_read, folder, layout)
        assert {total for _, total in found} == {whole}
        # norms are read by every tensor-parallel process
        assert sum(read for read, _ in found) == pytest.approx(whole, rel=0.01)
        assert max(read for read, _ in found) < 0.8 * whole


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(kind, tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")
    file = next(f for f in folder.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    found = load_file(file)
    found["model.norm.weight"] = found["model.norm.weight"].to(kind)
    save_file(found, file)
    with pytest.raises(
        RuntimeError, match=r"tensor model\.norm\.weight is of type (I8|F8_E4M3); only F64, F32"
    ):
        world(1, bytes_read, folder, {})


def test_files_stay_below_the_asked_size_and_the_index_counts_them(tmp_path):
    source, folder = random_models.checkpoint(tmp_path / "source", "llama"), tmp_path / "export"
    world(2, load_and_export, source, folder, {"pipeline": 2})
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 4
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 90_000 for f in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())
    world(1, load_and_export, source, folder, {}, "lm")
    shutil.rmtree(folder)
    world(1, lambda: load_and_export(source, folder, {}, max_shard_size="1GB"))
    assert [f.name for f in folder.glob("model*")] == ["model.safetensors"]


def test_export_converts_the_type_and_says_so(tmp_path):
    source, folder = random_models.checkpoint(tmp_path / "source", "llama"), tmp_path / "export"
    world(1, lambda: load_and_export(source, folder, {}, dtype=torch.bfloat16))
    before, after = tensors(source), tensors(folder)
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True})]
)
def test_reward_models_are_written_in_both_namings(size, layout, tmp_path):
    from transformers import AutoModelForSequenceClassification

    source, folder = random_models.checkpoint(tmp_path / "source", "mistral"), tmp_path / "export"
    members = random_models.sequences(4, seed=1)

    def make() -> list[np.ndarray]:
        load_and_export(source, folder, layout, "reward")
        groups.shutdown()
        return []

    world(size, make)
    written, eurus = tensors(folder), tensors(tmp_path / "export-eurus")
    assert "lm_head.weight" not in written
    assert torch.equal(written["score.weight"], eurus["regression_head.weight"])
    assert written["score.weight"].shape == (1, 64)
    config = json.loads((tmp_path / "export-eurus" / "config.json").read_text())
    assert config["architectures"] == ["EurusRewardModel"]
    # transformers scores every sequence as we do, and so do both folders when they are read again
    peer, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert peer.config.num_labels == 1
    assert not any(report.values()), report
    with torch.no_grad():
        expected = [float(peer(torch.from_numpy(s.tokens).long()[None]).logits) for s in members]

    def rewards(path: Path) -> list[np.ndarray]:
        chunks, _ = random_models.build(path, Parallel(), head="reward", seed=99)
        return random_models.outputs(chunks, [random_models.row([members])])

    for path in (folder, tmp_path / "export-eurus"):
        [[found]] = world(1, rewards, path)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_one_reward_format_is_one_folder(tmp_path):
    source, folder = random_models.checkpoint(tmp_path / "source", "llama"), tmp_path / "export"
    world(1, lambda: load_and_export(source, folder, {}, "reward", reward_format="eurus"))
    assert "regression_head.weight" in tensors(folder)
    assert not (tmp_path / "export-eurus").exists()


def test_only_an_earlier_export_is_replaced(tmp_path):
    source, folder = random_models.checkpoint(tmp_path / "source", "llama"), tmp_path / "export"
    folder.mkdir()  # empty: free to take
    world(1, load_and_export, source, folder, {})
    (folder / "left-over").touch()
    world(1, load_and_export, source, folder, {})
    assert not (folder / "left-over").exists()
    (folder / "silva_export.json").unlink()
    with pytest.raises(RuntimeError, match=r"UserError.*was not written by an export"):
        world(1, load_and_export, source, folder, {})
    assert tensors(folder).keys() == tensors(source).keys()


def test_an_export_that_fails_leaves_the_earlier_one_as_it_was(tmp_path):
    source, folder = random_models.checkpoint(tmp_path / "source", "llama"), tmp_path / "export"
    world(1, lambda: load_and_export(source, folder, {}, finish=lambda path: (path / "own").touch()))
    assert (folder / "own").exists()

    def fail(path: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        world(1, lambda: load_and_export(source, folder, {}, finish=fail))
    assert (folder / "own").exists()
    world(1, load_and_export, source, folder, {})  # the half-written folder is in nobody's way
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("export")] == ["export"]


def test_a_shard_size_that_is_none_is_refused(tmp_path):
    source = random_models.checkpoint(tmp_path / "source", "llama")
    with pytest.raises(RuntimeError, match=r"UserError: export.max_shard_size: '5 gigs'"):
        world(1, lambda: load_and_export(source, tmp_path / "export", {}, max_shard_size="5 gigs"))


# ------------------------------------------------------------------ shapes


def test_old_configs_read_as_new_ones_do(tmp_path):
    folder = random_models.checkpoint(tmp_path, "mistral")
    new = hf.read_shape(folder)
    edit(folder, rope_parameters=None, rope_theta=1e6, rope_scaling=None, head_dim=None)
    assert hf.read_shape(folder) == new
    edit(folder, sliding_window=None)  # the key is absent: transformers' default
    assert hf.read_shape(folder).window == 4096
    edit(folder, rope_theta=None)
    assert hf.read_shape(folder).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"mlp_bias": "yes"}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0, "rope_theta": 5e5}}, "rope_parameters"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": "x", "rope_theta": 5e5}}, "rope_type llama3"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2.0, "rope_theta": 5e5}}, "rope_type linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type yarn"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_configs_of_other_models_are_refused(changes, said, tmp_path):
    folder = edit(random_models.checkpoint(tmp_path, "llama"), **changes)
    with pytest.raises(UserError, match=said) as error:
        hf.read_shape(folder)
    assert str(folder / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_folder_without_a_readable_config_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        hf.read_shape(tmp_path)


# ------------------------------------------------------------------ where checkpoints come from


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in ("/no/such/folder", "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match=str(path)):
            hf.fetch(path)


def test_a_hub_name_is_downloaded_without_code_or_pickles(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.fetch("someone/their-model") == hf.fetch("someone/their-model") == tmp_path
    [(name, options)] = asked
    assert name == "someone/their-model"
    assert not any(pattern.endswith(("py", "bin", "*")) for pattern in options["allow_patterns"])


def test_a_failed_download_is_one_line(monkeypatch):
    import huggingface_hub

    def download(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"someone/absent.*no network") as error:
        hf.fetch("someone/absent")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ weights


def spoil(folder: Path, how: str) -> None:
    one = folder / "model.safetensors"
    if how in ("missing", "shape", "extra"):
        every = load_file(one)
        name = "model.layers.2.mlp.up_proj.weight"
        if how == "missing":
            del every[name]
        elif how == "shape":
            every[name] = every[name][:90].clone()
        else:
            every["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(64)
        save_file(every, one)
    elif how == "pickle":
        one.rename(folder / "pytorch_model.bin")
    elif how == "nothing":
        one.unlink()
    elif how == "damaged":
        one.write_bytes(one.read_bytes()[:1000])
    else:  # the index names a file that is not there
        names = [*load_file(one)]
        one.unlink()
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", r"model\.layers\.2\.mlp\.up_proj\.weight is missing.*\[96, 64\]"),
        ("shape", r"model\.layers\.2\.mlp\.up_proj\.weight has shape \[90, 64\].*\[96, 64\]"),
        ("extra", r"q_proj\.bias has no place"),
        ("pickle", r"save_pretrained"),
        ("nothing", r"neither model\.safetensors nor"),
        ("damaged", r"model\.safetensors: damaged"),
        ("index", r"model-00001-of-00002\.safetensors: missing"),
    ],
)
def test_wrong_weights_are_refused(how, said, tmp_path):
    random_models.model("llama").save_pretrained(tmp_path)
    spoil(tmp_path, how)
    # every process of a world finds it: none is left waiting
    with pytest.raises(RuntimeError, match="UserError: .*" + said):
        world(2, random_models.build, tmp_path, Parallel(tensor=2))


def test_a_head_that_the_checkpoint_lacks_is_named_and_one_it_has_in_plus_is_left_alone(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama", head="SequenceClassification")
    with pytest.raises(RuntimeError, match=r"without an output matrix"):
        world(1, random_models.build, folder, Parallel())
    every = tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(every | inverse | {"lm_head.weight": torch.zeros(251, 64)}, folder / "model.safetensors")
    world(1, lambda: bool(random_models.build(folder, Parallel())))
    world(1, lambda: bool(random_models.build(folder, Parallel(), head="reward")))


# ------------------------------------------------------------------ layout


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor_size"),
    [
        *itertools.product([8], [8, 4, 2, 1], [1, 2, 4, 8]),
        *((6, 3, size) for size in (1, 2)),
    ],
)
def test_pieces_cover_every_tensor_exactly_once(heads, kv_heads, tensor_size):
    shape = hf.ModelShape(1, 32, heads, kv_heads, 8, 48, 29, 1e4, 1e-5, False, None, "llama", 128)
    sharded = {
        "decoder.layers.0.self_attention.linear_qkv.weight": (heads + 2 * kv_heads) * 8 // tensor_size,
        "decoder.layers.0.self_attention.linear_proj.weight": heads * 8 // tensor_size,
        "decoder.layers.0.mlp.linear_fc1.weight": 2 * 48 // tensor_size,
        "decoder.layers.0.mlp.linear_fc2.weight": 48 // tensor_size,
        "embedding.word_embeddings.weight": None,
        "output_layer.weight": None,
    }
    covered = {name: [0] * max(size) for name, size in hf_layout.tensors(shape).items() if len(size) == 2}
    covered["lm_head.weight"] = [0] * 29
    dims = {}
    for parameter, rows in sharded.items():
        for rank in range(tensor_size):
            filled = 0
            for own in hf_layout.slices(parameter, 0, shape, tensor_rank=rank, tensor_size=tensor_size):
                dims[own.tensor] = own.dim
                filled += own.stop - own.start
                for index in range(own.start, own.stop):
                    covered[own.tensor][index] += 1
            assert rows is None or filled == rows
    every = hf_layout.tensors(shape) | {"lm_head.weight": (29, 32)}
    for name, counts in covered.items():
        length = every[name][dims[name]]
        assert counts[:length] == [1] * length
        assert not any(counts[length:])


# ------------------------------------------------------------------ heads


def load_as(folder: Path, head: gpt.Head) -> str:
    try:
        random_models.build(folder, Parallel(), head=head)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
def test_a_language_model_is_not_made_of_a_classifier(kind, tmp_path):
    folder = random_models.checkpoint(tmp_path, kind, head="SequenceClassification")
    [said] = world(1, load_as, folder, "lm")
    assert "is a classifier or reward model (score.weight) without an output matrix" in said
    assert world(1, load_as, folder, "reward") == [""]


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path):
    folder = random_models.checkpoint(tmp_path, "qwen3", head="SequenceClassification", num_labels=2)
    [said] = world(1, load_as, folder, "reward")
    assert "is a classifier of 2 labels (score.weight), and a reward model has 1" in said
