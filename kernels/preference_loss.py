"""Computes a preference loss, its metrics and its gradient from log-probs of scored positions, in one launch.

    L scored positions, N sequences, P comparisons, T trees, U spans, E entries of `span_index`

A tree's spans, sequences and comparisons are contiguous and belong to no other tree, so one program computes a whole
tree: barriers inside it take the place of launches, and sums have one order. The last program to arrive adds up the
trees.

The losses have no second torch definition here: where kernels do not run, the caller uses its own, the one that these
are tested against.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from silva.kernels.build import Build
from silva.kernels.dispatch import jit, tl
from silva.kernels.preference_terms import TERMS, preference_terms

# positions per step: eight per thread of four warps
POSITION_BLOCK = 1024
# sequences or comparisons per step: trees have a few to some tens of them
LANES = 32


class Structure(NamedTuple):
    """Holds which positions, sequences and comparisons belong together, on one device.

    Attributes:
        span_start: (U + 1,) int32, first position of each span; a span is a run of positions.
        span_pointer: (N + 1,) int32, CSR over sequences: where their spans stand in `span_index`.
        span_index: (E,) int32, the spans of each sequence.
        comparisons: (P, 2) int32, chosen and rejected sequence; -1: that side is absent, for kto alone.
        tree_start: (T + 1, 3) int32, first span, sequence and comparison of each tree.
        scored: (N,) int32, scored positions of each sequence, by which ipo, simpo and orpo divide.
        absolute: (P,) bool, whether bt_dr adds the absolute-reward term.
    """

    span_start: Tensor
    span_pointer: Tensor
    span_index: Tensor
    comparisons: Tensor
    tree_start: Tensor
    scored: Tensor
    absolute: Tensor


class PreferenceLoss(NamedTuple):
    """Holds the results of one launch, of which only `loss` carries a gradient.

    Attributes:
        loss: scalar, the sum over comparisons (sft: over sequences).
        sums: (8,) float64 sums: loss, chosen reward, rejected reward, margin, correct (a tie counts half), present
            chosen sides, present rejected sides, comparisons with both.
        rewards: (P, 2) of the chosen and the rejected side, 0 where absent; (0, 2) for sft.
        coefficient: d loss / d values: (L,) for log-probs, (N,) for rewards.
    """

    loss: Tensor
    sums: Tensor
    rewards: Tensor
    coefficient: Tensor


# ---------------------------------------------------------------- the steps of one tree


@jit
def _sum_spans(values_ptr, span_start_ptr, span_ptr, span, span_end, BLOCK: tl.constexpr):
    """Compute for each span the sum of its positions' values.

    It is taken in float64 as in `reference.sequence_sums`: a sum in float32 is off by more than its last digit, and
    the reference policy's log-probs, which are subtracted, are not.
    """
    for u in range(span, span_end):
        end = tl.load(span_start_ptr + u + 1)
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(tl.load(span_start_ptr + u), end, BLOCK):
            o_position = start + tl.arange(0, BLOCK)
            total += tl.load(values_ptr + o_position, mask=o_position < end, other=0.0).to(tl.float64)
        tl.store(span_ptr + u, tl.sum(total, 0))


@jit
def _sum_sequences(
    span_pointer_ptr, span_index_ptr, span_ptr, sequence_ptr, sequence, sequence_end, LANES: tl.constexpr
):
    """Compute for each sequence the sum of its spans, and return the sum over the tree's sequences, per lane."""
    all_ = tl.zeros((LANES,), tl.float64)
    for start in range(sequence, sequence_end, LANES):
        o_sequence = start + tl.arange(0, LANES)
        mask = o_sequence < sequence_end
        entry = tl.load(span_pointer_ptr + o_sequence, mask=mask, other=0)
        count = tl.load(span_pointer_ptr + o_sequence + 1, mask=mask, other=0) - entry
        total = tl.zeros((LANES,), tl.float64)
        for k in range(tl.max(count, 0)):
            m_entry = k < count
            u = tl.load(span_index_ptr + entry + k, mask=m_entry, other=0)
            total += tl.load(span_ptr + u, mask=m_entry, other=0.0)
        tl.store(sequence_ptr + o_sequence, total.to(tl.float32), mask=mask)
        all_ += total
    return all_


