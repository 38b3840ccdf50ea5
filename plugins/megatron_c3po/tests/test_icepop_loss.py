"""The packed loss against a loop over sequences and tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_c3po.loss import IcePopLossOptions, LossNormaliser, icepop_loss, supervised_loss
from megatron_c3po.microbatch import Microbatch, build_microbatch
from megatron_c3po.rollout import Rollout

VOCABULARY = 7
PROMPT_TOKENS = 2
ADVANTAGES = [1.2, -0.7, 0.4, 0.0]
LENGTHS = [5, 3, 1, 4]


@pytest.fixture
def logits() -> list[Tensor]:
    """Per sequence: float64 [prompt + completion, vocabulary]."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(
            PROMPT_TOKENS + n, VOCABULARY, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for n in LENGTHS
    ]


@pytest.fixture
def rollouts(logits: list[Tensor]) -> list[Rollout]:
    """The engine's log-probs are off by amounts that fall below, into and above the band."""
    generator = torch.Generator().manual_seed(6)
    offsets = [0.0, math.log(3.0), -math.log(4.9), -math.log(5.5), math.log(1.9)]
    made = []
    for i, (own, advantage) in enumerate(zip(logits, ADVANTAGES, strict=True)):
        ids = torch.randint(VOCABULARY, (own.shape[0],), generator=generator).tolist()
        train = own.detach().log_softmax(-1)
        logprobs = [
            float(train[t - 1, ids[t]]) + offsets[t % len(offsets)]
            for t in range(PROMPT_TOKENS, len(ids))
        ]
        made.append(
            Rollout(
                uid=f"g/{i}", group_uid="g", prompt_ids=ids[:PROMPT_TOKENS], max_new_tokens=8,
                token_ids=ids[PROMPT_TOKENS:], logprobs=logprobs, versions=[0] * len(logprobs),
                advantage=advantage,
            )
        )  # fmt: skip
    made[0].logprobs[2] = -math.inf  # the engine gave the token no probability at all
    return made


def naive_objective(
    logits: list[Tensor], rollouts: list[Rollout], normaliser: LossNormaliser
) -> Tensor:
    """Eq. 1 as it is written: one token at a time."""
    per_sequence, every_token = [], []
    for own, rollout in zip(logits, rollouts, strict=True):
        terms = []
        for t, (token, infer) in enumerate(zip(rollout.token_ids, rollout.logprobs, strict=True)):
            log_p = own[PROMPT_TOKENS + t - 1].log_softmax(-1)[token]
            k = math.exp(float(log_p.detach()) - infer) if math.isfinite(infer) else math.inf
            weight = k if 0.5 <= k <= 5.0 else 0.0
            r = torch.exp(log_p - log_p.detach())
            unclipped = r * rollout.advantage
            clipped = torch.clamp(r, 0.8, 1.2) * rollout.advantage
            terms.append(weight * torch.minimum(unclipped, clipped))
        per_sequence.append(torch.stack(terms).sum() / len(rollout.token_ids))
        every_token += terms
    if normaliser == "sequence":
        return torch.stack(per_sequence).sum() / len(rollouts)
    return torch.stack(every_token).sum() / len(every_token)


def packed_logprobs(logits: list[Tensor], microbatch: Microbatch) -> Tensor:
    """float32 [1, T], as Megatron's output layer gives it for a row of these sequences."""
    padding = microbatch["tokens"].shape[1] - sum(own.shape[0] for own in logits)
    packed = torch.cat([*logits, torch.zeros(padding, VOCABULARY, dtype=torch.float64)])
    logprobs = packed.log_softmax(-1).gather(-1, microbatch["labels"][0, :, None])
    return logprobs[:, 0].float()[None]


