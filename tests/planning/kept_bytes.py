"""What a micro-batch of real forward passes keeps for the backward pass, every kernel run in Triton's interpreter.

Run as a program with `TRITON_INTERPRET=1`: `python kept_bytes.py '{"shape": {...}, "row_length": 64, "cases": [...]}'`
prints a list of bytes. A case is {"dtype", "head", "recompute"}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import Any

from silva.engine.parallel import groups, optimizer

import torch

from silva.engine.config import Parallel
from silva.engine.model import gpt
from silva.engine.model.hf_layout import ModelShape
from silva.engine.planning.built import plain_row
from silva.kernels import dispatch


def kept(shape: ModelShape, row_length: int, case: dict[str, str]) -> int:
    """Bytes of the row and of what operations save, weights apart."""
    layout = Parallel.model_validate({"recompute": case["recompute"]})
    head: Any = case["head"]
    groups.initialize(layout)
    bare = gpt.build(shape, layout, head=head, dtype=getattr(torch, case["dtype"]))
    with torch.no_grad():
        for p in bare[0].parameters():
            p.normal_(std=0.02)
    chunk: Any = optimizer.wrap(bare, layout)[0]
    chunk.train()
    model = {x.untyped_storage()._cdata for x in chunk.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage()._cdata] = x
        return x

    row = plain_row(row_length)
    for field in fields(row):
        keep(getattr(row, field.name))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = gpt.forward(chunk, row)
    assert out.grad_fn is not None
    groups.shutdown()
    return sum(x.untyped_storage().nbytes() for key, x in held.items() if key not in model)


if __name__ == "__main__":
    assert dispatch.INTERPRETED
    asked = json.loads(sys.argv[1])
    shape = ModelShape(**asked["shape"])
    print(json.dumps([kept(shape, asked["row_length"], case) for case in asked["cases"]]))
