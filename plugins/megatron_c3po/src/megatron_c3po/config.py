"""Options of C3PO++ (Ring-1T section 2.3.3, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BudgetCount = Literal["completed", "generated"]


@dataclass(frozen=True, kw_only=True)
class C3POConfig:
    """Token budget, pool and groups.

    Attributes:
        token_budget: tokens that end an iteration (paper: Phi).  No default: it sets the batch.
        pool_capacity: rollouts decoded at once (paper: Omega_infer).
        max_retention: a rollout older than this many iterations is purged (paper: sigma).
        group_size: completions per prompt (paper: 8 in the Ring-1T runs, section 3).
        max_new_tokens: bound on one completion.
        budget_counts: ``"completed"`` counts |o| when a group is released (algorithm 1);
            ``"generated"`` counts every token sampled in the iteration (the paper's text).
        max_restarts: how often a purged rollout begins anew before its group is dropped.
            The paper is silent; once is this project's choice.
        seed: of every request's sampler.

    Raises:
        ValueError: a size is impossible; the message names it, what it is and what is allowed.
    """

    token_budget: int
    pool_capacity: int = 32
    max_retention: int = 4
    group_size: int = 8
    max_new_tokens: int = 64
    budget_counts: BudgetCount = "completed"
    max_restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("token_budget", "pool_capacity", "group_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("max_retention", "max_restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.pool_capacity % self.group_size:
            raise ValueError(
                f"pool_capacity = {self.pool_capacity} with group_size = {self.group_size}: "
                "the capacity must be a multiple of the group size"
            )
        if self.token_budget < self.max_new_tokens:
            raise ValueError(
                f"token_budget = {self.token_budget} with max_new_tokens = {self.max_new_tokens}: "
                "the budget must hold at least one whole rollout"
            )
        if self.budget_counts not in get_args(BudgetCount):
            raise ValueError(
                f"budget_counts = {self.budget_counts!r}: allowed are {get_args(BudgetCount)}"
            )
