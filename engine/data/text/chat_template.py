"""Finds chat templates, renders them message by message, and splits the text into what each message adds to it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from silva.engine.data.reading.messages import Message
from silva.engine.errors import UserError

# Eurus' template writes `[INST] {prompt} [/INST]` for user turns, then a space and the answer. It writes the EOS only
# *between* turns, so that `append_eos` alone decides about the last one. A system message goes before the first
# user's.
EURUS = (
    "{%- set found = namespace(system='', role='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and loop.first -%}"
    "{%- set found.system = message['content'] + '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' and found.role != 'user' -%}"
    "{%- if found.role == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{{ '[INST] ' + found.system + message['content'] + ' [/INST]' }}"
    "{%- set found.system = '' -%}{%- set found.role = 'user' -%}"
    "{%- elif message['role'] == 'assistant' and found.role == 'user' -%}"
    "{{ ' ' + message['content'] }}{%- set found.role = 'assistant' -%}"
    "{%- else -%}"
    "{{ raise_exception('after an optional system message, user and assistant take turns') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
BUILT_IN = {"eurus": EURUS}
# number of cached renderings, far more than one tree has
_STARTS_KEPT = 1024


class Piece(NamedTuple):
    """Holds what one message adds to the text: `header` opens an answer (never scored), `body` follows."""

    role: str
    header: str
    body: str


def resolve(chosen: str | None, own: str | dict[str, str] | None, tokenizer: str) -> tuple[str, str]:
    """Find the chat template.

    Args:
        chosen: the recipe's `tokenizer.chat_template`: a built-in name, a path to a .jinja file, or an inline
            template.
        own: the tokenizer's own, used where the recipe names none; of several, the one called "default".
        tokenizer: its name, for errors.

    Returns:
        The text of the template, and its name for errors.

    Raises:
        UserError: there is no template, or `chosen` is none of these.
    """
    if chosen is None:
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise UserError(
                f'tokenizer {tokenizer} has no chat template: set tokenizer.chat_template, e.g. to "eurus" '
                "(built in) or to the path of a .jinja file"
            )
        return own, f"the chat template of {tokenizer}"
    if chosen in BUILT_IN:
        return BUILT_IN[chosen], f"the built-in chat template {chosen}"
    if "{{" in chosen or "{%" in chosen:
        return chosen, "the recipe's inline chat template"
    file = Path(chosen).expanduser()
    if not chosen.endswith(".jinja"):
        raise UserError(
            f"tokenizer.chat_template: {chosen!r} is neither built in ({', '.join(BUILT_IN)}), nor the "
            'path of a .jinja file, nor an inline template containing "{{" or "{%"'
        )
    if not file.is_file():
        raise UserError(f"tokenizer.chat_template: there is no file {chosen}")
    try:
        return file.read_text(encoding="utf-8"), f"the chat template {chosen}"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template: {chosen} cannot be read ({error})") from None


class ChatTemplate:
    """Renders conversations through transformers' sandboxed Jinja.

    Control tokens that a message's content spells out are marked before rendering: a mark is put inside each of them,
    so that splitting the text finds only the control tokens that the template itself wrote.

    Args:
        tokenizer: of transformers.
        source: the text of the template.
        name: of the template, for errors.
        control: the control tokens.
    """

    def __init__(self, tokenizer: Any, source: str, name: str, control: Sequence[str]) -> None:
        self.source = source
        self.name = name
        self._tokenizer = tokenizer
        self._starts: dict[tuple[tuple[Message, ...], bool], str] = {}
        # a token of one character has no place inside it for the mark; it would be an ordinary character anyway
        long = sorted((token for token in control if len(token) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, long))) if long else None

    def render(self, messages: Sequence[Message], *, header: bool = False, **variables: str) -> str:
        """Render messages.

        Args:
            messages: what is rendered.
            header: whether the text that opens an answer is added.
            **variables: set in the template.

        Raises:
            UserError: the template cannot render these messages.
        """
        try:
            return self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=header,
                **variables,
            )
        # besides Jinja's own errors, the expressions of a template can raise these
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            LookupError,
        ) as error:
            raise UserError(
                f"{self.name} cannot render messages with roles {_roles(messages)}: {error}; choose another "
                "tokenizer.chat_template or repair the data"
            ) from None

    def pieces(self, messages: Sequence[Message]) -> tuple[list[Piece], str]:
        """Split the text of a conversation into what each message adds to it.

        A leading system message counts as part of the first user message, because templates may fold it in there.
        Every rendering must start with the rendering of one message less; otherwise two conversations that share
        messages would not share text.

        Args:
            messages: a conversation.

        Returns:
            The pieces, and the mark that is inside every spelled-out control token (empty where there is none).

        Raises:
            UserError: the template cannot render the messages, or a message changes the text before it.
        """
        marked, mark = self._mark(messages)
        start = 2 if marked[0].role == "system" else 1
        pieces = [Piece("user", "", self._start(marked[:start]))]
        before = pieces[0].body
        for count in range(start + 1, len(marked) + 1):
            role = marked[count - 1].role
            opened = self._start(marked[: count - 1], header=True) if role == "assistant" else before
            after = self._start(marked[:count])
            if not opened.startswith(before) or not after.startswith(opened):
                raise UserError(
                    f"{self.name} changes earlier text when message {count} is added (roles "
                    f"{_roles(marked[:count])}): the rendering of the first messages must be the start "
                    "of the whole; choose another tokenizer.chat_template"
                )
            pieces.append(Piece(role, opened[len(before) :], after[len(opened) :]))
            before = after
        return pieces, mark

    def _start(self, messages: Sequence[Message], *, header: bool = False) -> str:
        """Render messages through a cache: the conversations of a tree start alike and come one after the other."""
        key = (tuple(messages), header)
        text = self._starts.get(key)
        if text is None:
            if len(self._starts) >= _STARTS_KEPT:
                self._starts.clear()
            text = self._starts[key] = self.render(messages, header=header)
        return text

    def _mark(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        contents = "".join(message.content for message in messages)
        if self._control is None or not self._control.search(contents):
            return list(messages), ""
        private = (chr(code) for code in range(0xF0000, 0xFFFFE))
        mark = next(character for character in private if character not in contents + self.source)
        return [Message(role, self._broken(content, mark)) for role, content in messages], mark

    def _broken(self, content: str, mark: str) -> str:
        """Return `content` with `mark` inside every control token; this is repeated, because tokens may overlap."""
        assert self._control is not None
        while self._control.search(content):
            content = self._control.sub(lambda found: found[0][0] + mark + found[0][1:], content)
        return content


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.role for message in messages)
