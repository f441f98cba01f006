"""Gives megatron-core an AdamW that needs neither Transformer Engine nor apex, and wraps the model around it.

megatron-core's own path over `torch.optim.AdamW` cannot resume a distributed checkpoint (it asserts on a fresh state
and loses `step`), and it clips with one host synchronisation per tensor. The AdamW here keeps the step in the
parameter group, like the fused optimizers that megatron-core is written for, and runs torch's fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from silva.engine.parallel import weight_gradient
from silva.engine.parallel.offload import keep_on_host

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Parallel, Training


class FusedAdam(torch.optim.Optimizer):
    """Implements AdamW (arXiv 1711.05101) with `torch._fused_adamw_`; moments are float32.

    It replaces the class of that name in apex and Transformer Engine, and takes the same arguments.

    Args:
        params: parameters, or groups of them.
        lr: the learning rate.
        betas: decay rates of the first and the second moment.
        eps: is added to the root of the second moment.
        weight_decay: factor of the weight decay.
        adam_w_mode: whether the decay is AdamW's; without it, it is an L2 penalty, as in Adam.
        capturable: must be false.

    Raises:
        ValueError: `capturable` is true.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("FusedAdam cannot be captured in a CUDA graph: it counts its steps on the host")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": True,
        }
        super().__init__(params, defaults)
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; a closure is refused."""
        if closure is not None:
            raise ValueError("FusedAdam.step takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            states = [self.state[p] for p in parameters]
            self.update(group, parameters, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states])

    def update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        """Update parameters and their moments in place, by the group's settings and step.

        Args:
            group: the parameter group.
            parameters: of the group, all on one device and all with a gradient.
            first: first moments of the parameters.
            second: second moments of the parameters.
        """
        if not parameters:
            return
        step = torch.tensor(float(group["step"]), device=parameters[0].device)
        self._update(
            parameters,
            # the callers pass only parameters with a gradient, so this leaves none out
            [p.grad for p in parameters if p.grad is not None],
            first,
            second,
            [],
            [step] * len(parameters),
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _l2_norm(chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).reshape(1), None


def _scale(chunk: int, flag: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    source, target = lists
    if any(a is not b for a, b in zip(source, target, strict=True)):
        torch._foreach_copy_(target, source)
    if factor != 1.0:
        torch._foreach_mul_(target, factor)


def register(*, always: bool = False) -> bool:
    """Put this optimizer and its clipping where megatron-core looks for the fused ones.

    Args:
        always: whether to do so also where megatron-core has found apex or Transformer Engine.

    Returns:
        Whether they are in place.
    """
    import megatron.core.optimizer as factory
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    if factory.Adam is FusedAdam:
        return True
    if not factory.USING_PYTORCH_OPTIMIZER and not always:
        return False
    replaced: Any = factory
    replaced.Adam, replaced.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    distributed: Any = distrib_optimizer
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = FusedAdam, True, True
    clipping: Any = clip_grads
    clipping.l2_norm_impl, clipping.multi_tensor_scale_impl = _l2_norm, _scale
    mixed: Any = optimizer
    mixed.multi_tensor_scale_impl = _scale
    return True


def adam_in_use() -> str:
    """Return the library whose AdamW megatron-core uses; called after `build`."""
    import megatron.core.optimizer as factory

    return "torch, fused" if factory.Adam is FusedAdam else str(factory.Adam.__module__).partition(".")[0]


def wrap(chunks: Sequence[nn.Module], parallel: Parallel) -> list[nn.Module]:
    """Wrap a model whose weights are in place for data parallelism; gradients are summed, never averaged.

    bfloat16 models get float32 gradients, and convert their inputs and outputs themselves. A linear layer's gradient
    is added to the buffer by the product that computes it (`weight_gradient`).

    Args:
        chunks: `gpt.build`'s modules.
        parallel: the layout.

    Returns:
        The wrapped modules.
    """
    config: Any = chunks[0].config
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.bf16,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    wrapped: list[nn.Module] = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=place > 0)
        for place, chunk in enumerate(chunks)
    ]
    weight_gradient.fuse(wrapped)
    return wrapped


def build(chunks: Sequence[nn.Module], training: Training, parallel: Parallel) -> Any:
    """Build megatron-core's optimizer over wrapped chunks, and set the hooks that its schedules call.

    Losses are already divided by the global count, so `finalize_model_grads` gets no token count to divide by.

    Args:
        chunks: of `wrap`.
        training: the recipe's section.
        parallel: the layout.

    Returns:
        The optimizer of `get_megatron_optimizer`.
    """
    register(always=parallel.offload_optimizer)
    config: Any = chunks[0].config
    # With offloading, all main weights are first made on the GPU and then moved. Meanwhile the gradient buffers are
    # freed, to make room for them.
    every: list[Any] = list(chunks)
    gradients = [b.grad_data for chunk in every for b in chunk.buffers] if parallel.offload_optimizer else []
    sizes = [x.untyped_storage().nbytes() for x in gradients]
    for x in gradients:
        x.untyped_storage().resize_(0)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        adam_eps=training.epsilon,
        clip_grad=training.clip,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, list(chunks))
    for group in optimizer.param_groups:
        for weights in group["params"]:
            # Slices of float32 weights are no leaves. megatron-core keeps their gradients itself, and torch warns
            # whoever reads the `.grad` of such a tensor, unless it is told that there may be one.
            if not weights.is_leaf:
                weights.retain_grad()
    configure(optimizer, training)
    if parallel.offload_optimizer:
        keep_on_host(optimizer)
    for x, size in zip(gradients, sizes, strict=True):
        x.untyped_storage().resize_(size)
        x.zero_()
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = _sum_gradients
    if parallel.overlap:
        interleaved = len(every) > 1
        config.no_sync_func = [c.no_sync for c in every] if interleaved else every[0].no_sync
        if interleaved:
            config.grad_sync_func = [c.start_grad_sync for c in every]
            if parallel.distributed_optimizer:
                config.param_sync_func = [c.start_param_sync for c in every]
    return optimizer


def configure(optimizer: Any, training: Training) -> None:
    """Set what a recipe says about AdamW, except the learning rate, which is set for every step.

    Norms and biases get no weight decay, as in transformers: megatron-core marks their groups by `wd_mult` 0 and leaves
    the rest to a scheduler of its own. A checkpoint brings the settings of the run that wrote it, so this is called
    after it is loaded too.

    Args:
        optimizer: of `get_megatron_optimizer`.
        training: the recipe's section.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = training.weight_decay * group["wd_mult"]
        group["betas"] = (training.beta1, training.beta2)
        group["eps"] = training.epsilon


