"""The model against transformers on the same checkpoints, and packed trees against unrolled sequences."""

from pathlib import Path

from silva.engine.parallel import groups, optimizer

import numpy as np
import pytest
import torch
import torch.distributed as dist
from worlds import world

from benchmarks import random_models
from silva.engine.errors import UserError
from silva.engine.model import gpt, heads, hf
from silva.engine.recipe.schema import Parallel
from silva.kernels import reference

# float32, four layers: sums of about a hundred terms in another order
TOLERANCE = 1e-5


def our_logits(folder: Path, tokens: list[torch.Tensor], dtype: torch.dtype) -> list[np.ndarray]:
    bare, _ = random_models.build(folder, Parallel(), dtype=dtype)
    chunks = optimizer.wrap(bare, Parallel())  # as in training; bfloat16 models are wrapped once more
    return random_models.outputs(chunks, tokens, lambda chunk, row: gpt.logits(chunk, row).float())


@pytest.mark.parametrize("kind", random_models.KINDS)
def test_logits_equal_transformers(kind, tmp_path):
    folder = random_models.checkpoint(tmp_path, kind)
    tokens = torch.randint(0, random_models.VOCABULARY, (23,), generator=torch.Generator().manual_seed(5))
    [found] = world(1, our_logits, folder, [tokens, tokens[:1]], torch.float32)
    with torch.no_grad():
        expected = random_models.model(kind)(tokens[None]).logits[0]
    torch.testing.assert_close(torch.from_numpy(found[0]), expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(torch.from_numpy(found[1]), expected[:1], rtol=TOLERANCE, atol=TOLERANCE)


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path):
    from transformers import LlamaForCausalLM

    folder = random_models.checkpoint(tmp_path, "llama")
    tokens = torch.randint(0, random_models.VOCABULARY, (300,), generator=torch.Generator().manual_seed(5))
    [[found]] = world(1, our_logits, folder, [tokens], torch.bfloat16)
    with torch.no_grad():
        truth = random_models.model("llama")(tokens[None]).logits[0]
        # not .bfloat16(), which would round transformers' rotary frequencies
        peer = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(tokens[None]).logits[0].float()
    error, peer_error = (torch.from_numpy(found) - truth).norm(), (peer - truth).norm()
    # the same roundings in another order: neither is the better one
    assert error < 1.5 * peer_error


def test_rotary_frequencies_stay_exact_in_bfloat16(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")

    def frequencies() -> np.ndarray:
        bare, _ = random_models.build(folder, Parallel(), dtype=torch.bfloat16)
        optimizer.wrap(bare, Parallel())  # converts every parameter and buffer
        return bare[0].decoder.layers[0].self_attention.core_attention.inverse_frequency.numpy()

    [found] = world(1, frequencies)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1e6 ** -(np.arange(4) / 4), rtol=1e-6)


def test_logits_of_a_trained_model_equal_transformers(inputs):
    from transformers import LlamaForCausalLM

    folder = inputs / "models" / "stories260K" / "hf"
    tokens = torch.randint(0, 512, (300,), generator=torch.Generator().manual_seed(1))
    [[found]] = world(1, our_logits, folder, [tokens], torch.float32)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(folder).eval()(tokens[None]).logits[0]
    # logits of a trained model reach 20: a relative tolerance of the largest
    torch.testing.assert_close(
        torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen3-tied", "phi3"])
def test_rewards_equal_a_sequence_classifier(kind, tmp_path):
    folder = random_models.checkpoint(tmp_path, kind, head="SequenceClassification")
    members = random_models.sequences(5, seed=1)
    [[found]] = world(1, rewards, folder, [random_models.row([members])])
    peer = random_models.model(kind, head="SequenceClassification")
    with torch.no_grad():
        expected = [float(peer(torch.from_numpy(s.tokens).long()[None]).logits) for s in members]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def rewards(folder: Path, rows: list) -> list[np.ndarray]:
    chunks, _ = random_models.build(folder, Parallel(), head="reward")
    assert gpt.head_of(chunks[0]) == "reward"
    return random_models.outputs(chunks, rows)


def test_a_fresh_reward_head_follows_from_the_seed(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")

    def weight(seed: int) -> np.ndarray:
        chunks, _ = random_models.build(folder, Parallel(), head="reward", seed=seed)
        return chunks[0].output_layer.weight.detach().numpy()

    [first], [again], [other] = world(1, weight, 0), world(1, weight, 0), world(1, weight, 1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (1, 64)
    # 64 draws: their deviation is within 0.25 of the true one but for one seed in a thousand
    assert first.std() == pytest.approx(heads.REWARD_STD, rel=0.25)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        *(
            ("llama-tied", "lm"),
            ("mistral", "lm"),
            ("llama", "reward"),
            ("llama3", "lm"),
            ("llama-yarn", "lm"),
        ),
        *(("llama-biased", "reward"), ("qwen2", "lm"), ("qwen2-window", "reward"), ("qwen3-biased", "lm")),
    ],
)
def test_a_packed_row_has_values_and_gradients_of_its_sequences_alone(kind, head, tmp_path):
    folder = random_models.checkpoint(tmp_path, kind)
    members = [random_models.sequences(6, seed) for seed in range(3)]
    assert len(random_models.row(members).tokens) < 0.8 * sum(len(s.tokens) for m in members for s in m)
    [(packed, gradients)] = world(1, values_and_gradients, folder, [random_models.row(members)], head)
    alone = [random_models.row([[s]]) for m in members for s in m]
    [(unrolled, expected)] = world(1, values_and_gradients, folder, alone, head)
    np.testing.assert_allclose(packed, unrolled, rtol=1e-9)
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-9 * scale, err_msg=name)


