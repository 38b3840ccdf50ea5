"""Tasks by name, built from the plain values of a configuration file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from asystem_bridge.errors import ConfigError
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
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    _refuse_unknown(name, options, tuple(fields))
    missing = [
        field.name
        for field in fields.values()
        if field.name not in options
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"task {name}: needs a value for {', '.join(missing)}")
    for key, value in options.items():
        expected = _TYPES[str(fields[key].type).partition("[")[0]]
        if type(value) is not expected:
            raise ConfigError(
                f"task {name}: {key} = {value!r}: must be of type {expected.__name__}, "
                f"got {type(value).__name__}"
            )
    try:
        return task_class(options_class(**options))
    except ValueError as error:
        raise ConfigError(f"task {name}: {error}") from error


# The options classes postpone their annotations, so the types are here by name.
_TYPES: dict[str, type] = {"int": int, "str": str, "bool": bool, "dict": dict}


def _build_mixture(options: Mapping[str, Any]) -> Task:
    _refuse_unknown(_MIXTURE, options, ("tasks",))
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


def _refuse_unknown(name: str, options: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(options.keys() - set(allowed))
    if unknown:
        raise ConfigError(
            f"task {name}: unknown option {', '.join(unknown)}: allowed are {', '.join(allowed)}"
        )
