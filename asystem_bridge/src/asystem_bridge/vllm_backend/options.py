"""Options of the rollout engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

RolloutDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """What ``VllmRolloutWorker.setup`` needs.

    Attributes:
        checkpoint_dir: a Hugging Face checkpoint; also where the end-of-text tokens are read.
        dtype: of the engine's weights and activations.
        max_model_len: tokens of prompt and completion together.
        max_num_seqs: requests decoded at once; at least the pool's capacity, or some wait.
        kv_cache_gib: memory for keys and values; ``None`` leaves it to vLLM, which on a CPU takes a
            large share of the machine.
        max_num_batched_tokens: tokens of one scheduler step; ``None`` is vLLM's default.
        enforce_eager: no compilation: starts sooner, decodes more slowly.
        trust_remote_code: run configuration code in the checkpoint's folder.
        seed: of the engine; requests carry their own.

    Raises:
        ValueError: a value is impossible; the message names it and what is allowed.
    """

    checkpoint_dir: Path
    dtype: RolloutDtype = "bfloat16"
    max_model_len: int = 2048
    max_num_seqs: int = 32
    kv_cache_gib: float | None = 1.0
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in get_args(RolloutDtype):
            raise ValueError(f"dtype = {self.dtype!r}: allowed are {get_args(RolloutDtype)}")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len = {self.max_model_len}: must be at least 2")
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs = {self.max_num_seqs}: must be at least 1")
        if self.kv_cache_gib is not None and self.kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib = {self.kv_cache_gib}: must be positive or None")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise ValueError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens}: must be at least 1 or "
                "None"
            )
