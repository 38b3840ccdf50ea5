"""IcePop against a float64 implementation of the paper's equations, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icepop_core import (
    discrepancy_sums,
    group_advantages,
    icepop_weights,
    merge_discrepancy,
    policy_loss,
    summarize_discrepancy,
)

LOGPROBS = st.floats(-30.0, 0.0)


def naive_weight(train: float, infer: float, alpha: float, beta: float) -> float:
    k = math.exp(train) / math.exp(infer)
    return k if alpha <= k <= beta else 0.0


def naive_objective(new: float, old: float, advantage: float, weight: float, eps: float) -> float:
    r = math.exp(new) / math.exp(old)
    return weight * min(r * advantage, min(max(r, 1 - eps), 1 + eps) * advantage)


@given(st.lists(st.tuples(LOGPROBS, LOGPROBS), min_size=1, max_size=40))
@settings(deadline=None)
def test_weights_equal_the_naive_reference(pairs: list[tuple[float, float]]) -> None:
    train, infer = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    log_ratio = train - infer
    edges = torch.tensor([math.log(0.5), math.log(5.0)], dtype=torch.float64)
    if (log_ratio[:, None] - edges).abs().min() < 1e-12:
        return  # on a bound the naive quotient rounds either way; the bounds have their own test
    expected = [naive_weight(t, i, 0.5, 5.0) for t, i in pairs]
    assert icepop_weights(train, infer).weights.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_bounds_are_inclusive(dtype: torch.dtype) -> None:
    bounds = torch.tensor([0.5, 5.0], dtype=dtype)
    zeros = torch.zeros(2, dtype=dtype)
    assert icepop_weights(bounds.log(), zeros).weights.tolist() == pytest.approx([0.5, 5.0])
    outside = bounds * torch.tensor([1 - 1e-5, 1 + 1e-5], dtype=dtype)
    result = icepop_weights(outside.log(), zeros)
    assert result.weights.tolist() == [0.0, 0.0]
    assert result.low.tolist() == [True, False]
    assert result.high.tolist() == [False, True]


def test_the_ratio_in_the_band_is_neither_clamped_nor_set_to_one() -> None:
    k = torch.tensor([0.6, 1.0, 4.9])
    assert icepop_weights(k.log(), torch.zeros(3)).weights.tolist() == pytest.approx(k.tolist())


def test_nonfinite_tokens_get_no_weight_and_no_gradient() -> None:
    inf = math.inf
    train = torch.tensor([-inf, -1.0, -inf, math.nan, -1.0], requires_grad=True)
    infer = torch.tensor([-1.0, -inf, -inf, -1.0, -1.0])
    result = icepop_weights(train, infer)
    assert result.weights.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert result.nonfinite.tolist() == [True, True, True, True, False]
    loss = policy_loss(
        train, train.detach(), torch.ones(5), result.weights, clip_low=0.2, clip_high=0.2
    )
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0, 0.0, 0.0, -1.0]
    assert train.grad is not None
    assert train.grad.tolist() == [0.0, 0.0, 0.0, 0.0, -1.0]


def test_all_tokens_masked_is_a_zero_loss_with_zero_gradient() -> None:
    train = torch.full((7,), -0.1, requires_grad=True)
    result = icepop_weights(train, torch.full((7,), -9.0))
    assert result.high.all()
    loss = policy_loss(
        train, train.detach(), torch.ones(7), result.weights, clip_low=0.2, clip_high=0.2
    ).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert train.grad is not None
    assert train.grad.abs().sum().item() == 0.0


@given(st.lists(st.tuples(LOGPROBS, st.floats(-1.0, 1.0), st.floats(-3, 3), LOGPROBS), min_size=1))
@settings(deadline=None)
def test_objective_equals_the_naive_reference(
    tokens: list[tuple[float, float, float, float]],
) -> None:
    old = torch.tensor([t[0] for t in tokens], dtype=torch.float64)
    new = old + torch.tensor([t[1] for t in tokens], dtype=torch.float64)
    advantages = torch.tensor([t[2] for t in tokens], dtype=torch.float64)
    infer = torch.tensor([t[3] for t in tokens], dtype=torch.float64)
    weights = icepop_weights(old, infer).weights
    loss = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2)
    expected = [
        -naive_objective(*values, 0.2)
        for values in zip(
            new.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True
        )
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_gradient_is_the_weighted_advantage_inside_the_clip_range() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    infer = torch.tensor([-1.1, -2.4, -9.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    weights = icepop_weights(logprobs, infer).weights
    policy_loss(
        logprobs, logprobs.detach(), advantages, weights, clip_low=0.2, clip_high=0.2
    ).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.1), 2 * math.exp(0.4), 0.0])


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 5.0), (1.5, 5.0), (0.5, 0.9), (0.5, math.inf)])
def test_an_impossible_band_is_refused(alpha: float, beta: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        icepop_weights(torch.zeros(1), torch.zeros(1), alpha=alpha, beta=beta)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        icepop_weights(torch.zeros(2), torch.zeros(3))


def test_discrepancy_adds_up_over_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    infer = -4 * torch.rand(200, generator=generator, dtype=torch.float64)
    train = infer + torch.randn(200, generator=generator, dtype=torch.float64)
    infer[3] = -math.inf
    valid = torch.rand(200, generator=generator) < 0.7
    valid[3] = True

    def sums(part: slice) -> dict[str, float]:
        t, i, v = train[part], infer[part], valid[part]
        return discrepancy_sums(t, i, icepop_weights(t, i), v)

    whole = sums(slice(None))
    merged = merge_discrepancy([sums(slice(0, 50)), sums(slice(50, 51)), sums(slice(51, 200))])
    assert merged == pytest.approx(whole)

    log_k = [t - i for t, i, v in zip(train, infer, valid, strict=True) if v and i > -math.inf]
    k = [math.exp(x) for x in log_k]
    summary = summarize_discrepancy(whole)
    tokens = int(valid.sum())
    assert summary["masked_fraction"] == pytest.approx(
        (sum(not 0.5 <= x <= 5.0 for x in k) + 1) / tokens
    )
    assert summary["masked_high_fraction"] == pytest.approx(sum(x > 5.0 for x in k) / tokens)
    assert summary["ratio_mean"] == pytest.approx(sum(k) / len(k))
    assert summary["logprob_diff_max"] == pytest.approx(max(abs(x) for x in log_k))
    assert summary["kl_k1"] == pytest.approx(-sum(log_k) / len(k))
    assert summary["kl_k3"] == pytest.approx(
        sum(x - 1 - y for x, y in zip(k, log_k, strict=True)) / len(k)
    )
    assert summary["nonfinite_tokens"] == 1


def test_no_token_at_all_has_no_mean() -> None:
    empty = discrepancy_sums(
        torch.zeros(3), torch.zeros(3), icepop_weights(torch.zeros(3), torch.zeros(3)),
        torch.zeros(3, dtype=torch.bool),
    )  # fmt: skip
    assert empty == merge_discrepancy([]) == merge_discrepancy([empty, empty])
    summary = summarize_discrepancy(empty)
    assert summary.pop("nonfinite_tokens") == 0.0
    assert all(math.isnan(value) for value in summary.values())


def test_group_advantages_match_torch() -> None:
    rewards = [0.0, 1.0, 1.0, 0.25]
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-4)
    assert group_advantages(rewards) == pytest.approx(expected.tolist())
    assert group_advantages([0.7] * 8) == [0.0] * 8
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages([1.0])
