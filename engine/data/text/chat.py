"""Turns conversations into tokens: those that an inference server sees, and those that the model is to answer with.

Every scored answer is rendered from its own history, as at inference: the history with the generation prompt is
tokenized whole, and the answer from its border on. So templates that rewrite earlier turns (that drop their thoughts,
or treat the last turn differently) need no special case. Answers of one conversation whose histories begin alike share
these tokens; the radix merge computes them once.
"""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from silva.engine.data.reading.formats import Score
from silva.engine.data.reading.messages import Conversation, Message
from silva.engine.data.text import reader_tokens
from silva.engine.data.text.chat_template import PLAIN, CannotRender, ChatTemplate, Rendered, resolve
from silva.engine.data.text.tokenizer_files import NAMES, LoadedTokenizer, load
from silva.engine.data.trees.group import TokenSequence
from silva.engine.errors import UserError

# texts that no template writes itself
_PROBE = (Message("user", "Xq1"), Message("assistant", "Zq7"))
# transformers' own: a template's last new line is not written
_LAST_LINE = "\n"


@dataclass
class Encoded:
    """Holds what is computed for one side of a comparison, or for one conversation of SFT.

    Attributes:
        paths: token sequences, the last one that of the last answer. There is more than one where a template renders an
            earlier scored answer otherwise than it stands in a later one's history.
        notes: what a user should know of how the template took the conversation.
    """

    paths: list[TokenSequence]
    notes: list[str] = field(default_factory=list)


class _Ids(NamedTuple):
    """Holds the ids of a text, and whether its last token is an added one."""

    ids: list[int]
    ends_with_added: bool


