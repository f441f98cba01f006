"""What a micro-batch of real forward passes keeps for the backward pass, every kernel run in Triton's interpreter.

Run as a program with `TRITON_INTERPRET=1`: `python kept_bytes.py '{"shape": {...}, "row_length": 64, "cases": [...]}'`
prints a list of bytes. A case is {"dtype", "head", "recompute"} and, if more than 1, {"context"}: its collectives only
pretend, what is kept is the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import Any

from silva.engine.parallel import optimizer

import torch

from silva.engine.data.trees.row_share import share_of
from silva.engine.model import gpt
from silva.engine.model.families.shape import ModelShape
from silva.engine.planning.built import plain_row, simulated_world
from silva.engine.recipe.schema import Parallel
from silva.kernels import dispatch


def kept(shape: ModelShape, row_length: int, layout: Parallel, case: dict[str, Any]) -> int:
    """Bytes of the row and of what operations save, weights apart."""
    head: Any = case["head"]
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

    row, share = plain_row(row_length), None
    if layout.context > 1:
        share = share_of(row, 0, layout.context)
    for each in filter(None, (row, share)):
        for field in fields(each):
            keep(getattr(each, field.name))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = gpt.forward(chunk, row, share)
    assert out.grad_fn is not None
    return sum(x.untyped_storage().nbytes() for key, x in held.items() if key not in model)


if __name__ == "__main__":
    assert dispatch.INTERPRETED
    asked = json.loads(sys.argv[1])
    shape = ModelShape(**asked["shape"])
    found = []
    for case in asked["cases"]:
        layout = Parallel(recompute=case["recompute"], context=case.get("context", 1))
        with simulated_world(layout, 0, layout.context):
            found.append(kept(shape, asked["row_length"], layout, case))
    print(json.dumps(found))
