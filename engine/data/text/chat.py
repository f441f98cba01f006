"""Turns conversations into tokens, message by message, so that shared text becomes shared tokens.

The order of a sequence is: BOS (at most one), then for each message its header (assistant only) and its body, then EOS
if asked for. Header and body are tokenized separately, and no merge crosses their borders, so two conversations that
start with the same messages start with the same tokens. A generation prompt ends at exactly such a border, so the
model is trained to continue the same tokens that it is later asked to continue.
"""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.reading.messages import Message
from silva.engine.data.text.chat_template import ChatTemplate, resolve
from silva.engine.data.text.tokenizer_files import NAMES, LoadedTokenizer, load
from silva.engine.errors import UserError

_PROBE = (Message("user", "a"), Message("assistant", "b"))


@dataclass(slots=True)
class TokenSequence:
    """Holds the tokens of one conversation; scored[0] is always False, because nothing predicts the first token."""

    tokens: NDArray[np.int32]  # (n,)
    scored: NDArray[np.bool_]  # (n,)


class _Section(NamedTuple):
    """Holds the ids of one special token (`special`) or of the text between two; `blank` text is white space only."""

    ids: list[int]
    special: bool
    blank: bool


class ChatTokenizer:
    """Turns conversations into tokens by a tokenizer and a chat template.

    **BOS.** A sequence begins with at most one BOS. `add_bos` says whether it has one; with None, it has one if the
    template writes `bos_token` or the tokenizer itself adds one (by its `add_bos_token` or its post-processor; a bare
    `tokenizer.model` does). `add_bos: false` removes a BOS that comes from the template's `bos_token`, but not one
    that the template spells out as text.

    **Scored.** The body of a scored assistant message is scored, that is its content and the end of its turn. Its
    header is not scored, nor is the white space that a template writes after the end-of-turn token. Where a template
    writes the EOS only when another turn follows (as "eurus" does), that EOS still counts as the end of the scored
    message before it.

    **EOS.** With `append_eos`, the tokenizer's EOS is appended and scored, if the template's text of the final
    assistant message holds no EOS. Without it nothing is removed: a template that ends turns with EOS still does so.

    **Control tokens** are the tokenizer's special tokens, and the added tokens that occur in the template's text. They
    come from the template only: if a message spells one out, it is tokenized as plain characters, whatever the
    tokenizer. Other added tokens (such as "<tool_call>" where the template does not use it) are recognised in
    messages, as transformers does.

    Args:
        loaded: the tokenizer.
        template: made for this tokenizer.
        add_bos: whether a BOS is put in front; None leaves it to template and tokenizer.
        append_eos: whether an EOS is appended where the template writes none.

    Attributes:
        add_bos: whether a sequence begins with a BOS.
        vocab_size: number of ids, added tokens included.
        pad_id: the padding token's id, else the unknown token's, else 0. It is not replaced by the EOS, because a
            reader of rewards looks for the last token that is not padding, and that may be an EOS.
        eos_id: None where the tokenizer has no EOS.
        fingerprint: sha256 of tokenizer files, template and flags; equal fingerprints tokenize equally.

    Raises:
        UserError: `add_bos` or `append_eos` asks for a token that the tokenizer does not have.
    """

    def __init__(
        self, loaded: LoadedTokenizer, template: ChatTemplate, *, add_bos: bool | None, append_eos: bool
    ):
        tokenizer = loaded.transformers
        self._loaded = loaded
        self._template = template
        self.append_eos = append_eos
        self.vocab_size: int = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int = next(
            i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, 0) if i is not None
        )
        if append_eos and self.eos_id is None:
            raise UserError(
                "tokenizer.append_eos is true, but the tokenizer has no EOS token; set it to false"
            )

        self._bos_text: str = tokenizer.bos_token or ""
        probe = template.render(_PROBE)
        starts = bool(self._bos_text) and probe.startswith(self._bos_text)
        self._template_writes_bos = starts and template.render(_PROBE, bos_token="") != probe
        self._template_spells_bos = starts and not self._template_writes_bos
        self.add_bos: bool = (loaded.says_bos or self._template_writes_bos) if add_bos is None else add_bos
        if self.add_bos and tokenizer.bos_token_id is None:
            raise UserError("tokenizer.add_bos is true, but the tokenizer has no BOS token; set it to false")
        self._bos_id: int | None = tokenizer.bos_token_id

        self._added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._splitter = _splitter(tokenizer)
        # cached, because the conversations of a tree share most of their messages and come one after the other
        self._encode = functools.lru_cache(maxsize=1024)(loaded.text.encode)
        self.fingerprint = self._digest()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        append_eos: bool = True,
    ) -> "ChatTokenizer":
        """Load a tokenizer with its own or another chat template.

        Args:
            path: a folder, a `tokenizer.model` file, or a hub name.
            chat_template: None for the tokenizer's own, "eurus", a path to a .jinja file, or an inline template.
            add_bos: whether a BOS is put in front; None leaves it to template and tokenizer.
            append_eos: whether an EOS is appended where the template writes none.

        Raises:
            UserError: a missing or damaged tokenizer, no template anywhere, or one that cannot be rendered.
        """
        loaded = load(path)
        source, name = resolve(chat_template, loaded.transformers.chat_template, path)
        control = [
            token.content
            for token in loaded.transformers.added_tokens_decoder.values()
            if token.special or (token.content in source and not token.content.isspace())
        ]
        template = ChatTemplate(loaded.transformers, source, name, control)
        return cls(loaded, template, add_bos=add_bos, append_eos=append_eos)

    def encode(self, messages: Sequence[Message], *, score: Literal["last", "all"]) -> TokenSequence:
        """Tokenize one conversation.

        Args:
            messages: the last one must be the assistant's.
            score: which assistant messages are scored, the last one or all.

        Raises:
            UserError: the last message is not the assistant's, or the template cannot render the conversation or
                writes nothing for the answer.
        """
        if not messages or messages[-1].role != "assistant":
            raise UserError("a conversation must end with an assistant message to be trained on")
        pieces, mark = self._template.pieces(messages)
        if self._template_writes_bos:
            pieces[0] = pieces[0]._replace(body=pieces[0].body.removeprefix(self._bos_text))
        line = _Line(self, mark)
        if self.add_bos and not (self._template_spells_bos and pieces[0].body.startswith(self._bos_text)):
            line.append(self._bos_id, scored=False)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            scored = piece.role == "assistant" and (last or score == "all")
            line.add(piece.header, scored=False)
            sections = line.add(piece.body, scored=scored)
        if not any(section.ids and not section.special for section in sections):
            raise UserError(f"{self._template.name} writes no text for the final assistant message")
        if self.append_eos and not any(section.ids == [self.eos_id] for section in sections):
            line.append(self.eos_id, scored=True)
        return line.sequence()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with its chat template, for transformers' AutoTokenizer and for `load`.

        A tokenizer that came as files is copied file by file; one built from `tokenizer.model` gets an equal
        `tokenizer.json`. The saved template writes the BOS if and only if this tokenizer puts one in front. Files of
        another tokenizer in the folder are removed, because they would be read together with the new ones.

        Args:
            folder: made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = {file.resolve() for file in self._loaded.files}
        for name in NAMES:
            if (folder / name).resolve() not in own:
                (folder / name).unlink(missing_ok=True)
        if self._loaded.rebuilt:
            self._loaded.transformers.save_pretrained(folder)
        for file in self._loaded.files:
            # of a rebuilt tokenizer only the model is copied: its other files were just written by save_pretrained
            if not self._loaded.rebuilt:
                shutil.copyfile(file, folder / file.name)
            elif file.name == "tokenizer.model" or len(self._loaded.files) == 1:
                shutil.copyfile(file, folder / "tokenizer.model")
        template = self._served_template()
        settings_file = folder / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
        settings |= {"chat_template": template, "add_bos_token": self.add_bos}
        if self._loaded.rebuilt:
            # the plain class loads the built pipeline as it is, and LlamaTokenizer would replace its normalizer
            settings |= {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "legacy": self._loaded.prefix_after_special,
            }
        settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)

    def _served_template(self) -> str:
        source = self._template.source
        if self.add_bos and not self._template_writes_bos and not self._template_spells_bos:
            return "{{ bos_token }}" + source
        if not self.add_bos and self._template_writes_bos:
            return "{% set bos_token = '' %}" + source
        return source

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for file in self._loaded.files:
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
        flags = {"template": self._template.source, "add_bos": self.add_bos, "append_eos": self.append_eos}
        digest.update(json.dumps(flags, sort_keys=True).encode())
        return digest.hexdigest()

    def _sections(
        self, text: str, mark: str, *, after: Literal["nothing", "special", "text"]
    ) -> list[_Section]:
        """Split a text at the special tokens that the template wrote; `after` is what stands in front of `text`."""
        sections = []
        for part in self._splitter.split(text) if self._splitter else [text]:
            if not part:
                continue
            number = self._added.get(part, self._added.get(part.strip()))
            if number is not None:
                sections.append(_Section([number], True, False))
                after = "special"
                continue
            plain = part.replace(mark, "") if mark else part
            prefix = after == "nothing" or (after == "special" and self._loaded.prefix_after_special)
            ids = self._encode(plain, prefix=prefix)
            sections.append(_Section(ids, False, plain.isspace()))
            after = "text"
        return sections