def gradients(loss: Tensor, logits: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("normaliser", ["sequence", "token"])
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[2], [0, 3], [], [1]]])
def test_objective_and_gradient_equal_the_naive_loop_however_packed(
    logits: list[Tensor],
    rollouts: list[Rollout],
    normaliser: LossNormaliser,
    rows: list[list[int]],
) -> None:
    options = IcePopLossOptions(normaliser=normaliser)
    expected = -naive_objective(logits, rollouts, normaliser)
    expected_gradients = gradients(expected, logits)

    loss_sum, count = torch.zeros(()), 0
    for row in rows:
        microbatch = build_microbatch([rollouts[i] for i in row], length_multiple=4)
        own_sum, own_count, metrics = icepop_loss(
            packed_logprobs([logits[i] for i in row], microbatch), microbatch, options
        )
        assert metrics["loss_sum"] == pytest.approx(float(own_sum.detach()))
        assert metrics["count"] == int(own_count)
        loss_sum, count = loss_sum + own_sum, count + int(own_count)
    loss = loss_sum / count

    assert any(g.abs().max() > 1e-3 for g in expected_gradients)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    for ours, naive in zip(gradients(loss, logits), expected_gradients, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-7)


def test_masked_tokens_have_no_gradient_but_stay_in_the_denominator(
    logits: list[Tensor], rollouts: list[Rollout]
) -> None:
    kept = rollouts[1]
    kept.logprobs = [
        float(logits[1].detach()[PROMPT_TOKENS - 1 + t].log_softmax(-1)[token])
        for t, token in enumerate(kept.token_ids)
    ]
    microbatch = build_microbatch([kept])
    everything, count, _ = icepop_loss(
        packed_logprobs([logits[1]], microbatch), microbatch, IcePopLossOptions()
    )
    assert float(everything.detach()) == pytest.approx(-kept.advantage, rel=1e-6)

    kept.logprobs[1] += 10.0  # far below the band
    microbatch = build_microbatch([kept])
    masked, masked_count, metrics = icepop_loss(
        packed_logprobs([logits[1]], microbatch), microbatch, IcePopLossOptions()
    )
    assert float(masked.detach()) == pytest.approx(-kept.advantage * 2 / 3, rel=1e-6)
    assert int(masked_count) == int(count) == 1
    assert metrics["discrepancy"]["low_tokens"] == 1
    [gradient] = gradients(masked, [logits[1]])
    position_of_masked = PROMPT_TOKENS + 1 - 1
    assert gradient[position_of_masked].abs().max() == 0
    assert gradient[position_of_masked - 1].abs().max() > 0


def test_discrepancy_counts_only_sampled_tokens(
    logits: list[Tensor], rollouts: list[Rollout]
) -> None:
    microbatch = build_microbatch(rollouts, length_multiple=8)
    _, _, metrics = icepop_loss(
        packed_logprobs(logits, microbatch), microbatch, IcePopLossOptions()
    )
    assert metrics["discrepancy"]["tokens"] == metrics["tokens"] == sum(LENGTHS)
    assert metrics["discrepancy"]["nonfinite_tokens"] == 1


def test_an_empty_row_gives_a_zero_that_can_be_differentiated() -> None:
    microbatch = build_microbatch([])
    logprobs = torch.full((1, 1), -1.0, requires_grad=True)
    loss_sum, count, metrics = icepop_loss(logprobs, microbatch, IcePopLossOptions())
    loss_sum.backward()
    assert float(loss_sum.detach()) == 0.0
    assert int(count) == 0
    assert metrics["discrepancy"]["tokens"] == 0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0]]


def test_supervised_loss_is_the_mean_negative_log_prob_of_completions(
    logits: list[Tensor], rollouts: list[Rollout]
) -> None:
    microbatch = build_microbatch(rollouts, length_multiple=4)
    loss_sum, count, metrics = supervised_loss(packed_logprobs(logits, microbatch), microbatch)
    naive = [
        -own.log_softmax(-1)[PROMPT_TOKENS + t - 1, token]
        for own, rollout in zip(logits, rollouts, strict=True)
        for t, token in enumerate(rollout.token_ids)
    ]
    assert int(count) == metrics["tokens"] == len(naive)
    torch.testing.assert_close((loss_sum / count).double(), torch.stack(naive).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2.0}, "alpha"),
        ({"clip_low": 0.0}, "clip_low = 0.0"),
        ({"clip_high": -1.0}, "clip_high = -1.0"),
        ({"normaliser": "batch"}, "'batch'.*'sequence', 'token'"),
    ],
)
def test_refuses_impossible_options(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IcePopLossOptions(**changes)
