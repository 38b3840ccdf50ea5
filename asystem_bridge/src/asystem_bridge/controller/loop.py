"""The loop of ASystem: roll out under a token budget, score, train, sync, check, checkpoint.

Ring-1T section 2.5 with the rollouts of section 2.3.3 and the loss of section 2.3.2.  A step that
has ended is a record in ``metrics.jsonl``; a step that has a checkpoint is never repeated.

Left out: overlapping rollouts with training.  On one host both use the same cores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from asystem_bridge.config import LoopConfig
from asystem_bridge.controller import canary
from asystem_bridge.controller.fleet import Fleet
from asystem_bridge.controller.rewards import score_groups
from asystem_bridge.controller.run_directory import RunDirectory
from asystem_bridge.controller.step_record import NOTHING_TRAINED, step_record
from asystem_bridge.controller.teach import FIRST_TAUGHT_QUESTION, teach
from asystem_bridge.errors import CheckpointError
from asystem_bridge.report.metrics import StepRecord
from asystem_bridge.report.progress import Progress
from asystem_bridge.report.writers import MetricsLog
from asystem_bridge.tasks.base import Task
from asystem_bridge.tasks.chat_source import TaskPromptSource
from megatron_c3po.pool import C3POPool, CollectStats
from megatron_c3po.rollout import Rollout


class AsystemLoop:
    """One run.

    Args:
        config: what to do.
        run_directory: where its files are.
        fleet: the worker processes, started.
        task: asks and scores.
        tokenizer: the model's.
        progress: what the user sees meanwhile.
    """

    def __init__(
        self,
        config: LoopConfig,
        *,
        run_directory: RunDirectory,
        fleet: Fleet,
        task: Task,
        tokenizer: Any,
        progress: Progress,
    ) -> None:
        self.config = config
        self.run_directory = run_directory
        self.fleet = fleet
        self.task = task
        self.tokenizer = tokenizer
        self.progress = progress
        self.pool = C3POPool(config.c3po, fleet.engine, self._prompt_source())
        self.version = 0
        self._phase_s: dict[str, float] = {}
        self._canary_difference = math.nan
        self._canary = self._make_canary()
        self.canary_tolerance = (
            config.run.canary_tolerance or canary.DEFAULT_TOLERANCE[config.rollout.dtype]
        )

    def run(self, last_step: int | None = None) -> list[StepRecord]:
        """Run up to ``run.steps``; returns the records of all steps, earlier ones included.

        Args:
            last_step: the checkpoint to go on from, ``None`` for a new run.

        Raises:
            CanaryError: the engine does not hold the trainer's weights.
            CheckpointError: a checkpoint cannot be written or read.
            WorkerError, WorkerDiedError: a process failed.
        """
        self._canary_difference = self.run_canary()
        self.progress.message(
            "engine and trainer agree on the checkpoint: "
            f"max |dlogp| {self._canary_difference:.2e} "
            f"(tolerance {self.canary_tolerance:.0e})"
        )
        with ExitStack() as stack:
            metrics = stack.enter_context(
                MetricsLog(self.run_directory.path, resume_step=last_step)
            )
            if last_step is not None:
                self._restore(last_step)
            elif self.config.teach.steps:
                teach(
                    self.config.teach,
                    self._prompt_source(start=FIRST_TAUGHT_QUESTION),
                    self.tokenizer,
                    self.fleet.trainer,
                    self.progress,
                )
                self.sync(0)
                if self.config.run.checkpoint_every_steps:
                    self._write_checkpoint(0)
            for step in range((last_step or 0) + 1, self.config.run.steps + 1):
                record = self._step(step)
                if record is None:
                    self.progress.message(f"step {step}: the prompts have run out, nothing is left")
                    break
                metrics.append(record)
                self.progress.step(record)
                self._phase_s.clear()
                every = self.config.run.checkpoint_every_steps
                if every and (step % every == 0 or step == self.config.run.steps):
                    with self._phase("checkpoint"):
                        self._write_checkpoint(step)
            return list(metrics.records)

    def sync(self, version: int) -> float:
        """Bring the trainer's weights into the engine as ``version`` and check that they arrived.

        Returns:
            The canary's max |log-prob trainer - log-prob engine|.
        """
        with self._phase("publish"):
            self.publish()
        with self._phase("update"):
            self.fleet.engine.update_weights(version)
        self.version = version
        with self._phase("canary"):
            return self.run_canary()

    def publish(self) -> None:
        self.fleet.trainer.publish()

    def run_canary(self) -> float:
        """Raises: CanaryError, naming the tensors that differ."""
        difference = self._canary.max_abs_difference(
            self.fleet.trainer.logprobs(self._canary.sequences, as_published=True),
            self.fleet.engine.prompt_logprobs(self._canary.sequences),
        )
        if not difference <= self.canary_tolerance:  # also a NaN
            self.fleet.trainer.publish()  # what the engine should hold, for the comparison
            raise canary.canary_error(
                difference, self.canary_tolerance, self.version, self.fleet.engine.diagnose()
            )
        return difference

    def _step(self, step: int) -> StepRecord | None:
        # A checkpoint is written after its step's record, so its time is in the next one.
        self._phase_s = {k: v for k, v in self._phase_s.items() if k == "checkpoint"}
        with self._phase("rollout", total=self.config.c3po.token_budget, unit="tokens"):
            groups, stats = self.pool.collect(self.version, self._show_rollout())
        if not groups and self.pool.exhausted:
            return None
        with self._phase("reward"):
            rewards = score_groups(groups, self.task, self._decode)
        rollouts = [rollout for group in groups for rollout in group]
        trained = NOTHING_TRAINED
        if rollouts:
            with self._phase("train"):
                trained = self.fleet.trainer.train(rollouts)
            self._canary_difference = self.sync(self.version + 1)
        self.run_directory.append_rollouts(self._rollout_lines(step, rollouts))
        return step_record(
            step=step,
            policy_version=self.version,
            stats=stats,
            token_budget=self.config.c3po.token_budget,
            rollouts=rollouts,
            rewards=rewards,
            trained=trained,
            canary_difference=self._canary_difference,
            canary_tolerance=self.canary_tolerance,
            phase_s=self._phase_s,
        )

    def _restore(self, step: int) -> None:
        self.run_directory.truncate_rollouts(step)
        self.fleet.trainer.load(self.run_directory.checkpoint(step) / "trainer")
        try:
            self.pool.load_state_dict(self.run_directory.read_checkpoint(step, "pool"))
        except ValueError as error:
            raise CheckpointError(f"--resume: {error}") from None
        self.sync(self.run_directory.read_checkpoint(step, "loop")["policy_version"])
        self.progress.message(f"resumed after step {step}")

    def _write_checkpoint(self, step: int) -> None:
        self.run_directory.write_checkpoint(
            step,
            {
                "pool": self.pool.state_dict(),
                "loop": {"step": step, "policy_version": self.version},
            },
            save_trainer=self.fleet.trainer.save,
            keep=self.config.run.keep_checkpoints,
        )

    def _make_canary(self) -> canary.Canary:
        source = self._prompt_source()
        prompts = [source.next_prompt() for _ in range(canary.PROMPTS)]
        prompt_ids = [list(prompt.token_ids) for prompt in prompts if prompt is not None]
        completions = self.fleet.engine.greedy(prompt_ids, canary.TOKENS)
        return canary.Canary(prompt_ids, completions)

    def _prompt_source(self, start: int = 0) -> TaskPromptSource:
        return TaskPromptSource(
            self.task,
            self.tokenizer,
            max_prompt_tokens=self.config.task.max_prompt_tokens,
            start=start,
        )

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _rollout_lines(self, step: int, rollouts: list[Rollout]) -> Iterator[dict[str, Any]]:
        for rollout in rollouts:
            yield {
                "step": step,
                "uid": rollout.uid,
                "reward": rollout.reward,
                "advantage": rollout.advantage,
                "finish_reason": rollout.finish_reason,
                "retention": rollout.retention,
                "restarts": rollout.restarts,
                "prompt": self.tokenizer.decode(rollout.prompt_ids),
                "completion": self._decode(rollout.token_ids),
                "token_ids": rollout.token_ids,
                "logprobs": rollout.logprobs,
                "versions": rollout.versions,
            }

    def _show_rollout(self) -> Callable[[CollectStats], None]:
        shown = 0

        def on_step(stats: CollectStats) -> None:
            nonlocal shown
            self.progress.advance(stats.budget_used_tokens - shown)
            shown = stats.budget_used_tokens
            self.progress.show(
                pool=stats.pool_size,
                generated=stats.generated_tokens,
                decode_steps=stats.decode_steps,
            )

        return on_step

    @contextmanager
    def _phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[None]:
        began = time.perf_counter()
        with self.progress.phase(name, total=total, unit=unit):
            yield
        self._phase_s[name] = time.perf_counter() - began
