"""The training losses in the form that Megatron's schedules ask for (Ring-1T eq. 1).

    J = 1/G sum_i 1/|y_i| sum_t M(k_it; alpha, beta) min(r_it A_i, clip(r_it, 1-eps, 1+eps) A_i)

With ``calculate_per_token_loss=True`` a loss function returns ``(loss_sum, count, metrics)`` of one
microbatch; Megatron adds the sums and counts of all microbatches and data-parallel ranks and
divides the gradient once.  So the result does not depend on how rows were packed.

One optimizer step per batch: pi_old is pi at the start of the step, so r = 1 in value and carries
the gradient.  The KL term is left out: all Ring-1T runs use gamma = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from icepop_core import (
    DEFAULT_ALPHA,
    DEFAULT_BETA,
    check_band,
    discrepancy_sums,
    icepop_weights,
    policy_loss,
)
from megatron_c3po.microbatch import NO_SEQUENCE, Microbatch

LossNormaliser = Literal["sequence", "token"]
LossResult = tuple[Tensor, Tensor, dict[str, Any]]
"""``loss_sum`` (scalar, with gradient), ``count`` (int32 scalar), ``metrics`` (plain numbers)."""


@dataclass(frozen=True, kw_only=True)
class IcePopLossOptions:
    """Options of the policy loss.

    Attributes:
        alpha, beta: IcePop's band (paper: 0.5 and 5.0).
        clip_low, clip_high: PPO's epsilon on either side (Schulman et al., 2017: 0.2).  With one
            update per batch r = 1 and the clip never acts.
        normaliser: ``"sequence"`` is eq. 1: the mean over sequences of each one's mean over its
            tokens; ``"token"`` is the mean over all tokens of the step.  Masked tokens stay in the
            denominator of both.

    Raises:
        ValueError: a value is not allowed; the message names it.
    """

    alpha: float = DEFAULT_ALPHA
    beta: float = DEFAULT_BETA
    clip_low: float = 0.2
    clip_high: float = 0.2
    normaliser: LossNormaliser = "sequence"

    def __post_init__(self) -> None:
        check_band(self.alpha, self.beta)
        if not 0.0 < self.clip_low < 1.0:
            raise ValueError(f"clip_low = {self.clip_low}: must be between 0 and 1")
        if self.clip_high <= 0.0:
            raise ValueError(f"clip_high = {self.clip_high}: must be above 0")
        if self.normaliser not in get_args(LossNormaliser):
            raise ValueError(
                f"loss normaliser {self.normaliser!r}: allowed are {get_args(LossNormaliser)}"
            )


def icepop_loss(logprobs: Tensor, microbatch: Microbatch, options: IcePopLossOptions) -> LossResult:
    """The negated objective of one microbatch.

    Args:
        logprobs: float [1, T], log pi_train of each label, with gradient.
        microbatch: the same row.
        options: band, clip, normaliser.

    Returns:
        See ``LossResult``; metrics hold ``loss_sum``, ``count``, ``tokens`` and ``discrepancy``
        (the sums of ``icepop_core.discrepancy_sums``).
    """
    old_logprobs = logprobs.detach()
    behaviour_logprobs = microbatch["behaviour_logprobs"]
    icepop = icepop_weights(
        old_logprobs, behaviour_logprobs, alpha=options.alpha, beta=options.beta
    )
    per_token = policy_loss(
        logprobs,
        old_logprobs,
        microbatch["advantages"],
        icepop.weights,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
    )
    loss_sum, count, metrics = _normalise(per_token, microbatch, options.normaliser)
    metrics["discrepancy"] = discrepancy_sums(
        old_logprobs, behaviour_logprobs, icepop, microbatch["loss_mask"] > 0
    )
    return loss_sum, count, metrics


def supervised_loss(logprobs: Tensor, microbatch: Microbatch) -> LossResult:
    """-log p of the completions' tokens, mean over all tokens of the step: teaching by example.

    Advantages, behaviour log-probs and versions of the row are not used.
    """
    return _normalise(-logprobs, microbatch, "token")


def _normalise(per_token: Tensor, microbatch: Microbatch, normaliser: LossNormaliser) -> LossResult:
    """Sum a loss per token [1, T] and count what it is to be divided by."""
    mask = microbatch["loss_mask"]
    tokens = mask.sum()
    if normaliser == "sequence":
        sequence_ids = microbatch["sequence_ids"]
        sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
        ids = torch.where(sequence_ids == NO_SEQUENCE, sequences, sequence_ids)[0]
        lengths = mask.new_zeros(sequences + 1).index_add_(0, ids, mask[0])
        token_weights = mask / lengths[ids].clamp(min=1.0)
        count = torch.tensor(sequences, dtype=torch.int, device=mask.device)
    else:
        token_weights = mask
        count = tokens.to(torch.int)
    # `where` and not a product: a position outside the mask may hold an infinite value.
    loss_sum = torch.where(mask > 0, per_token, 0.0).mul(token_weights).sum()
    metrics = {
        "loss_sum": float(loss_sum.detach()),
        "count": int(count),
        "tokens": int(tokens),
    }
    return loss_sum, count, metrics
