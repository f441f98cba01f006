"""Floating-point operations against torch's own counter, and what is computed beyond what is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from silva.engine.model import flops, hf
from silva.engine.planning.named_models import NAMED


def test_needed_operations_are_those_that_torch_counts(tmp_path):
    """Of a dense Llama, by torch's counter: there the pairs are all pairs, and every token is scored."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    length = 40
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None]).logits.sum().backward()
    model.save_pretrained(tmp_path)
    counted = flops.needed(hf.read_shape(tmp_path), "lm").of(tokens=length, pairs=length**2, scored=length)
    # 2 %: the counter leaves out rotary tables' tiny products, the model the gradient of the embedding
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02)


def test_the_backward_pass_computes_scores_and_logits_again():
    shape = NAMED["llama-3-8b"]
    needed, computed = flops.needed(shape, "lm"), flops.computed(shape, "lm")
    assert computed.token == needed.token
    assert computed.pair == pytest.approx(needed.pair * 14 / 12)
    assert computed.scored == pytest.approx(needed.scored * 8 / 6)


def test_a_reward_head_has_no_output_matrix():
    shape = NAMED["mistral-7b"]
    assert flops.needed(shape, "reward") == replace(flops.needed(shape, "lm"), scored=0)
    assert flops.row_cost(shape, "reward").token == flops.needed(shape, "reward").token
    wide = flops.row_cost(shape, "lm", scored=0.25)
    assert wide.token == pytest.approx(flops.computed(shape, "lm").of(tokens=1, pairs=0, scored=0.25))
