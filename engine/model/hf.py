"""Reads Hugging Face checkpoints: the shape from config.json, the weights streamed from safetensors.

Every process reads only the rows and columns that it holds, one tensor at a time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from silva.engine.errors import UserError, shown
from silva.engine.model import hub_digests
from silva.engine.model.families import known
from silva.engine.model.families.config import read_json
from silva.engine.model.families.shape import ModelShape
from silva.engine.model.hf_layout import OUTPUT, REGRESSION, SCORE, global_layer, slices, tensors

# what this project reads of a repository: no pickles, no code
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# bytes of a weight, by safetensors' name of its type
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def fetch(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint, after downloading it if the path is a hub name.

    Args:
        path: a folder, or `owner/name` on the model hub.

    Returns:
        The path itself, or the folder of the download.

    Raises:
        UserError: the path is neither a folder nor a name that can be downloaded.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: a file, not a checkpoint's folder; give the folder that holds config.json")
    if not HUB_NAME.fullmatch(str(path)):
        raise UserError(
            f"{path}: no such folder; give a Hugging Face checkpoint's folder or a hub name owner/name"
        )
    return _download(str(path))


@cache
def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # */* is ignored, because some repositories keep a second copy of the weights in a folder
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[*WANTED], ignore_patterns=["*/*"])
        )
    # no connection arrives as LocalEntryNotFoundError or an OSError, a malformed name as ValueError
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: no such folder here, and downloading it from the model hub failed ({reason}); "
            "check the name and the network, or give a local folder"
        ) from error


def read_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Read the shape in a checkpoint's config.json.

    Args:
        path: as `fetch` takes it.

    Returns:
        The shape.

    Raises:
        UserError: the model is of no family that `gpt.build` can build, or another variant; the message names the key.
    """
    file = fetch(path) / "config.json"
    return known.shape(file, read_json(file))


