"""What a run prints: the plain lines exactly, and what the live view leaves on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from step_records import make_record

from asystem_bridge.report.live_view import LiveProgress
from asystem_bridge.report.plain_lines import PlainProgress
from asystem_bridge.report.progress import make_progress
from asystem_bridge.report.step_table import COLUMNS, columns_within, header_lines, step_line
from asystem_bridge.report.units import format_count, format_duration, format_seconds, format_small

RECORD = make_record(
    7,
    reward_mean=0.7382,
    loss=-0.01234,
    masked_fraction=0.00162,
    logprob_diff_mean=0.00141,
    logprob_diff_max=0.03512,
    canary_max_abs_logprob_diff=2.42e-6,
    token_budget=1200,
    budget_used_tokens=1647,
    generated_tokens=12345,
    trained_tokens=1647,
    resumed_tokens=447,
    purged_tokens=60,
    phase_s={"rollout": 7.012, "reward": 0.041, "train": 11.96, "publish": 0.3, "canary": 0.4},
)
HEADER = (
    "                        masked ---- |dlogp| (nats) --- budget ------------ tokens ------------"
    " ----------------------- seconds ------------------------",
    " step  reward     loss       ‰    mean     max  canary used % generated trained resumed purged"
    " rollout reward train publish update canary  save   total",
)
LINE = (
    "    7   0.738  -0.0123    1.62  0.0014  0.0351 2.4e-06    137     12.3k    1647     447     60"
    "    7.01   0.04  12.0    0.30      -   0.40     -    19.7"
)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_plain_lines_exactly() -> None:
    clock = Clock()
    file = io.StringIO()
    with PlainProgress(file, clock_s=clock) as progress:
        progress.message("model: SmolLM2 [bold]not markup[/bold]")
        with progress.phase("start the engine"):
            clock.now_s = 83.42
        with progress.phase("rollout", total=1200, unit="tokens"):
            progress.advance(100)
            clock.now_s += 9.9
            progress.advance(100)  # too early for a line
            progress.show(pool=32, decode_steps=118)
            clock.now_s += 0.2
            progress.advance(612)
            clock.now_s += 9.9
            progress.advance(100)
        with progress.phase("train"):
            clock.now_s += 30
            progress.advance()
        progress.step(RECORD)
        progress.step(make_record(8))
    assert file.getvalue().splitlines() == [
        "model: SmolLM2 [bold]not markup[/bold]",
        "start the engine ...",
        "start the engine: 83.4 s",
        "rollout: 812 of 1,200 tokens, 10.1 s, pool 32, decode steps 118",
        "train: 1, 30.0 s",
        *HEADER,
        LINE,
        step_line(make_record(8), COLUMNS),
    ]


def test_plain_header_comes_again() -> None:
    file = io.StringIO()
    progress = PlainProgress(file)
    for step in range(1, 42):
        progress.step(make_record(step))
    lines = file.getvalue().splitlines()
    assert [i for i, line in enumerate(lines) if line == HEADER[1]] == [1, 23, 45]
    assert len(lines) == 41 + 3 * 2


def test_failed_phase_is_not_reported_as_done() -> None:
    file = io.StringIO()
    progress = PlainProgress(file)
    with pytest.raises(KeyboardInterrupt), progress.phase("start the engine"):
        raise KeyboardInterrupt
    assert file.getvalue() == "start the engine ...\n"


@pytest.mark.parametrize("width", [None, 160, 150, 132, 100, 80])
def test_columns_are_aligned_and_fit(width: int | None) -> None:
    columns = columns_within(width)
    extreme = make_record(
        99_999,
        reward_mean=-12.3456,
        loss=float("nan"),
        masked_fraction=1.0,
        logprob_diff_max=float("inf"),
        generated_tokens=123_456_789,
        budget_used_tokens=120_000,
        phase_s={"rollout": 12_345.6, "train": 99.96},
    )
    lines = [*header_lines(columns), step_line(RECORD, columns), step_line(extreme, columns)]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= (width or 160)
    names = [column.name for column in columns]
    assert {"step", "reward", "‰", "mean", "canary", "total"} <= set(names)
    ends = [match.end() for match in re.finditer(r"used %|\S+", lines[1])]
    for line in lines[2:]:
        assert [match.end() for match in re.finditer(r"\S+", line)] == ends


def test_narrower_terminals_lose_columns_one_rank_at_a_time() -> None:
    counts = [len(columns_within(width)) for width in (160, 132, 100, 80)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(COLUMNS)
    assert counts[-1] >= 8


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (format_count(0), "0"),
        (format_count(9999), "9999"),
        (format_count(12_345), "12.3k"),
        (format_count(999_499), "999k"),
        (format_count(999_600), "1.00M"),
        (format_count(74_121_000), "74.1M"),
        (format_count(2.5e9), "2.50G"),
        (format_seconds(0.041), "0.04"),
        (format_seconds(9.996), "10.0"),
        (format_seconds(99.96), "100"),
        (format_duration(12.34), "12.3 s"),
        (format_duration(245.2), "4 min 05 s"),
        (format_duration(7620), "2 h 07 min"),
        (format_small(0.0), "0"),
        (format_small(-0.0351), "-0.0351"),
        (format_small(2.42e-6), "2.4e-06"),
        (format_small(float("nan")), "nan"),
        (format_small(1234.0), "1.2e+03"),
    ],
)
def test_figures_are_short(shown: str, text: str) -> None:
    assert shown == text


def test_the_kind_of_view_follows_the_console() -> None:
    file = io.StringIO()
    assert isinstance(make_progress(Console(file=file)), PlainProgress)
    assert isinstance(make_progress(Console(file=file, force_terminal=True)), LiveProgress)
    dumb = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_progress(dumb), PlainProgress)


LIVE_RUN = """
import sys, time
from step_records import make_record
from asystem_bridge.report.progress import make_progress
with make_progress(total_steps=3) as progress:
    progress.message("model: [bold]no markup[/bold]")
    with progress.phase("start the engine"):
        time.sleep(0.1)
    for step in (1, 2):
        with progress.phase("rollout", total=1200, unit="tokens"):
            progress.advance(812)
            progress.show(pool=32, decode_steps=118)
            time.sleep(0.6)
            if step == 2 and sys.argv[1] == "wait":
                print("READY")
                time.sleep(60)
        progress.step(make_record(step))
    progress.step(make_record(3, canary_max_abs_logprob_diff=2.4))
