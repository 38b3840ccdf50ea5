"""The example of a user's own prompts file and reward works as the README says."""

from __future__ import annotations

from pathlib import Path

import pytest

from asystem_bridge.tasks.prompts_file import PromptsFile, PromptsFileOptions

EXAMPLE = Path(__file__).parents[2] / "examples" / "prompts"


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> PromptsFile:
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.syspath_prepend(EXAMPLE)
    options = PromptsFileOptions(
        path="questions.jsonl", reward="short_answers:reward", epochs=1, shuffle=False
    )
    return PromptsFile(options)


def test_every_question_can_earn_the_whole_reward(task: PromptsFile) -> None:
    count = len((EXAMPLE / "questions.jsonl").read_text().splitlines())
    for index in range(count):
        question = task.question(index)
        assert question is not None
        for answer in question.record["answers"]:
            assert task.reward(f"It is {answer}.", question.record) == 1.0
    assert task.question(count) is None


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", 0.0),
        ("I do not know.", 0.5),
        ("paris", 1.0),
        ("Parisian", 0.5),
        ("one two three four five six seven eight nine Paris", 1.0),
        ("one two three four five six seven eight nine ten Paris", 0.5),
        ("one two three four five six seven eight nine ten eleven", 0.0),
    ],
)
def test_reward(task: PromptsFile, completion: str, expected: float) -> None:
    assert task.reward(completion, {"answers": ["Paris"]}) == expected
