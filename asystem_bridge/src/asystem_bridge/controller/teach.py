"""Supervised steps before the loop, for a task that knows its answers.

Reinforcement learning needs a policy that sometimes succeeds; a randomly initialised model never
does.  The questions are numbered far from those of the loop, so the loop sees none of them.
"""

from __future__ import annotations

from typing import Any

from asystem_bridge.config import TeachConfig
from asystem_bridge.controller.trainer_group import TrainerGroup
from asystem_bridge.errors import ConfigError
from asystem_bridge.report.progress import Progress
from asystem_bridge.tasks.chat_source import TaskPromptSource
from megatron_c3po.rollout import Rollout

FIRST_TAUGHT_QUESTION = 1_000_000


def teach(
    config: TeachConfig,
    prompts: TaskPromptSource,
    tokenizer: Any,
    trainer: TrainerGroup,
    progress: Progress,
) -> None:
    """Minimise -log p(record["answer"] | prompt), then forget the optimizer's state.

    Raises:
        ConfigError: the task does not know its answers, or has too few questions.
    """
    loss = float("nan")
    with progress.phase("teach", total=config.steps, unit="steps"):
        for _ in range(config.steps):
            batch = [_example(prompts, tokenizer) for _ in range(config.sequences_per_step)]
            loss = trainer.train(batch, "supervised", config.learning_rate).loss
            progress.advance()
            progress.show(loss=f"{loss:.3f}")
    trainer.reset_optimizer()
    progress.message(
        f"taught {config.steps} supervised steps of {config.sequences_per_step} examples; "
        f"last loss {loss:.3f}"
    )


def _example(prompts: TaskPromptSource, tokenizer: Any) -> Rollout:
    prompt = prompts.next_prompt()
    if prompt is None:
        raise ConfigError(f"teaching needs more questions than the task has ({prompts.next_index})")
    if "answer" not in prompt.record:
        raise ConfigError(
            "teach.steps > 0: the task does not say its answers (no 'answer' in the record of "
            f"question {prompt.uid}); set teach.steps = 0"
        )
    token_ids = tokenizer.encode(str(prompt.record["answer"]), add_special_tokens=False)
    token_ids.append(tokenizer.eos_token_id)
    return Rollout(
        uid=f"taught {prompt.uid}/0",
        group_uid=f"taught {prompt.uid}",
        prompt_ids=list(prompt.token_ids),
        max_new_tokens=len(token_ids),
        token_ids=token_ids,
        logprobs=[0.0] * len(token_ids),
        versions=[0] * len(token_ids),
        finish_reason="stop",
        advantage=0.0,  # not read: the loss is -log p
    )
