"""A packed row of rollouts as tensors: what the loss and Megatron's packed attention read.

Legend: T = tokens of the row, S = its sequences (a padding tail counts as one).
Everything but ``tokens`` and ``position_ids`` is label-aligned: position t holds the data of
token t + 1, so that it lines up with the log-prob that the model gives at position t.
Rows keep their natural length: packed attention needs no common one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

import torch
from torch import Tensor

from megatron_c3po.rollout import Rollout

NO_VERSION = -1
"""Policy version at positions whose label was not sampled: prompt and padding."""
NO_SEQUENCE = -1
"""Sequence id of padding."""


class Microbatch(TypedDict):
    """The contract between the data and Megatron's ``forward_step``.

    Keys:
        tokens, labels, position_ids: int64 [1, T].
        loss_mask: float32 [1, T], 1 where the label is a sampled token.
        cu_seqlens: int32 [S + 1], where sequences begin and end; covers all T tokens.
        max_seqlen: the longest sequence.
        advantages: float32 [1, T], the rollout's advantage where ``loss_mask`` is 1, else 0.
        behaviour_logprobs: float32 [1, T], the engine's log-prob of the label, 0 elsewhere.
        policy_versions: int64 [1, T], the version that sampled the label, ``NO_VERSION`` elsewhere.
        sequence_ids: int64 [1, T], position of the rollout in the row, ``NO_SEQUENCE`` on padding.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    advantages: Tensor
    behaviour_logprobs: Tensor
    policy_versions: Tensor
    sequence_ids: Tensor


def build_microbatch(
    row: Sequence[Rollout],
    *,
    length_multiple: int = 1,
    device: torch.device | str = "cpu",
) -> Microbatch:
    """Lay the rollouts of a row one after another.

    Args:
        row: finished rollouts; an empty row gives padding only, so that a rank without work still
            takes part in the collectives.
        length_multiple: T is padded to a multiple of this (sequence parallelism splits T evenly
            over the tensor-parallel ranks).
        device: where the model is.

    Raises:
        ValueError: a rollout has no prompt, no sampled token, no advantage, or not one log-prob
            and one version per token.
    """
    advantages = [_checked_advantage(rollout) for rollout in row]
    total = sum(rollout.total_tokens for rollout in row)
    padding = -total % length_multiple if total else length_multiple
    lengths = [rollout.total_tokens for rollout in row] + ([padding] if padding else [])
    length = total + padding

    microbatch = Microbatch(
        tokens=torch.zeros(1, length, dtype=torch.int64),
        labels=torch.zeros(1, length, dtype=torch.int64),
        loss_mask=torch.zeros(1, length),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        advantages=torch.zeros(1, length),
        behaviour_logprobs=torch.zeros(1, length),
        policy_versions=torch.full((1, length), NO_VERSION),
        sequence_ids=torch.full((1, length), NO_SEQUENCE),
    )
    start = 0
    for sequence_id, rollout in enumerate(row):
        end = start + rollout.total_tokens
        ids = torch.tensor(rollout.prompt_ids + rollout.token_ids)
        microbatch["tokens"][0, start:end] = ids
        microbatch["labels"][0, start : end - 1] = ids[1:]
        microbatch["sequence_ids"][0, start:end] = sequence_id
        sampled = slice(end - 1 - len(rollout.token_ids), end - 1)
        microbatch["loss_mask"][0, sampled] = 1.0
        microbatch["advantages"][0, sampled] = advantages[sequence_id]
        microbatch["behaviour_logprobs"][0, sampled] = torch.tensor(rollout.logprobs)
        microbatch["policy_versions"][0, sampled] = torch.tensor(rollout.versions)
        start = end
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in microbatch.items()}
    return cast(Microbatch, moved)


def _checked_advantage(rollout: Rollout) -> float:
    if not rollout.prompt_ids:
        raise ValueError(f"rollout {rollout.uid}: no prompt, so its first token has no log-prob")
    if not rollout.token_ids:
        raise ValueError(f"rollout {rollout.uid}: no sampled token, so there is nothing to train")
    if rollout.advantage is None:
        raise ValueError(f"rollout {rollout.uid}: no advantage; score its whole group first")
    counts = (len(rollout.token_ids), len(rollout.logprobs), len(rollout.versions))
    if len(set(counts)) != 1:
        raise ValueError(
            f"rollout {rollout.uid}: {counts[0]} tokens, {counts[1]} log-probs, {counts[2]} "
            "versions; the three must be equal"
        )
    return rollout.advantage
