"""How far the two engines are apart, as plain numbers that add up over microbatches and ranks.

The curves of Ring-1T section 2.3.2: the share of masked tokens, mean and maximum of
|log p_train - log p_infer|, and KL(infer || train) estimated on the sampled tokens
(k1: unbiased, can be negative; k3: positive, low variance).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from icepop_core.mask import IcePopWeights

_MINIMA = ("ratio_min",)
_MAXIMA = ("ratio_max", "abs_diff_max")
_SUMS = (
    "tokens",
    "low_tokens",
    "high_tokens",
    "nonfinite_tokens",
    "ratio_sum",
    "abs_diff_sum",
    "kl_k1_sum",
    "kl_k3_sum",
)
_NOTHING = (
    dict.fromkeys(_SUMS, 0.0) | dict.fromkeys(_MINIMA, math.inf) | dict.fromkeys(_MAXIMA, -math.inf)
)


def discrepancy_sums(
    train_logprobs: Tensor, infer_logprobs: Tensor, icepop: IcePopWeights, valid: Tensor
) -> dict[str, float]:
    """Sums and extremes over the tokens where ``valid`` is true.

    Args:
        train_logprobs, infer_logprobs: as given to ``icepop_weights``, any equal shape.
        icepop: its result.
        valid: bool, same shape: the sampled tokens.

    Returns:
        ``tokens``, ``low_tokens``, ``high_tokens``, ``nonfinite_tokens``; and over the finite
        tokens ``ratio_sum/min/max`` (k), ``abs_diff_sum/max`` and ``kl_k1_sum``, ``kl_k3_sum``.
    """
    finite = valid & ~icepop.nonfinite
    log_ratio = (train_logprobs.detach() - infer_logprobs.detach())[finite].double()
    ratio = log_ratio.exp()
    some = log_ratio.numel() > 0
    return {
        "tokens": float(valid.sum()),
        "low_tokens": float((icepop.low & valid).sum()),
        "high_tokens": float((icepop.high & valid).sum()),
        "nonfinite_tokens": float((icepop.nonfinite & valid).sum()),
        "ratio_sum": float(ratio.sum()),
        "ratio_min": float(ratio.min()) if some else math.inf,
        "ratio_max": float(ratio.max()) if some else -math.inf,
        "abs_diff_sum": float(log_ratio.abs().sum()),
        "abs_diff_max": float(log_ratio.abs().max()) if some else -math.inf,
        "kl_k1_sum": float(-log_ratio.sum()),
        "kl_k3_sum": float(torch.sum(ratio - 1.0 - log_ratio)),
    }


def merge_discrepancy(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Add up what ``discrepancy_sums`` gave for disjoint tokens; of no part: no token."""
    merged = dict(_NOTHING)
    for part in parts:
        for name, value in part.items():
            if name in _MINIMA:
                merged[name] = min(merged[name], value)
            elif name in _MAXIMA:
                merged[name] = max(merged[name], value)
            else:
                merged[name] += value
    return merged


def summarize_discrepancy(sums: dict[str, float]) -> dict[str, float]:
    """Shares and means for a log; nan where there is no token to speak of.

    Returns:
        ``masked_fraction`` (of all tokens), ``masked_low_fraction``, ``masked_high_fraction``,
        ``nonfinite_tokens``, ``ratio_min/mean/max``, ``logprob_diff_mean/max``, ``kl_k1/k3``.
    """
    tokens = sums["tokens"]
    finite = tokens - sums["nonfinite_tokens"]
    masked = sums["low_tokens"] + sums["high_tokens"] + sums["nonfinite_tokens"]

    def per(name: str, count: float) -> float:
        return sums[name] / count if count else math.nan

    return {
        "masked_fraction": masked / tokens if tokens else math.nan,
        "masked_low_fraction": per("low_tokens", tokens),
        "masked_high_fraction": per("high_tokens", tokens),
        "nonfinite_tokens": sums["nonfinite_tokens"],
        "ratio_min": sums["ratio_min"] if finite else math.nan,
        "ratio_mean": per("ratio_sum", finite),
        "ratio_max": sums["ratio_max"] if finite else math.nan,
        "logprob_diff_mean": per("abs_diff_sum", finite),
        "logprob_diff_max": sums["abs_diff_max"] if finite else math.nan,
        "kl_k1": per("kl_k1_sum", finite),
        "kl_k3": per("kl_k3_sum", finite),
    }
