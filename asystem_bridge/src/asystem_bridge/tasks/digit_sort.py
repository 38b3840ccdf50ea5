"""The tiny model's task: sort digits.  ``sort:4071=`` is answered by ``0147``.

Small enough to be learned within seconds by supervised steps on ``record["answer"]``, hard enough
that a model taught so is not perfect yet, which leaves reinforcement learning something to do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from asystem_bridge.tasks.base import Question


@dataclass(frozen=True, kw_only=True)
class DigitSortOptions:
    """Options of ``DigitSort``.

    Attributes:
        min_digits, max_digits: how many digits a question has, both ends included.
        seed: other seeds give other questions; held-out questions have their own seed.

    Raises:
        ValueError: the range of digits is empty.
    """

    min_digits: int = 4
    max_digits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_digits <= self.max_digits:
            raise ValueError(
                f"min_digits = {self.min_digits} with max_digits = {self.max_digits}: "
                "must hold 1 <= min_digits <= max_digits"
            )


class DigitSort:
    """Endless; the reward is 1.0 for exactly the sorted digits, else 0.0."""

    raw = True

    def __init__(self, options: DigitSortOptions) -> None:
        self.options = options

    def question(self, index: int) -> Question:
        rng = random.Random(f"{self.options.seed}/{index}")
        count = rng.randint(self.options.min_digits, self.options.max_digits)
        digits = rng.choices("0123456789", k=count)
        return Question(text=f"sort:{''.join(digits)}=", record={"answer": "".join(sorted(digits))})

    def reward(self, completion: str, record: dict[str, Any]) -> float:
        return float(completion == record["answer"])
