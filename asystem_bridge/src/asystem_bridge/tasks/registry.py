"""Tasks by name, built from the plain values of a configuration file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from asystem_bridge.errors import ConfigError
from asystem_bridge.option_tables import options_from_table, refuse_unknown
from asystem_bridge.tasks.base import Task
from asystem_bridge.tasks.digit_sort import DigitSort, DigitSortOptions
from asystem_bridge.tasks.mixture import Mixture
from asystem_bridge.tasks.prompts_file import PromptsFile, PromptsFileOptions
from asystem_bridge.tasks.reasoning_gym_tasks import ReasoningGymOptions, ReasoningGymTask

_TASKS: dict[str, tuple[type, Callable[[Any], Task]]] = {
    "digit_sort": (DigitSortOptions, DigitSort),
    "reasoning_gym": (ReasoningGymOptions, ReasoningGymTask),
    "prompts_file": (PromptsFileOptions, PromptsFile),
}
_MIXTURE = "mixture"
TASK_NAMES = (*_TASKS, _MIXTURE)


def build_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task called ``name``.

    Args:
        name: one of ``TASK_NAMES``.
        options: what the task's options class takes.  A mixture takes ``tasks``: a list of such
            mappings, each with its ``name``.

    Raises:
        ConfigError: the name or an option is unknown, missing or refused.
    """
    if name == _MIXTURE:
        return _build_mixture(options)
    if name not in _TASKS:
        raise ConfigError(f"unknown task {name!r}: allowed are {', '.join(TASK_NAMES)}")
    options_class, task_class = _TASKS[name]
    try:
        return task_class(options_from_table(options_class, options, where=f"task {name}"))
    except ValueError as error:
        raise ConfigError(f"task {name}: {error}") from error


def _build_mixture(options: Mapping[str, Any]) -> Task:
    refuse_unknown(options, ["tasks"], f"task {_MIXTURE}")
    parts = options.get("tasks")
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise ConfigError(f"task {_MIXTURE}: needs 'tasks', a list of tables, got {parts!r}")
    tasks = []
    for number, part in enumerate(parts, start=1):
        if "name" not in part:
            raise ConfigError(f"task {_MIXTURE}: number {number} of 'tasks' has no name: {part!r}")
        tasks.append(build_task(part["name"], {k: v for k, v in part.items() if k != "name"}))
    try:
        return Mixture(tasks)
    except ValueError as error:
        raise ConfigError(f"task {_MIXTURE}: {error}") from error
