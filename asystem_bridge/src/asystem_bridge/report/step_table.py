"""One line per step: the columns that both progress views print.

The whole line takes less than 160 characters.  Where a terminal is narrower, the columns that are
least needed go first; nothing is ever wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asystem_bridge.report.metrics import PHASES, StepRecord
from asystem_bridge.report.units import format_count, format_seconds, format_small

GAP = " "
HEADER_EVERY_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Column:
    """Columns of one group stand side by side; the group's name and unit are above them.

    Attributes:
        group, name: the two rows of the header.
        width: in characters; values are aligned right.
        value: the cell of a record.
        rank: 0 is shown always; higher ranks give way first in a narrow terminal.
    """

    group: str
    name: str
    width: int
    value: Callable[[StepRecord], str]
    rank: int = 0


def _phase_column(phase: str) -> Column:
    def seconds(record: StepRecord) -> str:
        return format_seconds(record.phase_s[phase]) if phase in record.phase_s else "-"

    name = {"checkpoint": "save"}.get(phase, phase)
    return Column(
        group="seconds", name=name, width=max(len(name), 5), value=seconds,
        rank=2 if phase in ("rollout", "train") else 6,
    )  # fmt: skip


COLUMNS = (
    Column(group="", name="step", width=5, value=lambda r: str(r.step)),
    Column(group="", name="reward", width=7, value=lambda r: f"{r.reward_mean:.3f}"),
    Column(group="", name="loss", width=8, value=lambda r: format_small(r.loss), rank=1),
    Column(
        group="masked", name="‰", width=7, value=lambda r: f"{1000 * r.masked_fraction:.2f}",
    ),
    Column(
        group="|dlogp| (nats)", name="mean", width=7,
        value=lambda r: format_small(r.logprob_diff_mean),
    ),
    Column(
        group="|dlogp| (nats)", name="max", width=7,
        value=lambda r: format_small(r.logprob_diff_max), rank=4,
    ),
    Column(
        group="|dlogp| (nats)", name="canary", width=7,
        value=lambda r: format_small(r.canary_max_abs_logprob_diff),
    ),
    Column(
        group="budget", name="used %", width=6,
        value=lambda r: f"{100 * r.budget_used_tokens / r.token_budget:.0f}", rank=5,
    ),
    Column(
        group="tokens", name="generated", width=9,
        value=lambda r: format_count(r.generated_tokens), rank=3,
    ),
    Column(
        group="tokens", name="trained", width=7, value=lambda r: format_count(r.trained_tokens),
        rank=1,
    ),
    Column(
        group="tokens", name="resumed", width=7, value=lambda r: format_count(r.resumed_tokens),
        rank=4,
    ),
    Column(
        group="tokens", name="purged", width=6, value=lambda r: format_count(r.purged_tokens),
        rank=5,
    ),
    *(_phase_column(phase) for phase in PHASES),
    Column(group="seconds", name="total", width=7, value=lambda r: format_seconds(r.step_s)),
)  # fmt: skip


def columns_within(width: int | None) -> tuple[Column, ...]:
    """The columns that fit into ``width`` characters (``None``: all of them)."""
    columns = COLUMNS
    for rank in range(max(column.rank for column in columns), 0, -1):
        if width is None or _line_width(columns) <= width:
            break
        columns = tuple(column for column in columns if column.rank < rank)
    return columns


def header_lines(columns: Sequence[Column]) -> tuple[str, str]:
    """The groups, and the columns' own names below them."""
    groups: list[str] = []
    start = 0
    while start < len(columns):
        end = start
        while end < len(columns) and columns[end].group == columns[start].group:
            end += 1
        width = _line_width(columns[start:end])
        name = columns[start].group
        # A group of several columns is ruled over its whole width, so that it is seen to belong.
        rule = f" {name} ".center(width, "-") if end - start > 1 and name else name.rjust(width)
        groups.append(rule[:width])
        start = end
    names = GAP.join(column.name.rjust(column.width) for column in columns)
    return GAP.join(groups), names


def step_line(record: StepRecord, columns: Sequence[Column]) -> str:
    """The cells of one step under ``header_lines``."""
    return GAP.join(column.value(record).rjust(column.width) for column in columns)


def _line_width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + len(GAP) * (len(columns) - 1)
