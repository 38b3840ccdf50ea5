"""The figures of one iteration, under the names that the metrics file, TensorBoard and plots use.

The quantities are those that the Ring-1T report (section 2.3) plots for IcePop: gradient norm,
|log p_train - log p_infer|, KL(infer || train), share masked, reward; and those that make C3PO++
visible: the token budget, resumed and purged rollouts, retention.  Left out: the entropy of masked
tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any

PHASES = ("rollout", "reward", "train", "publish", "update", "canary", "checkpoint")
"""The parts of an iteration, in the order in which they run."""

FAILURE_DISCREPANCY = 0.05
"""A mean |log p_train - log p_infer| above it preceded failures (Ring-1T report, section 2.3)."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One iteration: rollouts, one optimizer step, one weight update.

    ``k`` is p_train / p_infer of a sampled token and ``|dlogp|`` its logarithm's size, in nats.
    A figure that does not exist (no rollout was trained) is ``nan``, never 0.

    Attributes:
        step: from 1.
        policy_version: of the weights that the engine holds after this step.
        reward_mean, reward_std: over the trained rollouts, on the task's own scale.
        groups_trained, rollouts_trained: what entered the optimizer step.
        groups_with_signal: trained groups whose rewards differ; the others have no advantage.
        loss, grad_norm, learning_rate: of the optimizer step; the norm is that before clipping.
        masked_fraction: share of the trained tokens that the IcePop mask zeroes.
        masked_low_fraction, masked_high_fraction: of them, with k < alpha and with k > beta.
        nonfinite_tokens: trained tokens whose k is not finite (masked too).
        ratio_min, ratio_mean, ratio_max: of k over the trained tokens.
        logprob_diff_mean, logprob_diff_max: of |dlogp| over the trained tokens.
        kl_k1, kl_k3: estimates of KL(infer || train): mean of -log k, and of k - 1 - log k.
        canary_max_abs_logprob_diff: trainer against engine on fixed tokens and equal weights.
        canary_tolerance: the loop stops above it.
        token_budget: that ends an iteration (paper: Phi).
        budget_used_tokens, budget_overshoot_tokens: counted against it, and beyond it.
        generated_tokens: sampled in this iteration.
        trained_tokens: completion tokens in the optimizer step.
        resumed_tokens: sampled in earlier iterations and kept.
        purged_tokens, dropped_tokens: lost with rollouts begun anew, and with groups given up.
        reprefilled_tokens: prefilled again so that kept rollouts could go on.
        rollouts_resumed, rollouts_purged, groups_dropped: in this iteration.
        groups_waiting: with finished members whose siblings are still under way.
        pool_size: rollouts under way when the iteration ended.
        decode_steps: of the engine.
        completion_length_mean: tokens per trained completion.
        retention_histogram: {iterations a trained rollout outlived unfinished: rollouts}.
        versions_per_rollout_histogram: {policy versions in a trained rollout: rollouts}.
        phase_s: seconds per phase; keys from ``PHASES``, a phase that did not run is absent.

    Raises:
        ValueError: a phase is unknown, or a count is negative.
    """

    step: int
    policy_version: int

    reward_mean: float
    reward_std: float
    groups_trained: int
    groups_with_signal: int
    rollouts_trained: int

    loss: float
    grad_norm: float
    learning_rate: float

    masked_fraction: float
    masked_low_fraction: float
    masked_high_fraction: float
    nonfinite_tokens: int

    ratio_min: float
    ratio_mean: float
    ratio_max: float
    logprob_diff_mean: float
    logprob_diff_max: float
    kl_k1: float
    kl_k3: float
    canary_max_abs_logprob_diff: float
    canary_tolerance: float

    token_budget: int
    budget_used_tokens: int
    budget_overshoot_tokens: int
    generated_tokens: int
    trained_tokens: int
    resumed_tokens: int
    purged_tokens: int
    dropped_tokens: int
    reprefilled_tokens: int

    rollouts_resumed: int
    rollouts_purged: int
    groups_dropped: int
    groups_waiting: int
    pool_size: int
    decode_steps: int
    completion_length_mean: float
    retention_histogram: dict[int, int]
    versions_per_rollout_histogram: dict[int, int]

    phase_s: dict[str, float]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.phase_s) - set(PHASES))
        if unknown:
            raise ValueError(f"phase_s has unknown phases {unknown}: allowed are {PHASES}")
        for name, kind in _field_types().items():
            value = getattr(self, name)
            if kind is int and value < 0:
                raise ValueError(f"{name} = {value}: a count must not be negative")

    @property
    def step_s(self) -> float:
        """Seconds of all phases together."""
        return sum(self.phase_s.values())

    def to_json(self) -> str:
        """One line of strict JSON; ``nan`` and infinities are strings ("nan", "inf", "-inf")."""
        encoded = {
            name: _encode(kind, getattr(self, name)) for name, kind in _field_types().items()
        }
        return json.dumps(encoded, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        """The record that ``to_json`` wrote.

        Raises:
            ValueError: no JSON object, or keys are unknown or missing, or a value has a wrong type;
                the message names them.
        """
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError(f"a step record is a JSON object, not {type(data).__name__}")
        types = _field_types()
        if unknown := sorted(set(data) - set(types)):
            raise ValueError(f"a step record has no fields {unknown}")
        if missing := [name for name in types if name not in data]:
            raise ValueError(f"the step record lacks the fields {missing}")
        return cls(**{name: _decode(name, kind, data[name]) for name, kind in types.items()})


@cache
def _field_types() -> dict[str, Any]:
    hints = typing.get_type_hints(StepRecord)
    return {field.name: hints[field.name] for field in dataclasses.fields(StepRecord)}


def _encode(kind: Any, value: Any) -> Any:
    if kind is int:
        return int(value)
    if kind is float:
        number = float(value)
        return number if math.isfinite(number) else str(number)
    _, value_kind = typing.get_args(kind)
    return {str(key): _encode(value_kind, value[key]) for key in sorted(value, key=_order)}


def _order(key: int | str) -> int:
    return PHASES.index(key) if isinstance(key, str) else key


def _decode(name: str, kind: Any, value: Any) -> Any:
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if value in ("nan", "inf", "-inf"):
            return float(value)
    if isinstance(value, dict) and kind not in (int, float):
        key_kind, value_kind = typing.get_args(kind)
        return {key_kind(key): _decode(name, value_kind, item) for key, item in value.items()}
    raise ValueError(f"{name} = {value!r}: must be of type {getattr(kind, '__name__', kind)}")
