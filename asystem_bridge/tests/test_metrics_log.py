"""The step record's JSON, and the files that hold the steps of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_records import make_record, make_records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asystem_bridge.errors import BridgeError
from asystem_bridge.report.metrics import PHASES, StepRecord
from asystem_bridge.report.writers import TENSORBOARD_SECTIONS, MetricsLog, read_records

counts = st.integers(min_value=0, max_value=10**12)
histograms = st.dictionaries(counts, counts, max_size=4)
by_annotation = {
    "int": counts,
    "float": st.floats(allow_nan=False),
    "dict[int, int]": histograms,
    "dict[str, float]": st.dictionaries(st.sampled_from(PHASES), st.floats(0, 1e6)),
}
any_record = st.builds(
    StepRecord, **{f.name: by_annotation[str(f.type)] for f in dataclasses.fields(StepRecord)}
)


@given(any_record)
def test_json_gives_the_record_back(record: StepRecord) -> None:
    assert StepRecord.from_json(record.to_json()) == record


def test_json_is_strict_also_with_missing_figures() -> None:
    line = make_record(1, loss=math.nan, ratio_max=math.inf).to_json()

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(line, parse_constant=reject)
    assert (data["loss"], data["ratio_max"]) == ("nan", "inf")
    assert "\n" not in line
    back = StepRecord.from_json(line)
    assert math.isnan(back.loss)
    assert back.ratio_max == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(rewrd_mean=1.0), r"no fields \['rewrd_mean'\]"),
        (lambda data: data.pop("grad_norm"), r"lacks the fields \['grad_norm'\]"),
        (lambda data: data.update(step="3"), "step = '3': must be of type int"),
        (lambda data: data.update(step=True), "step = True: must be of type int"),
        (lambda data: data.update(loss=None), "loss = None: must be of type float"),
        (lambda data: data.update(pool_size=-1), "pool_size = -1: a count must not be negative"),
        (lambda data: data["phase_s"].update(sleep=1.0), r"unknown phases \['sleep'\]"),
        (lambda data: data.update(retention_histogram=[1]), r"retention_histogram = \[1\]"),
    ],
)
def test_wrong_records_are_refused_by_name(change: Any, message: str) -> None:
    data = json.loads(make_record(1).to_json())
    change(data)
    with pytest.raises(ValueError, match=message):
        StepRecord.from_json(json.dumps(data))


def test_step_seconds_are_the_sum_of_the_phases() -> None:
    record = make_record(1, phase_s={"rollout": 1.5, "train": 2.0})
    assert record.step_s == 3.5


def test_log_is_read_back(tmp_path: Path) -> None:
    records = make_records(3)
    with MetricsLog(tmp_path) as log:
        for record in records:
            log.append(record)
            # On the disk at once, not when the log is closed.
            assert read_records(log.path)[-1] == record
    assert read_records(tmp_path / "metrics.jsonl") == records


def test_new_run_refuses_the_folder_of_another(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.append(make_record(1))
    with pytest.raises(BridgeError, match="holds another run"):
        MetricsLog(tmp_path)
    assert read_records(tmp_path / "metrics.jsonl") == [make_record(1)]


def test_resume_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for record in make_records(5):
            log.append(record)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(make_record(6).to_json()[:40])  # killed in the middle of a write
    again = make_record(4, loss=123.0)
    with MetricsLog(tmp_path, resume_step=3) as log:
        assert log.records == make_records(3)
        log.append(again)
        assert log.records == [*make_records(3), again]
    assert read_records(tmp_path / "metrics.jsonl") == [*make_records(3), again]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_steps_must_follow_each_other(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.append(make_record(2))
        with pytest.raises(ValueError, match="step 2 after step 2"):
            log.append(make_record(2))


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(make_record(1).to_json() + "\n{broken\n" + make_record(3).to_json() + "\n")
    with pytest.raises(BridgeError, match=r"metrics\.jsonl, line 2: "):
        MetricsLog(tmp_path, resume_step=3)


def test_tensorboard_has_every_figure_and_hides_cut_steps(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for record in make_records(3):
            log.append(record)
    again = make_record(2, loss=123.0)
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.append(again)

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("optimizer/loss")] == [
        (1, pytest.approx(make_record(1).loss)),
        (2, 123.0),
    ]
    seen = {
        tag.split("/")[1]: tag for tag in events.Tags()["scalars"] + events.Tags()["histograms"]
    }
    fields = {field.name for field in dataclasses.fields(StepRecord)}
    assert set(seen) == fields - {"step", "phase_s"} | set(again.phase_s)
    for section, names in TENSORBOARD_SECTIONS.items():
        for name in names:
            value = events.Scalars(f"{section}/{name}")[-1].value
            assert value == pytest.approx(getattr(again, name), rel=1e-6)

    histogram = events.Histograms("pool/versions_per_rollout_histogram")[-1].histogram_value
    assert list(histogram.bucket_limit) == [1.5, 2.5, 3.5]
    assert list(histogram.bucket) == [12, 0, 4]
    assert (histogram.min, histogram.max, histogram.num) == (1, 3, 16)
    assert (histogram.sum, histogram.sum_squares) == (12 + 3 * 4, 12 + 9 * 4)


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from step_records import make_record
from asystem_bridge.errors import BridgeError
from asystem_bridge.report.writers import MetricsLog, read_records

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(Path(sys.argv[1]))
log.append(make_record(1))
size_bytes = log.path.stat().st_size
# No file of this process may grow beyond here: the next line fits in part.
resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes + 100, resource.RLIM_INFINITY))
try:
    log.append(make_record(2))
except BridgeError as error:
    print(error)
assert log.path.stat().st_size == size_bytes
assert log.records == read_records(log.path) == [make_record(1)]
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a file size limit")
def test_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout
    assert "--resume" in done.stdout
