"""Packing: properties over random lengths, and what is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_c3po.packing import best_fit_decreasing, plan_rows

ROW_TOKENS = 64
some_lengths = st.lists(st.integers(1, ROW_TOKENS), min_size=1, max_size=60)


@given(lengths=some_lengths, dp_size=st.integers(1, 5))
def test_each_sequence_once_no_row_above_the_cap_equal_counts(
    lengths: list[int], dp_size: int
) -> None:
    plan = plan_rows(lengths, row_tokens=ROW_TOKENS, dp_size=dp_size)
    rows = [row for rank in plan for row in rank]

    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= ROW_TOKENS for row in rows)


@given(lengths=some_lengths, dp_size=st.integers(1, 5))
def test_rows_are_few_and_empty_only_when_sequences_run_out(
    lengths: list[int], dp_size: int
) -> None:
    plan = plan_rows(lengths, row_tokens=ROW_TOKENS, dp_size=dp_size)
    rows = [row for rank in plan for row in rank]
    packed = best_fit_decreasing(lengths, ROW_TOKENS)

    # Two rows that were both at most half full would have been one.
    at_most_half_full = [
        row for row in packed if 2 * sum(lengths[index] for index in row) <= ROW_TOKENS
    ]
    assert len(at_most_half_full) <= 1
    assert len(packed) <= len(rows) < len(packed) + dp_size
    if [] in rows:
        assert all(len(row) <= 1 for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_carry_equal_work_at_pareto_lengths(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [min(1024, int(32 * generator.paretovariate(1.2))) for _ in range(256)]
    plan = plan_rows(lengths, row_tokens=1024, dp_size=4, linear_cost=1.0, quadratic_cost=0.002)
    costs = [n + 0.002 * n * n for n in lengths]
    loads = [sum(costs[index] for row in rank for index in row) for rank in plan]
    assert max(loads) < 1.05 * sum(loads) / len(loads)


def test_balances_cost_and_not_tokens() -> None:
    # 4 rows of 64 tokens each: two single long sequences, two rows of eight short ones.
    lengths = [64, 64] + [8] * 16
    plan = plan_rows(lengths, row_tokens=64, dp_size=2, linear_cost=1.0, quadratic_cost=0.1)
    assert [sum(1 for row in rank if len(row) == 1) for rank in plan] == [1, 1]


def test_same_plan_for_the_same_lengths() -> None:
    lengths = [7, 7, 7, 30, 12, 12, 64, 1]
    plans = [plan_rows(lengths, row_tokens=64, dp_size=2) for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_row_is_split_before_a_rank_is_left_idle() -> None:
    assert plan_rows([10, 10], row_tokens=64, dp_size=2) == [[[0]], [[1]]]


def test_padding_rows_when_there_are_fewer_sequences_than_ranks() -> None:
    assert plan_rows([10], row_tokens=64, dp_size=3) == [[[0]], [[]], [[]]]


@pytest.mark.parametrize(
    ("lengths", "sizes", "message"),
    [
        ([5, 65], {}, "sequence 1 has 65 tokens.*row_tokens"),
        ([5, 0], {}, "sequence 1 has 0 tokens"),
        ([], {}, "no sequence to pack"),
        ([5], {"dp_size": 0}, "dp_size = 0"),
        ([5], {"row_tokens": 0}, "row_tokens = 0"),
    ],
)
def test_refuses_what_cannot_be_packed(
    lengths: list[int], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rows(lengths, **{"row_tokens": 64, "dp_size": 1, **sizes})
