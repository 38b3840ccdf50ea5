"""Rewards, the canary's message, the rendezvous and the worker processes."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asystem_bridge.controller.canary import Canary, canary_error
from asystem_bridge.controller.rewards import score_groups
from asystem_bridge.controller.trainer_group import rendezvous
from asystem_bridge.errors import BridgeError, ConfigError, WorkerDiedError, WorkerError
from asystem_bridge.runtime.worker_client import WorkerClient, call_all, call_each
from asystem_bridge.tasks.base import Question
from asystem_bridge.vllm_backend.tensor_report import Status, TensorReport
from megatron_c3po.rollout import Rollout


class LengthTask:
    raw = True

    def question(self, index: int) -> Question:
        return Question(text=str(index))

    def reward(self, completion: str, record: dict[str, Any]) -> float:
        if record.get("raises"):
            raise KeyError("answer")
        return math.nan if record.get("nan") else float(len(completion))


def group(*lengths: int, **record: Any) -> list[Rollout]:
    return [
        Rollout(
            uid=f"0/{i}", group_uid="0", prompt_ids=[1], max_new_tokens=9, record=record,
            token_ids=[7] * length,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def decode(token_ids: list[int]) -> str:
    return "x" * len(token_ids)


def test_rewards_become_advantages_per_group() -> None:
    groups = [group(1, 3), group(2, 2)]
    summary = score_groups(groups, LengthTask(), decode)
    assert [r.reward for g in groups for r in g] == [1, 3, 2, 2]
    deviation = math.sqrt(2) + 1e-4
    assert [r.advantage for r in groups[0]] == pytest.approx([-1 / deviation, 1 / deviation])
    assert [r.advantage for r in groups[1]] == [0, 0]
    assert (summary.mean, summary.groups_with_signal) == (2.0, 1)
    assert summary.std == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("record", "message"),
    [({"raises": True}, "raised KeyError"), ({"nan": True}, "is nan for rollout 0/0")],
)
def test_a_reward_that_fails_names_the_rollout(record: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        score_groups([group(1, 2, **record)], LengthTask(), decode)


def test_the_canary_compares_every_token_of_the_completions() -> None:
    canary = Canary([[5, 6], [7]], [[8, 9], [3]])
    assert canary.sequences == [[5, 6, 8, 9], [7, 3]]
    ours = [[-9.0, -1.0, -2.0], [-3.0]]
    assert canary.max_abs_difference(ours, [[-1.0, -1.0, -2.5], [-3.1]]) == pytest.approx(0.5)
    assert canary.max_abs_difference(ours, [[-1.0, -1.0, -2.0], [-3.7]]) == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"canary rows of \[3\] tokens, expected \[3, 1\]"):
        canary.max_abs_difference(ours, ours[:1])


def test_the_canarys_error_lists_the_worst_tensors_first() -> None:
    def report(name: str, status: Status, error: float | None) -> TensorReport:
        return TensorReport(name=name, status=status, max_relative_error=error, reason="")

    reports = [report(f"t{i}", "differs", i / 100) for i in range(1, 16)]
    reports += [report("fine", "equal", 0.0), report("experts", "not checkable", None)]
    lines = str(canary_error(0.5, 1e-3, 4, reports)).splitlines()
    assert "policy version 4" in lines[0]
    assert "0.5" in lines[0]
    assert "15 of 17, 1 cannot be compared" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["t15", "t14", "t13"]
    assert lines[-1].strip() == "and 3 more"


def test_a_taken_port_is_refused_and_no_port_needs_none(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"rendezvous_port = {port}: Address already in use"):
            rendezvous(tmp_path, port)
    assert rendezvous(tmp_path, port) == f"tcp://127.0.0.1:{port}"
    assert rendezvous(tmp_path, 0).startswith("file:///")


class Echo:
    """A worker for the tests below; it runs in another process."""

    def add(self, a: int, b: int = 0) -> int:
        return a + b

    def fail(self) -> None:
        raise ValueError("no such thing")

    def refuse(self) -> None:
        raise BridgeError("it is full")

    def say_and_die(self) -> None:
        print("the last words", flush=True)
        os._exit(3)

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        pass


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[WorkerClient]]:
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(start(i, tmp_path)) for i in range(2)]
        for worker in started:
            worker.wait_started()
        yield started


def start(number: int, folder: Path) -> WorkerClient:
    return WorkerClient(
        "test_controller_parts:Echo",
        name=f"echo {number}",
        log_path=folder / f"{number}.log",
        environment={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )


def test_calls_reach_each_worker_and_errors_come_back(workers: list[WorkerClient]) -> None:
    assert call_each(workers, "add", [(1, 2), (3, 4)]) == [3, 7]
    assert call_all(workers, "pid") == [worker.pid for worker in workers]
    assert workers[0].call("add", 1, b=5) == 6
    with pytest.raises(WorkerError, match=r"echo 0: ValueError: no such thing\nTraceback"):
        workers[0].call("fail")
    with pytest.raises(WorkerError, match=r"^echo 1: it is full$"):  # explained: no traceback
        workers[1].call("refuse")
    assert workers[0].call("add", 1) == 1  # an error is not the end


def test_a_dead_worker_is_reported_with_its_last_words(workers: list[WorkerClient]) -> None:
    with pytest.raises(WorkerDiedError, match=r"echo 0 .*exit code 3[\s\S]*the last words"):
        workers[0].call("say_and_die")
    os.kill(workers[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="echo 1"):
        workers[1].call("add", 1)
