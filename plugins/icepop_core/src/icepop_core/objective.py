"""The clipped policy objective under IcePop's weights, per token: Ring-1T eq. 1 without its sums.

The paper's KL term is left out: all Ring-1T runs use gamma = 0.  The sums over tokens, sequences
and ranks belong to the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """-M(k) * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), to be minimised.

    Args:
        logprobs: log pi_train(token | theta), carries the gradient.
        old_logprobs: log pi_train(token | theta_old); detach ``logprobs`` for the first update.
        advantages: A, one per token.
        weights: M(k) of ``icepop_weights``.
        clip_low, clip_high: PPO's epsilon below and above 1.

    Returns:
        The loss per token, exactly 0 (value and gradient) where the weight is 0.
    """
    kept = weights != 0
    # A masked token may hold -inf: it must not reach exp(), since 0 * nan is nan in the gradient.
    log_ratio = torch.where(kept, logprobs - torch.where(kept, old_logprobs, 0.0), 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weights * torch.minimum(ratio * advantages, clipped * advantages)


def group_advantages(rewards: Sequence[float], *, epsilon: float = 1e-4) -> list[float]:
    """GRPO's advantages of one group: (reward - mean) / (standard deviation + epsilon).

    The deviation is the sample's (divided by n - 1) and epsilon is 1e-4, as in TRL.  A group
    whose rewards are all equal has advantages of exactly 0.

    Raises:
        ValueError: fewer than two rewards.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)}: advantages compare at least 2 completions")
    mean = sum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    deviation = (sum(value * value for value in centered) / (len(rewards) - 1)) ** 0.5
    return [value / (deviation + epsilon) for value in centered]