def prepare(optimizer: Any) -> float:
    """Bring the gradients to where the update reads them, and clip them; `step_with_ready_grads` is the update.

    The call is collective.

    Args:
        optimizer: of `get_megatron_optimizer`.

    Returns:
        The norm of the global gradient before clipping, the same on every rank.
    """
    # megatron-core chains several only for experts and for frozen parameters, and the models here have neither
    [one] = optimizer.chained_optimizers
    one.prepare_grads()
    return float(one.clip_grad_norm(one.config.clip_grad))


def settle(chunks: Sequence[Any], parallel: Parallel) -> None:
    """Finish gathering updated parameters, which `parallel.overlap` puts off until the next forward pass.

    It has to be called before anything but a forward pass reads the weights.

    Args:
        chunks: of `wrap`.
        parallel: the layout.
    """
    if parallel.overlap and parallel.distributed_optimizer:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def _sum_gradients(chunks: list[nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    finalize_model_grads(chunks, None, **options)


def learning_rate(
    step: int, steps: int, *, peak: float, minimum: float, warmup: float, schedule: str
) -> float:
    """Compute the learning rate of a step: linear warm-up, then cosine, linear or constant.

    The rate is a pure function of the step, so a resumed run needs no scheduler state. Warm-up takes
    `ceil(warmup * steps)` steps and its first step is not zero; the last step of the decay is just above `minimum`.
    Both are as in transformers' `get_cosine_schedule_with_warmup`, shifted by one step, because that function spends
    its first step on a rate of zero.

    Args:
        step: from 0 to `steps` - 1.
        steps: of the whole run.
        peak: the rate at the end of warm-up.
        minimum: the rate that the decay approaches.
        warmup: share of the steps.
        schedule: "cosine", "linear" or "constant".

    Returns:
        The rate.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    decay = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[schedule]
    return minimum + (peak - minimum) * decay
