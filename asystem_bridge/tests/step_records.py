"""Step records for the tests of the report: plausible, different in every step, reproducible."""

from __future__ import annotations

import random
from typing import Any

from asystem_bridge.report.metrics import StepRecord


def make_record(step: int, **changes: Any) -> StepRecord:
    """The record of one step; ``changes`` replace fields."""
    rng = random.Random(step)
    low, high = rng.uniform(0, 0.002), rng.uniform(0, 0.001)
    discrepancy = 0.002 * rng.uniform(0.8, 1.2)
    generated = rng.randint(900, 1500)
    fields: dict[str, Any] = {
        "step": step,
        "policy_version": step,
        "reward_mean": 0.3 + 0.001 * step + rng.uniform(-0.05, 0.05),
        "reward_std": 0.2,
        "groups_trained": 4,
        "groups_with_signal": 3,
        "rollouts_trained": 16,
        "loss": rng.gauss(0, 0.02),
        "grad_norm": 0.5,
        "learning_rate": 1e-5,
        "masked_fraction": low + high,
        "masked_low_fraction": low,
        "masked_high_fraction": high,
        "nonfinite_tokens": 0,
        "ratio_min": 0.46,
        "ratio_mean": 1.0,
        "ratio_max": 1.39,
        "logprob_diff_mean": discrepancy,
        "logprob_diff_max": discrepancy * rng.uniform(10, 20),
        "kl_k1": 1e-4,
        "kl_k3": 1.1e-4,
        "canary_max_abs_logprob_diff": 3e-6 * rng.uniform(0.5, 2),
        "canary_tolerance": 1e-3,
        "token_budget": 1200,
        "budget_used_tokens": 1200 + rng.randint(0, 200),
        "budget_overshoot_tokens": rng.randint(0, 200),
        "generated_tokens": generated,
        "trained_tokens": generated + rng.randint(-200, 200),
        "resumed_tokens": rng.randint(0, 400),
        "purged_tokens": rng.choice([0, 60]),
        "dropped_tokens": 7,
        "reprefilled_tokens": 100,
        "rollouts_resumed": 5,
        "rollouts_purged": 1,
        "groups_dropped": 0,
        "groups_waiting": 2,
        "pool_size": 16,
        "decode_steps": 130,
        "completion_length_mean": 42.0,
        "retention_histogram": {0: 12, 1: 3, 2: 1},
        "versions_per_rollout_histogram": {1: 12, 3: 4},
        "phase_s": {"rollout": rng.uniform(5, 9), "train": rng.uniform(10, 13), "canary": 0.4},
    }
    return StepRecord(**{**fields, **changes})


def make_records(steps: int) -> list[StepRecord]:
    """Steps 1 to ``steps``."""
    return [make_record(step) for step in range(1, steps + 1)]
