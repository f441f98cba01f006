"""Finds and loads a tokenizer from a folder, a `tokenizer.model` file or the hub.

Two kinds have the same interface: Llama-style sentencepiece models (whose text sentencepiece tokenizes, see
`sentencepiece_tokenizer.py`) and everything else that transformers loads as a fast tokenizer (`tokenizer.json`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from silva.engine.data.text import sentencepiece_tokenizer
from silva.engine.errors import UserError

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class TextEncoder(Protocol):
    """Tokenizes text that stands between special tokens, and never gives a special token."""

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        """Return the ids of a text.

        Args:
            text: what is tokenized.
            prefix: whether a tokenizer that puts a space in front of text does so here; others ignore it.
        """


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """Holds a tokenizer and what is known about its behaviour.

    Attributes:
        transformers: renders templates and names special tokens; an exported checkpoint is served with it.
        text: tokenizes text without special tokens.
        prefix_after_special: whether text after a special token gets the tokenizer's leading space too.
        says_bos: whether the tokenizer itself puts a BOS in front of a text.
        files: the tokenizer files that it was read from.
        rebuilt: whether `transformers` was built from `tokenizer.model` instead of loaded from the files.
    """

    transformers: Any
    text: TextEncoder
    prefix_after_special: bool
    says_bos: bool
    files: tuple[Path, ...]
    rebuilt: bool


def load(path: str) -> LoadedTokenizer:
    """Load a tokenizer.

    Code that comes with a tokenizer is never run.

    Args:
        path: a folder, a `tokenizer.model` file, or a hub name.

    Raises:
        UserError: there is no tokenizer, a file is not what its name says, or the files of one folder do not belong
            together.
    """
    folder, files = _locate(path)
    settings = _json(folder / "tokenizer_config.json") if folder / "tokenizer_config.json" in files else {}
    model = next((file for file in files if file.name == "tokenizer.model" or file == Path(path)), None)
    proto = sentencepiece_tokenizer.read(model) if model is not None else None
    if proto is None and model is not None and len(files) == 1:
        raise UserError(
            f"tokenizer {path}: not a sentencepiece model; name the folder the tokenizer files lie in"
        )
    if proto is not None and sentencepiece_tokenizer.is_llama_style(proto):
        return _from_sentencepiece(proto, folder, files, settings)
    if proto is not None and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer {path}: tokenizer.model is not a Llama-style sentencepiece model (byte-fallback BPE "
            "with a leading space), and there is no tokenizer.json; add the tokenizer.json of this tokenizer"
        )
    return _from_transformers(path, folder, files, settings)


def _locate(path: str) -> tuple[Path, tuple[Path, ...]]:
    place = Path(path).expanduser()
    if place.is_file():
        return place.parent, (place,)
    if not place.is_dir():
        if not _HUB_NAME.fullmatch(path):
            raise UserError(f"tokenizer {path}: there is no such file or folder; check tokenizer.path")
        place = _download(path)
    files = tuple(place / name for name in NAMES if (place / name).is_file())
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & {file.name for file in files}:
        raise UserError(
            f"tokenizer {path}: the folder holds neither tokenizer.json nor tokenizer.model; set "
            "tokenizer.path to a folder that does"
        )
    return place, files


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*NAMES, "config.json"]))
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer {name}: no such folder here, and the Hugging Face hub did not give it ({reason})"
        ) from None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not an object")
    return content


# ---------------------------------------------------------------- sentencepiece


def _from_sentencepiece(
    proto: Any, folder: Path, files: tuple[Path, ...], settings: Mapping[str, Any]
) -> LoadedTokenizer:
    present = {file.name: file for file in files}
    added: list[Mapping[str, Any]] = []
    if "tokenizer.json" in present:
        content = _json(present["tokenizer.json"])
        _same_vocabulary(proto, content, folder)
        added = content.get("added_tokens", [])
    elif "added_tokens_decoder" in settings:
        added = [{**token, "id": int(number)} for number, token in settings["added_tokens_decoder"].items()]
    elif "added_tokens.json" in present:
        names = _json(present["added_tokens.json"])
        added = [{"id": number, "content": content, "special": True} for content, number in names.items()]
    outside = sorted(
        (token for token in added if token["id"] >= len(proto.pieces)), key=lambda token: token["id"]
    )

    special = _special_tokens(proto, settings, present)
    prefix_after_special = settings.get("legacy") is not False
    says_bos = "bos_token" in special and settings.get("add_bos_token") is not False
    pipeline = sentencepiece_tokenizer.backend(
        proto,
        outside,
        prefix_after_special=prefix_after_special,
        bos=special["bos_token"] if says_bos else None,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length"),
        **special,
    )
    tokenizer.chat_template = _own_template(present, settings)
    return LoadedTokenizer(
        tokenizer,
        sentencepiece_tokenizer.SentencePieceText(proto),
        prefix_after_special,
        says_bos,
        files,
        rebuilt=True,
    )


def _same_vocabulary(proto: Any, content: Mapping[str, Any], folder: Path) -> None:
    vocabulary = (content.get("model") or {}).get("vocab")
    for number, piece in enumerate(proto.pieces):
        if not isinstance(vocabulary, dict) or vocabulary.get(piece.piece) != number:
            raise UserError(
                f"tokenizer {folder}: tokenizer.model and tokenizer.json disagree about piece {number} "
                f"({piece.piece!r}); remove the one that does not belong to the model"
            )


def _special_tokens(proto: Any, settings: Mapping[str, Any], present: Mapping[str, Path]) -> dict[str, str]:
    """Find the BOS, EOS, unknown and padding tokens: those that the files name, else those of the model."""
    numbers = {name: getattr(proto.trainer_spec, f"{name[:3]}_id") for name in _SPECIAL}
    found = {name: proto.pieces[number].piece for name, number in numbers.items() if number >= 0}
    mapped = _json(present["special_tokens_map.json"]) if "special_tokens_map.json" in present else {}
    for words in (mapped, settings):
        for name in _SPECIAL:
            value = words.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if content:
                found[name] = content
    return found


def _own_template(present: Mapping[str, Path], settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Find the chat template where transformers keeps it: in its own file, else in the configuration."""
    if "chat_template.jinja" in present:
        return present["chat_template.jinja"].read_text(encoding="utf-8")
    if "chat_template.json" in present:
        return _json(present["chat_template.json"]).get("chat_template")
    own = settings.get("chat_template")
    # a list holds several named templates
    if isinstance(own, list):
        return {entry["name"]: entry["template"] for entry in own}
    return own


