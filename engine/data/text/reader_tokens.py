"""Chooses the tokens that an exported model's readers need, and writes them into the tokenizer's files.

transformers finds the last token of a conversation in a padded batch as the last one that is not the padding token. So
a reward model's padding must be a token that no conversation ends with; of many checkpoints it is the EOS.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# the padding token of a tokenizer that has none to spare
ADDED = "<|pad|>"


def padding(tokenizer: Any, source: str, last: int) -> int | None:
    """Choose a token that may pad a reward model's batches.

    Args:
        tokenizer: of transformers.
        source: the text of the chat template.
        last: the id with which the template ends a conversation.

    Returns:
        The id of, in this order: the tokenizer's padding token; an added token called so; the unknown token; a special
        token that has no other use. Never `last`; None if there is no such token.
    """
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    spare = [
        number
        for number, token in sorted(added.items())
        if token.special and number not in used and token.content not in source
    ]
    named = [number for number, token in sorted(added.items()) if "pad" in token.content.lower()]
    for number in (tokenizer.pad_token_id, *named, tokenizer.unk_token_id, *spare):
        if number is not None and number != last:
            return int(number)
    return None


def end(tokenizer: Any, behind: str) -> int | None:
    """Return the id of the first added token in what a template writes behind an answer; None without one."""
    found = tokenizer.backend_tokenizer.encode(behind, add_special_tokens=False).ids
    return next((number for number in found if number in tokenizer.added_tokens_decoder), None)


def write_padding(folder: Path, number: int, content: str) -> None:
    """Name a padding token in a tokenizer's files, for transformers' AutoTokenizer.

    Args:
        folder: of the files.
        number: id of the token.
        content: its text; a token that `tokenizer.json` does not hold is added to it.
    """
    pipeline = folder / "tokenizer.json"
    if pipeline.is_file():
        found = json.loads(pipeline.read_text(encoding="utf-8"))
        known = {token["id"] for token in found["added_tokens"]} | set(_pieces(found).values())
        if number not in known:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            found["added_tokens"].append({"id": number, "content": content, **flags, "special": True})
        # a fixed padding would go over the one that is named
        found["padding"] = None
        write_json(pipeline, found)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"pad_token": content})


def _pieces(pipeline: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of a pipeline's vocabulary; unigram models list their pieces in the order of their ids."""
    vocabulary = pipeline["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: number for number, (piece, _) in enumerate(vocabulary)}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as transformers does."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
