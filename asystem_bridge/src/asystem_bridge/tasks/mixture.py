"""Several tasks in turn: question 0 from the first, question 1 from the second, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asystem_bridge.tasks.base import Question, Task


class Mixture:
    """Round robin over ``tasks``; list a task twice to meet it twice as often.

    It ends where the task whose turn it is ends.

    Raises:
        ValueError: there is no task, or only some of them are raw.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("a mixture needs at least one task")
        if len({task.raw for task in tasks}) > 1:
            raise ValueError("a mixture cannot have raw tasks together with chat tasks")
        self.raw = tasks[0].raw
        self._tasks = tuple(tasks)

    def question(self, index: int) -> Question | None:
        turn, part = divmod(index, len(self._tasks))
        question = self._tasks[part].question(turn)
        if question is None:
            return None
        return Question(text=question.text, record={"part": part, "record": question.record})

    def reward(self, completion: str, record: dict[str, Any]) -> float:
        part: int = record["part"]
        return self._tasks[part].reward(completion, record["record"])
