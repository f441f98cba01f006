"""Computes attention over a packed row with Silva and with every other implementation that is installed.

A peer that knows only documents gets the unrolled sequences: the path to every leaf is a document of its own. On rows
of plain documents this is the row itself.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.installed import absent
from silva.kernels import tree_attention as kernels

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Row(NamedTuple):
    """Holds a packed row of S tokens.

    Attributes:
        name: the kind of row.
        end: (S,) int32, one past the last token of the subtree under each token.
        position: (S,) int32, the depth of each token in its own tree.
    """

    name: str
    end: Tensor
    position: Tensor

    @property
    def area(self) -> int:
        """Return the number of visible (query, key) pairs."""
        return int((self.position.long() + 1).sum())


class Peer(NamedTuple):
    """Holds one way to compute attention over a row.

    Attributes:
        attend: computes the output from queries, keys and values.
        index: (T,) the row's tokens that `attend` is given, in its order; None where it is given the row as it is.
    """

    attend: Attend
    index: Tensor | None = None


def ours(row: Row, q: Tensor, k: Tensor) -> Peer:
    """Prepare Silva's kernel for a row."""
    end = row.end.to(q.device)
    blocks = kernels.attention_blocks(end, group=q.shape[1] // k.shape[1], size=q.shape[2], dtype=q.dtype)
    return Peer(lambda q, k, v: kernels.tree_attention(q, k, v, end, blocks=blocks))


def flex(row: Row, q: Tensor, k: Tensor, **options: Any) -> Peer:
    """Prepare FlexAttention with the mask of a row."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end = row.end.to(q.device)
    size = len(end)

    def sees(batch, head, i, j):
        return (j <= i) & (i < end[j])

    if q.is_cuda:
        # after a few recompilations FlexAttention silently runs without a kernel
        torch._dynamo.reset()
        # otherwise its backward pass gives its buffers away and cannot be timed twice
        torch._functorch.config.donated_buffer = False
    mask = create_block_mask(sees, None, None, size, size, device=str(q.device))
    attend: Any = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    more = {"kernel_options": options} if options else {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*_heads_first(q, k, v), block_mask=mask, enable_gqa=True, **more)[0].transpose(0, 1)

    return Peer(call)


def sdpa(row: Row, q: Tensor, k: Tensor, backend: str) -> Peer:
    """Prepare one backend of torch's own attention for a causal row."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.__members__[backend]):
            out = F.scaled_dot_product_attention(*_heads_first(q, k, v), is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    return Peer(call)


def one_by_one(row: Row, q: Tensor, k: Tensor) -> Peer:
    """Prepare one call of torch's attention for every unrolled sequence."""
    lengths, index = unrolled(row, q.device)
    parts = lengths.tolist()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = [
            F.scaled_dot_product_attention(*_heads_first(*each), is_causal=True, enable_gqa=True)[0]
            for each in zip(*(x.split(parts) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(found, 1).transpose(0, 1)

    return Peer(call, index)


def varlen(row: Row, q: Tensor, k: Tensor, make: Callable[[], Callable[..., Tensor]]) -> Peer:
    """Prepare variable-length attention over the unrolled sequences."""
    attend = make()
    lengths, index = unrolled(row, q.device)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int().to(q.device)
    longest = int(lengths.max())
    return Peer(lambda q, k, v: attend(q, k, v, starts, longest), index)


def torch_varlen() -> Callable[..., Tensor]:
    """Return FlashAttention-2 as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    # three releases of torch have three ways to ask for causal attention
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    causal |= {"enable_gqa": True} if "enable_gqa" in known else {}
    return lambda q, k, v, starts, longest: varlen_attn(q, k, v, starts, starts, longest, longest, **causal)


def flash_attention(module: str) -> Callable[..., Tensor]:
    """Return the variable-length attention of one of FlashAttention's own packages.

    Version 2 is in flash_attn, version 3 in flash_attn_interface and version 4 in flash_attn.cute.
    """
    attend = importlib.import_module(module).flash_attn_varlen_func

    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        limits = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        known = inspect.signature(attend).parameters
        limits |= {name: longest for name in ("max_seqlen_q", "max_seqlen_k") if name in known}
        out = attend(q, k, v, **limits, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return call


def unrolled(row: Row, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the lengths and the tokens of the unrolled sequences.

    Returns:
        (paths,) the lengths, on the CPU, and (sum,) the tokens of every leaf's path, one path after the other.
    """
    token = torch.arange(len(row.end))
    leaves = token[row.end == token + 1]
    paths = [((token <= leaf) & (leaf < row.end)).nonzero()[:, 0] for leaf in leaves]
    return torch.tensor([len(path) for path in paths]), torch.cat(paths).to(device)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1)[None] for x in tensors]


class Kind(NamedTuple):
    """Describes a peer and where it can be measured.

    Attributes:
        make: prepares it for a row, its queries and its keys.
        needs: the module that it needs.
        gpu: whether it runs on GPUs only.
        rows: the kinds of rows that it can compute.
    """

    make: Callable[[Row, Tensor, Tensor], Peer]
    needs: str = "torch"
    gpu: bool = True
    rows: tuple[str, ...] = ("documents", "pairs", "trees", "mint", "causal")


def _flash(module: str) -> Kind:
    return Kind(functools.partial(varlen, make=functools.partial(flash_attention, module)), module)


def _sdpa(backend: str) -> Kind:
    return Kind(functools.partial(sdpa, backend=backend), rows=("causal",))


PEERS = {
    "silva": Kind(ours, gpu=False),
    "flex": Kind(flex, gpu=False),
    "varlen torch": Kind(functools.partial(varlen, make=torch_varlen), "torch.nn.attention.varlen"),
    "sdpa flash": _sdpa("FLASH_ATTENTION"),
    "sdpa cudnn": _sdpa("CUDNN_ATTENTION"),
    "flash_attn 2": _flash("flash_attn"),
    "flash_attn 3": _flash("flash_attn_interface"),
    "flash_attn 4": _flash("flash_attn.cute"),
    "sdpa one by one": Kind(one_by_one, gpu=False, rows=("documents", "pairs", "trees", "mint")),
    "flex TMA": Kind(functools.partial(flex, USE_TMA=True), rows=("trees",)),
    "flex FLASH": Kind(functools.partial(flex, BACKEND="FLASH"), "flash_attn.cute"),
}


def missing(name: str, device: torch.device) -> str | None:
    """Return why a peer cannot be measured, or None."""
    kind = PEERS[name]
    return "runs on GPUs only" if kind.gpu and device.type != "cuda" else absent(kind.needs)
