"""One rollout and what an engine reports about it.

Ring-1T section 2.3.3: a rollout may live through several iterations, so every sampled token keeps
the log-prob and the policy version under which it was sampled.  Nothing here imports a host.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task instance, sampled once and answered by a whole GRPO group.

    Attributes:
        uid: stable across restarts; equal uids mean the same instance.
        token_ids: what the engine is given.
        record: JSON-serialisable data that the reward needs to score a completion.
    """

    uid: str
    token_ids: tuple[int, ...]
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Rollout:
    """A completion under way or finished.

    Attributes:
        uid: ``"<prompt uid>/<member>"``; unique in a run, unchanged by resumes and restarts.
        group_uid: the prompt's uid; the members of a GRPO group share it.
        prompt_ids: prompt tokens.
        record: the prompt's data for the reward.
        max_new_tokens: bound on ``len(token_ids)``.
        token_ids, logprobs, versions: per sampled token: its id, the log-prob the engine gave it
            when it was sampled, and the version of the weights that sampled it.  Equal lengths.
        retention: iterations that ended while it was unfinished (paper: ``retention(o)``).
        restarts: how often it was purged and begun anew.
        resumes: how often its tokens were prefilled again to go on.
        finish_reason: ``None`` while unfinished, else the engine's ``"stop"`` or ``"length"``.
        reward, advantage: set when the whole group has ended.
    """

    uid: str
    group_uid: str
    prompt_ids: list[int]
    max_new_tokens: int
    record: dict[str, Any] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    retention: int = 0
    restarts: int = 0
    resumes: int = 0
    finish_reason: str | None = None
    reward: float | None = None
    advantage: float | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and completion: what one forward pass of the trainer sees."""
        return len(self.prompt_ids) + len(self.token_ids)

    def append(
        self, token_ids: list[int], logprobs: list[float], version: int, finish_reason: str | None
    ) -> None:
        """Add tokens sampled under ``version``.

        Raises:
            ValueError: a token came without its log-prob: the IcePop ratio could not be formed.
        """
        if len(token_ids) != len(logprobs):
            raise ValueError(
                f"rollout {self.uid}: {len(token_ids)} tokens with {len(logprobs)} log-probs; "
                "the engine must return the log-prob of every sampled token"
            )
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.versions += [version] * len(token_ids)
        self.finish_reason = finish_reason

    def restart(self) -> None:
        """Forget every token (a purged rollout begins anew)."""
        self.token_ids, self.logprobs, self.versions = [], [], []
        self.retention = 0
        self.restarts += 1
        self.finish_reason = None

    def to_state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        return cls(**state)
