"""Megatron's data parallelism and AdamW around a model: plain, replicated, in float32.

The distributed optimizer (optimizer state sharded over data-parallel ranks) is left out: on one
host it saves little, and without it a checkpoint resumes bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

from asystem_bridge.trainer.options import TrainerOptions

SPLIT_AXIS = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
"""The axis along which tensor parallelism splits the weight of a layer."""


def wrap_data_parallel(model: Any) -> DistributedDataParallel:
    """Add gradient buffers; gradients are summed over ranks and divided once per step.

    A gradient that is not finite raises before any weight moves.
    """
    _mark_split_weights(model)
    config = model.config
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(check_for_nan_in_grad=True), model
    )
    wrapped.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def _mark_split_weights(model: torch.nn.Module) -> None:
    """Tell which weights each tensor-parallel rank holds a part of.

    Megatron's layers do so when they draw random weights, which loading a checkpoint skips.
    Without the mark the gradient norm takes the parts of the other ranks for copies and leaves
    them out.
    """
    for module in model.modules():
        axis = SPLIT_AXIS.get(type(module))
        weight = getattr(module, "weight", None)
        if axis is None or weight is None or hasattr(weight, "tensor_model_parallel"):
            continue  # not split; tied to the embedding; or marked by Megatron
        set_tensor_model_parallel_attributes(weight, True, axis, 1)


def build_optimizer(model: DistributedDataParallel, options: TrainerOptions) -> Any:
    """AdamW with gradient clipping over all model-parallel ranks."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.learning_rate,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            weight_decay=options.weight_decay,
            clip_grad=options.clip_grad,
            params_dtype=torch.float32,
        ),
        [model],
    )
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Use this rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
