"""Reads the forms of conversations found in data sets into one form, and checks them.

A row that cannot be used raises `BadRow`; `source.py` decides whether that ends the run or is counted.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Message(NamedTuple):
    """Holds one message of a conversation; its role is "system", "user" or "assistant"."""

    role: str
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
    """Tells that a row is malformed.

    Args:
        reason: the kind of fault, by which rows are counted.
        detail: what was found; it is added to the message.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def text(value: Any, name: str, *, blank: bool = False) -> str:
    """Check that a value is a string that can be written as UTF-8, and return it.

    JSON can spell half of a surrogate pair, which is no character.

    Args:
        value: a field of a row.
        name: what an error calls the value.
        blank: whether the string may be blank.

    Raises:
        BadRow: the value is not such a string.
    """
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
    """Read a list of {"role", "content"} or {"from", "value"} items, with roles as in ROLES.

    The order of roles is not checked.

    Args:
        value: a field of a row.
        name: what an error calls the value.
        blank: whether a message's content may be blank.

    Raises:
        BadRow: the value is not such a list, or it is empty.
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
    """Return "system", "user" or "assistant" for any name that data sets give to these roles.

    Args:
        value: the name, in any letter case.
        name: what an error calls the place where the role stands.

    Raises:
        BadRow: the name is not in ROLES.
    """
    known = ROLES.get(str(value).lower())
    if known is None:
        raise BadRow(f"{name} has an unknown role", f"{value!r}; known: {', '.join(ROLES)}")
    return known


def prompt(value: Any, name: str) -> Conversation:
    """Read a prompt, which is text (one user message) or a list of messages that ends with the user's.

    Args:
        value: a field of a row.
        name: what an error calls the value.

    Raises:
        BadRow: the value is no such prompt.
    """
    if isinstance(value, str):
        return (Message("user", text(value, name)),)
    turns = messages(value, name)
    if turns[-1].role != "user":
        raise BadRow(f"{name} does not end with a user message", f"it ends with {turns[-1].role}")
    return turns


def answer(value: Any, name: str) -> Conversation:
    """Read a completion, which is text (one assistant message) or a list of messages.

    Args:
        value: a field of a row.
        name: what an error calls the value.

    Raises:
        BadRow: the value is no such completion.
    """
    if isinstance(value, str):
        return (Message("assistant", text(value, name)),)
    return messages(value, name)


def human_assistant(value: Any, name: str) -> Conversation:
    r"""Read HH-RLHF's text "\n\nHuman: ...\n\nAssistant: ..."; the one space after each colon is dropped.

    Args:
        value: a field of a row.
        name: what an error calls the value.

    Raises:
        BadRow: the value is no such text.
    """
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
    """Check that user and assistant alternate after an optional system message, and return the conversation.

    The user comes first and the assistant last. The rule holds whatever the chat template would allow, so that the
    groups do not depend on the tokenizer.

    Args:
        conversation: what is checked.
        name: what an error calls the conversation.

    Raises:
        BadRow: the roles are in another order.
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
    """Return the instruction that a tree begins with: everything up to and with the first user message."""
    first = next((i for i, message in enumerate(conversation) if message.role == "user"), -1)
    return conversation[: first + 1]


def shared_prefix(left: Conversation, right: Conversation) -> Conversation:
    """Return the messages that both conversations start with."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return left[:count]
