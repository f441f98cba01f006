"""Chat templates that would take all time or memory, or end the interpreter: one short error each."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer

from silva.engine.data.reading.messages import Message
from silva.engine.data.text import limits
from silva.engine.data.text.chat_template import CannotRender, ChatTemplate
from silva.engine.errors import UserError

LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "memory": "{{ 'a' * 2 ** 32 }}",
    "memory in a list": "{{ [0] * 2 ** 32 }}",
    "memory by doubling": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "memory by padding": "{{ 'a'.center(10 ** 11) }}",
    "memory by format": "{{ '%99999999999d' % 1 }}",
    "memory by a filter": "{{ 'a' | indent(10 ** 11, first=true) }}",
    "memory by output": LOOP + "{{ 'abcdefgh' * 9999 }}{% endfor %}",
    "output": "{% for i in range(999) %}{{ 'a' * 200000 }}{% endfor %}",
    "time by a number": "{{ 10 ** (10 ** 9) % 7 }}",
    "time by loops": LOOP * 3 + "{% endfor %}" * 3,
    "time by recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a long range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep conditions": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "deep operators": "{{ " + "-" * 100_000 + "1 }}",
    "many operators": "{{ " + "1 + " * 100_000 + "1 }}",
    "a long integer": "{{ " + "9" * 5000 + " }}",
    "an escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.checkpoint(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_error(name, tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 2.0)
    template = ChatTemplate(tokenizer, HOSTILE[name], "the template", [])
    began = time.process_time()
    with pytest.raises(
        CannotRender, match=r"^the template cannot render messages with roles user: "
    ) as caught:
        template.render([Message("user", "Hello")])
    assert time.process_time() - began < 10
    assert len(str(caught.value)) < 600


def test_a_template_of_a_megabyte_is_refused(tokenizer):
    with pytest.raises(UserError, match="the template: has 1,048,577 characters"):
        ChatTemplate(tokenizer, "a" * (2**20 + 1), "the template", [])


def test_the_limits_are_gone_afterwards(tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "BYTES", 1 << 24)
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    template = ChatTemplate(tokenizer, "{{ messages[0]['content'] * 2 ** 25 }}", "the template", [])
    with pytest.raises(CannotRender, match="it needs more than 16 MiB of memory"):
        template.render([Message("user", "Hello")])
    assert len(b"a" * (1 << 28)) == 1 << 28
    end = time.process_time() + 1.0
    while time.process_time() < end:
        Path("/").exists()


def test_a_long_conversation_is_far_from_the_limits(tokenizer, monkeypatch):
    """A million words: a hundredth of the time and of the memory that are allowed."""
    monkeypatch.setattr(limits, "SECONDS", limits.SECONDS / 100)
    monkeypatch.setattr(limits, "BYTES", limits.BYTES // 10)
    said = [Message(("user", "assistant")[i % 2], "word " * 5000) for i in range(200)]
    source = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    assert len(ChatTemplate(tokenizer, source, "the template", []).render(said)) > 5_000_000
