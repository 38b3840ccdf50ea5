"""The report of a run: pictures that can be read, a table that says what the records say."""

from __future__ import annotations

import io
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from step_records import make_record, make_records

from asystem_bridge.errors import BridgeError
from asystem_bridge.report import plots
from asystem_bridge.report.plots import FIGURES, bin_means, running_mean, save_plots
from asystem_bridge.report.summary import findings, print_summary, summary_rows, write_report
from asystem_bridge.report.writers import read_records

EXTRA = {"model": "tiny | MoE", "vllm": "0.31.0+cpu", "peak memory": "7.1 GiB"}

AXIS_LABELS = {
    "reward": [("step", "mean reward of a trained rollout\n(the task's units)")],
    "discrepancy": [
        ("step", r"$|\log\,p_\mathrm{train} - \log\,p_\mathrm{infer}|$  (nats)"),
    ],
    "masked_share": [("step", "masked share of tokens  (‰)")],
    "time_per_phase": [("step", "time  (s)")],
    "tokens_per_step": [("step", "tokens")],
    "retention": [
        ("iterations outlived unfinished", "trained rollouts"),
        ("policy versions that sampled its tokens", "trained rollouts"),
    ],
}


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text: drawing takes seconds."""
    monkeypatch.setattr(plots, "save_plots", lambda records, folder: [])


def lines_of(figure: Figure) -> dict[str, np.ndarray]:
    """The drawn values by their legend's text."""
    return {str(line.get_label()): np.array(line.get_ydata()) for line in figure.axes[0].lines}


@pytest.mark.parametrize("steps", [1, 3, 60, 500])
@pytest.mark.parametrize("name", list(FIGURES))
def test_axes_are_labelled_and_nothing_is_cut_or_covered(name: str, steps: int) -> None:
    records = make_records(steps)
    figure = FIGURES[name](records)
    figure.draw_without_rendering()
    labels = [(re.sub(r"  \(drawn.*", "", a.get_xlabel()), a.get_ylabel()) for a in figure.axes]
    assert labels == AXIS_LABELS[name]

    inside = figure.bbox.padded(1)
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for box in boxes:
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1, f"{name} is cut"
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1, f"{name} is cut"
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])

    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 1 <= len(ticks) <= 12
        assert all(float(tick).is_integer() for tick in ticks)
        extents = [
            label.get_window_extent()
            for label, tick in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
            if low <= tick <= high
        ]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(extents))


def test_legends_name_what_is_drawn() -> None:
    texts = {
        name: [text.get_text() for text in draw(make_records(3)).legends[0].get_texts()]
        for name, draw in FIGURES.items()
        if name != "retention"  # one colour, told by its title
    }
    assert texts["reward"] == ["per step", "mean of the last 2 steps"]
    assert texts["time_per_phase"] == ["rollout", "train", "canary"]
    assert texts["tokens_per_step"] == [
        "generated",
        "trained",
        "resumed: kept from earlier steps",
        "purged: rollouts begun anew",
        "token budget",
    ]
    assert "0.05: a mean above it precedes failure" in texts["discrepancy"]
    assert len(texts["masked_share"]) == 2
    masked = plots.masked_figure([make_record(1, nonfinite_tokens=3)])
    assert len(masked.legends[0].get_texts()) == 3


def test_lines_are_the_records_figures() -> None:
    records = make_records(30)
    reward = lines_of(plots.reward_figure(records))
    np.testing.assert_allclose(reward["per step"], [r.reward_mean for r in records])
    assert reward["mean of the last 3 steps"][9] == pytest.approx(
        sum(r.reward_mean for r in records[7:10]) / 3
    )
    discrepancy = lines_of(plots.discrepancy_figure(records))
    np.testing.assert_allclose(
        discrepancy["mean over the trained tokens"], [r.logprob_diff_mean for r in records]
    )
    assert discrepancy["0.05: a mean above it precedes failure"][0] == 0.05
    tokens = lines_of(plots.tokens_figure(records))
    np.testing.assert_allclose(tokens["generated"], [r.generated_tokens for r in records])


