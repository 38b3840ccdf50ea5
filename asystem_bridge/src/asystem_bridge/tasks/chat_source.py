"""Turns a task's questions into the token ids that rollouts begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asystem_bridge.errors import ConfigError
from asystem_bridge.tasks.base import Question, Task
from megatron_c3po.rollout import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_SKIPPED_IN_A_ROW = 1000


class TaskPromptSource:
    """A ``megatron_c3po.prompts.PromptSource`` over a task.

    The text becomes one user turn of the tokenizer's chat template, unless the task is raw.  A
    prompt's uid is its question's index.  Questions longer than ``max_prompt_tokens`` are skipped
    and counted: a cut question would be another question.

    Args:
        task: asked for questions ``start``, ``start + 1``, ...
        tokenizer: of the model.
        max_prompt_tokens: longest prompt, template included.

    Attributes:
        next_index: the question that is looked at next.
        skipped: questions left out so far because they were too long.

    Raises:
        ConfigError: the task needs a chat template and the tokenizer has none.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        start: int = 0,
    ) -> None:
        if max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens = {max_prompt_tokens}: must be at least 1")
        if not task.raw and not tokenizer.chat_template:
            raise ConfigError(
                "the model's tokenizer has no chat template, which this task needs. Choose an "
                "instruction-tuned model, or a task whose prompts are raw"
            )
        self._task = task
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self.next_index = start
        self.skipped = 0

    def next_prompt(self) -> Prompt | None:
        """The next prompt that fits, or ``None`` past the task's end.

        Raises:
            ConfigError: 1000 questions in a row were too long: an endless task would never end.
        """
        for _ in range(_MAX_SKIPPED_IN_A_ROW):
            index = self.next_index
            question = self._task.question(index)
            if question is None:
                return None
            self.next_index += 1
            token_ids = self._tokenize(question)
            if len(token_ids) <= self._max_prompt_tokens:
                return Prompt(uid=str(index), token_ids=tuple(token_ids), record=question.record)
            self.skipped += 1
        raise ConfigError(
            f"{_MAX_SKIPPED_IN_A_ROW} questions in a row are longer than max_prompt_tokens = "
            f"{self._max_prompt_tokens}, the last with {len(token_ids)} tokens: raise the bound or "
            "choose an easier task"
        )

    def _tokenize(self, question: Question) -> list[int]:
        text = question.text
        if not self._task.raw:
            text = str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
            )
        # The template writes its special tokens itself; a raw task gets none.
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids

    def state_dict(self) -> dict[str, Any]:
        return {"next_index": self.next_index, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_index, self.skipped = state["next_index"], state["skipped"]
