"""Interrupt, kill and resume the loop as a user does: nothing is lost, doubled or left over."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from loop_inputs import (
    LoopProcess,
    metrics,
    rollouts,
    wait_until_gone,
    worker_processes,
    write_config,
)

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.slow]

STEPS = 6


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return write_config(folder, steps=STEPS)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, config: Path) -> LoopProcess:
    run = LoopProcess(config, folder / "uninterrupted")
    assert run.wait() == 0, run.printed
    return run


@pytest.fixture(scope="module")
def interrupted(folder: Path, config: Path) -> LoopProcess:
    """SIGINT after step 1, SIGKILL after step 3, then to the end."""
    output = folder / "interrupted"
    files_before, others = shared_memory_files(), set(worker_processes())

    first = LoopProcess(config, output)
    first.wait_for_checkpoint(1)
    workers = set(worker_processes()) - others
    assert len(workers) == 2
    first.process.send_signal(signal.SIGINT)
    assert first.wait(60) == 130, first.printed
    assert "interrupted" in first.printed
    assert set(worker_processes()) & workers == set()

    second = LoopProcess(config, output, "--resume")
    second.wait_for_checkpoint(3)
    workers = set(worker_processes()) - others
    second.process.kill()
    second.wait(60)
    assert wait_until_gone(workers) == set()
    assert shared_memory_files() <= files_before

    third = LoopProcess(config, output, "--resume")
    assert third.wait() == 0, third.printed
    return third


def test_the_resumed_run_trained_every_rollout_once(interrupted: LoopProcess) -> None:
    uids = [rollout["uid"] for rollout in rollouts(interrupted.output)]
    assert len(uids) == len(set(uids))
    assert [record["step"] for record in metrics(interrupted.output)] == list(range(1, STEPS + 1))


def test_the_resumed_run_equals_the_uninterrupted_one(
    uninterrupted: LoopProcess, interrupted: LoopProcess
) -> None:
    expected, resumed = rollouts(uninterrupted.output), rollouts(interrupted.output)
    assert [(r["step"], r["uid"]) for r in resumed] == [(r["step"], r["uid"]) for r in expected]
    assert [r["token_ids"] for r in resumed] == [r["token_ids"] for r in expected]
    assert [r["versions"] for r in resumed] == [r["versions"] for r in expected]
    for ours, theirs in zip(
        metrics(interrupted.output), metrics(uninterrupted.output), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_the_report_is_there(uninterrupted: LoopProcess) -> None:
    report = uninterrupted.output / "report"
    assert "| reward, first -> last step |" in (report / "report.md").read_text()
    assert len(list((report / "plots").glob("*.png"))) == 6
    assert not list((uninterrupted.output / "checkpoints").glob(".*"))


def test_a_run_folder_is_not_overwritten(uninterrupted: LoopProcess, config: Path) -> None:
    before = (uninterrupted.output / "metrics.jsonl").read_bytes()
    again = LoopProcess(config, uninterrupted.output)
    assert again.wait() == 1
    assert "--resume" in again.printed
    assert (uninterrupted.output / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("size", ["tensor_parallel_size", "data_parallel_size"])
def test_two_ranks_have_the_objective_of_one(
    size: str, uninterrupted: LoopProcess, folder: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, steps=2, **{size: 2})
    run = LoopProcess(config, tmp_path / "run")
    assert run.wait() == 0, run.printed
    for ours, theirs in zip(metrics(run.output), metrics(uninterrupted.output)[:2], strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "logprob_diff_mean", "ratio_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        assert ours["trained_tokens"] == theirs["trained_tokens"]