def test_stacks_add_up() -> None:
    records = make_records(3)
    masked = plots.masked_figure(records).axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in masked.patches[3:]]
    np.testing.assert_allclose(tops, [1000 * r.masked_fraction for r in records])
    phases = plots.phases_figure(records).axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in phases.patches[-3:]]
    np.testing.assert_allclose(tops, [r.step_s for r in records])


def test_retention_counts_the_whole_run() -> None:
    heights = [
        [bar.get_height() for bar in axes.patches]
        for axes in plots.retention_figure(make_records(10)).axes
    ]
    assert heights == [[120, 30, 10], [120, 40]]


def test_long_runs_are_drawn_in_means() -> None:
    values = np.arange(500.0)
    means = bin_means(values)
    np.testing.assert_allclose(means, values.reshape(100, 5).mean(axis=1))
    assert len(bin_means(np.arange(503.0))) == 101
    np.testing.assert_array_equal(bin_means(values[:60]), values[:60])
    label = plots.tokens_figure(make_records(500)).axes[0].get_xlabel()
    assert label == "step  (drawn: means of 5 steps)"


def test_running_mean_leaves_out_missing_values() -> None:
    values = np.array([1.0, math.nan, 3.0, 8.0])
    np.testing.assert_allclose(running_mean(values, 2), [1.0, 1.0, 3.0, 5.5])
    assert np.isnan(running_mean(np.array([math.nan]), 2)).all()


def test_extreme_figures_are_drawn(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("reward_mean", "logprob_diff_mean", "logprob_diff_max"), math.nan)
    records = [
        make_record(1, **nothing, masked_fraction=math.nan, masked_low_fraction=math.nan,
                    retention_histogram={}, versions_per_rollout_histogram={}, phase_s={}),
        make_record(2, logprob_diff_max=math.inf, canary_max_abs_logprob_diff=0.0),
        make_record(9),
    ]  # fmt: skip
    for count in (1, 3):
        assert len(save_plots(records[:count], tmp_path)) == len(FIGURES)


def test_report_folder(tmp_path: Path) -> None:
    records = make_records(25)
    folder = write_report(tmp_path, "steps = 25\n", records, EXTRA)
    assert folder == tmp_path / "report"
    assert read_records(folder / "metrics.jsonl") == records
    assert (folder / "config.toml").read_text() == "steps = 25\n"
    text = (folder / "report.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(linked) == sorted(f"plots/{name}.png" for name in FIGURES)
    for link in linked:
        pixels = imread(folder / link)
        assert pixels.shape[:2] == (480, 1080)
        assert len(np.unique(pixels[:, :, 0])) > 20, "blank"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def table_of(text: str) -> dict[str, str]:
    cells = re.findall(r"^\| (.*?) \| (.*?) \|$", text.split("## ")[0], flags=re.MULTILINE)
    return {name.replace("\\|", "|"): value.replace("\\|", "|") for name, value in cells}


@pytest.mark.usefixtures("no_plots")
def test_table_says_what_the_records_say(tmp_path: Path) -> None:
    records = [
        make_record(
            step,
            reward_mean=reward,
            generated_tokens=1000,
            trained_tokens=trained,
            resumed_tokens=10,
            purged_tokens=20,
            dropped_tokens=30,
            masked_fraction=masked,
            masked_low_fraction=masked,
            masked_high_fraction=0.0,
            logprob_diff_mean=mean,
            canary_max_abs_logprob_diff=canary,
            phase_s={"rollout": 3.0, "train": 6.0, **({"checkpoint": 2.0} if step == 2 else {})},
        )
        for step, reward, trained, masked, mean, canary in (
            (1, 0.25, 1000, 0.001, 0.002, 2e-6),
            (2, 0.5, 3000, 0.003, 0.004, 1e-6),
        )
    ]
    table = table_of((write_report(tmp_path, "", records, EXTRA) / "report.md").read_text())
    expected = {
        **EXTRA,
        "steps": "2 (step 1 to 2)",
        "reward, first -> last step": "0.250 -> 0.500",
        "groups trained, of them with differing rewards": "8, 6",
        "tokens generated / trained": "2,000 / 4,000",
        "tokens resumed / purged / dropped": "20 / 40 / 60",
        # (1000 * 1 permille + 3000 * 3 permille) / 4000
        "masked share of the trained tokens": "2.50 ‰ (k too low 2.50 ‰, too high 0.00 ‰)",
        "mean |log p_train - log p_infer|, largest step": "0.0040 nats",
        "canary, largest |log-prob difference|": "2.0e-06 nats (tolerance 0.0010)",
        "time in steps": "20.0 s (10.0 s per step)",
        "seconds per step: rollout": "3.00 (30 %)",
        "seconds per step: train": "6.00 (60 %)",
        "seconds per step: checkpoint": "1.00 (10 %)",
    }
    assert table == expected
    assert dict(summary_rows(records, EXTRA)) == expected


def test_longer_runs_compare_means_of_their_ends() -> None:
    records = [make_record(step, reward_mean=step / 10) for step in range(1, 11)]
    rows = dict(summary_rows(records, {}))
    assert rows["reward, mean of the first -> last 2 steps"] == "0.150 -> 0.950"


@pytest.mark.usefixtures("no_plots")
def test_step_table_keeps_first_and_last(tmp_path: Path) -> None:
    text = (write_report(tmp_path, "", make_records(60), {}) / "report.md").read_text()
    steps = [int(step) for step in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)]
    assert len(steps) == 20
    assert (steps[0], steps[-1]) == (1, 60)
    assert "## Steps (20 of 60)" in text


