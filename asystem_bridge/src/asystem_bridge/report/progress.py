"""What a run says while it runs: a live view in a terminal, plain lines elsewhere.

Both print one line per step (``step_table``) that stays; the live view adds a region below it with
the phase under way.  Neither installs a signal handler nor runs anything but printing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from asystem_bridge.report.live_view import LiveProgress
from asystem_bridge.report.metrics import StepRecord
from asystem_bridge.report.plain_lines import PlainProgress

if TYPE_CHECKING:
    from typing import Self


class Progress(Protocol):
    """What the controller tells; calls come from one thread.  To be used in a ``with``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def phase(
        self, name: str, total: float | None = None, unit: str = ""
    ) -> AbstractContextManager[None]:
        """A part of the work, for the length of a ``with``; phases do not nest.

        Args:
            name: one of ``PHASES`` within a step, anything else before the first and after the
                last one.
            total: what ``advance`` counts up to, in ``unit``; ``None`` when it is not known.
        """

    def advance(self, amount: float = 1) -> None:
        """The phase went on by ``amount``; it may go beyond the phase's total."""

    def show(self, **figures: object) -> None:
        """Small live figures beside the phase, by name; those of the same name are replaced."""

    def message(self, text: str) -> None:
        """A line for the user."""

    def step(self, record: StepRecord) -> None:
        """A step has ended."""


def make_progress(console: Console | None = None, *, total_steps: int | None = None) -> Progress:
    """The live view when the console is a terminal that can move its cursor, else plain lines.

    Args:
        console: where to print; by default standard output.
        total_steps: of the run, so that the live view can tell how far it is.
    """
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console, total_steps=total_steps)
    return PlainProgress(console.file)
