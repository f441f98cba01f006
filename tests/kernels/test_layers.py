"""Norm, rotary positions and SwiGLU: kernels against float64 and same-dtype torch; shapes as megatron-core has them."""

import pytest
import torch

from silva.kernels import layers, reference

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def torch_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def run(operation, inputs, device, dtype) -> list[torch.Tensor]:
    """Value and gradients, in float64; the upstream gradient is drawn."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    out = operation(*leaves)
    assert out.dtype == dtype
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.to(out))
    found = [out, *(leaf.grad for leaf in leaves)]
    return [x.detach().double().cpu() for x in found]


def three_ways(kernel, plain, inputs, dtype, device) -> None:
    """A kernel's largest error is at most twice same-dtype torch's, or two cuts of the largest element's last bit.

    Twice: the interpreter cuts off where a GPU rounds. Two cuts: the norm rounds twice, and torch may by chance err
    less in a few elements.
    """
    inputs = [x.to(dtype) for x in inputs]
    truth = run(plain, inputs, "cpu", torch.float64)
    theirs = run(plain, inputs, device, dtype)
    ours = run(kernel, inputs, device, dtype)
    epsilon = torch.finfo(dtype).eps
    for a, b, true in zip(ours, theirs, truth, strict=True):
        assert a.shape == true.shape
        if true.numel():
            error, peer = (float((x - true).abs().max()) for x in (a, b))
            assert error <= max(2 * peer, 2 * epsilon * float(true.abs().max()))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(252, 1, 123), (1, 1, 1), (0, 1, 8), (3, 2, 507), (7, 4096)])
def test_rms_norm(shape, dtype, device):
    weight = draw(shape[-1], seed=1)
    three_ways(
        lambda x, w: layers.rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
        [draw(*shape), weight],
        dtype,
        device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_sums_its_weights_gradient_over_many_programs(dtype, device, monkeypatch):
    monkeypatch.setattr(layers, "NORM_PROGRAMS", 5)  # 33 rows: some programs have six of them, some seven
    x, weight = 100 * draw(33, 1, 40), draw(40, seed=1)
    x[3] = 0
    x[4] *= 1e-4
    three_ways(
        lambda x, w: layers.rms_norm(x, w, 1e-6),
        lambda x, w: reference.rms_norm(x, w, 1e-6),
        [x, weight],
        dtype,
        device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "size"), [(63, 4, 64), (1, 1, 2), (0, 3, 8), (12, 5, 24), (9, 64, 128)]
)
def test_rotary_turns_by_explicit_positions(tokens, heads, size, dtype, device):
    # depths in trees: siblings repeat them, and none is the row index
    position = torch.randint(
        0, 5000, (tokens,), generator=torch.Generator().manual_seed(2), dtype=torch.int32
    )
    frequency = 1e4 ** -(torch.arange(0, size, 2) / size)
    place, turn = position.to(device), frequency.to(device)
    # angles as the definition takes them for 16-bit types, in float32: in float64 they differ by 5000 * 2^-24
    cos, sin = layers.rotary_angles(position, frequency)

    def plain(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return reference.rotary(x, place, turn)
        first, second = x.chunk(2, -1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    inputs = [draw(tokens, heads, size)]
    three_ways(lambda x: layers.rotary(x, place, turn), plain, inputs, dtype, device)
    angles = layers.rotary_angles(place, turn)
    three_ways(lambda x: layers.rotary(x, place, turn, angles=angles), plain, inputs, dtype, device)


def test_rotary_reads_a_slice_of_a_fused_projection(device):
    fused = draw(30, 1, 4 * (3 + 2) * 16).float().to(device).reshape(30, 4, 5, 16)
    query = fused[:, :, :3].reshape(30, 12, 16)
    key = fused[:, :, 3]
    assert not key.is_contiguous()
    position = torch.arange(30, device=device) % 7
    frequency = 1e4 ** -(torch.arange(0, 16, 2, device=device) / 16)
    for x in (query, key, key.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(
            layers.rotary(x, position, frequency),
            reference.rotary(x, position, frequency),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(252, 1, 246), (1, 2), (0, 1, 8), (3, 2, 2050)])
def test_swiglu(shape, dtype, device):
    three_ways(layers.swiglu, torch_swiglu, [3 * draw(*shape)], dtype, device)


def test_swiglu_far_from_zero(device):
    gate = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4], dtype=torch.float64)
    x = torch.cat([gate, torch.full_like(gate, 3.0)])
    ours, truth = (
        run(f, [x], d, t)
        for f, d, t in ((layers.swiglu, device, torch.float32), (torch_swiglu, "cpu", torch.float64))
    )
    for a, b in zip(ours, truth, strict=True):
        # the exponential of -88 has the error of its argument, 88 * 2^-24
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-36)


def test_float64_is_the_definition():
    x, weight = draw(5, 6), draw(6, seed=1)
    assert torch.equal(layers.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for a, b in zip(
        run(layers.swiglu, [x], "cpu", torch.float64),
        run(torch_swiglu, [x], "cpu", torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    position, frequency = torch.arange(5), torch.rand(3)
    heads = draw(5, 2, 6)
    assert torch.equal(
        layers.rotary(heads, position, frequency), reference.rotary(heads, position, frequency)
    )


def test_the_same_bits_every_time(device, monkeypatch):
    monkeypatch.setattr(layers, "NORM_PROGRAMS", 5)
    x, weight = (y.to(device, torch.bfloat16) for y in (draw(40, 1, 64), draw(64, seed=1)))
    first, second = (
        run(lambda x, w: layers.rms_norm(x, w, 1e-5), [x, weight], device, torch.bfloat16) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "size"), [(63, 4, 64), (1, 1, 2), (0, 3, 8), (12, 5, 24), (9, 40, 128), (300, 2, 16)]
)
def test_norm_and_rotary_in_one_pass(tokens, heads, size, dtype, device, monkeypatch):
    monkeypatch.setattr(layers, "NORM_PROGRAMS", 7)  # most programs have several tokens
    position = torch.arange(tokens, dtype=torch.int32) % 50
    frequency = 1e4 ** -(torch.arange(0, size, 2) / size)
    place, turn = position.to(device), frequency.to(device)
    cos, sin = layers.rotary_angles(position, frequency, 1.2)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = reference.rms_norm(x, weight, 1e-6)
        if x.dtype != torch.float64:
            return reference.rotary(x, place, turn, 1.2)
        first, second = x.chunk(2, -1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    def fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return layers.rotary(x, place, turn, 1.2, norm=(weight, 1e-6))

    x = 3 * draw(tokens, heads, size)
    x[:1] *= 1e-3
    three_ways(fused, plain, [x, draw(size, seed=1)], dtype, device)


def test_norm_and_rotary_of_a_slice_have_the_bits_of_one_after_the_other(device):
    """Also in bfloat16: it is rounded where the two are."""
    whole = draw(30, 1, 4 * (3 + 2) * 16).bfloat16().to(device).reshape(30, 4, 5, 16)
    position = torch.arange(30, device=device) % 7
    frequency = 1e4 ** -(torch.arange(0, 16, 2, device=device) / 16)
    weight = draw(16, seed=1).bfloat16().to(device)
    for x in (whole[:, :, :3].reshape(30, 12, 16), whole[:, :, 3]):
        found = layers.rotary(x, position, frequency, norm=(weight, 1e-6))
        apart = layers.rotary(layers.rms_norm(x, weight, 1e-6), position, frequency)
        assert torch.equal(found, apart)