class _Line:
    """Holds one sequence while messages are added to it."""

    def __init__(self, owner: ChatTokenizer, mark: str) -> None:
        self._owner = owner
        self._mark = mark
        self._ids: list[int] = []
        self._scored: list[bool] = []
        self._after: Literal["nothing", "special", "text"] = "nothing"
        # whether a scored message has not yet had an EOS
        self._awaits_end = False

    def add(self, text: str, *, scored: bool) -> list[_Section]:
        """Append the ids of `text` and return its sections."""
        owner = self._owner
        sections = owner._sections(text, self._mark, after=self._after)
        if scored:
            self._awaits_end = True
        for index, section in enumerate(sections):
            follows_special = index > 0 and sections[index - 1].special
            trailing_blank = section.blank and follows_special and index == len(sections) - 1
            is_eos = section.special and section.ids == [owner.eos_id]
            ends_turn = self._awaits_end and is_eos and index == 0
            self._ids += section.ids
            self._scored += [(scored and not trailing_blank) or ends_turn] * len(section.ids)
            self._after = "special" if section.special else "text"
            if not scored or is_eos:
                self._awaits_end = False
        return sections

    def append(self, number: int | None, *, scored: bool) -> None:
        """Append one special token."""
        assert number is not None
        self._ids.append(number)
        self._scored.append(scored)
        self._after = "special"

    def sequence(self) -> TokenSequence:
        """Return what was added."""
        scored = np.array(self._scored, bool)
        scored[0] = False
        return TokenSequence(np.array(self._ids, np.int32), scored)


def _splitter(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern that finds added tokens, the longest first; None if there are none.

    A match includes the white space that a token's lstrip and rstrip flags remove.
    """
    tokens = sorted(
        tokenizer.added_tokens_decoder.values(), key=lambda token: len(token.content), reverse=True
    )
    if not tokens:
        return None
    spelled = (
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in tokens
    )
    return re.compile("(" + "|".join(spelled) + ")")
