"""Metrics on disk: ``metrics.jsonl``, one line per step, and TensorBoard events beside it.

The JSONL file is the truth: a step is on the disk when ``append`` returns, and a run that goes on
from a checkpoint first cuts the file back to the checkpoint's step.  TensorBoard hides the events
of the steps that were cut.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from asystem_bridge.errors import BridgeError
from asystem_bridge.report.metrics import StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_SECTIONS = {
    "reward": ("reward_mean", "reward_std", "groups_trained", "groups_with_signal",
               "rollouts_trained", "completion_length_mean"),
    "optimizer": ("loss", "grad_norm", "learning_rate", "policy_version"),
    "icepop": ("masked_fraction", "masked_low_fraction", "masked_high_fraction",
               "nonfinite_tokens", "ratio_min", "ratio_mean", "ratio_max"),
    "discrepancy": ("logprob_diff_mean", "logprob_diff_max", "kl_k1", "kl_k3",
                    "canary_max_abs_logprob_diff", "canary_tolerance"),
    "tokens": ("token_budget", "budget_used_tokens", "budget_overshoot_tokens",
               "generated_tokens", "trained_tokens", "resumed_tokens", "purged_tokens",
               "dropped_tokens", "reprefilled_tokens"),
    "pool": ("rollouts_resumed", "rollouts_purged", "groups_dropped", "groups_waiting",
             "pool_size", "decode_steps"),
}  # fmt: skip
"""TensorBoard groups scalars by the part of the tag before the slash."""


class MetricsLog:
    """The metrics of one run.

    Args:
        run_dir: holds ``metrics.jsonl`` and ``tensorboard/``.
        resume_step: ``None`` begins a new run; N goes on after step N: later records are cut off.

    Raises:
        BridgeError: a new run finds the metrics of another one, the file is damaged, or the disk
            does not take it.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        self._records: list[StepRecord] = []
        if self.path.exists():
            if resume_step is None:
                raise BridgeError(
                    f"{self.path} exists: {run_dir} holds another run. "
                    "Go on with it (--resume) or choose another folder"
                )
            self._records = [r for r in read_records(self.path) if r.step <= resume_step]
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.path, "".join(r.to_json() + "\n" for r in self._records))
            self._file = self.path.open("ab", buffering=0)
            self._tensorboard: SummaryWriter = SummaryWriter(
                run_dir / "tensorboard",
                purge_step=None if resume_step is None else resume_step + 1,
            )
        except OSError as error:
            raise _not_written(self.path, error) from error

    @property
    def records(self) -> list[StepRecord]:
        """All steps of the run so far, in order; those before a resume included."""
        return list(self._records)

    def append(self, record: StepRecord) -> None:
        """Write one step; it is on the disk when this returns.

        Raises:
            ValueError: the step does not follow the last one.
            BridgeError: the disk did not take it; ``metrics.jsonl`` is as it was before.
        """
        if self._records and record.step <= self._records[-1].step:
            raise ValueError(f"step {record.step} after step {self._records[-1].step}")
        size_bytes = self._file.seek(0, os.SEEK_END)
        try:
            _write_all(self._file.fileno(), (record.to_json() + "\n").encode())
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size_bytes)
            raise _not_written(self.path, error) from error
        self._records.append(record)
        try:
            self._append_to_tensorboard(record)
        except OSError as error:
            raise _not_written(self.path.with_name("tensorboard"), error) from error

    def close(self) -> None:
        """Close the files.  Nothing is lost without it: every step is flushed."""
        self._file.close()
        try:
            self._tensorboard.close()
        except OSError as error:
            raise _not_written(self.path.with_name("tensorboard"), error) from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append_to_tensorboard(self, record: StepRecord) -> None:
        board = self._tensorboard
        for section, names in TENSORBOARD_SECTIONS.items():
            for name in names:
                board.add_scalar(f"{section}/{name}", getattr(record, name), record.step)
        for phase, seconds in record.phase_s.items():
            board.add_scalar(f"phase_s/{phase}", seconds, record.step)
        for name in ("retention_histogram", "versions_per_rollout_histogram"):
            counts: Mapping[int, int] = getattr(record, name)
            if counts:
                self._add_histogram(f"pool/{name}", counts, record.step)
        board.flush()

    def _add_histogram(self, tag: str, counts: Mapping[int, int], step: int) -> None:
        values = sorted(counts)
        self._tensorboard.add_histogram_raw(
            tag,
            min=values[0],
            max=values[-1],
            num=sum(counts.values()),
            sum=sum(value * counts[value] for value in values),
            sum_squares=sum(value * value * counts[value] for value in values),
            bucket_limits=[value + 0.5 for value in range(values[0], values[-1] + 1)],
            bucket_counts=[counts.get(value, 0) for value in range(values[0], values[-1] + 1)],
            global_step=step,
        )


def read_records(path: Path) -> list[StepRecord]:
    """The records of a ``metrics.jsonl``.

    A last line without its newline is what a killed process left of an unfinished ``append``: it
    is not a step.

    Raises:
        BridgeError: a whole line is no step record.
    """
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(StepRecord.from_json(line))
        except ValueError as error:
            raise BridgeError(f"{path}, line {number}: {error}") from error
    return records


def _write_all(descriptor: int, data: bytes) -> None:
    """A raw write may take a part only (the rest of a full disk's last page)."""
    while data:
        data = data[os.write(descriptor, data) :]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def _not_written(path: Path, error: OSError) -> BridgeError:
    return BridgeError(
        f"cannot write {path}: {error.strerror or error}. The run stops; once the disk takes files "
        "again, go on from the last checkpoint with --resume"
    )
