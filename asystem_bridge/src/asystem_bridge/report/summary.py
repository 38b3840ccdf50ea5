"""The report of a run: ``report/`` with report.md, plots, the metrics and the configuration.

It is written beside its place and then renamed, so that it is whole or absent, also when the disk
is full or the process is killed.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asystem_bridge.errors import BridgeError
from asystem_bridge.report.metrics import FAILURE_DISCREPANCY, PHASES, StepRecord
from asystem_bridge.report.units import format_duration, format_seconds, format_small

MOST_TABLE_STEPS = 20
PLOT_TITLES = {
    "reward": "Reward",
    "discrepancy": "Disagreement of trainer and engine",
    "masked_share": "Tokens that IcePop masks",
    "time_per_phase": "Time per phase",
    "tokens_per_step": "Tokens per step",
    "retention": "Retention and policy versions of the trained rollouts",
}


def summary_rows(records: Sequence[StepRecord], extra: Mapping[str, str]) -> list[tuple[str, str]]:
    """The summary table: ``extra`` first, in its order, then what the records say.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("a report needs at least one step")
    first, last = records[0], records[-1]
    total_s = sum(record.step_s for record in records)
    rows = [
        *extra.items(),
        ("steps", f"{len(records)} (step {first.step} to {last.step})"),
        ("reward, first -> last step", f"{first.reward_mean:.3f} -> {last.reward_mean:.3f}"),
    ]
    window = len(records) // 5
    if window >= 2:
        early, late = _mean_reward(records[:window]), _mean_reward(records[-window:])
        rows.append(
            (f"reward, mean of the first -> last {window} steps", f"{early:.3f} -> {late:.3f}")
        )
    trained_tokens = sum(record.trained_tokens for record in records)
    rows += [
        ("groups trained, of them with differing rewards",
         f"{sum(r.groups_trained for r in records):,}, "
         f"{sum(r.groups_with_signal for r in records):,}"),
        ("tokens generated / trained",
         f"{sum(r.generated_tokens for r in records):,} / {trained_tokens:,}"),
        ("tokens resumed / purged / dropped",
         " / ".join(f"{sum(getattr(r, name) for r in records):,}"
                    for name in ("resumed_tokens", "purged_tokens", "dropped_tokens"))),
        ("masked share of the trained tokens", _masked_text(records, trained_tokens)),
        ("mean |log p_train - log p_infer|, largest step",
         f"{format_small(_largest(r.logprob_diff_mean for r in records))} nats"),
        ("canary, largest |log-prob difference|",
         f"{format_small(_largest(r.canary_max_abs_logprob_diff for r in records))} nats "
         f"(tolerance {format_small(last.canary_tolerance)})"),
        ("time in steps", f"{format_duration(total_s)} "
         f"({format_seconds(total_s / len(records))} s per step)"),
    ]  # fmt: skip
    for phase in PHASES:
        phase_s = [record.phase_s[phase] for record in records if phase in record.phase_s]
        if phase_s:
            rows.append(
                (
                    f"seconds per step: {phase}",
                    f"{format_seconds(sum(phase_s) / len(records))} "
                    f"({100 * sum(phase_s) / total_s if total_s else 0:.0f} %)",
                )
            )
    return rows


def findings(records: Sequence[StepRecord]) -> list[str]:
    """What in the figures deserves a look; empty when nothing does."""
    checks = (
        (
            "trainer and engine disagree on the canary beyond its tolerance",
            [r for r in records if not r.canary_max_abs_logprob_diff <= r.canary_tolerance],
        ),
        (
            f"the mean |log p_train - log p_infer| is above {FAILURE_DISCREPANCY}, which preceded "
            "failures in the Ring-1T report",
            [r for r in records if r.logprob_diff_mean > FAILURE_DISCREPANCY],
        ),
        (
            "trained tokens have a ratio that is not finite",
            [r for r in records if r.nonfinite_tokens],
        ),
        (
            "no group had differing rewards, so nothing was learned: choose tasks that the model "
            "solves sometimes",
            [r for r in records if r.groups_with_signal == 0],
        ),
    )
    return [
        f"{text} (step{'s' if len(found) > 1 else ''} {_steps_text([r.step for r in found])})"
        for text, found in checks
        if found
    ]


