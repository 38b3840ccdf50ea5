"""The weight of a token, M(k; alpha, beta): Ring-1T eq. 2 and 3.

    k = pi_train(token) / pi_infer(token)      both engines holding the same weights
    M(k) = k   if alpha <= k <= beta, else 0   both bounds inclusive

What lies in the band is weighted by k itself, never clamped; what lies outside gets no gradient.
The comparison is made in log space and only what is kept is exponentiated, so that an extreme
token gives a zero and not an inf or a NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_ALPHA = 0.5
"""Ring-1T section 2.3.2 and figure 13: [0.5, 5.0] is stable, [0.5, 2.0] is not."""
DEFAULT_BETA = 5.0


class IcePopWeights(NamedTuple):
    """The result for tokens of any shape; the last three are disjoint and hold what was masked.

    Attributes:
        weights: M(k), detached, the dtype of the inputs.
        low: True where k < alpha.
        high: True where k > beta.
        nonfinite: True where k is not a number or infinite, so that it says nothing.
    """

    weights: Tensor
    low: Tensor
    high: Tensor
    nonfinite: Tensor


def check_band(alpha: float, beta: float) -> None:
    """Refuse a band that could not hold k = 1, the value of two engines that agree.

    Raises:
        ValueError: naming both bounds.
    """
    if not 0.0 < alpha <= 1.0 <= beta < math.inf:
        raise ValueError(
            f"icepop band [alpha, beta] = [{alpha}, {beta}]: needs 0 < alpha <= 1 <= beta < inf "
            f"(the paper's band is [{DEFAULT_ALPHA}, {DEFAULT_BETA}])"
        )


def icepop_weights(
    train_logprobs: Tensor,
    infer_logprobs: Tensor,
    *,
    alpha: float = DEFAULT_ALPHA,
    beta: float = DEFAULT_BETA,
) -> IcePopWeights:
    """M(k) of every token.

    Args:
        train_logprobs: log pi_train(token | theta_old), any shape.
        infer_logprobs: log pi_infer(token) recorded when the token was sampled, same shape.
        alpha, beta: the band.

    Raises:
        ValueError: the shapes differ, or the band is impossible.
    """
    check_band(alpha, beta)
    if train_logprobs.shape != infer_logprobs.shape:
        raise ValueError(
            f"train_logprobs {tuple(train_logprobs.shape)} and infer_logprobs "
            f"{tuple(infer_logprobs.shape)} must have the same shape"
        )
    log_ratio = train_logprobs.detach() - infer_logprobs.detach()
    finite = torch.isfinite(log_ratio)
    low = finite & (log_ratio < math.log(alpha))
    high = finite & (log_ratio > math.log(beta))
    kept = finite & ~low & ~high
    weights = torch.where(kept, log_ratio, 0.0).exp() * kept
    return IcePopWeights(weights, low, high, ~finite)
