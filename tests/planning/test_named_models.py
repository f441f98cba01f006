"""The shapes of well-known models have the parameters that the model hub counts in their safetensors files."""

from __future__ import annotations

import math

import pytest

from silva.engine.model.hf_layout import tensors
from silva.engine.planning.named_models import NAMED

# a tied output matrix is counted once
PUBLISHED = {
    "mistral-7b": 7_241_732_096,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    shape = NAMED[name]
    found = sum(math.prod(each) for each in tensors(shape).values())
    assert found + (0 if shape.tied else shape.vocab * shape.hidden) == PUBLISHED[name]