class ChatTokenizer:
    """Turns conversations into tokens by a tokenizer and a chat template.

    **As readers do.** The ids of a conversation are those of transformers' `apply_chat_template(..., tokenize=True)`
    with the tokenizer that `save` writes, added tokens in assistant messages included.

    **BOS.** A template decides whether a sequence begins with a BOS. `add_bos: true` puts one in front where it writes
    none, `add_bos: false` takes away the one that it writes by `bos_token` (not one that it spells out as text).
    Without a template (`chat_template: none`), the tokenizer decides, as it does for any text.

    **EOS.** An answer has to end with a token that ends it. With `append_eos` None, the EOS is appended where the
    template writes neither the EOS nor another control token behind an answer (as "eurus" does not, and `none` cannot).
    True appends it wherever the template writes no EOS; false never does.

    **Scored.** What the template writes for a scored answer behind the generation prompt, the end of turn included.

    **Control tokens** are the tokenizer's special tokens, and the added tokens that occur in the template's text. A
    user, tool or system message that spells one out does not get it: it is tokenized as plain characters, whatever the
    tokenizer. Other added tokens are recognised there, as transformers does.

    Args:
        loaded: the tokenizer.
        source: the text of the chat template.
        name: of the template, for errors.
        add_bos: see BOS.
        append_eos: see EOS.

    Attributes:
        template: what renders conversations: `source` with what `add_bos` and `append_eos` change about it.
        plain: whether there is no chat template, only prompts and completions.
        vocab_size: number of ids, added tokens included.
        pad_id: of the padding of our own rows, which nothing reads: the padding token's, else the unknown token's, else
            0.
        eos_id: None where the tokenizer has no EOS.
        own_padding: id of the tokenizer's own padding token; None if it has none.
        padding: id of the token that pads batches of an exported reward model: no conversation ends with it. None if
            the tokenizer has no token to spare.
        end: id of the token that ends an answer; None if none does.
        appends_eos: whether a conversation ends with the EOS.
        fingerprint: sha256 of tokenizer files, template and flags; equal fingerprints tokenize equally.

    Raises:
        UserError: `add_bos` or `append_eos` asks for a token that the tokenizer does not have.
    """

    def __init__(
        self,
        loaded: LoadedTokenizer,
        source: str,
        name: str,
        *,
        add_bos: bool | None = None,
        append_eos: bool | None = None,
    ):
        tokenizer = loaded.transformers
        self._loaded = loaded
        self.plain = source == PLAIN
        self.vocab_size: int = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int = next(
            i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, 0) if i is not None
        )
        for key, flag, number in (
            ("add_bos", add_bos, tokenizer.bos_token_id),
            ("append_eos", append_eos, self.eos_id),
        ):
            if flag and number is None:
                token = key.rpartition("_")[2].upper()
                raise UserError(
                    f"tokenizer.{key} is true, but the tokenizer has no {token} token; set it to false"
                )
        self._added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        control = [
            token.content
            for token in self._added.values()
            if token.special or (token.content in source and not token.content.isspace())
        ]
        template = ChatTemplate(tokenizer, source, name, control)
        served = self._with_bos(source, template, add_bos)
        template = ChatTemplate(tokenizer, served, name, control)
        served = self._with_eos(served, template, append_eos, control)
        self.template = ChatTemplate(tokenizer, served, name, control)
        self._spelled = {token.content: number for number, token in self._added.items()}
        self._splits = _splitting(self._added.values(), tokenizer.backend_tokenizer)
        self._ids = functools.lru_cache(maxsize=1024)(self._tokenized)
        # a tree's conversations begin alike, so most of the texts between added tokens have been seen
        self._between = functools.lru_cache(maxsize=4096)(self._plain_ids)
        probe = self.template.render_guarded(_PROBE)
        self.own_padding: int | None = tokenizer.pad_token_id
        self.appends_eos = self.eos_id is not None and self._ids(probe).ids[-1] == self.eos_id
        self.padding = reader_tokens.padding(tokenizer, served, self._ids(probe).ids[-1])
        self.end = reader_tokens.end(tokenizer, probe.text.rpartition(_PROBE[1].content)[2])
        self.fingerprint = self._digest()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        append_eos: bool | None = None,
    ) -> "ChatTokenizer":
        """Load a tokenizer with its own or another chat template.

        Args:
            path: a folder, a `tokenizer.model` file, or a hub name.
            chat_template: None for the tokenizer's own, "eurus", "none", a path to a .jinja file, or an inline
                template.
            add_bos: whether a sequence begins with a BOS; None leaves it to the template.
            append_eos: whether an answer ends with an EOS; None: where it would have no end otherwise.

        Raises:
            UserError: a missing or damaged tokenizer, no template anywhere, or one that cannot be rendered.
        """
        try:
            loaded = load(path)
            source, name = resolve(chat_template, loaded.transformers.chat_template, path)
            return cls(loaded, source, name, add_bos=add_bos, append_eos=append_eos)
        except UserError:
            raise
        # foreign files may hold anything, over which their readers, here and in libraries, stumble in many ways
        except Exception as error:
            raise UserError(
                f"tokenizer {path}: its files do not hold what a tokenizer's do ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); fetch them again"
            ) from error

    def _with_bos(self, source: str, template: ChatTemplate, add_bos: bool | None) -> str:
        """Return the template with what `add_bos` says."""
        bos = self._loaded.transformers.bos_token or ""
        if self.plain:
            # the tokenizer puts one in front of any text
            self._adds_special = self._loaded.says_bos if add_bos is None else add_bos
            return source
        self._adds_special = False
        probe = template.render(_PROBE)
        starts = bool(bos) and probe.startswith(bos)
        if add_bos and not starts:
            return "{{ bos_token }}" + source
        if add_bos is False and starts and template.render(_PROBE, bos_token="") != probe:
            return "{% set bos_token = '' %}" + source
        return source

    def _with_eos(
        self, source: str, template: ChatTemplate, append_eos: bool | None, control: Sequence[str]
    ) -> str:
        """Return the template with an EOS behind a conversation's last answer, if it is to write one."""
        eos = self._loaded.transformers.eos_token
        if append_eos is False or eos is None:
            return source
        probe = template.render(_PROBE)
        behind = probe.rpartition(_PROBE[1].content)[2]
        if eos in behind or (append_eos is None and any(token in behind for token in control)):
            return source
        return (
            source.removesuffix(_LAST_LINE)
            + "{{ eos_token if messages[-1]['role'] == 'assistant' and not add_generation_prompt else '' }}"
        )

    # ------------------------------------------------------------ conversations

    def encode(self, messages: Conversation, *, score: Score, given: int = 0) -> Encoded:
        """Tokenize one conversation.

        Args:
            messages: the last one must be the assistant's.
            score: what is scored. "completion": everything behind the first `given` messages, as TRL does; "turns": the
                assistant's messages among these; "last": the last message; "all": every assistant message. Messages
                that are not to be trained on are never scored.
            given: messages of the prompt; read by "completion" and "turns".

        Returns:
            Paths with at least one scored token; none if there is nothing to score.

        Raises:
            UserError: the last message is not the assistant's.
            CannotRender: the template cannot render the conversation, or writes nothing for an answer.
        """
        if len(messages) < 2 or messages[-1].role != "assistant" or messages[0].role == "assistant":
            raise UserError("a conversation must end with an assistant message that answers another one")
        last = len(messages) - 1
        found = Encoded([], self._notes(messages))
        turns = [place for place, m in enumerate(messages) if m.role == "assistant" and m.train]
        if score == "completion" and all(m.train for m in messages[given:]):
            prompt = self.template.render_guarded(messages[:given], generation=True)
            found.paths = [self._answer(prompt, messages, found)]
            return found
        if score in ("completion", "turns"):
            turns = [place for place in turns if place >= given]
        elif score == "last":
            turns = [place for place in turns if place == last]
        for place in turns:
            prompt = self.template.render_guarded(messages[:place], generation=True)
            path = self._answer(prompt, messages[: place + 1], found)
            before = found.paths[-1] if found.paths else None
            if before is not None and np.array_equal(path.tokens[: len(before.tokens)], before.tokens):
                path.scored[: len(before.tokens)] |= before.scored
                found.paths.pop()
            found.paths.append(path)
        return found

    def whole(self, messages: Conversation) -> Encoded:
        """Tokenize a conversation of which nothing is scored: its reward is read at its last token."""
        found = Encoded([], self._notes(messages))
        full = self.template.render_guarded(messages)
        self._note_changes(messages[-1], full, found)
        ids = self._ids(full).ids
        found.paths = [TokenSequence(np.array(ids, np.int32), np.zeros(len(ids), bool))]
        return found

    def _notes(self, messages: Conversation) -> list[str]:
        if not messages or not (any(m.extra for m in messages) or messages[0].role == "context"):
            return []
        return [f"the chat template writes nothing of {name}" for name in self.template.unread(messages)]

    def _note_changes(self, message: Message, full: Rendered, found: Encoded) -> None:
        if message.content.strip() not in full.text:
            found.notes.append("the chat template leaves out or changes a part of an answer")

    def _answer(self, prompt: Rendered, messages: Conversation, found: Encoded) -> TokenSequence:
        """Tokenize a prompt and what the template writes behind it for the rest of the messages."""
        full = self.template.render_guarded(messages)
        given = self._ids(prompt)
        ids = self._ids(full).ids
        border = len(given.ids)
        if not full.text.startswith(prompt.text):
            border = _common(given.ids, ids)
            found.notes.append("the chat template's answer does not begin with its generation prompt")
        elif ids[:border] != given.ids:
            # tokens merge across the border: a server has read the prompt alone, so the answer begins behind it
            rest = _behind(full, prompt)
            ids = given.ids + self._segments(rest, after="added" if given.ends_with_added else "text").ids
        self._note_changes(messages[-1], full, found)
        if len(ids) == border or (
            messages[-1].content.strip() not in full.text and all(n in self._added for n in ids[border:])
        ):
            raise CannotRender(
                f"{self.template.name} writes no text for the assistant's message {len(messages)}"
            )
        tokens = np.array(ids, np.int32)
        scored = np.arange(len(tokens)) >= max(border, 1)
        return TokenSequence(tokens, scored)

    # ------------------------------------------------------------ text

    def padding_within(self, vocabulary: int) -> tuple[int, str] | None:
        """Return the id and the text of the token that pads batches of an exported reward model.

        Args:
            vocabulary: number of the model's ids. Where it is larger than the tokenizer's, a tokenizer without a token
                to spare gets a new one.

        Returns:
            None if there is no such token.
        """
        if self.padding is not None:
            return self.padding, self.token(self.padding)
        return (self.vocab_size, reader_tokens.ADDED) if self.vocab_size < vocabulary else None

    def token(self, number: int) -> str:
        """Return the text of a token, for messages and files."""
        return str(self._loaded.transformers.convert_ids_to_tokens(number))

    def _tokenized(self, rendered: Rendered) -> _Ids:
        """Tokenize a text; where a message spells a control token, by the text between those that are meant."""
        if rendered.mark or (self._splits is not None and not self._adds_special):
            return self._segments(rendered, after="nothing")
        ids = self._loaded.transformers.backend_tokenizer.encode(
            rendered.text, add_special_tokens=self._adds_special
        ).ids
        return _Ids(ids, bool(ids) and ids[-1] in self._added)

    def _segments(self, rendered: Rendered, *, after: Literal["nothing", "added", "text"]) -> _Ids:
        """Tokenize a marked text, or one that goes on behind another.

        Args:
            rendered: added tokens with a mark inside are plain characters.
            after: what stands in front of the text.
        """
        ids: list[int] = []
        if after == "nothing" and self._adds_special:
            ids, after = [self._loaded.transformers.bos_token_id], "nothing"
        end = 0
        size = len(rendered.marked)
        for number, start, stop in [*self._added_tokens(rendered.marked), (None, size, size)]:
            plain = rendered.marked[end:start]
            if rendered.mark:
                plain = plain.replace(rendered.mark, "")
            if plain:
                prefix = after == "nothing" or (after == "added" and self._loaded.prefix_after_special)
                ids += self._between(plain, prefix)
                after = "text"
            if number is not None:
                ids.append(number)
                after = "added"
            end = stop
        return _Ids(ids, after == "added")

    def _plain_ids(self, text: str, prefix: bool) -> list[int]:
        return self._loaded.text.encode(text, prefix=prefix)

    def _added_tokens(self, text: str) -> list[tuple[int, int, int]]:
        """Find the added tokens of a text, each with the place where it begins and where it ends."""
        if self._splits is not None:
            return [(self._spelled[found[0]], *found.span()) for found in self._splits.finditer(text)]
        # the tokenizer itself finds them, whatever their flags make of the text around them
        encoded = self._loaded.transformers.backend_tokenizer.encode(text, add_special_tokens=False)
        pairs = zip(encoded.ids, encoded.offsets, strict=True)
        return [(number, *span) for number, span in pairs if number in self._added]

    # ------------------------------------------------------------ files

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with its chat template, for transformers' AutoTokenizer and for `load`.

        A tokenizer that came as files is copied file by file; one built from `tokenizer.model` gets an equal
        `tokenizer.json`. The saved template writes BOS and EOS where this tokenizer trains with them. Files of another
        tokenizer in the folder are removed, because they would be read together with the new ones.

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
        settings_file = folder / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
        (folder / "chat_template.json").unlink(missing_ok=True)
        if self.plain:
            settings.pop("chat_template", None)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        else:
            settings["chat_template"] = self.template.source
            (folder / "chat_template.jinja").write_text(self.template.source, encoding="utf-8")
        settings["add_bos_token"] = self.begins_with_bos
        if self._loaded.rebuilt:
            # the plain class loads the built pipeline as it is, and LlamaTokenizer would replace its normalizer
            settings |= {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "legacy": self._loaded.prefix_after_special,
            }
        reader_tokens.write_json(settings_file, settings)

    @property
    def begins_with_bos(self) -> bool:
        """Tell whether a sequence begins with the tokenizer's BOS."""
        bos = self._loaded.transformers.bos_token_id
        return bos is not None and self._ids(self.template.render_guarded(_PROBE)).ids[:1] == [bos]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for file in self._loaded.files:
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
        flags = {"template": self.template.source, "adds_special": self._adds_special}
        digest.update(json.dumps(flags, sort_keys=True).encode())
        return digest.hexdigest()


def _splitting(added: Collection[Any], backend: Any) -> re.Pattern[str] | None:
    """Return a pattern that finds added tokens as the tokenizer does; None where their flags need the tokenizer."""
    plain = not any(token.single_word or token.lstrip or token.rstrip for token in added)
    # those that are looked for in normalized text are found after all others
    alike = not any(token.normalized for token in added) or (
        backend.normalizer is None and all(token.normalized for token in added)
    )
    if not added or not plain or not alike:
        return None
    longest_first = sorted((token.content for token in added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _behind(full: Rendered, prompt: Rendered) -> Rendered:
    """Return what stands in `full` behind `prompt`, with its marks."""
    if not full.mark:
        rest = full.text[len(prompt.text) :]
        return Rendered(rest, rest, "")
    # the prompt's marks are among those of the whole
    count, place = 0, 0
    while count < len(prompt.text):
        count += full.marked[place] != full.mark
        place += 1
    return Rendered(full.text[len(prompt.text) :], full.marked[place:], full.mark)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the ids that both begin with."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
