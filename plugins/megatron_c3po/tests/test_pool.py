"""The pool with a deterministic stub engine, and against the paper's pseudo-code."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_c3po.config import C3POConfig
from megatron_c3po.engine import Delta, Submission
from megatron_c3po.pool import C3POPool, sampling_seed
from megatron_c3po.rollout import Prompt, Rollout


class StubEngine:
    """One token a poll for every request; a completion's length is a function of its uid.

    Token number n of uid u is a hash of (u, n): a resumed request continues the same text.
    """

    def __init__(self, lengths: dict[str, int] | int = 5, max_new_tokens: int = 64) -> None:
        self.lengths = lengths
        self.max_new_tokens = max_new_tokens
        self.live: dict[str, tuple[int, int]] = {}
        self.submissions: list[Submission] = []
        self.prompt_tokens: dict[str, int] = {}

    def length(self, uid: str) -> int:
        return self.lengths if isinstance(self.lengths, int) else self.lengths[uid]

    def submit(self, submissions: Iterable[Submission]) -> None:
        for s in submissions:
            assert s.uid not in self.live
            self.submissions.append(s)
            done = self.max_new_tokens - s.max_new_tokens
            self.live[s.uid] = (done, self.length(s.uid))

    def poll(self) -> list[Delta]:
        deltas = []
        for uid, (done, length) in list(self.live.items()):
            finished = done + 1 >= length
            token = hash((uid, done)) % 997
            deltas.append(
                Delta(
                    uid=uid,
                    token_ids=[token],
                    logprobs=[-token / 997],
                    finish_reason="stop" if finished else None,
                )
            )
            self.live[uid] = (done + 1, length)
            if finished:
                del self.live[uid]
        return deltas

    def abort(self, uids: Iterable[str]) -> None:
        for uid in uids:
            self.live.pop(uid, None)


class CountingPrompts:
    def __init__(self, end: int | None = None) -> None:
        self.cursor, self.end = 0, end

    def next_prompt(self) -> Prompt | None:
        if self.end is not None and self.cursor >= self.end:
            return None
        self.cursor += 1
        return Prompt(uid=str(self.cursor - 1), token_ids=(1, 2, 3))

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


def make(engine: StubEngine, prompts: CountingPrompts | None = None, **options: Any) -> C3POPool:
    return C3POPool(C3POConfig(**options), engine, prompts or CountingPrompts())


@given(
    seed=st.integers(0, 10_000),
    capacity=st.integers(1, 6),
    budget=st.integers(20, 60),
    sigma=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_decision_equals_the_papers_pseudo_code(
    seed: int, capacity: int, budget: int, sigma: int
) -> None:
    rng = random.Random(seed)
    lengths = {f"{n}/0": min(20, int(rng.paretovariate(0.8) * 2)) for n in range(4000)}

    # Algorithm 1, literally (with the pool kept full before each decode step).
    paper: list[tuple[list[str], int, list[str]]] = []
    P: dict[str, list[int]] = {}  # uid -> [tokens, retention]
    fresh = iter(range(4000))
    for _t in range(8):
        C, Q = 0, []
        purged = [o for o in P if P[o][1] > sigma]
        for o in purged:
            del P[o]
        while budget > C:
            while len(P) < capacity:
                P[f"{next(fresh)}/0"] = [0, 0]
            for o in list(P):
                P[o][0] += 1
                if P[o][0] == lengths[o]:
                    C += P[o][0]
                    Q.append(o)
                    del P[o]
        for o in P:
            P[o][1] += 1
        paper.append((Q, C, purged))

    pool = make(
        StubEngine(lengths, max_new_tokens=20), token_budget=budget, pool_capacity=capacity,
        max_retention=sigma, group_size=1, max_new_tokens=20, max_restarts=0,
    )  # fmt: skip
    for version, (Q, C, purged) in enumerate(paper):
        groups, stats = pool.collect(version)
        assert [g[0].uid for g in groups] == Q
        assert stats.budget_used_tokens == C
        assert stats.budget_overshoot_tokens == C - budget
        assert stats.rollouts_purged == len(purged)


def test_partial_rollouts_are_resumed_with_their_tokens_and_versions() -> None:
    engine = StubEngine(
        {"0/0": 3, "0/1": 9, **{f"{n}/{m}": 4 for n in range(1, 50) for m in (0, 1)}}
    )
    pool = make(engine, token_budget=64, pool_capacity=2, group_size=2, max_new_tokens=64)
    seen: dict[str, Rollout] = {}
    for version in range(4):
        groups, _ = pool.collect(version)
        seen |= {r.uid: r for g in groups for r in g}
    for rollout in seen.values():
        assert rollout.token_ids == [
            hash((rollout.uid, n)) % 997 for n in range(len(rollout.token_ids))
        ]
        assert len(rollout.token_ids) == engine.length(rollout.uid)
        assert len(rollout.logprobs) == len(rollout.versions) == len(rollout.token_ids)
        assert rollout.versions == sorted(rollout.versions)
        assert len(set(rollout.versions)) == rollout.retention + 1
    assert any(r.retention for r in seen.values())


def test_a_group_is_released_whole_and_counts_when_it_is_released() -> None:
    lengths = {f"{n}/{m}": 2 for n in range(200) for m in range(2)} | {"0/1": 12}
    pool = make(
        StubEngine(lengths), token_budget=64, pool_capacity=2, group_size=2, max_new_tokens=64
    )
    groups, stats = pool.collect(0)
    assert all(len({r.group_uid for r in g}) == 1 and len(g) == 2 for g in groups)
    released = [g[0].group_uid for g in groups]
    assert released.index("0") > 0  # its long member held it back
    assert stats.budget_used_tokens == sum(len(r.token_ids) for g in groups for r in g)
    assert stats.trained_tokens == stats.budget_used_tokens >= 64


def test_no_token_is_lost_or_trained_twice() -> None:
    rng = random.Random(3)
    lengths = {f"{n}/{m}": rng.randint(1, 40) for n in range(500) for m in range(4)}
    engine = StubEngine(lengths)
    pool = make(
        engine, token_budget=100, pool_capacity=16, group_size=4, max_retention=1, max_restarts=1
    )
    trained: list[str] = []
    generated = used = purged = dropped = 0
    for version in range(25):
        groups, stats = pool.collect(version)
        trained += [r.uid for g in groups for r in g]
        generated += stats.generated_tokens
        used += stats.trained_tokens
        purged += stats.purged_tokens
        dropped += stats.dropped_tokens
    state = pool.state_dict()
    held = sum(len(r["token_ids"]) for r in state["active"])
    assert stats.waiting_tokens == sum(len(r["token_ids"]) for r in state["finished"])
    assert len(trained) == len(set(trained))
    assert generated == used + purged + dropped + held + stats.waiting_tokens
    assert purged > 0


def test_a_purged_rollout_restarts_once_then_its_group_is_dropped() -> None:
    lengths = {f"{n}/{m}": 4 for n in range(3000) for m in range(2)} | {"0/0": 60}
    pool = make(
        StubEngine(lengths), token_budget=64, pool_capacity=2, group_size=2, max_retention=0,
        max_new_tokens=64, max_restarts=1, budget_counts="generated",
    )  # fmt: skip
    # 64 tokens over two slots: 32 of the 60 tokens of 0/0 in each iteration.
    history = [pool.collect(version)[1] for version in range(5)]
    assert [s.rollouts_purged for s in history] == [0, 1, 1, 0, 0]
    assert [s.groups_dropped for s in history] == [0, 0, 1, 0, 0]
    assert [s.purged_tokens for s in history] == [0, 32, 32, 0, 0]
    assert [s.dropped_tokens for s in history] == [0, 0, 4, 0, 0]  # the finished 0/1
    everything = json.dumps(pool.state_dict())
    assert '"0/0"' not in everything
    assert '"0/1"' not in everything


def test_generated_budget_stops_at_the_exact_step() -> None:
    pool = make(
        StubEngine(50), token_budget=64, pool_capacity=8, group_size=8, budget_counts="generated"
    )
    groups, stats = pool.collect(0)
    assert groups == []
    assert (stats.decode_steps, stats.generated_tokens, stats.budget_overshoot_tokens) == (8, 64, 0)


def test_the_end_of_the_prompts_ends_the_iteration() -> None:
    pool = make(
        StubEngine(5), CountingPrompts(end=3), token_budget=1000, group_size=2, pool_capacity=4
    )
    groups, stats = pool.collect(0)
    assert [g[0].group_uid for g in groups] == ["0", "1", "2"]
    assert stats.budget_used_tokens == 30
    assert pool.exhausted
    assert pool.collect(1)[0] == []


def test_state_survives_json_and_goes_on_identically() -> None:
    rng = random.Random(7)
    lengths = {f"{n}/{m}": rng.randint(1, 50) for n in range(400) for m in range(4)}
    options = {"token_budget": 150, "pool_capacity": 12, "group_size": 4, "max_retention": 1}

    def signature(pool: C3POPool, versions: range) -> list[Any]:
        return [
            ([r.to_state() for g in groups for r in g], stats)
            for groups, stats in (pool.collect(v) for v in versions)
        ]

    whole = make(StubEngine(lengths), **options)
    expected = signature(whole, range(10))

    first = make(StubEngine(lengths), **options)
    begun = signature(first, range(4))
    state = json.loads(json.dumps(first.state_dict()))
    second = make(StubEngine(lengths), **options)
    second.load_state_dict(state)
    assert begun + signature(second, range(4, 10)) == expected


def test_another_group_size_cannot_go_on() -> None:
    state = make(StubEngine(), token_budget=64, group_size=8).state_dict()
    other = make(StubEngine(), token_budget=64, group_size=4)
    with pytest.raises(ValueError, match="group_size = 8, the configuration 4"):
        other.load_state_dict(state)


def test_seeds_differ_by_position_restart_and_member() -> None:
    def rollout(uid: str, tokens: int, restarts: int) -> Rollout:
        return Rollout(
            uid=uid, group_uid="0", prompt_ids=[1], max_new_tokens=9, restarts=restarts,
            token_ids=[0] * tokens,
        )  # fmt: skip

    variants = [rollout(u, t, r) for u in ("0/0", "0/1") for t in (0, 1) for r in (0, 1)]
    seeds = [sampling_seed(run, v) for run in (0, 1) for v in variants]
    assert len(set(seeds)) == 16
    assert all(0 <= s < 2**62 for s in seeds)
    assert sampling_seed(0, variants[0]) == sampling_seed(0, variants[0])


def test_a_token_without_its_logprob_is_refused() -> None:
    rollout = Rollout(uid="0/0", group_uid="0", prompt_ids=[1], max_new_tokens=4)
    with pytest.raises(ValueError, match="2 tokens with 1 log-probs"):
        rollout.append([5, 6], [-0.1], 0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 0}, "token_budget = 0"),
        ({"token_budget": 63}, "hold at least one whole rollout"),
        ({"token_budget": 100, "pool_capacity": 12}, "multiple of the group size"),
        ({"token_budget": 100, "max_retention": -1}, "must not be negative"),
        ({"token_budget": 100, "budget_counts": "spent"}, "'completed', 'generated'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C3POConfig(**options)
