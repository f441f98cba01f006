"""Writes Hugging Face checkpoints: gathered and written tensor by tensor, published in one step.

Every pipeline stage writes its own files. Beside its share of the model, a process holds at most one parameter and one
file's worth of tensors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from silva.engine.parallel import groups

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from silva.engine import file_errors
from silva.engine.data.text import tokenizer_files
from silva.engine.errors import UserError
from silva.engine.model.families.config import read_json
from silva.engine.model.families.known import FAMILIES
from silva.engine.model.families.shape import ModelShape
from silva.engine.model.hf_layout import REGRESSION, SCORE, global_layer, slices

RewardFormat = Literal["sequence_classification", "eurus", "both"]
# the file that marks a folder as written by an export, which may be replaced
MARKER = "silva_export.json"
# end the names of an export that is being written, and of the one that it replaces
PARTIAL, OLD = ".partial", ".old"
# files that belong to a checkpoint beside its weights and config.json
COMPANIONS = (*tokenizer_files.NAMES, "generation_config.json")


def export(
    chunks: Sequence[nn.Module],
    shape: ModelShape,
    *,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    dtype: torch.dtype,
    head: Literal["lm", "reward"],
    reward_format: RewardFormat = "both",
    max_shard_size: str = "5GB",
    finish: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write the model as a Hugging Face checkpoint.

    The call is collective. The folder is written as `<folder>.partial` and renamed when it is complete.

    Args:
        chunks: `gpt.build`'s modules, not wrapped.
        shape: of the model.
        source: folder of the checkpoint that the model came from. Its config.json is written with what has changed;
            tokenizer, chat template and generation config are copied as they are.
        folder: to write.
        dtype: of the written tensors.
        head: which head the model has.
        reward_format: how a reward model is written. "sequence_classification" is a sequence classifier of
            transformers with `num_labels` 1 (`score.weight`). "eurus" is EurusRewardModel's naming
            (`regression_head.weight`); that class is not part of transformers. "both" writes the first to `<folder>`
            and the second to `<folder>-eurus`.
        max_shard_size: largest file, such as "5GB" (powers of ten); a larger tensor gets a file of its own.
        finish: called by the first process with each unpublished folder, to add or replace files.

    Returns:
        The folders written.

    Raises:
        UserError: a folder exists that no export wrote, or `max_shard_size` is unreadable.
    """
    limit = _bytes(max_shard_size)
    jobs = _jobs(Path(folder), head, reward_format)
    check_target(folder, head=head, reward_format=reward_format)
    # no process writes before all have looked at the folders
    groups.wait_for_all()
    for target, score in jobs:
        partial = _beside(target, PARTIAL)
        with file_errors.named(partial, SafetensorError):
            if groups.rank() == 0:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
                # a folder without it is somebody else's
                _write_json(partial / MARKER, {})
            groups.wait_for_all()
            _write_stage(chunks, shape, partial, dtype=dtype, score=score, limit=limit)
            groups.wait_for_all()
            if groups.rank() == 0:
                _join_stages(partial)
                _write_companions(Path(source), partial, shape, dtype=dtype, score=score)
                if finish is not None:
                    finish(partial)
                _publish(partial, target)
            groups.wait_for_all()
    return [target for target, _ in jobs]


