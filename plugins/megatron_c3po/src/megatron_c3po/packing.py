"""Packing sequences of unequal length into rows and rows onto data-parallel ranks.

Ring-1T section 2.3.3 trains rollouts of very different lengths in one step; padding them to the
longest would multiply the work.  Here: best-fit decreasing under a token cap, then an equal number
of rows per rank (Megatron runs the same number of microbatches everywhere), balanced by the cost
a * L + b * L^2 of a sequence of length L.  Pure Python; nothing here knows what a sequence holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = list[int]
"""Indices of the sequences that share a row; ``[]`` is a padding row without a trained token."""

LINEAR_COST = 1.0
QUADRATIC_COST = 1.0 / (12 * 1024)
"""Causal attention needs L / (12 h) of the linear layers' work in a dense layer of width h; 1024
stands for a small model.  Only the ratio of the two costs matters, and only for the balance."""


def plan_rows(
    lengths: Sequence[int],
    *,
    row_tokens: int,
    dp_size: int,
    linear_cost: float = LINEAR_COST,
    quadratic_cost: float = QUADRATIC_COST,
) -> list[list[Row]]:
    """Decide which sequences share a row and which rank trains it.

    Args:
        lengths: tokens of each sequence, prompt included.
        row_tokens: the cap on a row's tokens.
        dp_size: number of data-parallel ranks.
        linear_cost, quadratic_cost: a and b of a sequence's cost a * L + b * L^2.

    Returns:
        One list of rows per rank, all of equal length.  Every index occurs exactly once.  When
        there are fewer sequences than rows needed, the last rows are empty.

    Raises:
        ValueError: there is no sequence, one is empty or longer than ``row_tokens`` (named by its
            index), or a size is below 1.
    """
    if row_tokens < 1 or dp_size < 1:
        raise ValueError(f"row_tokens = {row_tokens}, dp_size = {dp_size}: both must be at least 1")
    if not lengths:
        raise ValueError("there is no sequence to pack: a training step needs at least one")
    for index, length in enumerate(lengths):
        if not 1 <= length <= row_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens: a row holds 1 to {row_tokens} "
                "(row_tokens); raise it or shorten prompts and completions"
            )

    costs = [linear_cost * length + quadratic_cost * length * length for length in lengths]
    rows = best_fit_decreasing(lengths, row_tokens)
    rows_per_rank = math.ceil(len(rows) / dp_size)
    rows = _split_costliest(rows, rows_per_rank * dp_size, costs)
    return _balance(rows, dp_size, costs)


def best_fit_decreasing(lengths: Sequence[int], row_tokens: int) -> list[Row]:
    """Put each sequence, longest first, into the fullest row that still holds it."""
    rows: list[Row] = []
    free_tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row, free in enumerate(free_tokens) if free >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda candidate: free_tokens[candidate])
            rows[row].append(index)
            free_tokens[row] -= lengths[index]
        else:
            rows.append([index])
            free_tokens.append(row_tokens - lengths[index])
    return rows


def _split_costliest(rows: list[Row], count: int, costs: Sequence[float]) -> list[Row]:
    """Reach ``count`` rows by halving the costliest that can be; empty rows only if none can."""
    rows = list(rows)
    while len(rows) < count:
        divisible = [row for row in rows if len(row) > 1]
        if not divisible:
            rows.append([])
            continue
        costliest = max(divisible, key=lambda row: sum(costs[index] for index in row))
        rows.remove(costliest)
        halves: tuple[Row, Row] = ([], [])
        for index in sorted(costliest, key=lambda i: (-costs[i], i)):
            min(halves, key=lambda half: sum(costs[i] for i in half)).append(index)
        rows += halves
    return rows


def _balance(rows: list[Row], dp_size: int, costs: Sequence[float]) -> list[list[Row]]:
    """Give the costliest row left to the least loaded rank that still has room."""
    rows_per_rank = len(rows) // dp_size
    row_costs = [sum(costs[index] for index in row) for row in rows]
    plan: list[list[Row]] = [[] for _ in range(dp_size)]
    loads = [0.0] * dp_size
    for row in sorted(range(len(rows)), key=lambda i: (-row_costs[i], i)):
        with_room = [rank for rank in range(dp_size) if len(plan[rank]) < rows_per_rank]
        rank = min(with_room, key=lambda candidate: (loads[candidate], candidate))
        plan[rank].append(rows[row])
        loads[rank] += row_costs[row]
    return plan