# ---------------------------------------------------------------- tokenizer.json


class PipelineText:
    """Tokenizes text by a `tokenizers` pipeline without its added tokens, with or without a leading space.

    Args:
        pipeline: left as it is.
    """

    def __init__(self, pipeline: tokenizers.Tokenizer) -> None:
        content = json.loads(pipeline.to_str())
        content.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._start = tokenizers.Tokenizer.from_str(json.dumps(content))
        for part in ("normalizer", "pre_tokenizer"):
            content[part] = _without_prefix(content[part])
        self._middle = tokenizers.Tokenizer.from_str(json.dumps(content))

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        """Return the ids of `text`; special tokens in it are tokenized as plain characters."""
        return (self._start if prefix else self._middle).encode(text, add_special_tokens=False).ids


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the same normalizer or pre-tokenizer, changed so that it puts nothing in front of the text."""
    if part is None or part["type"] == "Prepend":
        return None
    part = dict(part)
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        part[key] = [inner for inner in map(_without_prefix, part[key]) if inner is not None]
    elif part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    elif part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return part


def _from_transformers(
    path: str, folder: Path, files: tuple[Path, ...], settings: Mapping[str, Any]
) -> LoadedTokenizer:
    if folder / "tokenizer.json" in files:
        _json(folder / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # tokenizers raises `Exception` itself for a tokenizer.json that it cannot use
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer {path}: transformers cannot load it ({reason})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {path}: transformers loads it as {type(tokenizer).__name__}, not a fast tokenizer; "
            "add its tokenizer.json"
        )
    pipeline = tokenizer.backend_tokenizer
    text = PipelineText(pipeline)
    says_bos = settings.get("add_bos_token")
    if says_bos is None:
        says_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
            tokenizer.bos_token_id
        ]
    return LoadedTokenizer(
        tokenizer, text, _prefixes_after_special(tokenizer, text), bool(says_bos), files, rebuilt=False
    )


def _prefixes_after_special(tokenizer: Any, text: PipelineText) -> bool:
    """Try out whether a word after a special token gets the leading space that the same word alone gets."""
    start, middle = text.encode("a", prefix=True), text.encode("a", prefix=False)
    special = next((str(token) for token in tokenizer.added_tokens_decoder.values() if token.special), None)
    if start == middle or special is None:
        return False
    return tokenizer.backend_tokenizer.encode(special + "a", add_special_tokens=False).ids[1:] == start
