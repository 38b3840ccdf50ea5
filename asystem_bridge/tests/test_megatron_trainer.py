"""The trainer's processes, driven as the controller drives them, against plain torch in float64.

One scenario is played by every process group (one process, TP2, DP2); its tests then compare what
came back with a naive model, with each other and with the files on disk.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_trainer import CLIP_GRAD, Naive, naive_logits, naive_logprobs, naive_step
from safetensors.torch import load_file
from tiny_checkpoints import write_tiny_checkpoint
from torch import Tensor
from trainer_processes import TrainerGroup

from asystem_bridge.errors import WorkerError
from asystem_bridge.runtime.worker_client import call_all
from megatron_c3po.rollout import Rollout

pytestmark = pytest.mark.megatron


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a group gave back in ``play``."""

    setup: list[dict[str, Any]]
    logprobs: list[list[list[float]]]
    initial: dict[str, Tensor]
    initial_bfloat16: dict[str, Tensor]
    initial_bytes: int
    first: list[dict[str, Any]]
    after_first: dict[str, Tensor]
    saved: Path
    second: list[dict[str, Any]]
    after_second: dict[str, Tensor]
    again: list[dict[str, Any]]
    after_again: dict[str, Tensor]


def play(group: TrainerGroup, directory: Path, rollouts: list[Rollout]) -> Played:
    """Two IcePop steps with a checkpoint between them; then back and the second step again."""
    setup = group.setup()
    initial_bfloat16, _ = group.published(torch.bfloat16)
    initial, initial_bytes = group.published()
    sequences = [rollout.prompt_ids + rollout.token_ids for rollout in rollouts]
    logprobs = call_all(group.workers, "logprobs", sequences)

    first = group.train(rollouts)
    after_first, _ = group.published()
    saved = directory / "checkpoint"
    saved.mkdir()
    call_all(group.workers, "save", saved)
    second = group.train(rollouts)
    after_second, _ = group.published()

    call_all(group.workers, "load", saved)
    again = group.train(rollouts)
    after_again, _ = group.published()
    return Played(
        setup=setup,
        logprobs=logprobs,
        initial=initial,
        initial_bfloat16=initial_bfloat16,
        initial_bytes=initial_bytes,
        first=first,
        after_first=after_first,
        saved=saved,
        second=second,
        after_second=after_second,
        again=again,
        after_again=after_again,
    )


