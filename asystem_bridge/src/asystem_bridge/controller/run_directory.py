"""Where a run keeps its files, and how a checkpoint becomes visible: whole or not at all.

RUN/config.toml             the configuration as it was given
RUN/metrics.jsonl           one record per step         RUN/tensorboard/
RUN/rollouts.jsonl          every trained rollout with its reward and versions
RUN/checkpoints/step_N/     trainer/ (Megatron), pool.json, loop.json
RUN/logs/                   what each worker printed
RUN/report/                 the summary and its plots
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from asystem_bridge.durable_files import sync_to_disk, write_synced
from asystem_bridge.errors import CheckpointError, ConfigError

_STEP = re.compile(r"step_(\d{6})")


class RunDirectory:
    """One run's folder, held by one process at a time.

    Raises:
        ConfigError: another process is using the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] = (path / ".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path} is in use by another run; give --output another") from None

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def rollouts_path(self) -> Path:
        return self.path / "rollouts.jsonl"

    def checkpoint_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        found = (_STEP.fullmatch(p.name) for p in (self.path / "checkpoints").glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def resume_step(self, *, resume: bool) -> int | None:
        """The step to go on from, ``None`` for a new run.

        Raises:
            ConfigError: the folder holds a run and ``resume`` is false.
            CheckpointError: there is no checkpoint to resume.
        """
        steps = self.checkpoint_steps()
        if not resume:
            if (self.path / "metrics.jsonl").exists():
                raise ConfigError(
                    f"{self.path} holds a run already: go on with it (--resume) or give --output "
                    "another folder"
                )
            return None
        if not steps:
            raise CheckpointError(
                f"--resume: {self.path} has no complete checkpoint: there is nothing to go on "
                "from; start anew with --output another folder"
            )
        return steps[-1]

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def write_checkpoint(
        self, step: int, state: dict[str, Any], save_trainer: Callable[[Path], None], keep: int
    ) -> None:
        """Write everything beside its final place, then rename it there; delete older ones.

        Args:
            step: the step that has just ended.
            state: file stem -> JSON-serialisable content.
            save_trainer: writes the trainer's part into the folder it is given.
            keep: how many checkpoints stay.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        final = self.checkpoint(step)
        partial = final.with_name(f".{final.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "trainer").mkdir(parents=True)
            save_trainer(partial / "trainer")
            for name, content in state.items():
                write_synced(partial / f"{name}.json", json.dumps(content))
            if final.exists():  # the step is repeated after a resume from an earlier one
                shutil.rmtree(final)
            partial.rename(final)
            sync_to_disk(final.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint of step {step} in {final.parent} failed: {error}. Earlier checkpoints "
                "are untouched; make room and start again with --resume"
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.checkpoint_steps()[:-keep]:
            shutil.rmtree(self.checkpoint(old))

    def read_checkpoint(self, step: int, name: str) -> Any:
        path = self.checkpoint(step) / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def append_rollouts(self, lines: Iterable[dict[str, Any]]) -> None:
        with self.rollouts_path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def truncate_rollouts(self, last_step: int) -> None:
        """Forget what was trained after ``last_step``: it will be trained again from there."""
        if not self.rollouts_path.exists():
            return
        kept = [
            line
            for line in self.rollouts_path.read_text().splitlines(keepends=True)
            if line.endswith("\n") and json.loads(line)["step"] <= last_step
        ]
        partial = self.rollouts_path.with_suffix(".partial")
        write_synced(partial, "".join(kept))
        partial.replace(self.rollouts_path)

    def close(self) -> None:
        self._lock.close()


def choose_run_path(root: Path, name: str, *, resume: bool) -> Path:
    """``root/name-NNN``: the next free number, or the highest that exists when resuming.

    Raises:
        ConfigError: there is nothing to resume.
    """
    taken = [
        int(match[1])
        for path in root.glob(f"{name}-*")
        if (match := re.fullmatch(re.escape(name) + r"-(\d{3})", path.name))
    ]
    if resume:
        if not taken:
            raise ConfigError(f"--resume: there is no run {name}-NNN in {root}; give --output")
        return root / f"{name}-{max(taken):03d}"
    return root / f"{name}-{max(taken, default=0) + 1:03d}"
