"""Supervised steps before the loop, for a task that knows its answers.

Reinforcement learning needs a policy that sometimes succeeds; a randomly initialised model never
does.  The questions are numbered far from those of the loop, so the loop sees none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asystem_bridge.config import TeachConfig
from asystem_bridge.controller.trainer_group import TrainerGroup
from asystem_bridge.errors import ConfigError
from asystem_bridge.report.progress import Progress
from asystem_bridge.tasks.base import Task
from megatron_c3po.rollout import Rollout

FIRST_QUESTION = 1_000_000


def teach(
    config: TeachConfig, task: Task, tokenizer: Any, trainer: TrainerGroup, progress: Progress
) -> None:
    """Minimise -log p(answer | question), then forget the optimizer's state.

    Raises:
        ConfigError: the task does not know its answers, or has too few questions.
    """
    answer = getattr(task, "answer", None)
    if answer is None:
        raise ConfigError(
            f"teach.steps = {config.steps}: the task {type(task).__name__} has no answers to "
            "teach; set teach.steps = 0"
        )
    examples = _examples(task, answer, tokenizer)
    loss = float("nan")
    with progress.phase("teach", total=config.steps, unit="steps"):
        for _ in range(config.steps):
            batch = [next(examples) for _ in range(config.sequences_per_step)]
            loss = trainer.train(batch, "supervised", config.learning_rate).loss
            progress.advance()
            progress.show(loss=f"{loss:.3f}")
    trainer.reset_optimizer()
    progress.message(
        f"taught {config.steps} supervised steps of {config.sequences_per_step} examples; "
        f"last loss {loss:.3f}"
    )


def _examples(task: Task, answer: Any, tokenizer: Any) -> Iterator[Rollout]:
    index = FIRST_QUESTION
    while True:
        question = task.question(index)
        if question is None:
            raise ConfigError(
                f"teach needs question {index} of {type(task).__name__}, which has fewer"
            )
        prompt_ids = tokenizer.encode(question.text, add_special_tokens=False)
        token_ids = tokenizer.encode(answer(question.record), add_special_tokens=False)
        token_ids.append(tokenizer.eos_token_id)
        yield Rollout(
            uid=f"taught {index}/0",
            group_uid=f"taught {index}",
            prompt_ids=prompt_ids,
            max_new_tokens=len(token_ids),
            token_ids=token_ids,
            logprobs=[0.0] * len(token_ids),
            versions=[0] * len(token_ids),
            finish_reason="stop",
            advantage=1.0,
        )
        index += 1
