"""Products into a wide matrix, judged by float64: as weight gradients need them, added to what is there."""

from __future__ import annotations

import pytest
import torch

from silva.kernels.products import product

torch.set_num_threads(1)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 1), (37, 8, 24), (200, 48, 136), (0, 8, 8)])
def test_a_transposed_operand_adds_in_float32(tokens, rows, columns, dtype, add, device):
    """(tokens, rows)^T @ (tokens, columns), the first a view of a larger matrix, into a view of a buffer."""
    draw = torch.Generator().manual_seed(tokens)
    grad = torch.randn(tokens, rows + 8, generator=draw).to(device, dtype)[:, :rows]
    x = torch.randn(tokens, columns, generator=draw).to(device, dtype)
    # far larger than what is added: a sum in a narrow type would lose all of it
    before = (
        1000 + torch.randn(rows, columns, generator=draw).to(device) if add else torch.zeros(rows, columns)
    )
    buffer = torch.full((rows * columns + 64,), torch.nan, device=device)
    out = buffer[32:-32].view(rows, columns).copy_(before)
    product(grad.T, x, out, add=add)
    exact = before.double().cpu() + grad.double().cpu().T @ x.double().cpu()
    # float32: half a last bit of the largest sum on the way, for each of its terms at most
    bound = 2.0**-24 * (tokens + 1) * float(exact.abs().max() + 10)
    assert float((out.double().cpu() - exact).abs().max()) <= bound
    assert torch.isnan(buffer[:32]).all()
    assert torch.isnan(buffer[-32:]).all()


@pytest.mark.parametrize("columns", [11, 122, 123])
def test_what_stands_between_rows_is_not_read(columns, device):
    """A block of a larger tile, whose other columns nobody wrote: oneDNN's AMX product multiplied them by zero."""
    draw = torch.Generator().manual_seed(columns)
    tile = torch.full((64, 128), torch.nan, dtype=torch.bfloat16, device=device)
    block = tile[:, :columns].copy_(torch.randn(64, columns, generator=draw))
    weight = torch.randn(columns, 12, generator=draw).to(device, torch.bfloat16)
    out = torch.empty(64, 12, dtype=torch.bfloat16, device=device)
    product(block, weight, out)
    torch.testing.assert_close(out.double(), block.double() @ weight.double(), rtol=2**-8, atol=2**-6)
    transposed = torch.empty(columns, 64, dtype=torch.bfloat16, device=device)
    product(block.T, torch.eye(64, dtype=torch.bfloat16, device=device), transposed)
    assert torch.equal(transposed, block.T)
