"""Finds chat templates, renders conversations by them, and keeps apart what a template and what a message wrote."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from silva.engine.data.reading.messages import Message
from silva.engine.data.text import limits
from silva.engine.errors import UserError

# Eurus' template writes `[INST] {prompt} [/INST]` for user turns, then a space and the answer. It writes the EOS only
# *between* turns, so that `append_eos` alone decides about the last one. A system message goes before the first
# user's.
EURUS = (
    "{{ bos_token }}"
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
# A prompt and its completion, one behind the other: no template.
PLAIN = (
    "{%- if messages | length > 2 or messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('without a chat template a row is one prompt and one completion, both text') }}"
    "{%- endif -%}"
    "{%- for message in messages -%}{{ message['content'] }}{%- endfor -%}"
)
BUILT_IN = {"eurus": EURUS, "none": PLAIN}
# number of cached renderings, far more than one tree has
_KEPT = 1024


class CannotRender(UserError):
    """Says that the template cannot render one conversation; other rows may be sound."""


class Rendered(NamedTuple):
    """Holds the text of some messages.

    Attributes:
        text: what the template gives, as transformers gives it.
        marked: the same with `mark` inside every control token that a user, tool or system message spells out.
        mark: a character that is in none of the texts; empty where `marked` is `text`.
    """

    text: str
    marked: str
    mark: str


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
                '(built in), to the path of a .jinja file, or to "none" for prompts and completions as they are'
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

    A template sees every message as it is. What an assistant message says is a training target: added tokens in it are
    tokens. A control token that another message spells out must not become one: `render_guarded` says where they are.

    Args:
        tokenizer: of transformers.
        source: the text of the template.
        name: of the template, for errors.
        control: the control tokens: those that only the template may write.

    Raises:
        UserError: the template is far too long to be one.
    """

    def __init__(self, tokenizer: Any, source: str, name: str, control: Sequence[str]) -> None:
        if len(source) > limits.SOURCE_CHARACTERS:
            raise UserError(
                f"{name}: has {len(source):,} characters, and a template may have {limits.SOURCE_CHARACTERS:,}"
            )
        self.source = source
        self.name = name
        self._tokenizer = tokenizer
        # a token of one character has no place inside it for the mark; it would be an ordinary character anyway
        long = sorted((token for token in control if len(token) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, long))) if long else None
        self._cached = functools.lru_cache(maxsize=_KEPT)(self._render)

    def render(self, messages: Sequence[Message], *, generation: bool = False, **variables: str) -> str:
        """Render messages.

        Args:
            messages: a first one of role "context" holds what is given to the template beside the messages.
            generation: whether the text goes on to the place where an answer begins.
            variables: further variables of the template.

        Raises:
            CannotRender: the template fails.
        """
        if variables:
            return self._render(tuple(messages), generation, **variables)
        return self._cached(tuple(messages), generation)

    def _render(self, messages: tuple[Message, ...], generation: bool, **variables: str) -> str:
        context, said = split(messages)
        try:
            with limits.limited():
                text: str = self._tokenizer.apply_chat_template(
                    [message.fields() for message in said],
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **context,
                    **variables,
                )
            if len(text) > limits.CHARACTERS:
                raise limits.Exceeded(f"it writes more than {limits.CHARACTERS:,} characters")
        # templates compute: besides Jinja's own errors, an expression in one can raise any of these
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            LookupError,
            # of the Python that Jinja writes for a template
            SyntaxError,
            limits.Exceeded,
        ) as error:
            raise CannotRender(
                f"{self.name} cannot render messages with roles {_roles(said)}: {error}; choose another "
                "tokenizer.chat_template or repair the data"
            ) from None
        return text

    def unread(self, messages: Sequence[Message]) -> list[str]:
        """Return the names of what the messages bring beside their text and the template writes nothing of."""
        context, said = split(tuple(messages))
        names = dict.fromkeys([*context, *(key for message in said for key in message.more())])
        names.pop("content", None)
        return [name for name in names if self._without(name, messages) == self.render(messages)]

    def _without(self, name: str, messages: Sequence[Message]) -> str:
        left = [
            message._replace(
                content=_dropped(name, message.content) if message.role == "context" else message.content,
                extra=_dropped(name, message.extra),
            )
            for message in messages
        ]
        try:
            return self.render(left)
        # it is read: without it, nothing can be rendered
        except CannotRender:
            return ""

    # ------------------------------------------------------------ control tokens that a message spells out

    def render_guarded(self, messages: Sequence[Message], *, generation: bool = False) -> Rendered:
        """Render messages, and say where user, tool and system messages spell control tokens.

        The text is rendered from the messages as they are. A second rendering, with a mark inside each such token, says
        where they came to stand. Where a template looks at the very tokens (Qwen's asks whether a user message starts
        with "<tool_response>"), and so renders something else, a mark beside them says where the message stands.

        Raises:
            CannotRender: the template fails, or the place of such a message cannot be told.
        """
        text = self.render(messages, generation=generation)
        if self._control is None:
            return Rendered(text, text, "")
        guarded = [
            place
            for place, message in enumerate(messages)
            if message.role != "assistant" and self._spells(message.content + message.extra)
        ]
        if not guarded:
            return Rendered(text, text, "")
        everything = self.source + text + "".join(m.content + m.extra for m in messages)
        private = (chr(code) for code in range(0xF0000, 0xFFFFE))
        free = [
            mark
            for _, mark in zip(
                range(len(guarded) + 1), (c for c in private if c not in everything), strict=False
            )
        ]
        mark = free[0]
        inside = list(messages)
        for place in guarded:
            message = messages[place]
            inside[place] = message._replace(
                content=self._broken(message.content, mark), extra=self._broken(message.extra, mark)
            )
        try:
            marked = self.render(inside, generation=generation)
        except CannotRender:
            marked = ""
        if marked.replace(mark, "") == text:
            return Rendered(text, marked, mark)
        for at_start in (True, False):
            spans = self._located(messages, guarded, free[1:], text, generation, at_start=at_start)
            if spans is not None:
                parts, end = [], 0
                for start, stop in sorted(spans):
                    parts += [text[end:start], self._broken(text[start:stop], mark)]
                    end = stop
                return Rendered(text, "".join([*parts, text[end:]]), mark)
        place = guarded[0]
        [spelled, *_] = self._control.findall(messages[place].content + messages[place].extra)
        raise CannotRender(
            f"{self.name} looks at message {place + 1} ({messages[place].role}), which spells the control token "
            f"{spelled!r}, and hides where it stands; repair the row, or choose another tokenizer.chat_template"
        )

    def _spells(self, text: str) -> bool:
        return self._control is not None and self._control.search(text) is not None

    def _broken(self, content: str, mark: str) -> str:
        """Return `content` with `mark` inside every control token; again where one overlapped another."""
        assert self._control is not None
        while self._control.search(content):
            content = self._control.sub(lambda found: found[0][0] + mark + found[0][1:], content)
        return content

    def _located(
        self,
        messages: Sequence[Message],
        guarded: Sequence[int],
        marks: Sequence[str],
        text: str,
        generation: bool,
        *,
        at_start: bool,
    ) -> list[tuple[int, int]] | None:
        """Find the spans of guarded contents in `text` by a mark behind the first, or before the last control token.

        Returns:
            (start, stop) of every appearance; None if the marks change the rendering, or a span is not the content.
        """
        assert self._control is not None
        marked, offsets = list(messages), []
        for place, mark in zip(guarded, marks, strict=True):
            message = messages[place]
            matches = list(self._control.finditer(message.content))
            if not matches or self._spells(message.extra):
                return None
            offset = matches[0].end() if at_start else matches[-1].start()
            offsets.append(offset)
            marked[place] = message._replace(
                content=message.content[:offset] + mark + message.content[offset:]
            )
        try:
            rendered = self.render(marked, generation=generation)
        except CannotRender:
            return None
        plain: list[str] = []
        places: list[tuple[int, int]] = []
        for character in rendered:
            if character in marks:
                places.append((marks.index(character), len(plain)))
            else:
                plain.append(character)
        if "".join(plain) != text:
            return None
        spans = []
        for number, place in places:
            content, offset = messages[guarded[number]].content, offsets[number]
            lead = len(content) - len(content.lstrip())
            for before, shown in (
                (0, content),
                (0, content.rstrip()),
                (lead, content.lstrip()),
                (lead, content.strip()),
            ):
                start = place - (offset - before)
                if start >= 0 and text.startswith(shown, start):
                    spans.append((start, start + len(shown)))
                    break
            else:
                return None
        return spans


def _dropped(name: str, text: str) -> str:
    """Return JSON of an object without one of its keys; text that is none is left as it is."""
    if not text:
        return text
    return json.dumps(
        {key: value for key, value in json.loads(text).items() if key != name}, ensure_ascii=False
    )


def split(messages: tuple[Message, ...]) -> tuple[dict[str, Any], tuple[Message, ...]]:
    """Return what is given beside the messages, and the messages."""
    if messages and messages[0].role == "context":
        return json.loads(messages[0].content), messages[1:]
    return {}, messages


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.role for message in messages)
