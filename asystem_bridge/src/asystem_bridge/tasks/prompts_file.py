"""Prompts from the user's own file, scored by the user's own function.

A ``.jsonl`` file has one JSON object per line with the prompt under ``"prompt"``; the reward gets
the whole object.  Any other file is plain text with one prompt per line; the reward gets
``{"prompt": ..., "line": ...}``.  Blank lines are skipped in both.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asystem_bridge.errors import ConfigError
from asystem_bridge.tasks.base import Question

Reward = Callable[[str, dict[str, Any]], float]

_MAX_REPORTED_LINES = 5


@dataclass(frozen=True, kw_only=True)
class PromptsFileOptions:
    """Options of ``PromptsFile``.

    Attributes:
        path: the file.
        reward: ``"module:function"``, called with the completion and the prompt's record; returns
            a finite number.  Modules are looked for in the current directory too.
        epochs: passes over the file; 0 goes on for ever.
        shuffle: a new order in every epoch, decided by ``seed`` and the epoch's number.
        raw: the prompt goes to the model as it is, without the chat template.
        seed: of the shuffling.

    Raises:
        ValueError: ``epochs`` is negative or ``reward`` has not the form ``module:function``.
    """

    path: str
    reward: str
    epochs: int = 0
    shuffle: bool = True
    raw: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs = {self.epochs}: must be 0 (endless) or more")
        module, _, function = self.reward.partition(":")
        if not module or not function:
            raise ValueError(f"reward = {self.reward!r}: must have the form 'module:function'")


class PromptsFile:
    """The file is read once, at the start.

    Raises:
        ConfigError: the file or the reward function cannot be loaded; bad lines are named.
    """

    def __init__(self, options: PromptsFileOptions) -> None:
        self.options = options
        self.raw = options.raw
        self._records = load_records(Path(options.path))
        self._reward = load_reward(options.reward)
        # Neighbouring questions share their epoch's order.
        self._order = functools.lru_cache(maxsize=2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> list[int]:
        order = list(range(len(self._records)))
        if self.options.shuffle:
            random.Random(f"{self.options.seed}/{epoch}").shuffle(order)
        return order

    def question(self, index: int) -> Question | None:
        epoch, position = divmod(index, len(self._records))
        if self.options.epochs and epoch >= self.options.epochs:
            return None
        record = self._records[self._order(epoch)[position]]
        return Question(text=record["prompt"], record=record)

    def reward(self, completion: str, record: dict[str, Any]) -> float:
        """Raises:
        ConfigError: the user's function returned something else than a finite number.
        """
        value = self._reward(completion, record)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(
                f"the reward {self.options.reward} returned {value!r} for {record!r}: "
                "it must return a finite number"
            )
        return float(value)


def load_records(path: Path) -> list[dict[str, Any]]:
    """One record per prompt, in the file's order.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or has bad lines (named by number).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the prompts file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the prompts file {path} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error
    parse = _parse_json_line if path.suffix == ".jsonl" else _parse_text_line
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    # Not splitlines(): it would also cut at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(parse(line, number))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        shown = problems[:_MAX_REPORTED_LINES]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ConfigError(f"the prompts file {path} has bad lines\n  " + "\n  ".join(shown))
    if not records:
        raise ConfigError(f"the prompts file {path} holds no prompt: every line is blank")
    return records


def _parse_text_line(line: str, number: int) -> dict[str, Any]:
    return {"prompt": line.strip(), "line": number}


def _parse_json_line(line: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        found = "none" if "prompt" not in record else repr(prompt)
        raise ValueError(f"expected a non-empty string under 'prompt', got {found}")
    return record


def load_reward(spec: str) -> Reward:
    """The function that ``"module:function"`` names.

    Raises:
        ConfigError: there is no such module or function.
    """
    module_name, _, function_name = spec.partition(":")
    # As with `python -m`: an installed command does not look in the current directory by itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"reward {spec!r}: the module {module_name!r} cannot be imported ({error}). It must be "
            f"installed or lie in the current directory {os.getcwd()}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"reward {spec!r}: {module_name} has no function {function_name!r}. It has: "
            f"{', '.join(sorted(n for n, v in vars(module).items() if callable(v))) or 'none'}"
        )
    reward: Reward = function
    return reward
