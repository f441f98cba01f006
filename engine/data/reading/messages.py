"""Reads the forms of conversations found in data sets into one form, and checks them.

A row that cannot be used raises `BadRow`; `source.py` decides whether that ends the run or is counted.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# what a message may hold beside role and content, for the chat template; other keys are not read
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
# keys by which data sets say that an assistant message is not to be trained on: 0 or false
TRAIN_KEYS = ("weight", "train", "training", "loss")
# longest piece of a value that a message quotes
_QUOTED = 80


class Message(NamedTuple):
    """Holds one message of a conversation.

    Attributes:
        role: "system", "user", "assistant" or "tool"; "context" for what stands before a conversation and is given to
            the chat template beside the messages (`content` is then JSON).
        content: the text.
        extra: JSON of what else the message holds, by EXTRA_KEYS, and of a content that is null; empty if nothing.
        train: whether the message may be a training target.
    """

    role: str
    content: str
    extra: str = ""
    train: bool = True

    def more(self) -> dict[str, Any]:
        """Return what the message holds beside role and content."""
        return json.loads(self.extra) if self.extra else {}

    def fields(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.more()}


Conversation = tuple[Message, ...]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
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


def quoted(value: Any) -> str:
    """Return a value as an error quotes it: not more than the first characters of a long one."""
    shown = repr(value[: _QUOTED + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= _QUOTED else f"{shown[:_QUOTED]}... ({len(str(value)):,} characters)"


def typename(value: Any) -> str:
    """Return the name of a value's type as an error says it."""
    return "null" if value is None else type(value).__name__


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
    if value is None:
        raise BadRow(f"{name} is null")
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text", f"found {typename(value)}")
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

    A content may also be a list of text parts, {"type": "text", "text"}, which are joined. What else chat templates
    take (EXTRA_KEYS) goes with the message, and an assistant message with `weight: 0`, or one of TRAIN_KEYS set to
    false, is not trained on. The order of roles is not checked.

    Args:
        value: a field of a row.
        name: what an error calls the value.
        blank: whether a message's content may be blank.

    Raises:
        BadRow: the value is not such a list, or it is empty.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadRow(f"{name} is not a list of messages", f"found {typename(value)}")
    if not value:
        raise BadRow(f"{name} is empty")
    return tuple(_message(item, f"{name} message", index, blank) for index, item in enumerate(value))


def _message(item: Any, name: str, index: int, blank: bool) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"{name} is not an object", f"number {index + 1} is a {typename(item)}")
    own = {key: value for key, value in item.items() if value is not None}
    more = {key: own[key] for key in EXTRA_KEYS if key in own and own[key] not in ([], {}, "")}
    speaker, content = _role_and_content(item, own, name)
    known = role(speaker, name)
    # a call of a tool may be all that an assistant says
    silent = blank or (known == "assistant" and "tool_calls" in more)
    if content is None and "tool_calls" in more:
        # templates tell a call without a content by its null
        more = {"content": None, **more}
    said = _content("" if content is None and silent else content, f"{name} content", blank=silent)
    return Message(known, said, _extra(more, name), _trained(own, name))


