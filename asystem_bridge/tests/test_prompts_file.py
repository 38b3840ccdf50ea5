"""Prompts from a user's file with a user's reward function."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from asystem_bridge.errors import ConfigError
from asystem_bridge.tasks.prompts_file import PromptsFile, PromptsFileOptions, load_records
from asystem_bridge.tasks.registry import build_task

REWARDS = """
def length(completion, record):
    return len(completion) / record.get("divide_by", 1)

def nothing(completion, record):
    return None

def infinite(completion, record):
    return float("inf")

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``my_rewards`` lies in the current directory, as a user's would."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield
    sys.modules.pop("my_rewards", None)


def task_of(text: str, *, suffix: str = ".txt", **options: object) -> PromptsFile:
    path = Path(f"prompts{suffix}")
    path.write_text(text, encoding="utf-8")
    options = {"reward": "my_rewards:length"} | options
    task = build_task("prompts_file", {"path": str(path), **options})
    assert isinstance(task, PromptsFile)
    return task


def test_plain_text_has_one_prompt_per_line():
    task = task_of("first\n\n  second  \n\n", shuffle=False, epochs=1)
    questions = [task.question(index) for index in range(3)]
    assert [q.text for q in questions[:2]] == ["first", "second"]
    assert [q.record for q in questions[:2]] == [
        {"prompt": "first", "line": 1},
        {"prompt": "second", "line": 3},
    ]
    assert questions[2] is None
    assert task.reward("four", questions[0].record) == 4.0


def test_json_lines_hand_the_whole_object_to_the_reward():
    lines = [
        {"prompt": "grüß\u2028dich", "divide_by": 2},
        {"prompt": "b\nc", "tags": [1, {"deep": None}]},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    task = task_of(text + "\n", suffix=".jsonl", shuffle=False)
    assert [task.question(i).record for i in (0, 1)] == lines
    assert task.question(0).text == "grüß\u2028dich"
    assert task.reward("four", task.question(0).record) == 2.0


def test_every_epoch_has_every_prompt_once_in_another_order():
    prompts = [f"p{i}" for i in range(12)]
    task = task_of("\n".join(prompts), seed=5)
    epochs = [[task.question(e * 12 + i).text for i in range(12)] for e in range(4)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(prompts)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # Any index at any time: nothing depends on what was asked before.
    again = task_of("\n".join(prompts), seed=5)
    assert again.question(29).text == epochs[2][5]
    assert again.question(3).text == epochs[0][3]
    other = task_of("\n".join(prompts), seed=6)
    assert [other.question(i).text for i in range(12)] != epochs[0]


@pytest.mark.parametrize("shuffle", [True, False])
def test_finite_epochs_end(shuffle: bool):
    task = task_of("a\nb\nc\n", epochs=2, shuffle=shuffle)
    texts = [task.question(index) for index in range(7)]
    assert texts[6] is None
    assert Counter(q.text for q in texts[:6]) == {"a": 2, "b": 2, "c": 2}


def test_raw_is_the_users_choice():
    assert not task_of("a\n").raw
    assert task_of("a\n", raw=True).raw


def test_bad_lines_are_named_by_number():
    lines = ['{"prompt": "fine"}', "", "{broken", "[1]", '{"text": "x"}', '{"prompt": " "}', "7"]
    lines += ['{"prompt": 3}']
    with pytest.raises(ConfigError) as error:
        task_of("\n".join(lines), suffix=".jsonl")
    message = str(error.value)
    assert "prompts.jsonl has bad lines" in message
    assert "line 3: not JSON" in message
    assert "line 4: expected a JSON object, got list" in message
    assert "line 5: expected a non-empty string under 'prompt', got none" in message
    assert "line 6: expected a non-empty string under 'prompt', got ' '" in message
    assert "line 7: expected a JSON object, got int" in message
    assert "and 1 more" in message
    assert "line 2" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "holds no prompt"), (b"", "holds no prompt"), (b"a\xff", "is not UTF-8")],
)
def test_unusable_files(content: bytes, message: str):
    Path("prompts.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_records(Path("prompts.txt"))


def test_missing_file():
    with pytest.raises(ConfigError, match=r"absent\.txt cannot be read: No such file"):
        load_records(Path("absent.txt"))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("my_rewards", "must have the form 'module:function'"),
        (":length", "must have the form 'module:function'"),
        ("no_such_module:f", "'no_such_module' cannot be imported"),
        ("my_rewards:absent", "has no function 'absent'. It has: infinite, length, nothing"),
        ("my_rewards:not_a_function", "has no function 'not_a_function'"),
    ],
)
def test_bad_reward_names(reward: str, message: str):
    with pytest.raises(ConfigError, match=message):
        task_of("a\n", reward=reward)


@pytest.mark.parametrize(("reward", "value"), [("nothing", "None"), ("infinite", "inf")])
def test_reward_must_be_a_finite_number(reward: str, value: str):
    task = task_of("a\n", reward=f"my_rewards:{reward}")
    with pytest.raises(ConfigError, match=f"my_rewards:{reward} returned {value}"):
        task.reward("x", task.question(0).record)


def test_negative_epochs():
    with pytest.raises(ValueError, match="epochs = -1"):
        PromptsFileOptions(path="p", reward="m:f", epochs=-1)
