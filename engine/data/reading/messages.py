"""Conversations: the message shapes found in data sets, read into one form and checked.

A row that cannot be used raises `BadRow`; `formats.py` decides whether that ends the run or is counted.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Message(NamedTuple):
    role: str  # "system", "user" or "assistant"
    content: str


Conversation = tuple[Message, ...]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class BadRow(Exception):
    """A malformed row; `reason` is the kind of fault, which is counted; the message adds what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def text(value: Any, name: str, *, blank: bool = False) -> str:
    """A string, not blank unless allowed, that can be written as UTF-8 (JSON can spell halves of characters)."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text", f"found {type(value).__name__}")
    if not blank and not value.strip():
        raise BadRow(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{name} is not valid Unicode", f"character {error.start} is half of a surrogate pair"
        ) from None
    return value


def messages(value: Any, name: str, *, blank: bool = False) -> Conversation:
    """Reads a list of {"role", "content"} or {"from", "value"} items, roles as in ROLES; checks no order.

    blank: whether a message may say nothing.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadRow(f"{name} is not a list of messages", f"found {type(value).__name__}")
    if not value:
        raise BadRow(f"{name} is empty")
    return tuple(_message(item, f"{name} message", index, blank) for index, item in enumerate(value))


def _message(item: Any, name: str, index: int, blank: bool) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"{name} is not an object", f"number {index + 1} is a {type(item).__name__}")
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in item and content_key in item:
            break
    else:
        raise BadRow(
            f"{name} has neither role and content nor from and value", f"it has {', '.join(item) or 'none'}"
        )
    return Message(role(item[role_key], name), text(item[content_key], f"{name} content", blank=blank))


def role(value: Any, name: str) -> str:
    """One of "system", "user" and "assistant", from the names data sets give them."""
    known = ROLES.get(str(value).lower())
    if known is None:
        raise BadRow(f"{name} has an unknown role", f"{value!r}; known: {', '.join(ROLES)}")
    return known


def prompt(value: Any, name: str) -> Conversation:
    """A prompt as text (one user message) or as a list of messages that ends with the user."""
    if isinstance(value, str):
        return (Message("user", text(value, name)),)
    turns = messages(value, name)
    if turns[-1].role != "user":
        raise BadRow(f"{name} does not end with a user message", f"it ends with {turns[-1].role}")
    return turns


def answer(value: Any, name: str) -> Conversation:
    """A completion as text (one assistant message) or as a list of messages."""
    if isinstance(value, str):
        return (Message("assistant", text(value, name)),)
    return messages(value, name)


def human_assistant(value: Any, name: str) -> Conversation:
    """HH-RLHF's text "\\n\\nHuman: ...\\n\\nAssistant: ..."; the one space after each colon is dropped."""
    whole = text(value, name)
    head, *rest = _HH_TURN.split(whole)
    if head.strip() or not rest:
        raise BadRow(f'{name} does not start with "\\n\\nHuman:"', f"it starts with {whole[:20]!r}")
    roles, contents = rest[::2], rest[1::2]
    return tuple(
        Message(ROLES.get(role.lower(), role.lower()), text(content.removeprefix(" "), f"{name} {role} turn"))
        for role, content in zip(roles, contents, strict=True)
    )


def check(conversation: Conversation, name: str) -> Conversation:
    """An optional system message, then user and assistant in turn, assistant last.

    The rule holds whatever the chat template would allow, so that the groups do not depend on the tokenizer.
    """
    turns = conversation[1:] if conversation and conversation[0].role == "system" else conversation
    for index, message in enumerate(turns):
        wanted = "assistant" if index % 2 else "user"
        if message.role != wanted:
            place = (
                f"message {index + 1 + len(conversation) - len(turns)} is from {message.role}, not {wanted}"
            )
            raise BadRow(f"{name}: user and assistant do not alternate", place)
    if not turns or turns[-1].role != "assistant":
        raise BadRow(f"{name} does not end with an assistant message")
    return conversation


def root(conversation: Conversation) -> Conversation:
    """The instruction a tree grows from: everything up to the first user message."""
    first = next((i for i, message in enumerate(conversation) if message.role == "user"), -1)
    return conversation[: first + 1]


def shared_prefix(left: Conversation, right: Conversation) -> Conversation:
    """The messages both conversations start with."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return left[:count]
