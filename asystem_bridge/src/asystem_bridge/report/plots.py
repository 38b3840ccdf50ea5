"""The report's pictures: what the Ring-1T report plots for IcePop and C3PO++ (section 2.3).

Each ``*_figure`` takes the records of a run, one or more, and returns a matplotlib figure; only
``save_plots`` writes files.  No pyplot: nothing here touches a display or global state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from asystem_bridge.report.metrics import FAILURE_DISCREPANCY, PHASES, StepRecord
from asystem_bridge.report.units import format_count

# Okabe and Ito's palette: told apart with every kind of colour blindness.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#666666"
PHASE_COLOURS = dict(zip(PHASES, (BLUE, YELLOW, ORANGE, GREEN, SKY, PINK, GREY), strict=True))

MARKED_STEPS = 40
"""Up to so many steps each point has its marker and bars have gaps between them."""
MOST_BARS = 120
SMALLEST_DRAWN = 1e-8
"""Exact zeros have no place on a logarithmic axis; they are drawn here."""

Array = NDArray[np.float64]


def reward_figure(records: Sequence[StepRecord]) -> Figure:
    """Mean reward per step and its running mean over the last tenth of the run."""
    figure, axes = _step_axes(
        records, "Reward", "mean reward of a trained rollout\n(the task's units)"
    )
    steps, rewards = _steps(records), _series(records, "reward_mean")
    window = running_window(len(records))
    few = len(records) <= MARKED_STEPS
    axes.plot(
        steps, rewards, color=SKY, marker="o" if few else None, linewidth=1.2, label="per step"
    )
    axes.plot(
        steps,
        running_mean(rewards, window),
        color=BLUE,
        linewidth=2.2,
        label=f"mean of the last {window} steps",
    )
    _legend(axes)
    return figure


def discrepancy_figure(records: Sequence[StepRecord]) -> Figure:
    """How far trainer and engine disagree on a token's log-prob.  Infinities leave gaps."""
    label = r"$|\log\,p_\mathrm{train} - \log\,p_\mathrm{infer}|$  (nats)"
    figure, axes = _step_axes(records, "Trainer against engine", label)
    steps, marker = _steps(records), "." if len(records) <= MARKED_STEPS else None
    for name, label, colour in (
        ("logprob_diff_max", "maximum over the trained tokens", ORANGE),
        ("logprob_diff_mean", "mean over the trained tokens", BLUE),
        ("canary_max_abs_logprob_diff", "canary (fixed tokens)", GREEN),
    ):
        drawn = np.maximum(_series(records, name), SMALLEST_DRAWN)
        axes.plot(steps, drawn, color=colour, marker=marker, linewidth=1.5, label=label)
    axes.axhline(
        FAILURE_DISCREPANCY,
        color="black",
        linestyle="--",
        linewidth=1,
        zorder=5,  # above the lines that cross it
        label=f"{FAILURE_DISCREPANCY}: a mean above it precedes failure",
    )
    axes.axhline(
        records[-1].canary_tolerance,
        color=GREEN,
        linestyle=":",
        linewidth=1.5,
        label="canary tolerance",
    )
    axes.set_yscale("log")
    axes.margins(y=0.08)
    _legend(axes)
    return figure


def masked_figure(records: Sequence[StepRecord]) -> Figure:
    """The share of tokens that IcePop takes out of the loss, by the bound they crossed."""
    figure, axes = _step_axes(
        records, "Masked by IcePop", "masked share of tokens  (‰)", binned=True
    )
    low = 1000 * _series(records, "masked_low_fraction")
    high = 1000 * _series(records, "masked_high_fraction")
    parts = [
        (low, r"$k < \alpha$: the engine is surer", BLUE),
        (high, r"$k > \beta$: the trainer is surer", ORANGE),
    ]
    if any(record.nonfinite_tokens for record in records):
        rest = 1000 * _series(records, "masked_fraction") - low - high
        parts.append((rest.clip(min=0), r"$k$ not finite", RED))
    _stack(axes, records, parts)
    _legend(axes)
    return figure


def phases_figure(records: Sequence[StepRecord]) -> Figure:
    """Where the time of a step goes."""
    figure, axes = _step_axes(records, "Time per phase", "time  (s)", binned=True)
    parts = [
        (np.array([record.phase_s.get(phase, 0.0) for record in records]), phase, colour)
        for phase, colour in PHASE_COLOURS.items()
        if any(phase in record.phase_s for record in records)
    ]
    _stack(axes, records, parts)
    _legend(axes)
    return figure