def values_and_gradients(
    folder: Path, rows: list, head: gpt.Head
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Per sequence its value, and gradients of their weighted sum, in float64."""
    [chunk], _ = random_models.build(folder, Parallel(), head=head, dtype=torch.float64)
    values = []
    for row in rows:
        out = gpt.forward(chunk, row)
        if head == "lm":
            out = reference.sequence_sums(out, row.span, row.span_pointer, row.span_index)
        values.append(out)
    every = torch.cat(values)
    (every * torch.linspace(-1, 2, len(every), dtype=torch.float64)).sum().backward()
    return every.detach().numpy(), {n: p.grad.numpy() for n, p in chunk.named_parameters()}


def test_logprobs_equal_log_softmax_of_the_logits(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")

    def both() -> tuple[np.ndarray, np.ndarray]:
        [chunk], _ = random_models.build(folder, Parallel(), dtype=torch.float64)
        row = random_models.row([random_models.sequences(4, seed=2)[:1]])
        with torch.no_grad():
            expected = gpt.logits(chunk, row.tokens).log_softmax(-1)[row.source.long(), row.target]
            return gpt.forward(chunk, row).numpy(), expected.numpy()

    [(found, expected)] = world(1, both)
    assert len(found) > 2
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_row_without_scored_positions_gives_nothing_and_zero_gradients(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")

    def empty() -> tuple[tuple[int, ...], float]:
        [chunk], _ = random_models.build(folder, Parallel())
        out = gpt.forward(chunk, random_models.row([]))
        out.sum().backward()
        return tuple(out.shape), max(float(p.grad.abs().max()) for p in chunk.parameters())

    assert world(1, empty) == [((0,), 0.0)]


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        ({"pipeline": 2, "stage_layers": [3, 2]}, "together 5 layers, but the model has 4"),
        ({"pipeline": 3}, "4 layers"),
        ({"pipeline": 2, "virtual_pipeline": 4}, "4 layers"),
        ({"tensor": 3}, "8 attention heads"),
        ({"tensor": 64}, "8 attention heads"),
    ],
)
def test_a_layout_the_model_cannot_be_split_into_is_refused(layout, word, tmp_path):
    shape = hf.read_shape(random_models.checkpoint(tmp_path, "llama"))
    with pytest.raises(UserError, match=word):
        gpt.check_layout(shape, Parallel(**layout))


def attention_calls(folder: Path, parallel: Parallel) -> tuple[list[dict], list[tuple]]:
    """(what block lists were asked for, (query heads per key head, lists) of every layer) in one pass over one row."""
    asked, seen, built = [], [], []
    make, attend = gpt.attention_blocks, gpt.tree_attention

    def recorded_make(end, **options):
        asked.append({name: options[name] for name in ("group", "size", "window", "dtype")})
        built.append(make(end, **options))
        return built[-1]

    def recorded_attend(q, k, v, end, *, blocks, **options):
        seen.append((q.shape[1] // k.shape[1], [blocks is one for one in built]))
        return attend(q, k, v, end, blocks=blocks, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "attention_blocks", recorded_make)
        patch.setattr(gpt, "tree_attention", recorded_attend)
        chunks, _ = random_models.build(folder, parallel)
        random_models.outputs(chunks, [torch.arange(9)], gpt.logits)
    return asked, seen


@pytest.mark.parametrize(
    ("kind", "size", "group", "window"),
    [
        ("llama", 1, 2, None),
        ("mistral", 2, 2, 5),
        ("mistral-no-window", 1, 8, None),
        ("mistral-no-window", 2, 4, None),
    ],
)
def test_block_lists_are_built_once_for_all_layers(kind, size, group, window, tmp_path):
    folder = random_models.checkpoint(tmp_path, kind)
    for asked, seen in world(size, attention_calls, folder, Parallel(tensor=size)):
        assert asked == [{"group": group, "size": 8, "window": window, "dtype": torch.float32}]
        assert seen == [(group, [True])] * 4


def test_one_process_trains_one_model_after_the_other(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")
    row = random_models.row([random_models.sequences(3, seed=0)])

    def twice() -> list[float]:
        dist.destroy_process_group()  # the world of the test: here the process makes its own
        found = []
        for _ in range(2):
            [chunk], _ = random_models.build(folder, Parallel())
            found.append(float(gpt.forward(chunk, row).sum()))
            groups.shutdown()
        groups.shutdown()  # nothing to undo
        return found

    [[first, second]] = world(1, twice)
    assert first == second
