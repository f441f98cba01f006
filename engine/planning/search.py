"""Finds the best layouts for a cluster: predicts every layout the engine accepts, and builds the best ones.

Building each of hundreds of layouts would take minutes. So for each way of splitting and recomputing a layer, models
of one and two layers are built and measured as a first, a middle, a last and an only stage, and a layout's stages are
composed of them, since the cost of layers adds up. Every layout that is shown has been built whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from silva.engine.parallel import offload
from silva.engine.parallel.forked import isolated_each

from silva.engine.errors import UserError
from silva.engine.model import gpt
from silva.engine.planning import built
from silva.engine.planning.built import Chunk, Job, Stage
from silva.engine.planning.meter import Cost
from silva.engine.planning.predict import Prediction, Setting, build_stages, predict
from silva.engine.planning.step_time import copies
from silva.engine.recipe.schema import Parallel

Recompute = Literal["none", "selective", "full"]
# an interleaved stage has at most this many chunks
MOST_CHUNKS = 8
# One process has at least this many tokens of a row: with fewer, more pipeline stages or data-parallel copies are as
# good and send less.
FEWEST_TOKENS = 8192
# the search for the smallest cluster that fits ends at this number of GPUs
LARGEST_CLUSTER = 4096

# tensor- and context-parallel size, recomputation, row length
Way = tuple[int, int, Recompute, int]


@dataclass(frozen=True)
class Probe:
    """Holds measured chunks of one way of splitting and recomputing a layer.

    Attributes:
        only: one layer, as the whole model.
        first: one layer, as the first of several stages.
        middle: one layer, as a stage between others.
        middle_of_two: two layers, as a stage between others.
        last: one layer, as the last of several stages.
        buffers: bytes of megatron-core's own buffers, the largest of all measured stages.
    """

    only: Chunk
    first: Chunk
    middle: Chunk
    middle_of_two: Chunk
    last: Chunk
    buffers: float


Probes = dict[Way, Probe]


def search(setting: Setting, probes: Probes, top: int) -> list[Prediction]:
    """Find the fastest layouts that fit, and build each of them whole.

    Args:
        setting: what the plan is made for.
        probes: of `measure_layers`.
        top: how many layouts to return at most.

    Returns:
        Predictions, the fastest first: one for each way of splitting the model (tensor, context and pipeline size).
    """
    best: dict[tuple[int, int, int], Prediction] = {}
    for each in sorted(_candidates(setting, probes), key=lambda each: each.time.total):
        layout = each.job.parallel
        best.setdefault((layout.tensor, layout.context, layout.pipeline), each)
    found: list[Prediction] = []
    for candidate in best.values():
        if len(found) == top:
            break
        whole = predict(setting, candidate.job, build_stages(candidate.job))
        # a composed stage that fits may not fit when built, which adds the padding of buffers
        if whole.fits:
            found.append(whole)
    return sorted(found, key=lambda each: each.time.total)


def smallest_cluster(setting: Setting, probes: Probes) -> int | None:
    """Find the smallest number of GPUs on which some layout fits.

    The setting's number is tried first. It is doubled up to a whole node, and then grows by whole nodes.

    Args:
        setting: what the plan is made for.
        probes: of `measure_layers`.

    Returns:
        The number of GPUs; None if it would exceed `LARGEST_CLUSTER`.
    """
    count = setting.gpus
    while count <= LARGEST_CLUSTER:
        if next(_candidates(replace(setting, gpus=count), probes), None) is not None:
            return count
        count = count * 2 if count < setting.gpu.per_node else count + setting.gpu.per_node
    return None


# ---------------------------------------------------------------- the space


def contexts(setting: Setting) -> list[int]:
    """Return the context-parallel sizes: powers of two that leave every process enough tokens of a row."""
    longest = setting.recipe.data.row_length // FEWEST_TOKENS
    return [2**n for n in range(max(longest, 1).bit_length())]


def layouts(setting: Setting) -> Iterator[Parallel]:
    """Yield every layout the engine accepts on the setting's GPUs, with tensor parallelism within a node."""
    shape, gpus = setting.shape, setting.gpus
    for tensor in _tensors(setting):
        for context in contexts(setting):
            for pipeline in range(1, min(shape.layers, gpus // tensor // context) + 1):
                if gpus % (tensor * context * pipeline):
                    continue
                chunks = [None, *range(2, MOST_CHUNKS + 1)] if pipeline > 1 else [None]
                for virtual in chunks:
                    for recompute in get_args(Recompute):
                        layout = _layout(gpus, tensor, pipeline, virtual, context, recompute)
                        layout = _cut(layout, shape.layers)
                        if _accepted(setting, layout):
                            yield layout
                            yield layout.model_copy(update={"offload_optimizer": True})


def _tensors(setting: Setting) -> list[int]:
    """Return the tensor-parallel sizes: powers of two within a node."""
    return [2**n for n in range(setting.gpu.per_node.bit_length())]


def _layout(
    gpus: int, tensor: int, pipeline: int, virtual: int | None, context: int, recompute: Recompute
) -> Parallel:
    return Parallel(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=context,
        # saves activations and sends no more
        sequence_parallel=tensor > 1,
        overlap=gpus > tensor * pipeline * context,
        recompute=recompute,
    )


def _cut(layout: Parallel, layers: int) -> Parallel:
    """Add `stage_layers` where stages cannot be equal: fewer at the ends, which have the embedding and the head.

    Interleaved stages stay equal: a list with a number for each chunk gains one percent and is hard to read.
    """
    stages = layout.pipeline
    each, more = divmod(layers, stages)
    if not more or not each or layout.virtual_pipeline is not None:
        return layout
    # the middle stages get one layer more first, then those around them
    order = sorted(range(stages), key=lambda place: (abs(2 * place - stages + 1), place))
    extra = set(order[:more])
    return layout.model_copy(update={"stage_layers": [each + (place in extra) for place in range(stages)]})


def _accepted(setting: Setting, layout: Parallel) -> bool:
    try:
        gpt.check_layout(setting.shape, layout)
    except UserError:
        return False
    return True


def _row_lengths(setting: Setting) -> list[int]:
    """Return the recipe's row length, and half of it where every sequence still fits: twice as many micro-batches."""
    data = setting.recipe.data
    half = data.row_length // 2
    return [data.row_length, *([half] if half >= (data.max_length or data.row_length) else [])]


def _candidates(setting: Setting, probes: Probes) -> Iterator[Prediction]:
    """Yield the predictions of all layouts and row lengths that fit."""
    for layout in layouts(setting):
        for row_length in _row_lengths(setting):
            probe = probes[layout.tensor, layout.context, layout.recompute, row_length]
            job = setting.job(layout, row_length)
            stages = [_compose(probe, job, place) for place in range(layout.pipeline)]
            prediction = predict(setting, job, stages)
            if prediction.fits:
                yield prediction


# ---------------------------------------------------------------- measuring once, composing often


def measure_layers(setting: Setting) -> Probes:
    """Measure every way of splitting and recomputing a layer; the result holds for any number of GPUs."""
    tensors = [n for n in _tensors(setting) if _accepted(setting, Parallel(tensor=n))]
    ways: list[Way] = [
        (n, context, recompute, row)
        for n in tensors
        for context in contexts(setting)
        for recompute in get_args(Recompute)
        for row in _row_lengths(setting)
    ]
    return dict(zip(ways, isolated_each(_probe, [(setting, *way) for way in ways]), strict=True))


def _probe(setting: Setting, tensor: int, context: int, recompute: Recompute, row_length: int) -> Probe:
    def measured(pipeline: int, place: int, layers: int) -> Stage:
        world = tensor * context * pipeline
        job = setting.job(_layout(world, tensor, pipeline, None, context, recompute), row_length)
        job = replace(job, shape=replace(job.shape, layers=layers * pipeline), world=world)
        return built.measure(job, place * tensor * context)

    only = measured(1, 0, 1)
    stages = [measured(3, place, 1) for place in range(3)]
    two = measured(3, 1, 2)
    first, middle, last = (stage.chunks[0] for stage in stages)
    buffers = max(stage.buffers for stage in (only, *stages, two))
    return Probe(only.chunks[0], first, middle, two.chunks[0], last, buffers)


def _compose(probe: Probe, job: Job, place: int) -> Stage:
    """Compose a stage of any number of layers."""
    layout = job.parallel
    count = layout.virtual_pipeline or 1
    layers = gpt.stage_layers(job.shape, layout)
    chunks = []
    for index in range(count):
        ends = (place == 0 and index == 0, place == layout.pipeline - 1 and index == count - 1)
        base = {(True, True): probe.only, (True, False): probe.first, (False, True): probe.last}
        chunks.append(_grow(probe, base.get(ends, probe.middle), layers[index * layout.pipeline + place]))
    elements = sum(chunk.parameters for chunk in chunks)
    # of a model in 16 bits, gradients and main weights are wider than its own weights
    narrow = job.dtype.itemsize == 2
    owned = elements / copies(job)
    state, shape = 12 if narrow else 8, job.shape
    on_gpu, host = owned, 0.0
    if layout.offload_optimizer:
        largest = shape.hidden * max(shape.vocab, 2 * shape.ffn) / layout.tensor
        on_gpu, host = min(owned, max(offload.PORTION, largest)), owned
    return Stage(
        parameters=elements * job.dtype.itemsize,
        gradients=elements * 4,
        optimizer=on_gpu * state,
        host=host * state,
        buffers=probe.buffers,
        chunks=chunks,
    )


def _grow(probe: Probe, base: Chunk, layers: int) -> Chunk:
    """Return the chunk that `base`, of one layer, is with `layers`."""
    one, two = probe.middle, probe.middle_of_two
    more = layers - 1

    def cost(of: Callable[[Chunk], Cost]) -> Cost:
        return of(base) + (of(two) + of(one).scaled(-1)).scaled(more)

    return Chunk(
        layers=layers,
        parameters=base.parameters + more * (two.parameters - one.parameters),
        saved=base.saved + more * (two.saved - one.saved),
        forward_peak=max(base.forward_peak, two.forward_peak if more else 0),
        backward_peak=max(base.backward_peak, two.backward_peak if more else 0),
        forward=cost(lambda chunk: chunk.forward),
        backward=cost(lambda chunk: chunk.backward),
    )
