"""The live view of a terminal: the steps' lines scroll, and below them stands what runs now.

    ⠹ rollout ━━━━━━━━━━━━━━━━╸━━━━━━━ 812 of 1,200 tokens 0:00:07
    after step 3 of 60   pool 32, decode steps 118

The terminal is never in a state that must be undone: no alternate screen, no raw mode, no signal
handler, and the cursor stays visible, so that even a killed process leaves a usable prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from asystem_bridge.report.metrics import PHASES, StepRecord
from asystem_bridge.report.step_table import (
    HEADER_EVERY_STEPS,
    Column,
    columns_within,
    header_lines,
    step_line,
)
from asystem_bridge.report.units import amount_text, figures_text, format_duration

if TYPE_CHECKING:
    from typing import Self

REFRESHES_PER_S = 4


class _AmountColumn(TextColumn):
    """What is done, of how much: nothing for a phase that does not count."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        if task.total is None and not task.completed:
            return Text("")
        return Text(amount_text(task.completed, task.total, task.fields["unit"]))


class LiveProgress:
    """See ``Progress``.

    Args:
        console: a terminal.
        total_steps: of the run, when known.
    """

    def __init__(self, console: Console, *, total_steps: int | None = None) -> None:
        self._console = console
        self._total_steps = total_steps
        self._last_step = 0
        self._steps_printed = 0
        self._columns: tuple[Column, ...] = ()
        self._figures: dict[str, object] = {}
        self._task: TaskID | None = None
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            _AmountColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._live = Live(
            get_renderable=self._region,
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        self._console.show_cursor(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @contextmanager
    def phase(self, name: str, total: float | None = None, unit: str = "") -> Iterator[None]:
        self._figures = {}
        task = self._task = self._bar.add_task(name, total=total, unit=unit)
        try:
            yield
            if name not in PHASES:
                elapsed_s = self._bar.tasks[-1].elapsed or 0.0
                self.message(f"{name}: {format_duration(elapsed_s)}")
        finally:
            self._bar.remove_task(task)
            self._task = None

    def advance(self, amount: float = 1) -> None:
        if self._task is not None:
            self._bar.advance(self._task, amount)

    def show(self, **figures: object) -> None:
        # A new dictionary: the refreshing thread may be reading the old one.
        self._figures = {**self._figures, **figures}

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def step(self, record: StepRecord) -> None:
        columns = columns_within(self._console.width)
        if self._steps_printed % HEADER_EVERY_STEPS == 0 or columns != self._columns:
            for line in header_lines(columns):
                self._print_line(line, style="bold")
        self._columns = columns  # others after the window's size has changed
        self._steps_printed += 1
        self._last_step = record.step
        self._print_line(step_line(record, columns), style=_alarm_style(record))

    def _print_line(self, line: str, style: str) -> None:
        self._console.print(Text(line, style=style, no_wrap=True), overflow="crop", crop=True)

    def _region(self) -> RenderableType:
        """Called by the refreshing thread; one line, or two while there are figures."""
        of_total = f" of {self._total_steps}" if self._total_steps is not None else ""
        title = Text(f"after step {self._last_step}{of_total}", style="dim", no_wrap=True)
        figures = Text(figures_text(self._figures), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(self._bar.get_renderable(), Text.assemble(title, "   ", figures))


def _alarm_style(record: StepRecord) -> str:
    """Red where the loop stops by itself: the figures of that step are not to be trusted."""
    failed = not record.canary_max_abs_logprob_diff <= record.canary_tolerance
    return "bold red" if failed else ""
