"""The example configuration is valid, and its task asks and scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from asystem_bridge.config import load_config
from asystem_bridge.tasks.registry import build_task

EXAMPLE = Path(__file__).parents[2] / "examples" / "prompts"


def test_prompts_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    config = load_config((EXAMPLE / "loop.toml").read_text(), origin="loop.toml", overrides={})
    task = build_task(config.task.name, config.task.options)
    question = task.question(0)
    assert question is not None
    answer = question.record["answers"][0]
    assert task.reward(answer, question.record) == 1.0
    assert task.reward("so " * 11 + answer, question.record) == 0.5
    assert task.reward("", question.record) == 0.0