def _role_and_content(item: Mapping[str, Any], own: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Return the values under role and content, or under from and value."""
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in own and (content_key in item or "tool_calls" in own):
            return own[role_key], own.get(content_key)
    for pair in (("role", "content"), ("from", "value")):
        for key, other in (pair, pair[::-1]):
            if key in item and item[key] is None and other in own:
                raise BadRow(f"{name} {key} is null")
    raise BadRow(
        f"{name} has neither role and content nor from and value", f"it has {', '.join(own) or 'nothing'}"
    )


def _content(value: Any, name: str, *, blank: bool) -> str:
    if not isinstance(value, list):
        return text(value, name, blank=blank)
    said = []
    for number, part in enumerate(value, start=1):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            what = part.get("type", "no type") if isinstance(part, Mapping) else typename(part)
            raise BadRow(f"{name} has a part that is not text", f"part {number} is {quoted(what)}")
        said.append(part["text"])
    return text("".join(said), name, blank=blank)


def _extra(more: Mapping[str, Any], name: str) -> str:
    if not more:
        return ""
    try:
        return text(json.dumps(more, ensure_ascii=False), f"{name} {next(iter(more))}")
    # a value of a kind that JSON does not have, from a Parquet file
    except TypeError as error:
        raise BadRow(f"{name} has a value that a chat template cannot take", quoted(str(error))) from None


def _trained(own: Mapping[str, Any], name: str) -> bool:
    """Tell whether no key says that the message is not trained on."""
    trained = True
    for key in TRAIN_KEYS:
        if key in own:
            if own[key] not in (0, 1):
                raise BadRow(f"{name} {key} is neither 0 nor 1, false nor true", f"found {quoted(own[key])}")
            trained = trained and bool(own[key])
    return trained


def unread_keys(value: Any) -> Iterator[str]:
    """Yield the keys of a field's messages that nothing reads, each once; nothing if the field holds no messages."""
    if isinstance(value, list):
        known = {"role", "content", "from", "value", *EXTRA_KEYS, *TRAIN_KEYS}
        found = dict.fromkeys(
            key
            for item in value
            if isinstance(item, Mapping) and ("role" in item or "from" in item)
            for key, held in item.items()
            if held is not None
        )
        yield from (key for key in found if key not in known)


def role(value: Any, name: str) -> str:
    """Return "system", "user", "assistant" or "tool" for any name that data sets give to these roles.

    Args:
        value: the name, in any letter case.
        name: what an error calls the place where the role stands.

    Raises:
        BadRow: the name is not in ROLES.
    """
    known = ROLES.get(str(value).lower())
    if known is None:
        raise BadRow(f"{name} has an unknown role", f"{quoted(value)}; known: {', '.join(ROLES)}")
    return known


def prompt(value: Any, name: str) -> Conversation:
    """Read a prompt, which is text (one user message) or a list of messages that ends with the user's or a tool's.

    Args:
        value: a field of a row.
        name: what an error calls the value.

    Raises:
        BadRow: the value is no such prompt.
    """
    if isinstance(value, str):
        return (Message("user", text(value, name)),)
    turns = messages(value, name)
    if turns[-1].role not in ("user", "tool"):
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
        raise BadRow(f'{name} does not start with "\\n\\nHuman:"', f"it starts with {quoted(whole[:20])}")
    roles, contents = rest[::2], rest[1::2]
    return tuple(
        Message(ROLES.get(role.lower(), role.lower()), text(content.removeprefix(" "), f"{name} {role} turn"))
        for role, content in zip(roles, contents, strict=True)
    )


def check(conversation: Conversation, name: str) -> Conversation:
    """Check that user and assistant alternate after an optional system message, and return the conversation.

    The user comes first and the assistant last. Messages of tools may follow an assistant's. The rule holds whatever
    the chat template would allow, so that the groups do not depend on the tokenizer.

    Args:
        conversation: what is checked.
        name: what an error calls the conversation.

    Raises:
        BadRow: the roles are in another order.
    """
    start = len(head(conversation))
    before = ""
    for index, message in enumerate(conversation[start:], start):
        allowed = {"": ("user",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}.get(
            before, ("assistant",)
        )
        if message.role not in allowed:
            raise BadRow(
                f"{name}: user and assistant do not alternate",
                f"message {index + 1} is from {message.role}, not {' or '.join(allowed)}",
            )
        before = message.role
    if before != "assistant":
        raise BadRow(f"{name} does not end with an assistant message")
    return conversation


def head(conversation: Conversation) -> Conversation:
    """Return what stands before the first turn: what is given to the template, and a system message."""
    count = 0
    for role in ("context", "system"):
        count += conversation[count : count + 1] != () and conversation[count].role == role
    return conversation[:count]


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
