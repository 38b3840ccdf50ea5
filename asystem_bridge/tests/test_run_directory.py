"""Checkpoints appear whole or not at all; a run folder has one user."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from asystem_bridge.controller.run_directory import RunDirectory, choose_run_path
from asystem_bridge.errors import CheckpointError, ConfigError


def save_trainer(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w")


def no_space(folder: Path) -> None:
    (folder / "half").write_bytes(b"h")
    raise OSError(errno.ENOSPC, "No space left on device")


def write(run: RunDirectory, step: int, keep: int = 2) -> None:
    run.write_checkpoint(step, {"loop": {"step": step}}, save_trainer, keep)


def test_older_checkpoints_go_once_the_new_one_is_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for step in range(4):
        write(run, step)
    assert run.checkpoint_steps() == [2, 3]
    assert run.read_checkpoint(3, "loop") == {"step": 3}
    assert (run.checkpoint(3) / "trainer" / "weights").read_bytes() == b"w"


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    write(run, 1)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left.*--resume"):
        run.write_checkpoint(2, {"loop": {}}, no_space, 2)
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_000001"]


def test_what_a_killed_writer_left_is_neither_read_nor_in_the_way(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    partial = run.checkpoint(5).with_name(".step_000005.partial")
    (partial / "trainer").mkdir(parents=True)
    (partial / "stale").touch()
    assert run.checkpoint_steps() == []
    write(run, 5)
    assert run.checkpoint_steps() == [5]
    assert not (run.checkpoint(5) / "stale").exists()


def test_rollouts_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.truncate_rollouts(3)  # nothing there yet
    run.append_rollouts({"step": step, "uid": f"{step}/0"} for step in (1, 2, 3))
    with run.rollouts_path.open("a") as file:
        file.write('{"step": 3, "uid": "cut o')  # killed while writing
    run.truncate_rollouts(2)
    lines = run.rollouts_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match="in use by another run"):
        RunDirectory(tmp_path / "run")
    first.close()
    RunDirectory(tmp_path / "run").close()


def test_run_folders_are_numbered_and_resume_takes_the_last(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run tiny-NNN"):
        choose_run_path(tmp_path, "tiny", resume=True)
    assert choose_run_path(tmp_path, "tiny", resume=False).name == "tiny-001"
    for name in ("tiny-001", "tiny-007", "tiny-x", "other-009"):
        (tmp_path / name).mkdir()
    assert choose_run_path(tmp_path, "tiny", resume=False).name == "tiny-008"
    assert choose_run_path(tmp_path, "tiny", resume=True).name == "tiny-007"


def test_what_a_start_finds_decides_how_it_may_go_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.resume_step(resume=False) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.resume_step(resume=True)
    (run.path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume.*--output"):
        run.resume_step(resume=False)
    write(run, 2)
    write(run, 7)
    assert run.resume_step(resume=True) == 7
