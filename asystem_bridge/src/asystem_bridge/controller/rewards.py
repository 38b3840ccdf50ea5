"""Score complete groups and turn rewards into advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asystem_bridge.errors import BridgeError
from asystem_bridge.tasks.base import Task
from icepop_core import group_advantages
from megatron_c3po.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class RewardSummary:
    """Over the groups of one step; mean and std are nan when there is none.

    Attributes:
        groups_with_signal: groups whose rewards differ; the others have no gradient.
    """

    mean: float
    std: float
    groups_with_signal: int


def score_groups(
    groups: Sequence[Sequence[Rollout]], task: Task, decode: Callable[[list[int]], str]
) -> RewardSummary:
    """Set ``reward`` and ``advantage`` of every rollout.

    Raises:
        BridgeError: the task's reward raised, or is not a finite number.
    """
    rewards = []
    with_signal = 0
    for group in groups:
        scores = [_score(rollout, task, decode(rollout.token_ids)) for rollout in group]
        for rollout, score, advantage in zip(group, scores, group_advantages(scores), strict=True):
            rollout.reward, rollout.advantage = score, advantage
        with_signal += max(scores) > min(scores)
        rewards += scores
    if not rewards:
        return RewardSummary(mean=math.nan, std=math.nan, groups_with_signal=0)
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return RewardSummary(mean=mean, std=math.sqrt(variance), groups_with_signal=with_signal)


def _score(rollout: Rollout, task: Task, completion: str) -> float:
    try:
        score = float(task.reward(completion, rollout.record))
    except Exception as error:
        raise BridgeError(
            f"the reward of {type(task).__name__} raised {type(error).__name__}: {error}; "
            f"rollout {rollout.uid}, completion {completion!r}, record {rollout.record!r}"
        ) from error
    if not math.isfinite(score):
        raise BridgeError(
            f"the reward of {type(task).__name__} is {score} for rollout {rollout.uid}, completion "
            f"{completion!r}: it must be a finite number"
        )
    return score
