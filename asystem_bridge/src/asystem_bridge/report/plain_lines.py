"""Progress where there is no terminal: one line per event, for log files and pipes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from asystem_bridge.report.metrics import PHASES, StepRecord
from asystem_bridge.report.step_table import (
    HEADER_EVERY_STEPS,
    columns_within,
    header_lines,
    step_line,
)
from asystem_bridge.report.units import amount_text, figures_text, format_duration

if TYPE_CHECKING:
    from typing import Self

HEARTBEAT_S = 10.0


class PlainProgress:
    """See ``Progress``.  Every line is flushed at once.

    The phases of a step tell nothing by themselves, since the step's line holds their seconds,
    unless one takes long: then it reports each ``HEARTBEAT_S`` how far it is.

    Args:
        file: where the lines go.
        clock_s: replaced by tests.
    """

    def __init__(self, file: IO[str], *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock_s = clock_s
        self._steps_printed = 0
        self._phase: tuple[str, float | None, str] | None = None
        self._phase_start_s = self._last_line_s = 0.0
        self._done: float = 0
        self._figures: dict[str, object] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # every line has been flushed

    @contextmanager
    def phase(self, name: str, total: float | None = None, unit: str = "") -> Iterator[None]:
        self._phase = (name, total, unit)
        self._phase_start_s = self._last_line_s = self._clock_s()
        self._done = 0
        self._figures = {}
        if name not in PHASES:
            self.message(f"{name} ...")
        try:
            yield
            if name not in PHASES:
                self.message(f"{name}: {format_duration(self._clock_s() - self._phase_start_s)}")
        finally:
            self._phase = None

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now_s = self._clock_s()
        if self._phase is None or now_s - self._last_line_s < HEARTBEAT_S:
            return
        self._last_line_s = now_s
        name, total, unit = self._phase
        parts = [
            f"{name}: {amount_text(self._done, total, unit)}",
            format_duration(now_s - self._phase_start_s),
            figures_text(self._figures),
        ]
        self.message(", ".join(part for part in parts if part))

    def show(self, **figures: object) -> None:
        self._figures.update(figures)

    def message(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def step(self, record: StepRecord) -> None:
        columns = columns_within(None)
        if self._steps_printed % HEADER_EVERY_STEPS == 0:
            for line in header_lines(columns):
                self.message(line)
        self._steps_printed += 1
        self.message(step_line(record, columns))
