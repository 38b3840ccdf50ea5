"""Where prompts come from.  The source is part of the checkpoint: see ``state_dict``."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_c3po.rollout import Prompt


class PromptSource(Protocol):
    """A stream of prompts that can be put back where it was."""

    def next_prompt(self) -> Prompt | None:
        """The next prompt, or ``None`` when there is none left (an endless source never ends)."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that ``state_dict`` gave."""
