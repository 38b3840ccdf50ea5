"""Megatron, the weight segment and vLLM in one loop, against transformers after every sync."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loop_inputs import write_config

from asystem_bridge.config import LoopConfig, load_config
from asystem_bridge.controller.fleet import Fleet
from asystem_bridge.controller.loop import AsystemLoop
from asystem_bridge.controller.run_directory import RunDirectory
from asystem_bridge.errors import CanaryError, WorkerDiedError
from asystem_bridge.models.named import checkpoint_folder
from asystem_bridge.report.metrics import StepRecord
from asystem_bridge.report.progress import make_progress
from asystem_bridge.tasks.registry import build_task
from asystem_bridge.trainer.reference import transformers_reference
from asystem_bridge.weights.hf_checkpoint import write_hf_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

NEW_TOKENS = 16


class CheckedLoop(AsystemLoop):
    """After every sync, the trainer's exported weights in transformers against the engine."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.greedy: list[tuple[list[list[int]], list[list[int]]]] = []
        self.corrupt: str | None = None

    def publish(self) -> None:
        super().publish()
        if self.corrupt is not None:  # one tensor is not what the trainer holds
            self.fleet.segment.views[self.corrupt].mul_(1.5)

    def sync(self, version: int) -> float:
        difference = super().sync(version)
        exported = self.run_directory.path / f"exported_{version}"
        write_hf_checkpoint(
            exported,
            {name: view.clone() for name, view in self.fleet.segment.views.items()},
            source_directory=self.config.trainer.checkpoint_dir,
        )
        prompts = [sequence[:8] for sequence in self._canary.sequences]
        model = transformers_reference(exported)
        expected = []
        for prompt in prompts:
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False
            )
            expected.append(output[0, len(prompt) :].tolist())
        self.greedy.append((self.fleet.engine.greedy(prompts, NEW_TOKENS), expected))
        return difference


def read_config(folder: Path) -> LoopConfig:
    path = write_config(folder, steps=2)
    config = load_config(path.read_text(), origin=str(path), overrides={})
    checkpoint = checkpoint_folder(config.model.checkpoint)
    return dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, checkpoint_dir=checkpoint),
        rollout=dataclasses.replace(config.rollout, checkpoint_dir=checkpoint),
    )


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckedLoop]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("loop")
    config = read_config(folder)
    run_directory = RunDirectory(folder / "run")
    with Fleet(config, run_path=run_directory.path) as fleet, make_progress() as progress:
        yield CheckedLoop(
            config,
            run_directory=run_directory,
            fleet=fleet,
            task=build_task(config.task.name, config.task.options),
            tokenizer=AutoTokenizer.from_pretrained(
                config.trainer.checkpoint_dir, trust_remote_code=True
            ),
            progress=progress,
        )
    run_directory.close()


@pytest.fixture(scope="module")
def records(loop: CheckedLoop) -> list[StepRecord]:
    return loop.run()


def test_greedy_tokens_equal_transformers_after_every_sync(
    loop: CheckedLoop, records: list[StepRecord]
) -> None:
    assert len(loop.greedy) == len(records) == 2
    for ours, theirs in loop.greedy:
        assert ours == theirs
    assert loop.greedy[0][0] != loop.greedy[1][0]  # the weights did change


def test_trainer_and_engine_agree_and_nothing_is_masked_in_float32(
    records: list[StepRecord],
) -> None:
    for record in records:
        assert record.canary_max_abs_logprob_diff < 1e-4
        assert record.groups_with_signal > 0
        assert record.grad_norm > 0
    assert records[0].masked_fraction == 0.0
    assert records[0].logprob_diff_max < 1e-4


def test_tokens_of_resumed_rollouts_carry_the_version_that_sampled_them(
    loop: CheckedLoop, records: list[StepRecord]
) -> None:
    assert records[1].rollouts_resumed > 0
    assert records[1].versions_per_rollout_histogram.get(2, 0) > 0
    assert sum(r.trained_tokens for r in records) + loop_tokens(loop) == sum(
        r.generated_tokens for r in records
    )


def loop_tokens(loop: CheckedLoop) -> int:
    state = loop.pool.state_dict()
    return sum(len(r["token_ids"]) for r in state["active"] + state["finished"])


@pytest.mark.usefixtures("records")
def test_the_canary_stops_the_loop_and_names_the_tensor(loop: CheckedLoop) -> None:
    name = "model.layers.1.attention.dense.weight"
    loop.corrupt = name
    try:
        with pytest.raises(CanaryError, match="differ by") as caught:
            AsystemLoop.sync(loop, loop.version + 1)
    finally:
        loop.corrupt = None
    listed = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert listed == [name]
    assert AsystemLoop.sync(loop, loop.version + 1) < 1e-4  # whole weights mend it


@pytest.mark.usefixtures("records")
def test_an_engine_that_dies_is_reported_with_the_end_of_its_log(loop: CheckedLoop) -> None:
    """Last: the engine is gone afterwards."""
    pid = loop.fleet.pids[-1]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"rollout engine .* signal SIGKILL") as caught:
        loop.pool.collect(loop.version)
    assert "engine.log" in str(caught.value)