@jit
def _slope_of_sequences(
    comparisons_ptr,
    side_ptr,
    o_sequence,
    comparison,
    comparison_end,
    LANES: tl.constexpr,
    OBJECTIVE: tl.constexpr,
):
    """Compute d loss / d of every sequence's sum, over the comparisons it is a side of, in their order."""
    slope = tl.zeros((LANES,), tl.float32)
    if OBJECTIVE == "sft":
        slope -= 1.0
    else:
        for start in range(2 * comparison, 2 * comparison_end, LANES):
            o_side = start + tl.arange(0, LANES)
            mask = o_side < 2 * comparison_end
            of = tl.load(comparisons_ptr + o_side, mask=mask, other=-1)
            side = tl.load(side_ptr + o_side, mask=mask, other=0.0)
            slope += tl.sum(tl.where(o_sequence[:, None] == of[None, :], side[None, :], 0.0), 1)
    return slope


@jit
def _spread(
    span_start_ptr,
    span_index_ptr,
    entry_ptr,
    coefficient_ptr,
    span,
    span_end,
    entry,
    entry_end,
    BLOCK: tl.constexpr,
):
    """Compute for each span the sum of the slopes of all its sequences, and write it to each of its positions."""
    for u in range(span, span_end):
        slope = tl.zeros((BLOCK,), tl.float32)
        for start in range(entry, entry_end, BLOCK):
            o_entry = start + tl.arange(0, BLOCK)
            mask = o_entry < entry_end
            here = tl.load(span_index_ptr + o_entry, mask=mask, other=-1) == u
            slope += tl.load(entry_ptr + o_entry, mask=mask & here, other=0.0)
        total = tl.sum(slope, 0)
        end = tl.load(span_start_ptr + u + 1)
        for start in range(tl.load(span_start_ptr + u), end, BLOCK):
            o_position = start + tl.arange(0, BLOCK)
            tl.store(
                coefficient_ptr + o_position, tl.zeros((BLOCK,), tl.float32) + total, mask=o_position < end
            )


@jit
def _add_trees(partial_ptr, sums_ptr, loss_ptr, trees, LANES: tl.constexpr):
    """Compute the eight sums over all trees."""
    o_sum = tl.arange(0, 8)
    total = tl.zeros((LANES, 8), tl.float64)
    for start in range(0, trees, LANES):
        o_tree = start + tl.arange(0, LANES)
        part_ptr = partial_ptr + 8 * o_tree[:, None] + o_sum[None, :]
        # reads past the L1 cache, which may hold what stood there before the other programs wrote
        total += tl.load(part_ptr, mask=o_tree[:, None] < trees, other=0.0, cache_modifier=".cg")
    sums = tl.sum(total, 0)
    tl.store(sums_ptr + o_sum, sums)
    tl.store(loss_ptr, tl.sum(tl.where(o_sum == 0, sums, 0.0), 0).to(tl.float32))


# ---------------------------------------------------------------- the kernel


