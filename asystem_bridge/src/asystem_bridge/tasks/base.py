"""A task: numbered questions and a verifier.

``question(index)`` is a pure function of the index and the task's options, so the position in the
task is one integer and a resumed run sees the questions that the uninterrupted one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Question:
    """One instance of a task.

    Attributes:
        text: what the model is asked.  The chat template is applied by the prompt source unless
            the task says ``raw``.
        record: JSON-serialisable data that ``reward`` needs.
    """

    text: str
    record: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """What the loop asks of a task."""

    raw: bool
    """The text is the prompt as it is: no chat template."""

    def question(self, index: int) -> Question | None:
        """The question number ``index`` (from 0), or ``None`` past the end."""

    def reward(self, completion: str, record: dict[str, Any]) -> float:
        """Score a completion (special tokens removed), usually in [0, 1]."""