print("after")
"""


class Terminal:
    """A process in a pseudo-terminal of 100 columns, and what it printed so far."""

    def __init__(self, mode: str) -> None:
        ours, theirs = pty.openpty()
        self.descriptor = ours
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", LIVE_RUN, mode],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "100",
                 "LINES": "30", "TERM": "xterm-256color", "NO_COLOR": "1"},
        )  # fmt: skip
        os.close(theirs)

    def read_until(self, text: str, timeout_s: float = 60.0) -> str:
        """Read until ``text`` was printed, or to the end where it is empty."""
        deadline_s = time.monotonic() + timeout_s
        while not text or text not in self.output:
            ready, _, _ = select.select([self.descriptor], [], [], 1.0)
            assert time.monotonic() < deadline_s, self.output
            if not ready:
                continue
            try:
                data = os.read(self.descriptor, 65536)
            except OSError:  # the process has closed the terminal
                break
            if not data:
                break
            self.output += data.decode(errors="replace")
        return self.output

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.descriptor)


def cursor_is_visible(output: str) -> bool:
    return output.rfind("\x1b[?25l") <= output.rfind("\x1b[?25h")


def test_live_view_in_a_terminal() -> None:
    terminal = Terminal("run")
    try:
        output = terminal.read_until("")
        assert terminal.process.wait(30) == 0, output
    finally:
        terminal.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    for expected in (
        "model: [bold]no markup[/bold]",
        "start the engine: 0.1",
        "812 of 1,200 tokens",
        "pool 32, decode steps 118",
        "after step 1 of 3",
        "after",
    ):
        assert expected in text
    columns = columns_within(100)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    for line in (
        *header_lines(columns),
        step_line(make_record(1), columns),
        step_line(make_record(2), columns),
    ):
        assert lines.count(line) == 1
    assert cursor_is_visible(output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_view_leaves_a_usable_terminal(number: signal.Signals) -> None:
    terminal = Terminal("wait")
    try:
        terminal.read_until("READY")
        terminal.process.send_signal(number)
        output = terminal.read_until("")
        code = terminal.process.wait(30)
    finally:
        terminal.close()
    assert code == -number  # an interpreter that KeyboardInterrupt ends dies by the signal
    assert cursor_is_visible(output)
    assert "\x1b[?1049h" not in output  # the alternate screen was never entered
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in output


def test_resized_terminal_gets_the_header_of_its_columns() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=160, no_color=True)
    view = LiveProgress(console)
    view.step(make_record(1))
    console.width = 100
    view.step(make_record(2))
    view.step(make_record(3))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    expected: list[str] = []
    for width, steps in ((160, (1,)), (100, (2, 3))):
        columns = columns_within(width)
        expected += header_lines(columns)
        expected += [step_line(make_record(step), columns) for step in steps]
    assert text.splitlines() == expected