@jit(do_not_specialize=["trees"])
def _preference_kernel(
    # inputs
    values_ptr,
    reference_ptr,
    divergence_ptr,
    span_start_ptr,
    span_pointer_ptr,
    span_index_ptr,
    comparisons_ptr,
    tree_ptr,
    scored_ptr,
    absolute_ptr,
    # results
    loss_ptr,
    sums_ptr,
    rewards_ptr,
    coefficient_ptr,
    # scratch
    span_ptr,
    sequence_ptr,
    side_ptr,
    entry_ptr,
    partial_ptr,
    arrived_ptr,
    # sizes and numbers
    trees,
    beta,
    first,
    second,
    # constants
    OBJECTIVE: tl.constexpr,
    REFERENCE: tl.constexpr,
    REWARD: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute loss, sums, rewards and coefficients of one tree per program; the last one adds up all trees."""
    tree = tl.program_id(0)
    span, span_end = tl.load(tree_ptr + 3 * tree), tl.load(tree_ptr + 3 * tree + 3)
    sequence, sequence_end = tl.load(tree_ptr + 3 * tree + 1), tl.load(tree_ptr + 3 * tree + 4)
    comparison, comparison_end = tl.load(tree_ptr + 3 * tree + 2), tl.load(tree_ptr + 3 * tree + 5)
    zero, none = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.int32)
    loss_sum, chosen_sum, rejected_sum, margin_sum = zero, zero, zero, zero
    half_points, chosen_count, rejected_count, pairs = none, none, none, none

    if REWARD:
        policy_ptr = values_ptr
    else:
        policy_ptr = sequence_ptr
        _sum_spans(values_ptr, span_start_ptr, span_ptr, span, span_end, BLOCK)
        tl.debug_barrier()
        total = _sum_sequences(
            span_pointer_ptr, span_index_ptr, span_ptr, sequence_ptr, sequence, sequence_end, LANES
        )
        if OBJECTIVE == "sft":
            loss_sum -= total
        tl.debug_barrier()

    if OBJECTIVE != "sft":
        baseline = beta * tl.maximum(tl.load(divergence_ptr), 0.0) if OBJECTIVE == "kto" else 0.0
        for start in range(comparison, comparison_end, LANES):
            o_comparison = start + tl.arange(0, LANES)
            mask = o_comparison < comparison_end
            of_c = tl.load(comparisons_ptr + 2 * o_comparison, mask=mask, other=-1)
            of_r = tl.load(comparisons_ptr + 2 * o_comparison + 1, mask=mask, other=-1)
            has_c, has_r = of_c >= 0, of_r >= 0
            both = has_c & has_r
            chosen = tl.load(policy_ptr + of_c, mask=has_c, other=0.0)
            rejected = tl.load(policy_ptr + of_r, mask=has_r, other=0.0)
            if REFERENCE:
                chosen -= tl.load(reference_ptr + of_c, mask=has_c, other=0.0)
                rejected -= tl.load(reference_ptr + of_r, mask=has_r, other=0.0)
            loss, slope_c, slope_r, c, r = preference_terms(
                chosen,
                rejected,
                tl.maximum(tl.load(scored_ptr + of_c, mask=has_c, other=1), 1).to(tl.float32),
                tl.maximum(tl.load(scored_ptr + of_r, mask=has_r, other=1), 1).to(tl.float32),
                tl.load(absolute_ptr + o_comparison, mask=mask, other=0) != 0,
                baseline,
                beta,
                tl.where(has_c, first, 0.0) if OBJECTIVE == "kto" else first,
                tl.where(has_r, second, 0.0) if OBJECTIVE == "kto" else second,
                OBJECTIVE,
                AVERAGE,
            )
            c, r = tl.where(has_c, c, 0.0), tl.where(has_r, r, 0.0)
            tl.store(rewards_ptr + 2 * o_comparison, c, mask=mask)
            tl.store(rewards_ptr + 2 * o_comparison + 1, r, mask=mask)
            tl.store(side_ptr + 2 * o_comparison, slope_c, mask=mask)
            tl.store(side_ptr + 2 * o_comparison + 1, slope_r, mask=mask)
            loss_sum += tl.where(mask, loss, 0.0).to(tl.float64)
            chosen_sum += c.to(tl.float64)
            rejected_sum += r.to(tl.float64)
            margin_sum += tl.where(both, c.to(tl.float64) - r.to(tl.float64), 0.0)
            half_points += (both & (c > r)).to(tl.int32) + (both & (c >= r)).to(tl.int32)
            chosen_count += has_c.to(tl.int32)
            rejected_count += has_r.to(tl.int32)
            pairs += both.to(tl.int32)
        tl.debug_barrier()

    for start in range(sequence, sequence_end, LANES):
        o_sequence = start + tl.arange(0, LANES)
        mask = o_sequence < sequence_end
        slope = _slope_of_sequences(
            comparisons_ptr, side_ptr, o_sequence, comparison, comparison_end, LANES, OBJECTIVE
        )
        if REWARD:
            tl.store(coefficient_ptr + o_sequence, slope, mask=mask)
        else:
            entry = tl.load(span_pointer_ptr + o_sequence, mask=mask, other=0)
            count = tl.load(span_pointer_ptr + o_sequence + 1, mask=mask, other=0) - entry
            for k in range(tl.max(count, 0)):
                tl.store(entry_ptr + entry + k, slope, mask=k < count)
    if not REWARD:
        tl.debug_barrier()
        entry, entry_end = tl.load(span_pointer_ptr + sequence), tl.load(span_pointer_ptr + sequence_end)
        _spread(
            span_start_ptr,
            span_index_ptr,
            entry_ptr,
            coefficient_ptr,
            span,
            span_end,
            entry,
            entry_end,
            BLOCK,
        )

    mine_ptr = partial_ptr + 8 * tree
    tl.store(mine_ptr, tl.sum(loss_sum, 0))
    tl.store(mine_ptr + 1, tl.sum(chosen_sum, 0))
    tl.store(mine_ptr + 2, tl.sum(rejected_sum, 0))
    tl.store(mine_ptr + 3, tl.sum(margin_sum, 0))
    tl.store(mine_ptr + 4, 0.5 * tl.sum(half_points, 0).to(tl.float64))
    tl.store(mine_ptr + 5, tl.sum(chosen_count, 0).to(tl.float64))
    tl.store(mine_ptr + 6, tl.sum(rejected_count, 0).to(tl.float64))
    tl.store(mine_ptr + 7, tl.sum(pairs, 0).to(tl.float64))
    tl.debug_barrier()
    # the program that arrives last adds up the trees, in the same order whichever program it is
    if tl.atomic_add(arrived_ptr, 1) == trees - 1:
        _add_trees(partial_ptr, sums_ptr, loss_ptr, trees, LANES)
        tl.store(arrived_ptr, 0)


def aot_builds(capability: int) -> list[Build]:
    """List one build per objective."""
    numbers = ("loss", "rewards", "coefficient", "sequence", "side", "entry")
    floats = {f"{name}_ptr": "*fp32" for name in ("values", "reference", "divergence", *numbers)}
    floats |= {f"{name}_ptr": "*fp64" for name in ("sums", "span", "partial")}
    floats |= {"beta": "fp32", "first": "fp32", "second": "fp32"}
    builds = []
    for objective in TERMS:
        constants = _constants(objective, ipo_average=True)
        signature = {
            name: "constexpr" if name in constants else floats.get(name, "*i32")
            for name in getattr(_preference_kernel, "arg_names", ())
        }
        signature |= {"absolute_ptr": "*i1", "trees": "i32"}
        builds.append(Build(f"preference_loss {objective}", _preference_kernel, signature, constants))
    return builds


# ---------------------------------------------------------------- host


_arrived: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """Return the counter of programs that have arrived in the running launch.

    Each stream has its own, and it is 0 between launches.
    """
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _arrived:
        _arrived[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _arrived[key]


def _constants(objective: str, *, ipo_average: bool) -> dict[str, Any]:
    return {
        "OBJECTIVE": objective,
        "REFERENCE": TERMS[objective].reference,
        "REWARD": TERMS[objective].reward,
        "AVERAGE": ipo_average,
        "BLOCK": POSITION_BLOCK,
        "LANES": LANES,
    }


def _launch(
    values: Tensor,
    structure: Structure,
    reference: Tensor,
    divergence: Tensor,
    numbers: tuple[float, float, float],
    constants: dict[str, Any],
) -> PreferenceLoss:
    trees = structure.tree_start.shape[0] - 1
    sides = 0 if constants["OBJECTIVE"] == "sft" else 2 * structure.comparisons.shape[0]
    found = PreferenceLoss(
        loss=values.new_empty(()),
        sums=values.new_empty(8, dtype=torch.float64),
        rewards=values.new_empty(sides // 2, 2),
        coefficient=torch.empty_like(values),
    )
    if not trees:
        found.loss.zero_()
        found.sums.zero_()
        return found
    s = structure
    span, partial = _scratch(values, torch.float64, s.span_start.shape[0] - 1, 8 * trees)
    narrow = _scratch(values, torch.float32, s.span_pointer.shape[0] - 1, sides, s.span_index.shape[0])
    with torch.cuda.device_of(values):
        _preference_kernel[(trees,)](
            *(values, reference, divergence),
            *(s.span_start, s.span_pointer, s.span_index, s.comparisons, s.tree_start, s.scored, s.absolute),
            *found,
            *(span, *narrow, partial, _counter(values.device)),
            trees,
            *numbers,
            **constants,
            num_warps=4,
        )
    return found


def _scratch(like: Tensor, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, ...]:
    """Return parts of one allocation, each of which begins at a multiple of 16 bytes, whatever the sizes.

    A pointer's alignment is part of what Triton compiles a kernel for: it would otherwise be compiled again and again
    as rows change.
    """
    rounded = [-(-size // 4) * 4 for size in sizes]
    return like.new_empty(sum(rounded), dtype=dtype).split(rounded)


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *arguments: Any) -> PreferenceLoss:
        found = _launch(values, *arguments)
        ctx.save_for_backward(found.coefficient)
        ctx.mark_non_differentiable(found.sums, found.rewards, found.coefficient)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        (coefficient,) = ctx.saved_tensors
        return grad * coefficient, None, None, None, None, None


def preference_loss(
    values: Tensor,
    structure: Structure,
    objective: str,
    *,
    reference_logprob: Tensor | None = None,
    kl: Tensor | None = None,
    beta: float = 0.1,
    ipo_average: bool = True,
    **numbers: float,
) -> PreferenceLoss:
    """Compute the loss over spans, sequences and comparisons, and one coefficient per position, in one launch.

    The results are bit-identical from run to run, because every sum has a fixed order. Nothing is read back to the
    host. There is no torch path here: where `dispatch.runs_kernels(values)` is false, the caller's own definition is
    to be used.

    Args:
        values: (L,) float32 log-probs of the scored positions, or (N,) rewards for bt, bt_margin and bt_dr.
        structure: on the device of `values`.
        objective: one of `TERMS`; its equation is in `silva.engine.objectives`.
        reference_logprob: (N,) float32, for the objectives that have a reference.
        kl: scalar float32, for kto: the KL estimate over the global batch; a negative one counts as 0.
        beta: of the objective.
        ipo_average: whether ipo divides log-probs by the number of scored positions.
        **numbers: by the names in `TERMS`; those of other objectives are not read.

    Raises:
        ValueError: the objective is not known, or the reference, the estimate or a number that it needs is absent.
    """
    if objective not in TERMS:
        raise ValueError(f"preference_loss: no objective {objective!r}, only {', '.join(TERMS)}")
    terms = TERMS[objective]
    if terms.reference and reference_logprob is None:
        raise ValueError(f"preference_loss: {objective} needs `reference_logprob`")
    if objective == "kto" and kl is None:
        raise ValueError("preference_loss: kto needs `kl`")
    missing = [name for name in terms.numbers if name not in numbers]
    if missing:
        raise ValueError(f"preference_loss: {objective} needs `{missing[0]}`")
    first, second, *_ = (*(numbers[name] for name in terms.numbers), 0.0, 0.0)
    values = values.float().contiguous()
    return PreferenceLoss(
        *_PreferenceLoss.apply(
            values,
            Structure(*(x.contiguous() for x in structure)),
            values if reference_logprob is None else reference_logprob.detach().float().contiguous(),
            values if kl is None else kl.detach().float(),
            (beta, first, second),
            _constants(objective, ipo_average=ipo_average),
        )
    )
