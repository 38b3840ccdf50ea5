"""The loop's configuration: a TOML file whose sections are the components' own option classes.

``[c3po]`` is ``megatron_c3po.config.C3POConfig``, ``[trainer]`` is ``TrainerOptions`` and
``[rollout]`` is ``RolloutOptions``; what several of them must agree on is checked here.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from asystem_bridge.errors import ConfigError
from asystem_bridge.option_tables import options_from_table, refuse_unknown
from asystem_bridge.trainer.options import TrainerOptions
from asystem_bridge.vllm_backend.options import RolloutOptions
from megatron_c3po.config import C3POConfig

PRESETS = ("smollm2", "tiny")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Attributes:
    checkpoint: a folder with a Hugging Face checkpoint, or ``"smollm2"`` or ``"tiny-ring"``,
        which are made in the cache folder.
    trust_remote_code: let vLLM run the configuration code that the folder ships.
    """

    checkpoint: str
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Attributes:
    name: of the task (see ``asystem_bridge.tasks.registry``).
    options: the task's own options.
    max_prompt_tokens: longer prompts are skipped, and counted.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int = 192


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """Supervised steps before the loop, for a task that knows its answers.

    Attributes:
        steps: optimizer steps; 0 for none.
        sequences_per_step: question and answer pairs in each.
        learning_rate: of Adam, constant.
    """

    steps: int = 0
    sequences_per_step: int = 64
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.steps < 0 or self.sequences_per_step < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"steps = {self.steps}, sequences_per_step = {self.sequences_per_step}, "
                f"learning_rate = {self.learning_rate}: must be >= 0, >= 1 and > 0"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Attributes:
    steps: iterations of the loop in all, those of a resumed run included.
    checkpoint_every_steps: 0 for none; the last step is always checkpointed otherwise.
    keep_checkpoints: older ones are deleted once a new one is complete.
    canary_tolerance: above this max |log-prob trainer - log-prob engine| the loop stops.
        0 chooses by the engine's dtype: see ``controller.canary``.
    rendezvous_port: TCP port where the trainer ranks meet; 0 meets in a file, without a port.
    """

    steps: int = 3
    checkpoint_every_steps: int = 1
    keep_checkpoints: int = 2
    canary_tolerance: float = 0.0
    rendezvous_port: int = 0
    engine_threads: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("checkpoint_every_steps", 0),
            ("keep_checkpoints", 1),
            ("canary_tolerance", 0),
            ("rendezvous_port", 0),
            ("engine_threads", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Everything a run is made of.  ``checkpoint_dir`` of trainer and rollout is the model's."""

    name: str
    model: ModelConfig
    task: TaskConfig
    c3po: C3POConfig
    trainer: TrainerOptions
    rollout: RolloutOptions
    teach: TeachConfig = field(default_factory=TeachConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        longest = self.task.max_prompt_tokens + self.c3po.max_new_tokens
        prompt_and_completion = (
            f"task.max_prompt_tokens + c3po.max_new_tokens = {self.task.max_prompt_tokens} + "
            f"{self.c3po.max_new_tokens} = {longest}"
        )
        if self.c3po.group_size < 2:
            raise ValueError(
                f"c3po.group_size = {self.c3po.group_size}: must be at least 2, since GRPO "
                "compares the members of a group"
            )
        if self.rollout.max_model_len < longest:
            raise ValueError(
                f"rollout.max_model_len = {self.rollout.max_model_len}: must hold "
                f"{prompt_and_completion}"
            )
        if self.trainer.row_tokens < longest:
            raise ValueError(
                f"trainer.row_tokens = {self.trainer.row_tokens}: must hold {prompt_and_completion}"
            )
        if self.rollout.max_num_seqs < self.c3po.pool_capacity:
            raise ValueError(
                f"rollout.max_num_seqs = {self.rollout.max_num_seqs}: must be at least "
                f"c3po.pool_capacity = {self.c3po.pool_capacity}, or part of the pool would wait"
            )


def preset_text(name: str) -> str:
    """The TOML text of a preset: a file to copy and change."""
    return resources.files("asystem_bridge.presets").joinpath(f"{name}.toml").read_text()


def load_config(text: str, *, origin: str, overrides: dict[str, dict[str, Any]]) -> LoopConfig:
    """Parse and check a configuration.

    Args:
        text: TOML.
        origin: where it is from, for messages.
        overrides: section -> key -> value, from the command line.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None
    for name, values in overrides.items():
        table.setdefault(name, {}).update(values)

    refuse_unknown(table, [f.name for f in dataclasses.fields(LoopConfig)], origin)

    def section(kind: type[T], name: str, supplied: dict[str, Any] | None = None) -> T:
        where = f"{origin}: [{name}]"
        return options_from_table(kind, table.get(name, {}), where=where, supplied=supplied)

    model = section(ModelConfig, "model")
    checkpoint = {"checkpoint_dir": model.checkpoint}
    trusted = {"trust_remote_code": model.trust_remote_code}
    try:
        return LoopConfig(
            name=table.get("name", Path(origin).stem),
            model=model,
            task=section(TaskConfig, "task"),
            c3po=section(C3POConfig, "c3po"),
            trainer=section(TrainerOptions, "trainer", checkpoint),
            rollout=section(RolloutOptions, "rollout", checkpoint | trusted),
            teach=section(TeachConfig, "teach"),
            run=section(RunConfig, "run"),
        )
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None