def write_report(
    run_dir: Path, config_text: str, records: Sequence[StepRecord], extra: Mapping[str, str]
) -> Path:
    """Write ``run_dir/report``, in place of an older one.

    Args:
        config_text: the configuration of the run, as TOML.
        extra: rows for the head of the summary table, in order: model, hosts and their versions,
            peak memory.

    Returns:
        The report's folder.

    Raises:
        ValueError: there are no records.
        BridgeError: the disk does not take it; an older report is still there.
    """
    from asystem_bridge.report.plots import save_plots

    report_dir = run_dir / "report"
    text = _report_text(records, extra)
    try:
        for leftover in run_dir.glob(".report-*"):  # of a process that was killed right here
            shutil.rmtree(leftover)
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=run_dir) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            save_plots(records, new / "plots")
            lines = "".join(record.to_json() + "\n" for record in records)
            (new / "metrics.jsonl").write_text(lines, encoding="utf-8")
            (new / "config.toml").write_text(config_text, encoding="utf-8")
            (new / "report.md").write_text(text, encoding="utf-8")
            if report_dir.exists():
                report_dir.rename(Path(temporary) / "old")
            new.rename(report_dir)
    except OSError as error:
        raise BridgeError(
            f"cannot write the report {report_dir}: {error.strerror or error}. "
            f"The figures are safe in {run_dir / 'metrics.jsonl'}"
        ) from error
    return report_dir


def print_summary(
    console: Console, records: Sequence[StepRecord], extra: Mapping[str, str], report_dir: Path
) -> None:
    """The summary table and where the report is."""
    table = Table(title="Summary", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(records, extra):
        table.add_row(name, value)
    console.print(table, markup=False, highlight=False)
    for text in findings(records):
        console.print(f"Worth a look: {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Report: {report_dir / 'report.md'}", markup=False, highlight=False, soft_wrap=True
    )


def _report_text(records: Sequence[StepRecord], extra: Mapping[str, str]) -> str:
    lines = ["# Report of the run", "", "| | |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in summary_rows(records, extra)]
    if found := findings(records):
        lines += ["", "## Worth a look", "", *(f"* {text}" for text in found)]
    lines += ["", "## Plots"]
    for name, title in PLOT_TITLES.items():
        lines += ["", f"![{title}](plots/{name}.png)"]
    lines += ["", *_step_lines(records)]
    lines += [
        "",
        "All figures of all steps are in [metrics.jsonl](metrics.jsonl), "
        "the configuration is in [config.toml](config.toml).",
        "",
    ]
    return "\n".join(lines)


def _step_lines(records: Sequence[StepRecord]) -> list[str]:
    shown = _evenly(records, MOST_TABLE_STEPS)
    note = "" if len(shown) == len(records) else f" ({len(shown)} of {len(records)})"
    head = (
        "step", "reward", "loss", "masked (‰)", "mean abs dlogp (nats)", "max abs dlogp (nats)",
        "canary (nats)", "budget used (tokens)", "generated", "trained", "resumed", "purged",
        "time (s)",
    )  # fmt: skip
    lines = [f"## Steps{note}", "", f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]
    for r in shown:
        cells = (
            str(r.step), f"{r.reward_mean:.3f}", format_small(r.loss),
            f"{1000 * r.masked_fraction:.2f}", format_small(r.logprob_diff_mean),
            format_small(r.logprob_diff_max), format_small(r.canary_max_abs_logprob_diff),
            f"{r.budget_used_tokens:,} of {r.token_budget:,}", f"{r.generated_tokens:,}",
            f"{r.trained_tokens:,}", f"{r.resumed_tokens:,}", f"{r.purged_tokens:,}",
            format_seconds(r.step_s),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _masked_text(records: Sequence[StepRecord], trained_tokens: int) -> str:
    """Per mille over all tokens of the run; a step counts by its tokens."""
    if not trained_tokens:
        return "no token was trained"

    def per_mille(name: str) -> str:
        weighted = (getattr(r, name) * r.trained_tokens for r in records if r.trained_tokens)
        return f"{1000 * sum(weighted) / trained_tokens:.2f} ‰"

    return (
        f"{per_mille('masked_fraction')} (k too low {per_mille('masked_low_fraction')}, "
        f"too high {per_mille('masked_high_fraction')})"
    )


def _mean_reward(records: Sequence[StepRecord]) -> float:
    rewards = [r.reward_mean for r in records if not math.isnan(r.reward_mean)]
    return sum(rewards) / len(rewards) if rewards else math.nan


def _largest(values: Iterable[float]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return max(present, default=math.nan)


def _evenly(records: Sequence[StepRecord], most: int) -> list[StepRecord]:
    """At most ``most`` of them, the first and the last included."""
    if len(records) <= most:
        return list(records)
    return [records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)]


def _steps_text(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:5]))
    return shown if len(steps) <= 5 else f"{shown} and {len(steps) - 5} more"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