def _weight_map(index: Path) -> dict[str, str]:
    """Return which file holds which tensor, files of this folder alone."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise UserError(f"{index}: weight_map must be an object, found {shown(found)}")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: weight_map: {shown(name)} must be in a .safetensors file of the folder, found "
                f"{shown(file)}"
            )
    return found


class _Checkpoint:
    """Reads the safetensors files of a folder, each opened when it is first needed."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.folder, self._opened = folder, opened
        self._files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.names: dict[str, str] = _weight_map(index)
        elif (folder / "model.safetensors").is_file():
            self.names = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        elif [*folder.glob("*.bin")]:
            raise UserError(
                f"{folder}: only .bin files (pickles) are here, and pickles are not read; convert them once "
                "with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        else:
            raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is here")

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = self._opened.enter_context(safe_open(path, "pt"))
            except FileNotFoundError:
                raise UserError(
                    f"{path}: missing, though the index names it; download the checkpoint again"
                ) from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: damaged ({error}); download the checkpoint again") from None
        return self._files[name]

    def tensor(self, name: str) -> Any:
        """Return a slice object over one tensor; nothing is read yet."""
        try:
            return self._file(self.names[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / self.names[name]}: {name}: {error}") from None

    def finite(self, name: str, values: Tensor) -> Tensor:
        """Return values of a tensor; raise UserError if one is not a finite number."""
        if not values.isfinite().all():
            raise UserError(
                f"{self.folder / self.names[name]}: tensor {name} holds numbers that are not finite; download the "
                "checkpoint again, or take another one"
            )
        return values

    def bytes(self, name: str) -> int:
        """Return the bytes of one tensor."""
        found = self.tensor(name)
        return math.prod(found.get_shape()) * BYTES[found.get_dtype()]

    def check_head(self, head: str, score: str | None) -> None:
        """Refuse a classifier where a language model is needed, and one of several labels where a reward is.

        Args:
            head: of the model that is to be filled.
            score: the tensor of a classifier's or reward model's head, if the checkpoint has one.
        """
        if score is None:
            return
        if head == "lm" and OUTPUT not in self.names:
            raise UserError(
                f"{self.folder}: is a classifier or reward model ({score}) without an output matrix, and this "
                "objective trains a language model; take the language model that it was made from"
            )
        labels = self.tensor(score).get_shape()[0]
        if head == "reward" and labels != 1:
            raise UserError(
                f"{self.folder}: is a classifier of {labels} labels ({score}), and a reward model has 1; take another "
                "checkpoint, or the language model that it was made from"
            )

    def check(self, expected: dict[str, tuple[int, ...]], *, unused: set[str]) -> None:
        """Raise UserError unless exactly the tensors `expected` are here; those in `unused` may be here too."""
        for name, shape in expected.items():
            if name not in self.names:
                raise UserError(f"{self.folder}: tensor {name} is missing; it should have shape {[*shape]}")
            kind = self.tensor(name).get_dtype()
            if kind not in BYTES:
                raise UserError(
                    f"{self.folder}: tensor {name} is of type {kind}; only {', '.join(BYTES)} are supported: convert "
                    "the checkpoint first"
                )
            found = [*self.tensor(name).get_shape()]
            if found != [*shape]:
                raise UserError(
                    f"{self.folder}: tensor {name} has shape {found}, but by config.json it should have {[*shape]}"
                )
        # old checkpoints store the rotary frequencies, which follow from config.json
        extra = {n for n in self.names if not n.endswith("rotary_emb.inv_freq")} - set(expected) - unused
        if extra:
            raise UserError(
                f"{self.folder}: tensor {min(extra)} has no place in the model that config.json describes "
                f"({len(extra)} such tensors)"
            )


@torch.no_grad()
def load(chunks: Sequence[nn.Module], path: str | os.PathLike[str], shape: ModelShape) -> tuple[int, int]:
    """Fill the weights of `gpt.build`'s modules from a checkpoint, converting them to the modules' type.

    The call is collective, and every process reads its own rows and columns only. A reward head is read if the
    checkpoint has one (`score.weight` or `regression_head.weight`); otherwise it keeps the weight that it was built
    with. Padded vocabulary rows become zero.

    Args:
        chunks: `gpt.build`'s modules, not wrapped.
        path: as `fetch` takes it.
        shape: of the checkpoint.

    Returns:
        The bytes that this process read, and those of all tensors of the model.

    Raises:
        UserError: a tensor is missing, of another shape, not finite, or has no place in the model; or a file is not
            what the model hub gave.
    """
    folder = fetch(path)
    hub_digests.check(folder)
    with ExitStack() as opened:
        checkpoint = _Checkpoint(folder, opened)
        head: Any = chunks[0].config.head  # type: ignore[union-attr]
        score = next((name for name in (SCORE, REGRESSION) if name in checkpoint.names), None)
        checkpoint.check_head(head, score)
        expected = tensors(shape)
        if head == "lm" and not shape.tied:
            expected[OUTPUT] = (shape.vocab, shape.hidden)
        if head == "reward" and score:
            expected[score] = (1, shape.hidden)
        checkpoint.check(expected, unused={OUTPUT, SCORE, REGRESSION})
        read = 0
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if head == "reward" and name == "output_layer.weight":
                    if score:
                        values = checkpoint.finite(score, checkpoint.tensor(score)[:])
                        parameter.copy_(values)
                        read += values.nbytes
                else:
                    read += _fill(parameter, name, chunk, checkpoint, shape)
        return read, sum(checkpoint.bytes(name) for name in expected)


def _fill(
    parameter: nn.Parameter, name: str, chunk: nn.Module, checkpoint: _Checkpoint, shape: ModelShape
) -> int:
    """Fill one parameter, and return the bytes that were read."""
    parameter.zero_()
    read = 0
    layer = global_layer(chunk, name)
    rank, size = groups.tensor_rank(), groups.tensor_size()
    for own in slices(name, layer, shape, tensor_rank=rank, tensor_size=size):
        source = checkpoint.tensor(own.tensor)
        cut = slice(own.start, own.stop)
        values = checkpoint.finite(own.tensor, source[cut] if own.dim == 0 else source[:, cut])
        parameter.narrow(own.dim, own.at, own.stop - own.start).copy_(values)
        read += values.nbytes
    return read
