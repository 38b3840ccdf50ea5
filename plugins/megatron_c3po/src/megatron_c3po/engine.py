"""The seam between the C3PO++ pool and whatever generates tokens.

An engine decodes requests that are identified by the rollout's uid.  One ``poll`` is one step of
the engine: the finer the step, the more exactly the token budget is met.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Ask the engine to go on with ``token_ids`` for at most ``max_new_tokens`` more tokens.

    Attributes:
        uid: the rollout's uid.
        token_ids: prompt plus whatever was sampled before.
        max_new_tokens: at least 1.
        seed: of this request's sampler.  Derived from (run seed, uid, tokens so far), because a
            seeded engine restarts its generator at every resume.
    """

    uid: str
    token_ids: list[int]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Tokens that one engine step added to one request.

    Attributes:
        uid: the rollout's uid.
        token_ids: zero or more new tokens.
        logprobs: one per token, of the distribution that the token was drawn from.
        finish_reason: ``None``, ``"stop"`` or ``"length"``.
    """

    uid: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None = None


class RolloutEngine(Protocol):
    """What the pool asks of an engine.  Calls come from one thread."""

    def submit(self, submissions: Iterable[Submission]) -> None:
        """Accept requests.  They need not start before the next ``poll``."""

    def poll(self) -> list[Delta]:
        """Advance every request by one step and return what is new."""

    def abort(self, uids: Iterable[str]) -> None:
        """Forget unfinished requests.  Unknown uids are ignored: they may just have finished."""