def make_rollouts(checkpoint_dir: Path) -> list[Rollout]:
    """Two groups of three; the engine's log-probs are off, some by more than the band allows."""
    _, logits = naive_logits(checkpoint_dir)
    generator = torch.Generator().manual_seed(3)
    offsets = [0.0, 0.3, -0.4, math.log(2.5), -0.1, -math.log(6.0), 0.05]
    rollouts = []
    for i, (length, advantage) in enumerate(
        zip([9, 4, 13, 6, 1, 22], [1.1, -0.8, -0.3, 0.9, -1.2, 0.3], strict=True)
    ):
        prompt = torch.randint(4, 120, (3 + i // 3,), generator=generator).tolist()
        sampled = torch.randint(4, 120, (length,), generator=generator).tolist()
        with torch.no_grad():
            logprobs = naive_logprobs(logits, prompt + sampled)[len(prompt) - 1 :]
        rollouts.append(
            Rollout(
                uid=f"{i // 3}/{i % 3}",
                group_uid=str(i // 3),
                prompt_ids=prompt,
                max_new_tokens=32,
                token_ids=sampled,
                logprobs=[
                    float(logprob) + offsets[(i + t) % len(offsets)]
                    for t, logprob in enumerate(logprobs)
                ],
                versions=[0] * length,
                finish_reason="stop",
                advantage=advantage,
            )
        )
    return rollouts


# --- the runs -------------------------------------------------------------------------------------


SIZES = {"single": (1, 1), "tp2": (2, 1), "dp2": (1, 2)}  # tensor parallel, data parallel
FAMILIES = {"qwen3": ("single", "tp2", "dp2"), "bailing_moe_v2": ("single", "tp2")}
of_every_family = pytest.mark.parametrize("family", FAMILIES)
of_every_group = pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family, sizes in FAMILIES.items() for size in sizes]
)
of_every_pair = pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family, sizes in FAMILIES.items() for size in sizes[1:]]
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checkpoint, its rollouts, the naive step, the groups and what they gave back."""

    checkpoint_dir: Path
    rollouts: list[Rollout]
    naive: Naive
    groups: dict[str, TrainerGroup]
    played: dict[str, Played]


@contextlib.contextmanager
def started_run(family: str, directory: Path) -> Iterator[Run]:
    """Start the family's groups side by side and let each play."""
    checkpoint_dir = write_tiny_checkpoint(directory / "model", family)
    rollouts = make_rollouts(checkpoint_dir)
    with contextlib.ExitStack() as stack:
        groups = {}
        for name in FAMILIES[family]:
            groups[name] = TrainerGroup(directory / name, checkpoint_dir, *SIZES[name])
            stack.callback(groups[name].kill)
        naive = naive_step(checkpoint_dir, rollouts)
        played = {name: play(group, directory / name, rollouts) for name, group in groups.items()}
        yield Run(
            checkpoint_dir=checkpoint_dir,
            rollouts=rollouts,
            naive=naive,
            groups=groups,
            played=played,
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Iterator[Callable[[str], Run]]:
    """A family's run, started when a test first asks for it."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(
            lambda family: stack.enter_context(started_run(family, tmp_path_factory.mktemp(family)))
        )


@pytest.fixture
def run(runs: Callable[[str], Run], family: str) -> Run:
    return runs(family)


def assert_same_weights(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name].double(), expected[name].double(), rtol=0, atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@of_every_group
def test_starts_with_the_checkpoints_weights(run: Run, size: str) -> None:
    played = run.played[size]
    stored = load_file(run.checkpoint_dir / "model.safetensors")
    assert all(setup["logits_max_abs_diff"] < 1e-4 for setup in played.setup)
    for rank_logprobs in played.logprobs:
        for ours, naive in zip(rank_logprobs, run.naive.logprobs, strict=True):
            torch.testing.assert_close(
                torch.tensor(ours, dtype=torch.float64), naive, rtol=0, atol=2e-5
            )
    assert played.initial.keys() == stored.keys()
    assert all(torch.equal(played.initial[name], stored[name]) for name in stored)
    for name, tensor in played.initial_bfloat16.items():
        assert torch.equal(tensor, stored[name].bfloat16()), name


@of_every_group
def test_every_byte_is_published_once(run: Run, size: str) -> None:
    played = run.played[size]
    assert played.initial_bytes == sum(tensor.nbytes for tensor in played.initial.values())


@of_every_group
def test_one_step_equals_the_naive_one(run: Run, size: str) -> None:
    played, naive = run.played[size], run.naive
    masked = sum(result["discrepancy"]["low_tokens"] for result in played.first[:: SIZES[size][0]])
    assert masked > 0
    assert naive.grad_norm > CLIP_GRAD, "the step must be a clipped one"
    for result in played.first:
        assert result["step"] == 1
        assert result["loss"] == pytest.approx(naive.loss, rel=1e-5)
        assert result["grad_norm"] == pytest.approx(naive.grad_norm, rel=1e-5)
    moved = max(
        float((naive.after_first[name] - tensor.double()).abs().max())
        for name, tensor in played.initial.items()
    )
    assert moved > 1e-3
    assert_same_weights(played.after_first, naive.after_first, atol=1e-6)


@of_every_group
def test_data_parallel_ranks_share_the_tokens(run: Run, size: str) -> None:
    tp, dp = SIZES[size]
    per_dp_rank = [result["tokens"] for result in run.played[size].first[::tp]]
    assert len(per_dp_rank) == dp
    assert all(tokens > 0 for tokens in per_dp_rank)
    assert sum(per_dp_rank) == sum(len(rollout.token_ids) for rollout in run.rollouts)
    per_dp_rank = [result["discrepancy"]["tokens"] for result in run.played[size].first[::tp]]
    assert sum(per_dp_rank) == sum(len(rollout.token_ids) for rollout in run.rollouts)


@of_every_pair
def test_two_processes_equal_one(run: Run, size: str) -> None:
    one, two = run.played["single"], run.played[size]
    for step_of_one, step_of_two in ((one.first, two.first), (one.second, two.second)):
        assert step_of_two[0]["loss"] == pytest.approx(step_of_one[0]["loss"], rel=1e-5)
        assert step_of_two[0]["grad_norm"] == pytest.approx(step_of_one[0]["grad_norm"], rel=1e-5)
        assert step_of_two[0]["loss"] == step_of_two[1]["loss"]
    assert_same_weights(two.after_second, one.after_second, atol=1e-5)


@of_every_group
def test_a_loaded_checkpoint_continues_bit_for_bit(run: Run, size: str) -> None:
    played = run.played[size]
    for key in ("step", "loss", "grad_norm", "discrepancy"):
        assert [r[key] for r in played.again] == [r[key] for r in played.second]
    assert played.again[0]["step"] == 2
    for name, tensor in played.after_second.items():
        assert torch.equal(played.after_again[name], tensor), name


def check_continues_from(
    group: TrainerGroup, checkpoint: Played, rollouts: list[Rollout], atol: float
) -> None:
    """Load another group's checkpoint and do its second step."""
    results = call_all(group.workers, "load", checkpoint.saved)
    assert results == [{"step": 1}] * len(group.workers)
    loaded, _ = group.published()
    assert_same_weights(loaded, checkpoint.after_first, atol=0.0)
    second = group.train(rollouts)
    assert second[0]["loss"] == pytest.approx(checkpoint.second[0]["loss"], rel=1e-5)
    after_second, _ = group.published()
    assert_same_weights(after_second, checkpoint.after_second, atol=atol)


@of_every_pair
def test_checkpoints_move_between_numbers_of_processes(run: Run, size: str) -> None:
    check_continues_from(run.groups["single"], run.played[size], run.rollouts, atol=1e-5)
    check_continues_from(run.groups[size], run.played["single"], run.rollouts, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3"])
def test_a_new_process_continues_bit_for_bit(run: Run, tmp_path: Path) -> None:
    group = TrainerGroup(tmp_path / "resumed", run.checkpoint_dir, 1, 1)
    try:
        group.setup()
        check_continues_from(group, run.played["single"], run.rollouts, atol=0.0)
        group.workers[0].close()
        assert "Traceback" not in group.workers[0].log_tail()
    finally:
        group.kill()


@of_every_group
def test_supervised_steps_teach_the_answers(run: Run, size: str) -> None:
    group = run.groups[size]
    call_all(group.workers, "reset_optimizer")
    results = [group.train(run.rollouts, "supervised", 3e-2)[0] for _ in range(6)]
    losses = [result["loss"] for result in results]
    assert results[0]["step"] == 1
    assert results[0]["discrepancy"] == {}
    assert results[0]["learning_rate"] == 3e-2
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@of_every_group
def test_logprobs_of_the_weights_as_they_are_published(run: Run, size: str) -> None:
    group = run.groups[size]
    published, _ = group.published(torch.bfloat16)
    sequence = [5, 60, 7, 81, 9, 33]
    [[plain]] = call_all(group.workers, "logprobs", [sequence])[:1]
    [[rounded]] = call_all(group.workers, "logprobs", [sequence], True)[:1]
    weights, logits = naive_logits(run.checkpoint_dir)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(published[name])
        expected = naive_logprobs(logits, sequence)
    assert rounded == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(plain, rounded, strict=True)) > 1e-3
    assert call_all(group.workers, "logprobs", [sequence])[0] == [plain]  # put back exactly


@of_every_family
def test_what_cannot_be_trained_is_refused_and_moves_no_weight(run: Run) -> None:
    group = run.groups["single"]
    before, _ = group.published()

    def rollout(advantage: float | None) -> Rollout:
        return Rollout(
            uid="9/0", group_uid="9", prompt_ids=[5], max_new_tokens=4, token_ids=[6],
            logprobs=[-4.0], versions=[0], advantage=advantage,
        )  # fmt: skip

    with pytest.raises(WorkerError, match="9/0: no advantage"):
        group.train([rollout(None)])
    with pytest.raises(WorkerError, match="mode = 'distil': allowed are"):
        group.train([rollout(1.0)], "distil")
    own_logprob = call_all(group.workers, "logprobs", [[5, 6]])[0][0][0]
    infinite = rollout(math.inf)
    infinite.logprobs = [own_logprob]
    with pytest.raises(WorkerError, match="in local grad norm"):
        group.train([infinite])
    after, _ = group.published()
    assert_same_weights(after, before, atol=0.0)


@of_every_family
def test_a_full_disk_of_one_rank_is_an_error_on_all(run: Run, tmp_path: Path) -> None:
    """A limit on the size of files makes writes fail as a full disk does."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    workers = run.groups["tp2"].workers
    unlimited = resource.prlimit(workers[1].pid, resource.RLIMIT_FSIZE)
    log_bytes = workers[1].log_path.stat().st_size
    resource.prlimit(workers[1].pid, resource.RLIMIT_FSIZE, (log_bytes + 65536, unlimited[1]))
    try:
        for worker in workers:
            worker.send("save", directory)
        for worker in workers:
            with pytest.raises(WorkerError, match=r"^trainer \d: cannot write .*ranks \[1\]"):
                worker.receive()
    finally:
        resource.prlimit(workers[1].pid, resource.RLIMIT_FSIZE, unlimited)
    other = tmp_path / "other"
    other.mkdir()
    [saved, _] = call_all(workers, "save", other)
    assert saved["bytes"] == sum(path.stat().st_size for path in other.iterdir())


@of_every_group
def test_no_helper_process_is_left_by_a_save(run: Run, size: str) -> None:
    for worker in run.groups[size].workers:
        assert Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text() == ""


@of_every_family
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_refused(run: Run, tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "damaged"
    if damage == "cut":
        directory.mkdir()
        for path in run.played["single"].saved.iterdir():
            content = path.read_bytes()
            cut = len(content) // 2 if path.suffix == ".distcp" else len(content)
            (directory / path.name).write_bytes(content[:cut])
    [worker] = run.groups["single"].workers
    with pytest.raises(WorkerError, match=r"^trainer 0: cannot read the checkpoint"):
        worker.call("load", directory)


@of_every_family
def test_save_needs_an_empty_folder(run: Run) -> None:
    [worker] = run.groups["single"].workers
    with pytest.raises(WorkerError, match="existing empty folder"):
        worker.call("save", run.played["single"].saved)