def tokens_figure(records: Sequence[StepRecord]) -> Figure:
    """Tokens of each step against the budget that ends it."""
    figure, axes = _step_axes(records, "Tokens per step", "tokens", binned=True)
    steps, marker = bin_means(_steps(records)), "." if len(records) <= MARKED_STEPS else None
    for name, label, colour in (
        ("generated_tokens", "generated", BLUE),
        ("trained_tokens", "trained", ORANGE),
        ("resumed_tokens", "resumed: kept from earlier steps", GREEN),
        ("purged_tokens", "purged: rollouts begun anew", RED),
    ):
        values = bin_means(_series(records, name))
        axes.plot(steps, values, color=colour, marker=marker, linewidth=1.5, label=label)
    axes.plot(
        steps,
        bin_means(_series(records, "token_budget")),
        color="black",
        linestyle="--",
        linewidth=1,
        marker="_" if len(records) == 1 else None,
        label="token budget",
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def retention_figure(records: Sequence[StepRecord]) -> Figure:
    """How long trained rollouts lived, and how many policies wrote them; the whole run."""
    figure = _blank_figure()
    panels: Any = figure.subplots(1, 2)
    for axes, name, title, label in zip(
        panels,
        ("retention_histogram", "versions_per_rollout_histogram"),
        ("Retention", "Policy versions in a rollout"),
        ("iterations outlived unfinished", "policy versions that sampled its tokens"),
        strict=True,
    ):
        counts: Counter[int] = Counter()
        for record in records:
            counts.update(getattr(record, name))
        values = sorted(counts) or [0]
        bars = axes.bar(values, [counts[value] for value in values], color=BLUE, width=0.8)
        if len(values) <= 10:
            axes.bar_label(bars, [format_count(counts[value]) for value in values], padding=2)
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0, top=None if counts else 1)
        axes.set_xlim(min(values) - 0.7, max(max(values), min(values) + 2) + 0.7)
        axes.xaxis.set_major_locator(_whole_numbers(10))
        axes.yaxis.set_major_locator(_whole_numbers(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.set_ylabel("trained rollouts")
        _tidy(axes)
    return figure


FIGURES: dict[str, Callable[[Sequence[StepRecord]], Figure]] = {
    "reward": reward_figure,
    "discrepancy": discrepancy_figure,
    "masked_share": masked_figure,
    "time_per_phase": phases_figure,
    "tokens_per_step": tokens_figure,
    "retention": retention_figure,
}


def save_plots(records: Sequence[StepRecord], folder: Path) -> list[Path]:
    """Draw all figures as ``folder/<name>.png``; paths in the order of ``FIGURES``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        paths.append(folder / f"{name}.png")
        draw(records).savefig(paths[-1], dpi=120)
    return paths


def bin_steps(step_count: int) -> int:
    """Steps that one bar of a long run stands for: a picture has room for ``MOST_BARS``."""
    return -(-step_count // MOST_BARS)


def bin_means(values: Array) -> Array:
    """Means over runs of ``bin_steps`` values (the last may be shorter)."""
    size = bin_steps(len(values))
    return np.array([_present_mean(values[i : i + size]) for i in range(0, len(values), size)])


def running_window(step_count: int) -> int:
    """A tenth of the run, at least 2 steps."""
    return max(2, round(step_count / 10))


def running_mean(values: Array, window: int) -> Array:
    """Mean of the last ``window`` values at each place."""
    ends = range(1, len(values) + 1)
    return np.array([_present_mean(values[max(0, end - window) : end]) for end in ends])


def _present_mean(values: Array) -> float:
    """Mean of what is not missing (``nan``)."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def _steps(records: Sequence[StepRecord]) -> Array:
    return np.array([record.step for record in records], dtype=np.float64)


def _series(records: Sequence[StepRecord], name: str) -> Array:
    values = np.array([getattr(record, name) for record in records], dtype=np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def _blank_figure() -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
    return Figure(figsize=(9, 4), layout=layout)


def _step_axes(
    records: Sequence[StepRecord], title: str, label: str, *, binned: bool = False
) -> tuple[Figure, Axes]:
    figure = _blank_figure()
    axes = figure.subplots()
    axes.set_title(title)
    size = bin_steps(len(records)) if binned else 1
    axes.set_xlabel("step" if size == 1 else f"step  (drawn: means of {size} steps)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(_whole_numbers(10))
    margin = 0.6 if len(records) > 1 else 1
    axes.set_xlim(records[0].step - margin, records[-1].step + margin)
    _tidy(axes)
    return figure, axes


def _stack(
    axes: Axes, records: Sequence[StepRecord], parts: Sequence[tuple[Array, str, str]]
) -> None:
    """Stacked bars, one per step; without gaps where there are many."""
    steps = bin_means(_steps(records))
    few = len(records) <= MARKED_STEPS
    half = 0.35 if few else bin_steps(len(records)) / 2
    bottom = np.zeros(len(steps))
    for values, label, colour in parts:
        top = bottom + np.nan_to_num(bin_means(values))
        if few:
            axes.bar(steps, top - bottom, 2 * half, bottom=bottom, color=colour, label=label)
        else:  # one area: adjoining bars would show seams
            axes.fill_between(
                np.repeat(steps, 2) + np.tile([-half, half], len(steps)),
                np.repeat(bottom, 2),
                np.repeat(top, 2),
                color=colour,
                linewidth=0,
                label=label,
            )
        bottom = top
    axes.set_ylim(0, 1.05 * bottom.max() if bottom.max() > 0 else 1)


def _legend(axes: Axes) -> None:
    """Below the axes, where it can hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if sum(map(len, labels)) < 80 else min(3, len(labels))
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _whole_numbers(most: int) -> MaxNLocator:
    return MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