def test_findings_name_the_steps() -> None:
    assert findings(make_records(5)) == []
    records = [
        make_record(1, logprob_diff_mean=0.06),
        make_record(2, nonfinite_tokens=1),
        make_record(3, nonfinite_tokens=2, groups_with_signal=0),
        make_record(4, canary_max_abs_logprob_diff=math.nan),
    ]
    found = findings(records)
    assert [re.search(r"\((steps?.*)\)$", text).group(1) for text in found] == [
        "step 4",
        "step 1",
        "steps 2, 3",
        "step 3",
    ]
    many = findings([make_record(step, nonfinite_tokens=1) for step in range(1, 9)])
    assert many[0].endswith("(steps 1, 2, 3, 4, 5 and 3 more)")


def test_report_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one step"):
        write_report(tmp_path, "", [], EXTRA)
    assert list(tmp_path.iterdir()) == []


def test_failed_report_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save_plots", lambda records, folder: [])
        folder = write_report(tmp_path, "old", make_records(2), EXTRA)

    def full(figure: Figure, *args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(BridgeError, match="No space left on device"):
        write_report(tmp_path, "new", make_records(3), EXTRA)
    assert (folder / "config.toml").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.usefixtures("no_plots")
def test_new_report_replaces_the_old_one_and_its_leftovers(tmp_path: Path) -> None:
    write_report(tmp_path, "old", make_records(2), EXTRA)
    (tmp_path / ".report-killed" / "new").mkdir(parents=True)
    folder = write_report(tmp_path, "new", make_records(3), EXTRA)
    assert (folder / "config.toml").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_summary_on_the_console(tmp_path: Path) -> None:
    file = io.StringIO()
    records = [make_record(1, logprob_diff_mean=0.06)]
    print_summary(Console(file=file, width=120), records, EXTRA, tmp_path / "report")
    text = file.getvalue()
    for name, value in summary_rows(records, EXTRA):
        assert re.search(rf"{re.escape(name)} *│ {re.escape(value)}", text)
    assert "Worth a look: the mean |log p_train - log p_infer| is above 0.05" in text
    assert text.endswith(f"Report: {tmp_path}/report/report.md\n")
