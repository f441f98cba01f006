"""Weight files that the hub's client has downloaded, and that have changed since."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

from silva.engine.parallel import groups

import pytest
import tiny
import torch
from worlds import world

from silva.engine.errors import UserError
from silva.engine.model import gpt, hf
from silva.engine.recipe.schema import Parallel


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


def snapshot(model: Path, cache: Path) -> Path:
    """The folder that `snapshot_download` returns: links to blobs, large ones named by their SHA-256."""
    blobs, folder = cache / "blobs", cache / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for file in model.iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        (blobs / name).write_bytes(content)
        (folder / file.name).symlink_to(Path("../../blobs") / name)
    return folder


def downloaded(model: Path, folder: Path) -> Path:
    """What `snapshot_download(local_dir=...)` leaves."""
    shutil.copytree(model, folder)
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for file in model.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (notes / f"{file.name}.metadata").write_text(f"0123abcd\n{digest}\n{time.time()}\n")
    return folder


def flip(file: Path) -> None:
    """One bit of a number, as a disk would: the time of the last change stays."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-1001] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def load(folder: Path, parallel: Parallel) -> str:
    with groups.joined(parallel):
        shape = hf.read_shape(folder)
        chunks = gpt.build(shape, parallel, head="lm", dtype=torch.float32)
        try:
            hf.load(chunks, folder, shape)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("made", [snapshot, downloaded])
def test_a_file_that_is_not_what_the_hub_gave_is_refused_on_every_rank(made, model, tmp_path):
    folder = made(model, tmp_path / "hub")
    assert world(2, load, folder, Parallel()) == ["", ""]
    flip(folder / "model.safetensors")
    for said in world(2, load, folder, Parallel(tensor=2)):
        assert said.startswith(f"{folder}/model.safetensors: is not what the model hub gave (SHA-256 ")
        assert said.endswith("remove it and download the checkpoint again")


def test_a_file_that_was_replaced_on_purpose_is_read(model, tmp_path):
    folder = downloaded(model, tmp_path / "hub")
    flip(folder / "model.safetensors")
    os.utime(folder / "model.safetensors", (time.time() + 60, time.time() + 60))
    assert world(1, load, folder, Parallel()) == [""]


def test_a_folder_of_another_origin_is_read(model):
    assert world(1, load, model, Parallel()) == [""]
