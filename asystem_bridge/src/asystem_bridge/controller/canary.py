"""After each sync: do trainer and engine give fixed tokens the same log-probs?

The trainer computes them with its weights rounded to the engine's dtype, so that what is left is
the engine's arithmetic.  One stale tensor makes the difference larger by orders of magnitude; the
tolerance lies between.  What the rounding itself does to the policy is not asked here: it shows in
the |dlogp| of the trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from asystem_bridge.errors import CanaryError
from asystem_bridge.vllm_backend.tensor_report import TensorReport

PROMPTS = 8
TOKENS = 16

DEFAULT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Seen on a CPU with SmolLM2-135M: 2e-5 in float32, 0.1 in bfloat16."""

LISTED_TENSORS = 12


class Canary:
    """The fixed tokens: what the engine answers greedily to a few prompts at the start of a run.

    Likely tokens, because a low-precision engine computes the log-prob of unlikely ones with an
    error that is large even where the weights are equal.

    Args:
        prompts: token ids.
        completions: of the same prompts.
    """

    def __init__(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> None:
        pairs = list(zip(prompts, completions, strict=True))
        self.sequences = [prompt + completion for prompt, completion in pairs]
        self._compared = [len(completion) for completion in completions]

    def max_abs_difference(
        self, ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
    ) -> float:
        """max |a - b| over the completions' tokens.

        Args:
            ours, theirs: log-probs of tokens 1..n-1 of each of ``sequences``.

        Raises:
            ValueError: they are not the log-probs of ``sequences``.
        """
        expected = [len(sequence) - 1 for sequence in self.sequences]
        for rows in (ours, theirs):
            if [len(row) for row in rows] != expected:
                raise ValueError(
                    f"canary rows of {[len(row) for row in rows]} tokens, expected {expected}"
                )
        return max(
            abs(a - b)
            for ours_row, theirs_row, compared in zip(ours, theirs, self._compared, strict=True)
            for a, b in zip(ours_row[-compared:], theirs_row[-compared:], strict=True)
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
