"""One training step: packed rows through Megatron's own schedule, one optimizer update.

Ring-1T eq. 1 (IcePop) or, to teach a model a task first, supervised cross-entropy on the same rows.
Left out: pipeline parallelism (rows have different lengths and the schedule has one stage).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from asystem_bridge.trainer.optimizer import set_learning_rate
from icepop_core import merge_discrepancy
from megatron_c3po.loss import IcePopLossOptions, LossResult, icepop_loss, supervised_loss
from megatron_c3po.microbatch import Microbatch, build_microbatch
from megatron_c3po.rollout import Rollout

TrainMode = Literal["icepop", "supervised"]


def train_step(
    model: Any,
    optimizer: Any,
    rows: Sequence[Sequence[Rollout]],
    *,
    mode: TrainMode,
    loss_options: IcePopLossOptions,
    learning_rate: float,
    length_multiple: int,
) -> dict[str, Any]:
    """Accumulate the gradient over the rows of every rank, clip it and update.

    Args:
        model: wrapped by ``wrap_data_parallel``.
        optimizer: of ``build_optimizer``.
        rows: of this data-parallel rank; as many as on every other, at least one.
        mode: which loss.
        loss_options: for ``"icepop"``.
        learning_rate: of this update.
        length_multiple: rows are padded to a multiple of it.

    Returns:
        ``loss`` and ``grad_norm`` (before clipping) over all ranks; ``tokens`` trained and
        ``discrepancy`` sums of this data-parallel rank (``{}`` when supervised).

    Raises:
        ValueError: unknown mode, no row, or no token to train on any rank.
        RuntimeError: a gradient is not finite; no weight has moved.
    """
    if mode not in get_args(TrainMode):
        raise ValueError(f"mode = {mode!r}: allowed are {get_args(TrainMode)}")
    if not rows:
        raise ValueError("no row to train: every rank needs as many rows as the others")
    device = next(model.parameters()).device
    microbatches = [
        build_microbatch(row, length_multiple=length_multiple, device=device) for row in rows
    ]

    model.train()
    model.zero_grad_buffer()
    optimizer.zero_grad()
    set_learning_rate(optimizer, learning_rate)
    metrics: list[dict[str, Any]] = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, mode=mode, loss_options=loss_options),
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=max(microbatch["tokens"].shape[1] for microbatch in microbatches),
        micro_batch_size=1,
        forward_only=False,
    )
    totals = torch.tensor(
        [sum(part[name] for part in metrics) for name in ("loss_sum", "count")],
        dtype=torch.float64,
        device=device,
    )
    torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    loss_sum, count = totals.tolist()
    if count == 0:
        raise ValueError("no token to train: the rows of every rank are empty")
    _, grad_norm, _ = optimizer.step()
    return {
        "loss": loss_sum / count,
        "grad_norm": float(grad_norm),
        "tokens": sum(part["tokens"] for part in metrics),
        "discrepancy": merge_discrepancy(part["discrepancy"] for part in metrics)
        if mode == "icepop"
        else {},
    }


def packed_seq_params(microbatch: Microbatch) -> PackedSeqParams:
    """Megatron's description of a row ("thd": tokens, heads, head size)."""
    cu_seqlens = microbatch["cu_seqlens"]
    max_seqlen = microbatch["max_seqlen"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def label_logprobs(model: Any, microbatch: Microbatch) -> Tensor:
    """log pi_train of each label, float32 [1, T]: Megatron's vocabulary-parallel cross-entropy."""
    cross_entropy = model(
        microbatch["tokens"],
        microbatch["position_ids"],
        None,  # the packing says who attends to whom
        labels=microbatch["labels"],
        packed_seq_params=packed_seq_params(microbatch),
    )
    logprobs: Tensor = -cross_entropy.float()
    return logprobs


def _forward_step(
    microbatches: Iterator[Microbatch],
    model: Any,
    *,
    mode: TrainMode,
    loss_options: IcePopLossOptions,
) -> tuple[Tensor, functools.partial[LossResult]]:
    """Megatron's convention: the model's output and a function from it to the loss."""
    microbatch = next(microbatches)
    if mode == "icepop":
        loss = functools.partial(icepop_loss, microbatch=microbatch, options=loss_options)
    else:
        loss = functools.partial(supervised_loss, microbatch=microbatch)
    return label_logprobs(model, microbatch), loss
