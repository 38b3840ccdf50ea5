"""The rollout pool of C3PO++: Ring-1T section 2.3.3, algorithm 1.

An iteration decodes until the token budget is used up.  What has ended goes to training; what has
not stays in the pool, keeps its tokens with their log-probs and policy versions, and is resumed
under the next policy.  A rollout that has been kept for too many iterations is purged.

Where the paper is silent: GRPO groups are released whole, so finished members wait for their
siblings and count in the iteration that releases the group; a purged rollout begins anew
``max_restarts`` times, then its whole group is dropped; the pool is refilled to its capacity
before every decode step, where the pseudo-code adds one prompt a step.

Left out: rewards and advantages, which the caller adds to the released groups.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_c3po.config import C3POConfig
from megatron_c3po.engine import Delta, RolloutEngine, Submission
from megatron_c3po.prompts import PromptSource
from megatron_c3po.rollout import Rollout


@dataclass(kw_only=True)
class CollectStats:
    """One iteration in numbers; every token that was sampled is in one of them.

    Attributes:
        budget_used_tokens: C of algorithm 1; ``budget_overshoot_tokens`` is what exceeds Phi.
        generated_tokens: sampled in this iteration.
        trained_tokens: in the released groups, whenever they were sampled.
        resumed_tokens: sampled in earlier iterations by the rollouts that were resumed.
        reprefilled_tokens: prompt and completion tokens that the resumes prefilled again.
        purged_tokens: thrown away because their rollout was too old.
        dropped_tokens: thrown away with the other members of a dropped group.
        waiting_tokens: in finished rollouts whose siblings are still under way.
        retention_histogram: retention -> number of released rollouts.
        versions_per_rollout_histogram: number of policy versions -> number of released rollouts.
    """

    budget_used_tokens: int = 0
    budget_overshoot_tokens: int = 0
    generated_tokens: int = 0
    trained_tokens: int = 0
    resumed_tokens: int = 0
    reprefilled_tokens: int = 0
    purged_tokens: int = 0
    dropped_tokens: int = 0
    waiting_tokens: int = 0
    rollouts_resumed: int = 0
    rollouts_purged: int = 0
    groups_released: int = 0
    groups_dropped: int = 0
    groups_waiting: int = 0
    pool_size: int = 0
    decode_steps: int = 0
    retention_histogram: dict[int, int] = field(default_factory=dict)
    versions_per_rollout_histogram: dict[int, int] = field(default_factory=dict)


class C3POPool:
    """Keeps ``pool_capacity`` rollouts decoding and releases complete groups.

    Args:
        config: budget, capacity, retention, groups.
        engine: decodes; the pool is its only user.
        prompts: where new groups come from.
    """

    def __init__(self, config: C3POConfig, engine: RolloutEngine, prompts: PromptSource) -> None:
        self.config = config
        self._engine = engine
        self._prompts = prompts
        self._active: dict[str, Rollout] = {}
        self._queue: deque[Rollout] = deque()
        self._finished: dict[str, list[Rollout]] = {}

    @property
    def exhausted(self) -> bool:
        """Nothing is under way, and the source had nothing to add when it was last asked."""
        return not self._active and not self._queue

    def collect(
        self, version: int, on_step: Callable[[CollectStats], None] | None = None
    ) -> tuple[list[list[Rollout]], CollectStats]:
        """Run one iteration under the weights of ``version``.

        Args:
            version: of the weights that the engine holds now.
            on_step: called after every engine step with the numbers so far.

        Returns:
            The complete groups, in the order of their completion, and the iteration's numbers.
            Fewer tokens than the budget come back only when the prompts have run out.
        """
        stats = CollectStats()
        self._purge(stats)
        self._resume(stats)
        released: list[list[Rollout]] = []
        while stats.budget_used_tokens < self.config.token_budget:
            self._refill()
            if not self._active:
                break
            for delta in self._engine.poll():
                released += self._take(delta, version, stats)
            stats.decode_steps += 1
            stats.pool_size = len(self._active)
            if on_step is not None:
                on_step(stats)
        self._engine.abort(list(self._active))
        for rollout in self._active.values():
            rollout.retention += 1
        self._finish_stats(stats, released)
        return released, stats

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, JSON-serialisable.  Call it between iterations."""
        return {
            "group_size": self.config.group_size,
            "active": [rollout.to_state() for rollout in self._active.values()],
            "queue": [rollout.to_state() for rollout in self._queue],
            "finished": [
                rollout.to_state() for group in self._finished.values() for rollout in group
            ],
            "prompts": self._prompts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; the prompt source goes back with it.

        Raises:
            ValueError: the state was written with another group size.
        """
        if state["group_size"] != self.config.group_size:
            raise ValueError(
                f"the saved pool has group_size = {state['group_size']}, the configuration "
                f"{self.config.group_size}: half-finished groups cannot change their size"
            )
        self._active = {s["uid"]: Rollout.from_state(s) for s in state["active"]}
        self._queue = deque(Rollout.from_state(s) for s in state["queue"])
        self._finished = {}
        for rollout in map(Rollout.from_state, state["finished"]):
            self._finished.setdefault(rollout.group_uid, []).append(rollout)
        self._prompts.load_state_dict(state["prompts"])

    def _purge(self, stats: CollectStats) -> None:
        expired = [r for r in self._active.values() if r.retention > self.config.max_retention]
        restarted = []
        for rollout in expired:
            if rollout.uid not in self._active:  # it went with a sibling's group
                continue
            del self._active[rollout.uid]
            stats.rollouts_purged += 1
            stats.purged_tokens += len(rollout.token_ids)
            if rollout.restarts < self.config.max_restarts:
                rollout.restart()
                restarted.append(rollout)
            else:
                self._drop_group(rollout.group_uid, stats)
                restarted = [r for r in restarted if r.group_uid != rollout.group_uid]
        self._queue.extendleft(reversed(restarted))

    def _drop_group(self, group_uid: str, stats: CollectStats) -> None:
        siblings = [r for r in self._active.values() if r.group_uid == group_uid]
        for rollout in siblings:
            del self._active[rollout.uid]
        siblings += self._finished.pop(group_uid, [])
        self._queue = deque(r for r in self._queue if r.group_uid != group_uid)
        stats.groups_dropped += 1
        stats.dropped_tokens += sum(len(r.token_ids) for r in siblings)

    def _resume(self, stats: CollectStats) -> None:
        for rollout in self._active.values():
            rollout.resumes += 1
            stats.rollouts_resumed += 1
            stats.resumed_tokens += len(rollout.token_ids)
            stats.reprefilled_tokens += rollout.total_tokens
        self._engine.submit([self._submission(r) for r in self._active.values()])

    def _refill(self) -> None:
        admitted = []
        while len(self._active) < self.config.pool_capacity:
            if not self._queue and not self._enqueue_group():
                break
            rollout = self._queue.popleft()
            self._active[rollout.uid] = rollout
            admitted.append(rollout)
        if admitted:
            self._engine.submit([self._submission(r) for r in admitted])

    def _enqueue_group(self) -> bool:
        prompt = self._prompts.next_prompt()
        if prompt is None:
            return False
        self._queue.extend(
            Rollout(
                uid=f"{prompt.uid}/{member}",
                group_uid=prompt.uid,
                prompt_ids=list(prompt.token_ids),
                max_new_tokens=self.config.max_new_tokens,
                record=prompt.record,
            )
            for member in range(self.config.group_size)
        )
        return True

    def _submission(self, rollout: Rollout) -> Submission:
        return Submission(
            uid=rollout.uid,
            token_ids=rollout.prompt_ids + rollout.token_ids,
            max_new_tokens=rollout.max_new_tokens - len(rollout.token_ids),
            seed=sampling_seed(self.config.seed, rollout),
        )

    def _take(self, delta: Delta, version: int, stats: CollectStats) -> list[list[Rollout]]:
        """Book one delta; returns the group that it completed, if any."""
        rollout = self._active[delta.uid]
        rollout.append(delta.token_ids, delta.logprobs, version, delta.finish_reason)
        stats.generated_tokens += len(delta.token_ids)
        if self.config.budget_counts == "generated":
            stats.budget_used_tokens += len(delta.token_ids)
        if rollout.finish_reason is None:
            return []
        del self._active[rollout.uid]
        group = self._finished.setdefault(rollout.group_uid, [])
        group.append(rollout)
        if len(group) < self.config.group_size:
            return []
        del self._finished[rollout.group_uid]
        group.sort(key=lambda r: int(r.uid.rpartition("/")[2]))
        if self.config.budget_counts == "completed":
            stats.budget_used_tokens += sum(len(r.token_ids) for r in group)
        return [group]

    def _finish_stats(self, stats: CollectStats, released: list[list[Rollout]]) -> None:
        rollouts = [rollout for group in released for rollout in group]
        stats.budget_overshoot_tokens = max(0, stats.budget_used_tokens - self.config.token_budget)
        stats.groups_released = len(released)
        stats.trained_tokens = sum(len(r.token_ids) for r in rollouts)
        stats.groups_waiting = len(self._finished)
        stats.waiting_tokens = sum(len(r.token_ids) for g in self._finished.values() for r in g)
        stats.pool_size = len(self._active)
        stats.retention_histogram = dict(sorted(Counter(r.retention for r in rollouts).items()))
        stats.versions_per_rollout_histogram = dict(
            sorted(Counter(len(set(r.versions)) for r in rollouts).items())
        )


def sampling_seed(run_seed: int, rollout: Rollout) -> int:
    """A seed of 62 bits from (run seed, uid, restart, position).

    The position is in it because a seeded request restarts its generator at every resume: with one
    seed for all of them a resumed rollout would draw the numbers of its beginning again.
    """
    key = f"{run_seed}:{rollout.uid}:{rollout.restarts}:{len(rollout.token_ids)}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 2
