"""After each sync: do trainer and engine give fixed tokens the same log-probs?

Two engines with the same weights differ by rounding only; with one stale tensor they differ by
orders of magnitude more.  The tolerance must therefore lie between the two, and it depends on the
engine's dtype: the trainer computes in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from asystem_bridge.errors import CanaryError
from asystem_bridge.vllm_backend.tensor_report import TensorReport

DEFAULT_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}
"""Seen on a CPU with SmolLM2-135M: 2e-5 in float32, 0.1 to 0.3 in bfloat16."""

LISTED_TENSORS = 12


def max_abs_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """max |a - b| over two equally shaped lists of lists.

    Raises:
        ValueError: the shapes differ.
    """
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        raise ValueError(
            f"canary rows of {[len(row) for row in ours]} and {[len(row) for row in theirs]} tokens"
        )
    return max(
        abs(a - b)
        for ours_row, theirs_row in zip(ours, theirs, strict=True)
        for a, b in zip(ours_row, theirs_row, strict=True)
    )


def canary_error(
    difference: float, tolerance: float, version: int, reports: Sequence[TensorReport]
) -> CanaryError:
    """The error that stops the loop: how far apart, and which tensors differ."""
    differing = sorted(
        ((r.max_relative_error or 0.0, r.name) for r in reports if r.status == "differs"),
        reverse=True,
    )
    unknown = [report for report in reports if report.status == "not checkable"]
    listed = [f"  {name}: relative error {error:.2g}" for error, name in differing[:LISTED_TENSORS]]
    if len(differing) > LISTED_TENSORS:
        listed.append(f"  and {len(differing) - LISTED_TENSORS} more")
    if not differing:
        listed = ["  none of those that can be compared: look at how the engine uses its weights"]
    return CanaryError(
        f"policy version {version}: trainer and engine differ by {difference:.3g} in the log-prob "
        f"of a fixed token; the tolerance is {tolerance:.3g}. "
        f"Tensors of the engine that differ from the trainer's ({len(differing)} of "
        f"{len(reports)}, {len(unknown)} cannot be compared):\n" + "\n".join(listed)
    )