def set_padding(folder: Path, padding: int | None) -> None:
    """Name a reward model's padding token in its config.

    transformers takes no batch without one, and reads the reward at the last token that is not padding.

    Args:
        folder: of the written checkpoint.
        padding: id of the token; None: the config names none, so that a batch is refused.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", config | {"pad_token_id": padding})


def set_end(folder: Path, end: int) -> None:
    """Have generation stop at a token, beside those at which it stops already.

    Args:
        folder: of the written checkpoint.
        end: id of the token that ends an answer.
    """
    file = folder / "generation_config.json"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # without a file of its own, generation goes by the model's config
    inherited = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = {key: config[key] for key in inherited if config.get(key) is not None}
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end not in ends:
        _write_json(file, settings | {"eos_token_id": [*ends, end] if ends else end})


def check_target(
    folder: str | os.PathLike[str], *, head: Literal["lm", "reward"], reward_format: RewardFormat
) -> None:
    """Check that `export` may write to a folder; a run asks this before training, too.

    Raises:
        UserError: a folder exists that no export wrote.
    """
    for target, _ in _jobs(Path(folder), head, reward_format):
        for place in (target, _beside(target, PARTIAL), _beside(target, OLD)):
            _check_replaceable(place)


def check_source(folder: Path) -> None:
    """Check that what an export copies from the model that it came from can be read; a run asks this before training.

    Args:
        folder: as `export` takes it for `source`.

    Raises:
        UserError: generation_config.json is not what its name says.
    """
    file = folder / "generation_config.json"
    if file.is_file():
        read_json(file)


def _jobs(folder: Path, head: str, reward_format: RewardFormat) -> list[tuple[Path, str | None]]:
    """List the folders to write, each with the name of the reward head's tensor in it.

    A symbolic link is followed: what it points to is replaced, and the link stays.
    """
    folder = folder.resolve()
    if head == "lm":
        return [(folder, None)]
    if reward_format == "both":
        return [(folder, SCORE), (folder.with_name(folder.name + "-eurus"), REGRESSION)]
    return [(folder, SCORE if reward_format == "sequence_classification" else REGRESSION)]


def _bytes(size: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)(KB|MB|GB)", size)
    if match is None:
        raise UserError(f"export.max_shard_size: {size!r} is not a size such as 500MB or 5GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def _check_replaceable(target: Path) -> None:
    """Raise UserError unless the target is missing, an empty folder or an earlier export, which may be replaced."""
    # a link to nothing does not exist, and yet nothing can be made under its name
    if (target.exists() or target.is_symlink()) and not (
        target.is_dir()
        and not target.is_symlink()
        and ((target / MARKER).is_file() or not any(target.iterdir()))
    ):
        raise UserError(
            f"{target}: exists and was not written by an export (no {MARKER} in it); choose another "
            "export.path or move it away"
        )


class _Files:
    """Collects tensors and writes a file whenever the next one would not fit into it."""

    def __init__(self, folder: Path, stage: int, limit: int) -> None:
        self._folder, self._stage, self._limit = folder, stage, limit
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        # (file, the tensors in it)
        self.weights: list[tuple[str, list[str]]] = []
        self.bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > self._limit:
            self.flush()
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self.bytes += tensor.nbytes

    def flush(self) -> None:
        if self._held:
            file = f"stage-{self._stage:03d}-{len(self.weights):05d}.safetensors"
            save_file(self._held, self._folder / file, metadata={"format": "pt"})
            self.weights.append((file, [*self._held]))
            self._held, self._held_bytes = {}, 0


@torch.no_grad()
def _write_stage(
    chunks: Sequence[nn.Module],
    shape: ModelShape,
    folder: Path,
    *,
    dtype: torch.dtype,
    score: str | None,
    limit: int,
) -> None:
    """Write this stage's tensors to files of their own, and a table of them; one data-parallel copy writes."""
    if groups.copy_rank() != 0:
        return
    files = _Files(folder, groups.pipeline_rank(), limit)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            for tensor_name, tensor in _whole_tensors(chunk, name, parameter, shape, score=score):
                files.add(tensor_name, tensor.to(device="cpu", dtype=dtype).contiguous())
    if groups.tensor_rank() == 0:
        files.flush()
        table = {"bytes": files.bytes, "weights": files.weights}
        _write_json(folder / f"stage-{groups.pipeline_rank():03d}.json", table)


def _whole_tensors(
    chunk: nn.Module, name: str, parameter: nn.Parameter, shape: ModelShape, *, score: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors in a parameter, on the first tensor-parallel process; elsewhere nothing."""
    if name == "output_layer.weight":
        if score is not None:
            if groups.tensor_rank() == 0:
                yield score, parameter.clone()
            return
        # it is then the embedding's copy at the end of a pipeline
        if shape.tied:
            return
    shares = [parameter.detach()]
    if getattr(parameter, "tensor_model_parallel", False) and groups.tensor_size() > 1:
        shares = _gather(parameter)
    if groups.tensor_rank() != 0:
        return
    found: dict[str, list[tuple[int, int, Tensor]]] = {}
    layer = global_layer(chunk, name)
    for rank, share in enumerate(shares):
        for own in slices(name, layer, shape, tensor_rank=rank, tensor_size=len(shares)):
            part = share.narrow(own.dim, own.at, own.stop - own.start)
            found.setdefault(own.tensor, []).append((own.start, own.dim, part))
    for tensor, parts in found.items():
        parts.sort(key=lambda part: part[0])
        yield tensor, torch.cat([part for _, _, part in parts], dim=parts[0][1])


def _gather(parameter: nn.Parameter) -> list[Tensor]:
    """Gather all shares on the first tensor-parallel process; return an empty list elsewhere."""
    mine = parameter.detach().contiguous()
    first = groups.tensor_rank() == 0
    shares = [torch.empty_like(mine) for _ in range(groups.tensor_size())] if first else []
    dist.gather(mine, shares if first else None, group=groups.tensor_group(), group_dst=0)
    return shares


def _join_stages(folder: Path) -> None:
    """Give the stages' files their final names, as transformers does, and write the index."""
    tables = [json.loads(table.read_text()) for table in sorted(folder.glob("stage-*.json"))]
    files = [entry for table in tables for entry in table["weights"]]
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            final = "model.safetensors"
        (folder / file).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(files) > 1:
        total = sum(table["bytes"] for table in tables)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    for table in folder.glob("stage-*.json"):
        table.unlink()


def _write_companions(
    source: Path, folder: Path, shape: ModelShape, *, dtype: torch.dtype, score: str | None
) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # these keys describe the head, the code and the type of the source, not what is written now
    for key in ("auto_map", "id2label", "label2id", "num_labels", "problem_type", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    name = FAMILIES[shape.architecture].name
    if score is None:
        config["architectures"] = [f"{name}ForCausalLM"]
    elif score == SCORE:
        config["architectures"] = [f"{name}ForSequenceClassification"]
        # this is how transformers writes num_labels 1
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    else:
        config["architectures"] = ["EurusRewardModel"]
    _write_json(folder / "config.json", config)
    _write_json(folder / MARKER, {"head": "lm" if score is None else score})


def _publish(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an earlier export is removed only now."""
    old = _beside(target, OLD)
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.exists():
        shutil.rmtree(old)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
