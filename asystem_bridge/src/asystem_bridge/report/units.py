"""Figures as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping


def format_count(value: float) -> str:
    """At most five characters below a thousand billion: ``950``, ``12.3k``, ``1.05M``."""
    if value < 1e4:
        return f"{value:.0f}"
    divisor, suffix = (1e3, "k") if value < 999.5e3 else (1e6, "M")
    if value >= 999.5e6:
        divisor, suffix = 1e9, "G"
    scaled = value / divisor
    return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"


def format_seconds(value_s: float) -> str:
    """Without the unit, at most five characters below a day: ``0.04``, ``12.3``, ``1204``."""
    if math.isnan(value_s):
        return "nan"
    return f"{value_s:.{2 if value_s < 9.995 else 1 if value_s < 99.95 else 0}f}"


def format_duration(value_s: float) -> str:
    """With units: ``12.3 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if value_s < 99.95:
        return f"{format_seconds(value_s)} s"
    whole_s = round(value_s)
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02} s"
    return f"{whole_s // 3600} h {whole_s % 3600 // 60:02} min"


def format_small(value: float) -> str:
    """At most seven characters: ``0.0351``, ``2.4e-06``, ``0``, ``nan``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.1e}"


def amount_text(done: float, total: float | None, unit: str) -> str:
    """``812 of 1,200 tokens``."""
    of_total = f" of {total:,.0f}" if total is not None else ""
    return f"{done:,.0f}{of_total} {unit}".rstrip()


def figures_text(figures: Mapping[str, object]) -> str:
    """``pool 32, decode steps 118`` from names with underscores."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
