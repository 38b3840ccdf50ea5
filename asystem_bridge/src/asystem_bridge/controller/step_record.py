"""Put the figures of one step together, from the pool, the rewards and the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from asystem_bridge.controller.rewards import RewardSummary
from asystem_bridge.controller.trainer_group import TrainResult
from asystem_bridge.report.metrics import StepRecord
from icepop_core import merge_discrepancy, summarize_discrepancy
from megatron_c3po.pool import CollectStats
from megatron_c3po.rollout import Rollout

NOTHING_TRAINED = TrainResult(
    loss=math.nan,
    grad_norm=math.nan,
    learning_rate=math.nan,
    trained_tokens=0,
    discrepancy=merge_discrepancy([]),
)


def step_record(
    *,
    step: int,
    policy_version: int,
    stats: CollectStats,
    token_budget: int,
    rollouts: Sequence[Rollout],
    rewards: RewardSummary,
    trained: TrainResult,
    canary_difference: float,
    canary_tolerance: float,
    phase_s: Mapping[str, float],
) -> StepRecord:
    """``rollouts`` are those that were trained; the other arguments are each part's own result."""
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    discrepancy = summarize_discrepancy(trained.discrepancy)
    return StepRecord(
        step=step,
        policy_version=policy_version,
        reward_mean=rewards.mean,
        reward_std=rewards.std,
        groups_trained=stats.groups_released,
        groups_with_signal=rewards.groups_with_signal,
        rollouts_trained=len(rollouts),
        loss=trained.loss,
        grad_norm=trained.grad_norm,
        learning_rate=trained.learning_rate,
        masked_fraction=discrepancy["masked_fraction"],
        masked_low_fraction=discrepancy["masked_low_fraction"],
        masked_high_fraction=discrepancy["masked_high_fraction"],
        nonfinite_tokens=int(discrepancy["nonfinite_tokens"]),
        ratio_min=discrepancy["ratio_min"],
        ratio_mean=discrepancy["ratio_mean"],
        ratio_max=discrepancy["ratio_max"],
        logprob_diff_mean=discrepancy["logprob_diff_mean"],
        logprob_diff_max=discrepancy["logprob_diff_max"],
        kl_k1=discrepancy["kl_k1"],
        kl_k3=discrepancy["kl_k3"],
        canary_max_abs_logprob_diff=canary_difference,
        canary_tolerance=canary_tolerance,
        token_budget=token_budget,
        budget_used_tokens=stats.budget_used_tokens,
        budget_overshoot_tokens=stats.budget_overshoot_tokens,
        generated_tokens=stats.generated_tokens,
        trained_tokens=stats.trained_tokens,
        resumed_tokens=stats.resumed_tokens,
        purged_tokens=stats.purged_tokens,
        dropped_tokens=stats.dropped_tokens,
        reprefilled_tokens=stats.reprefilled_tokens,
        rollouts_resumed=stats.rollouts_resumed,
        rollouts_purged=stats.rollouts_purged,
        groups_dropped=stats.groups_dropped,
        groups_waiting=stats.groups_waiting,
        pool_size=stats.pool_size,
        decode_steps=stats.decode_steps,
        completion_length_mean=sum(lengths) / len(lengths) if lengths else math.nan,
        retention_histogram=stats.retention_histogram,
        versions_per_rollout_histogram=stats.versions_per_rollout_histogram,
        phase_s=dict(phase_s),
    )
