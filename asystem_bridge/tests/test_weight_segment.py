"""The shared-memory segment: layout, sharing between processes, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asystem_bridge.weights.segment import (
    ALIGNMENT_BYTES,
    SegmentLayout,
    WeightSegment,
    WeightSegmentError,
)

TENSORS = {
    "model.embed_tokens.weight": ((7, 5), torch.bfloat16),
    "model.layers.0.mlp.gate.expert_bias": ((3,), torch.float32),
    "model.norm.weight": ((5,), torch.bfloat16),
    "step": ((), torch.int64),
}

# Adds one to every tensor, then waits: the parent looks at the result or kills it.
OTHER_PROCESS = """
import json, sys
from asystem_bridge.weights.segment import SegmentLayout, WeightSegment
path, layout = sys.argv[1], SegmentLayout.from_state(json.loads(sys.argv[2]))
segment = WeightSegment.open(path, layout)
for view in segment.views.values():
    view += 1
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def segment():
    made = WeightSegment.create(SegmentLayout.from_tensors(TENSORS))
    yield made
    made.close()


def start_writer(segment: WeightSegment) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [
            sys.executable, "-c", OTHER_PROCESS,
            segment.path, json.dumps(segment.layout.to_state()),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3)
dtypes = st.sampled_from([torch.bfloat16, torch.float32, torch.int8])


@given(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=12))
def test_tensors_are_aligned_in_order_and_do_not_overlap(tensors):
    layout = SegmentLayout.from_tensors({str(i): tensor for i, tensor in enumerate(tensors)})
    end_bytes = 0
    for entry, (shape, dtype) in zip(layout.entries, tensors, strict=True):
        assert entry.offset_bytes % ALIGNMENT_BYTES == 0
        assert end_bytes <= entry.offset_bytes < end_bytes + ALIGNMENT_BYTES
        end_bytes = entry.offset_bytes + torch.empty(shape, dtype=dtype).nbytes
    assert layout.total_bytes == end_bytes
    assert SegmentLayout.from_state(json.loads(json.dumps(layout.to_state()))) == layout


def test_views_have_the_shapes_and_begin_with_zeros(segment):
    for name, (shape, dtype) in TENSORS.items():
        view = segment.views[name]
        assert (tuple(view.shape), view.dtype) == (shape, dtype)
        assert not view.any()


def test_another_process_writes_what_this_one_reads(segment):
    for number, view in enumerate(segment.views.values()):
        view.fill_(number)
    process = start_writer(segment)
    process.communicate()
    for number, view in enumerate(segment.views.values()):
        assert (view == number + 1).all()


def test_a_reader_keeps_the_memory_when_the_creator_closes(segment):
    reader = WeightSegment.open(segment.path, segment.layout)
    segment.views["model.norm.weight"].fill_(2.0)
    segment.close()
    assert (reader.views["model.norm.weight"] == 2.0).all()
    with pytest.raises(WeightSegmentError, match="its creator must be alive"):
        WeightSegment.open(reader.path, reader.layout)
    reader.close()


def test_a_view_outlives_close(segment):
    view = segment.views["model.embed_tokens.weight"]
    segment.close()
    view.fill_(1.0)
    assert (view == 1.0).all()


def test_killed_processes_leave_nothing_behind():
    before = set(os.listdir("/dev/shm"))
    owner = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, torch\n"
            "from asystem_bridge.weights.segment import SegmentLayout, WeightSegment\n"
            "layout = SegmentLayout.from_tensors({'w': ((1 << 20,), torch.float32)})\n"
            "print(WeightSegment.create(layout).path, flush=True)\n"
            "sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    path = owner.stdout.readline().strip()
    layout = SegmentLayout.from_tensors({"w": ((1 << 20,), torch.float32)})
    WeightSegment.open(path, layout).close()  # it was there
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert not Path(path).exists()
    assert {name for name in os.listdir("/dev/shm") if "asystem" in name} <= before


def test_too_little_memory_is_an_error_and_not_a_bus_error(monkeypatch):
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(WeightSegmentError, match=r"cannot reserve 4 MiB .*No space left"):
        WeightSegment.create(SegmentLayout.from_tensors({"w": ((1 << 20,), torch.float32)}))
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_layout_of_another_segment_is_refused(segment):
    other = SegmentLayout.from_tensors({"w": ((3,), torch.float32)})
    with pytest.raises(WeightSegmentError, match="the layout needs 12"):
        WeightSegment.open(segment.path, other)


def test_a_file_that_is_no_segment_is_refused(tmp_path, segment):
    ordinary = tmp_path / "weights"
    ordinary.write_bytes(bytes(segment.layout.total_bytes))
    with pytest.raises(WeightSegmentError, match="not a weight segment"):
        WeightSegment.open(str(ordinary), segment.layout)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "at least one tensor"),
        ({"w": ((2, 0), torch.float32)}, r"w: shape \(2, 0\) has no elements"),
    ],
)
def test_impossible_layouts_are_refused(tensors, message):
    with pytest.raises(WeightSegmentError, match=message):
        SegmentLayout.from_tensors(tensors)


@pytest.mark.parametrize("state", [{}, {"entries": [["w", [2]]]}, {"entries": []}])
def test_a_damaged_state_is_refused(state):
    with pytest.raises(WeightSegmentError, match="SegmentLayout"):
        SegmentLayout.from_state(state)


def test_an_unknown_dtype_is_named(segment):
    state = segment.layout.to_state()
    state["entries"][0][2] = "bfloat17"
    with pytest.raises(WeightSegmentError, match="'bfloat17' is not a torch dtype"):
        WeightSegment.open(segment.path, SegmentLayout.from_state(state))
